"""The models of examples/models."""

import functools
import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "models"


@functools.cache
def load(path):
    """The module of a file; the same one each time."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def family():
    """A function from the name of a file in examples/models, such as "vit", to its module."""
    return lambda name: load(FOLDER / f"{name}.py")
