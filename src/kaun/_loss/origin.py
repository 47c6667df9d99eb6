"""Whose code it is: the user's own, or a library's."""

from __future__ import annotations

import functools
import sys
import sysconfig
import types

# The libraries a loss is written with: what they hold at module level never changes under a run.
_LIBRARIES = frozenset(
    ["kaun", "jax", "jaxlib", "numpy", "optax", "scipy", "flax", "equinox", "haiku", "chex", "einops", "torch"]
)


_PREFIXES = tuple({sysconfig.get_path(p) for p in ("stdlib", "platstdlib", "purelib", "platlib")})


@functools.lru_cache(maxsize=4096)
def is_own_module(name: str) -> bool:
    """Whether a module is the user's own and not an installed library's or Python's."""
    module = sys.modules.get(name)
    return module is not None and _is_own(name.partition(".")[0], getattr(module, "__file__", None) or "")


def is_own(function: types.FunctionType) -> bool:
    """Whether a function was written by the user, and not in an installed library or Python's."""
    return _is_own(root_package(function), function.__code__.co_filename)


def root_package(function: types.FunctionType) -> str:
    return str(function.__globals__.get("__name__", "")).partition(".")[0]


def is_library(name: str) -> bool:
    """Whether a module belongs to the libraries that losses are written with, whose objects do not change in a run."""
    return name.partition(".")[0] in _LIBRARIES


def _is_own(root: str, filename: str) -> bool:
    if filename.startswith("<"):  # typed at a prompt, in a notebook, a doctest
        return not filename.startswith("<frozen")
    if root in _LIBRARIES:
        return False
    return root in ("", "__main__") or (root not in sys.stdlib_module_names and not filename.startswith(_PREFIXES))
