"""The models of examples/models, for comparisons with PyTorch."""

import pytest

from ...models.conftest import load


@pytest.fixture(scope="session")
def family():
    """A function from the name of a file in examples/models, such as "vit", to its module."""
    return load
