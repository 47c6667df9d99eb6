"""The model as shapes and dtypes, and whether variables fit it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from kaun import tree
from kaun._calls import model_for, shown
from kaun._step.precision import Policy
from kaun.layers.core import Layer, Vars, abstract_vars

__all__ = ["VarsSpec", "abstract_vars", "check_model"]


def check_model(model: Any) -> None:
    """Check the argument ``model``.

    Raises:
        TypeError: If it is not a ``Layer``.
    """
    if not isinstance(model, Layer):
        raise TypeError(f"Trainer(model=...) expected a kaun Layer, received {shown(model)}. {_advice(model)}")


def _advice(model: Any) -> str:
    if (advice := model_for(model)) is not None:
        return f"{advice[0].upper()}{advice[1:]}."
    if isinstance(model, (list, tuple)):
        return "Write model=layers.sequential([...])."
    called = "Did you forget to call it? " if callable(model) else ""
    return f"{called}Write model=layers.sequential([layers.linear(2, 1)])."


class VarsSpec:
    """Shapes and dtypes of the variables of a trainer's model.

    Args:
        model: The model.
        policy: The trainer's precision, None without one.
    """

    def __init__(self, model: Layer[Any, Any], policy: Policy | None) -> None:
        self._model, self._policy = model, policy
        self._known: dict[Any, Any] = {}

    def check(self, vars: Vars) -> None:
        """Check that variables belong to the model.

        Raises:
            ValueError: If paths, shapes or dtypes differ (the message lists them), or the precision does.
        """
        if self._policy is not None:
            self._policy.check(vars.dtype)
        if vars.dtype not in self._known:
            self._known[vars.dtype] = abstract_vars(self._model, vars.dtype)
        lines = tree.difference(self._known[vars.dtype], vars)
        if lines:
            more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
            raise ValueError(
                "The variables belong to another model than this trainer's:\n  "
                + "\n  ".join(lines[:10])
                + f"{more}{_of_members(self._known[vars.dtype], vars)}"
                "\nMake them with trainer.init() or trainer.model.init(dtype=...), or load them with "
                "checkpoint.load(path, like=trainer.model.init(dtype=...))."
            )


def _of_members(expected: Vars, found: Vars) -> str:
    """Say so where variables are those of an ensemble; empty otherwise."""
    one, many = ([np.shape(leaf) for leaf in jax.tree_util.tree_leaves(each)] for each in (expected, found))
    n = next((shape[0] for shape in many if shape), 0)
    if many != [(n, *shape) for shape in one]:
        return ""
    return (
        f"\nThey are those of {n} members of an ensemble. Write state.member(i) for one of them, or for all many = "
        f"kaun.Ensemble(trainer, {n}), with many.fit, many.predict, many.evaluate and reports.validate(many, ...)."
    )
