"""Runs of two processes beside those of one with as many devices, and the program of the documentation in both."""

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest

SCENARIOS = str(Path(__file__).with_name("scenarios.py"))
PAGE = Path(__file__).resolve().parents[3] / "docs" / "scale.md"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def groups(make_group):
    """Two processes of two devices, and one of four."""
    with contextlib.closing(make_group(2, 2)) as two, contextlib.closing(make_group(1, 4)) as one:
        yield two, one


@pytest.mark.parametrize("kind", ["dp", "fsdp"])
def test_two_processes_have_the_results_of_one_with_as_many_devices(groups, kind):
    (first, second), (alone,) = (group.run(SCENARIOS, "trained", kind=kind) for group in groups)
    assert first == second, "the two processes have the same states, losses, scores and outputs"
    start, state, folded, same_losses, numbers = first
    assert state == folded and same_losses, "fit is the fold of step"
    assert start == alone[0], "a state is made of the same bytes"
    for name in ("losses", "outputs"):
        np.testing.assert_allclose(numbers[name], alone[4][name], rtol=1e-6, atol=1e-7)
    assert numbers["scores"]["mse"] == pytest.approx(alone[4]["scores"]["mse"], rel=1e-6)


def test_the_program_of_the_documentation(groups, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    section = PAGE.read_text().split("## Several processes")[1]
    text = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    (first, second), (alone,) = (group.run(SCENARIOS, "page", text=text) for group in groups)
    assert first == second and first[1:] == (2, True) and alone[1] == 1
    np.testing.assert_allclose(first[0], alone[0], rtol=1e-6)
