"""Strict mode for every test: no implicit dtype promotion, no implicit rank promotion (warnings are errors too)."""

import importlib.util
import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Before pytest collects the doctests of single files, which would otherwise run a second copy of each module.
import kaun  # noqa: E402, F401

OF_OTHERS = ("datasets", "equinox", "flax", "grain", "haiku", "torch")


def pytest_collection_modifyitems(items):
    """An example that imports another library runs where that is installed."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            text = "".join(example.source for example in item.dtest.examples)
            for name in OF_OTHERS:
                if re.search(rf"^(import|from) {name}\b", text, re.MULTILINE) and not importlib.util.find_spec(name):
                    item.add_marker(pytest.mark.skip(reason=f"{name} is not installed"))
