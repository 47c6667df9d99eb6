"""The models of examples/models."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "models"


@pytest.fixture(scope="session")
def family(module_at):
    """A function from the name of a file in examples/models, such as "vit", to its module."""
    return lambda name: module_at(FOLDER / f"{name}.py")
