"""Strict mode for every test: no implicit dtype promotion, no implicit rank promotion (warnings are errors too)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Before pytest collects the doctests of single files, which would otherwise run a second copy of each module.
import kaun  # noqa: E402, F401
