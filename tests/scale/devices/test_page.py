"""docs/scale.md on eight devices; tests/test_docs.py runs it on those that there are."""

import importlib.util
from pathlib import Path

import jax
import pytest

TESTS = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_page_runs_on_eight_devices(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("pages", TESTS / "test_docs.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        pages.run_page(TESTS.parent / "docs" / "scale.md")
