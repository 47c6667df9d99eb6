"""What the tests of the two pretrained models share: the examples themselves, and the script that recorded the values."""

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[2] / "examples"

# It needs torch, so it is loaded by the tests that need torch too.
collect_ignore = ["record.py"]


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def gpt2():
    return loaded(EXAMPLES / "gpt2.py")


@pytest.fixture(scope="session")
def minilm():
    return loaded(EXAMPLES / "minilm.py")


@pytest.fixture(scope="session")
def record():
    for package in ("torch", "transformers"):
        pytest.importorskip(package)
    return loaded(HERE / "record.py")
