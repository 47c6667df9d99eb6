"""A model without numbers: its variables as shapes and dtypes, and whether others are of the same model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kaun import rng, tree
from kaun.layers.core import Layer, Vars

__all__ = ["check", "variables"]


def variables(model: Layer[Any, Any], dtype: Any) -> Any:
    """The model's variables as shapes and dtypes."""

    def init() -> Vars:
        with rng.scope(0):
            return model.init(dtype=dtype)

    try:
        return jax.eval_shape(init)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        made = init()  # an init that reads its own numbers, say through NumPy, has to be run
        return jax.eval_shape(lambda: jax.tree_util.tree_map(jnp.asarray, made))


def check(expected: Any, vars: Vars) -> None:
    """Refuse variables of another model.

    Arguments:
        expected: as ``variables`` gives it.

    Raises:
        ValueError: when paths, shapes or dtypes differ; the message lists them.
    """
    lines = tree.difference(expected, vars)
    if lines:
        more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise ValueError(
            "The variables belong to another model than this trainer's:\n  "
            + "\n  ".join(lines[:10])
            + f"{more}\nMake them with trainer.init() or trainer.model.init(dtype=...), or load them with "
            "checkpoint.load(path, like=trainer.model.init(dtype=...))."
        )
