"""The comparisons read the models of examples/models as tests/models does."""

from ..models.conftest import family

__all__ = ["family"]
