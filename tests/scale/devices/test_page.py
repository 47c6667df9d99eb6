"""docs/scale.md on eight devices; tests/test_docs.py runs it on those that there are."""

from pathlib import Path

import jax
import pytest

TESTS = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_page_runs_on_eight_devices(tmp_path, monkeypatch, module_at):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        module_at(TESTS / "test_docs.py").run_page(TESTS.parent / "docs" / "scale.md")
