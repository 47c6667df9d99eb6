"""The user's loss traced on its own, so that what it holds on to is seen before it is compiled into a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from kaun import rebuild, rng, tree
from kaun.errors import CaptureError, locate
from kaun.grad import check_scalar
from kaun.rebuild import Rebuilt

__all__ = ["staged"]


def staged(key: Any, arrays: Sequence[Any], output: Any) -> jax.Array:
    """The loss of a model's output, a scalar, with every array that the loss captures given from outside.

    Arguments:
        key: the loss as ``lift.take_apart`` gave it.
        arrays: what it captures, traced.
        output: the model's output, any pytree.

    Raises:
        CaptureError: when it reads an array that it was not given, or writes to something that it captures.
        TypeError, ValueError: when it does not return a real floating scalar.
    """

    def run(draw: jax.Array, output: Any, arrays: Sequence[Any]) -> jax.Array:
        rebuilt = Rebuilt(key, arrays)
        with rng.scope(draw):
            value = rebuilt.function(output)
        if rebuilt.written():
            _refuse_writes(function)
        return check_scalar(value, function, source="the model's output", role="loss")

    function = rebuild.subject(key)
    arguments = (rng.next_key(), output, list(arrays))
    try:
        closed = jax.make_jaxpr(run)(*arguments)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        error.add_note(
            f"In loss {locate(function)}. A compiled loss sees shapes and dtypes, not numbers: write "
            "jnp.where(c, a, b) for an if, jnp for np, and read numbers in report(step, loss, state)."
        )
        raise
    _refuse_constants(closed, key, function)
    # What was looked at is what runs: the loss is not traced a second time.
    return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *jax.tree_util.tree_leaves(arguments))[0]


def _refuse_writes(function: Any) -> None:
    raise CaptureError(
        f"loss {locate(function)} writes to a list, dict or object that it captures. A compiled loss runs as Python "
        "only when it is traced, so the write would happen once and then never again. Keep values outside: read the "
        "loss in report(step, loss, state), or call trainer.predict(state, x) there and store what you need."
    )


def _refuse_constants(closed: Any, key: Any, function: Any) -> None:
    hidden = list(rebuild.hidden_arrays(key))
    for constant in _constants(closed):
        where = next((name for name, array in hidden if _is_same(constant, array)), None)
        if where is None and not isinstance(constant, jax.Array):
            continue  # NumPy arrays made while the loss ran, np.array([0.1, 0.9]), are part of its code
        if isinstance(constant, jax.core.Tracer):
            continue  # belongs to the user's own jit around the step, and is an argument there
        raise CaptureError(
            f"loss {locate(function)} reads an array {tree.describe(constant)} through {where or 'an object'}, where "
            "it cannot be found again for the next batch: the compiled loss would go on with this one. Bind it to "
            "a name of its own first,\n    y = batch.y\n    loss = lambda output: losses.mse(output, y)\n"
            "or make the object a dataclass, whose fields are looked into."
        )


def _is_same(constant: Any, array: Any) -> bool:
    if isinstance(constant, jax.Array):
        return constant is array
    if not isinstance(array, np.ndarray) or array.ndim == 0 or constant.shape != array.shape:
        return False  # a number is a literal of the program, and part of the key by its value
    return bool(np.array_equal(np.asarray(constant), array.astype(constant.dtype)))


def _constants(closed: Any) -> Iterator[Any]:
    """The constants of a program and of all programs inside it."""
    yield from getattr(closed, "consts", ())
    jaxpr = getattr(closed, "jaxpr", closed)
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                    yield from _constants(part)
