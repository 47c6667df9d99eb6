"""``Trainer(penalty=f)``: a function of the parameters that is added to the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kaun import rng, tree
from kaun._loss import FrozenLoss, TracedLoss, array_names, capture_loss, captures, trace_function
from kaun._messages import locate
from kaun.errors import CaptureError
from kaun.grad import check_scalar

__all__ = ["Penalty", "make_penalty"]

_DRAWS = 2**32 - 2  # folded into the step's key, so that the layers draw the same numbers with and without a penalty


class Penalty:
    """A penalty and the values that it captured when its trainer was made.

    Args:
        function: The user's function of the parameters.

    Raises:
        CaptureError: If it captures what a compiled step cannot hold.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        try:
            self._frozen = FrozenLoss(function)
        except CaptureError as error:
            raise CaptureError(f"Trainer(penalty=...): {error}") from None

    def value(self, params: Any, step_key: jax.Array) -> jax.Array:
        """Return the penalty of all parameters, a floating scalar, traced.

        Args:
            params: All parameters, the frozen ones too.
            step_key: The step's key; the penalty draws from a key of its own that depends on it.

        Raises:
            CaptureError: If it does what a compiled function must not do, such as write to what it captures.
            TypeError, ValueError: If it does not return a real floating scalar.
        """

        def check(value: Any) -> jax.Array:
            return check_scalar(value, self._function, role="penalty")

        with rng.scope(jax.random.fold_in(step_key, _DRAWS)):
            return trace_function(self._frozen.key, self._frozen.arrays, (params,), check, "penalty")

    def add(self, given: TracedLoss, params: Any, step_key: jax.Array) -> TracedLoss:
        """Return a loss with the penalty added to its value, and with ``"penalty"`` among its scalars."""
        value = self.value(params, step_key)
        scalars = given.scalars | {"penalty": tree.host_scalar(value)}
        weights = given.weights if given.weight is None else given.weights | {"penalty": given.weight}
        total = given.value + value.astype(given.value.dtype)
        return given._replace(value=total, scalars=scalars, weights=weights)

    def refuse_changes(self) -> None:
        """Check that what the penalty captures is as it was when the trainer was made.

        Raises:
            CaptureError: If a value was changed, or its variable was assigned another one.
        """
        key, arrays = capture_loss(self._function)
        before = self._frozen
        if key == before.key and all(map(_is_same, arrays, before.arrays)):
            return
        old, new = captures(before.key, before.arrays), captures(key, arrays)
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if key == before.key:
            pairs = zip(array_names(key, len(arrays)), arrays, before.arrays, strict=True)
            changed += [name for name, a, b in pairs if name not in changed and not _is_same(a, b)]
        listed = ", ".join(f"`{name}`" for name in changed) or "values"
        raise CaptureError(
            f"penalty {locate(self._function)} captures {listed}, which changed after the trainer was made. A penalty "
            "is a part of its trainer, and keeps the values of that time. To use the new ones, make another trainer, "
            "dataclasses.replace(trainer, penalty=f). To keep the old ones, capture a variable that nothing assigns to "
            "later:\n"
            "    old = state.vars.params\n    penalty = lambda params: distance(params, old)"
        )


def make_penalty(function: Any) -> Penalty | None:
    """Return the penalty for the argument ``penalty``, None for None.

    Raises:
        TypeError: If it is not a function.
        CaptureError: As ``Penalty``.
    """
    if function is None:
        return None
    if not callable(function):
        raise TypeError(
            "Trainer(penalty=...) expected a function (params) -> scalar, which is added to the loss, received "
            f"{tree.describe(function)}. Write penalty=lambda params: 1e-4 * optax.tree.norm(params, squared=True)."
        )
    return Penalty(function)


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype and _bytes(a) == _bytes(b)


def _bytes(array: Any) -> bytes:
    return np.asarray(jax.random.key_data(array) if tree.is_key(array) else array).tobytes()
