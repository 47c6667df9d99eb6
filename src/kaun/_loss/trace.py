"""The user's loss, or a metric, traced on its own: what it holds on to is seen before it is compiled into a program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import rng, tree
from kaun._jax import constants_in, is_traced, run_program
from kaun._loss import describe
from kaun._loss.rebuild import Rebuilt
from kaun._messages import locate
from kaun.errors import CaptureError
from kaun.grad import check_scalar

__all__ = ["RESERVED", "trace_loss"]

RESERVED = frozenset(
    {"examples_per_second", "finite", "grad_norm", "learning_rate", "loss", "skipped", "step", "step_time"}
)


def trace_loss(key: Any, arrays: Sequence[Any], output: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a model's output, a scalar, with every array that the loss captures given from outside.

    And the other scalars that the loss returned beside it, by name, in float32.

    Arguments:
        key: the loss as ``lift.take_apart`` gave it.
        arrays: what it captures, traced.
        output: the model's output, any pytree.

    Raises:
        CaptureError: when it reads an array that it was not given, or writes to something that it captures.
        TypeError, ValueError: when it does not return a real floating scalar.
    """
    function = describe.subject(key)
    check = functools.partial(_with_scalars, function)
    try:
        return trace_function(key, arrays, (output,), check, "loss")
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        error.add_note(
            f"In loss {locate(function)}. A compiled loss sees shapes and dtypes, not numbers: write "
            "jnp.where(c, a, b) for an if, jnp for np, and read numbers in report(step, loss, state)."
        )
        raise


def _with_scalars(function: Any, returned: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    scalar = functools.partial(check_scalar, source="the model's output", role="loss")
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)):
        return scalar(returned, function), {}
    value, given = scalar(returned[0], function), dict(returned[1])
    wrong = [name for name, v in given.items() if not isinstance(name, str) or name in RESERVED or not _is_scalar(v)]
    if wrong:
        name = wrong[0]
        why = "the name is kaun's own" if name in RESERVED else f"received {tree.describe(given[name])}"
        raise TypeError(
            f"loss {locate(function)} must return (loss, dict of scalars by name); {name!r}: {why}. A scalar is a real "
            f"number or an array of shape (): jnp.mean(value). Names that are taken: {', '.join(sorted(RESERVED))}."
        )
    return value, {name: jnp.asarray(v).astype(jnp.float32) for name, v in sorted(given.items())}


def _is_scalar(value: Any) -> bool:
    if tree.is_array(value):
        return value.shape == () and (jnp.issubdtype(value.dtype, jnp.floating) or value.dtype.kind in "biu")
    return isinstance(value, (bool, int, float))


def trace_function(
    key: Any, arrays: Sequence[Any], given: tuple[Any, ...], check: Callable[[Any], Any], role: str
) -> Any:
    def run(draw: jax.Array, given: tuple[Any, ...], arrays: Sequence[Any]) -> Any:
        rebuilt = Rebuilt(key, arrays)
        with rng.scope(draw):
            value = rebuilt.function(*given)
        if rebuilt.written():
            _refuse_writes(f"{role} {locate(function)}")
        return check(value)

    function = describe.subject(key)
    arguments = (rng.next_key(), given, list(arrays))
    closed, out = jax.make_jaxpr(run, return_shape=True)(*arguments)
    _refuse_constants(closed, key, f"{role} {locate(function)}")
    # What was looked at is what runs: the loss is not traced a second time.
    leaves = run_program(closed, jax.tree_util.tree_leaves(arguments))
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(out), leaves)


def _refuse_writes(where: str) -> None:
    raise CaptureError(
        f"{where} writes to a list, dict or object that it captures. A compiled {where.split()[0]} runs as Python "
        "only when it is traced, so the write would happen once and then never again. Keep values outside: read the "
        "loss in report(step, loss, state), or call trainer.predict(state, x) there and store what you need."
    )


def _refuse_constants(closed: Any, key: Any, where: str) -> None:
    hidden = list(describe.hidden_arrays(key))
    for constant in constants_in(closed):
        through = next((name for name, array in hidden if _is_same(constant, array)), None)
        if through is None and not isinstance(constant, jax.Array):
            continue  # NumPy arrays made while the loss ran, np.array([0.1, 0.9]), are part of its code
        if is_traced(constant):
            continue  # belongs to the user's own jit around the step, and is an argument there
        kind = where.split()[0]
        bound = "loss = lambda output: losses.mse(output, y)" if kind == "loss" else "metric = lambda p, t: (p - t) @ y"
        raise CaptureError(
            f"{where} reads an array {tree.describe(constant)} through {through or 'an object'}, where it cannot be "
            f"found again for the next batch: the compiled {kind} would go on with this one. Bind it to a name of its "
            f"own first,\n    y = batch.y\n    {bound}\nor make the object a dataclass, whose fields are looked into."
        )


def _is_same(constant: Any, array: Any) -> bool:
    if isinstance(constant, jax.Array):
        return constant is array
    if not isinstance(array, np.ndarray) or array.ndim == 0 or constant.shape != array.shape:
        return False  # a number is a literal of the program, and part of the key by its value
    return bool(np.array_equal(np.asarray(constant), array.astype(constant.dtype)))
