"""The user's loss, or a metric, traced on its own: what it holds on to is seen before it is compiled into a program."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kaun import rng, tree
from kaun._calls import is_refused
from kaun._jax import constants_in, is_traced, run_program
from kaun._loss import describe
from kaun._loss.rebuild import Rebuilt
from kaun._loss.walk import LossKey
from kaun._loss.watch import UnforeseenError
from kaun._messages import add_note, in_kaun, locate
from kaun.errors import CaptureError
from kaun.grad import check_scalar
from kaun.losses import Mean
from kaun.metrics import CountedParts

__all__ = ["RESERVED", "TracedLoss", "Weighted", "trace_loss"]

RESERVED = frozenset(
    {
        "epoch", "examples_per_second", "examples_per_step", "finite", "grad_norm", "learning_rate", "loss",
        "loss_weight", "penalty", "skipped", "step", "step_time", "updates",
    }
)  # fmt: skip


class Weighted(NamedTuple):
    """A scalar that a loss returned in addition to its value.

    Attributes:
        value: The scalar; of a ``losses.Mean`` its value.
        weight: The weight of a ``losses.Mean``. None for a scalar, which counts by the number of examples.
    """

    value: jax.Array
    weight: jax.Array | None


class TracedLoss(NamedTuple):
    """What a loss returned, traced.

    Attributes:
        value: The loss, a floating scalar; of a ``losses.Mean`` its value.
        weight: The weight of a ``losses.Mean``, a scalar. None where the loss is a scalar, which counts by its number
            of examples.
        scalars: The other scalars that the loss returned, by name, each in its own dtype.
        weights: The weights of those of them that are a ``losses.Mean``, by name.
        parts: What it returned as ``Counted.parts``, by name.
    """

    value: jax.Array
    weight: jax.Array | None
    scalars: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    parts: dict[str, CountedParts]

    def numbers(self) -> dict[str, Any]:
        """What reports receive besides the loss, by name: the loss's weight if it has one, ``Weighted`` and parts."""
        own = {} if self.weight is None else {"loss_weight": self.weight}
        return own | {n: Weighted(v, self.weights.get(n)) for n, v in self.scalars.items()} | self.parts


def trace_loss(key: LossKey, arrays: Sequence[Any], output: Any, *, needs_gradient: bool = True) -> TracedLoss:
    """The loss of a model's output, with every array that the loss captures given from outside.

    Args:
        key: The loss as ``capture_loss`` gave it.
        arrays: What it captures, traced.
        output: The model's output, any pytree.
        needs_gradient: Whether it is refused if it has no gradient, where JAX differentiates it; a penalty has its own.

    Raises:
        CaptureError: If it reads an array that it was not given, or writes to something that it captures.
        TypeError, ValueError: If it does not return a real floating scalar, or a ``losses.Mean`` of scalars, or
            has no gradient and needs one.
    """
    function = describe.subject(key)
    check = functools.partial(_with_scalars, function)
    try:
        traced = trace_function(key, arrays, (output,), check, "loss")
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        add_note(
            error,
            f"In loss {locate(function)}. A compiled loss sees shapes and dtypes, not numbers: write "
            "jnp.where(c, a, b) for an if, jnp for np, and read numbers in report(step, loss, state).",
        )
        raise
    if needs_gradient:
        _refuse_no_gradient(traced.value, output, function)
    return traced


def _refuse_no_gradient(value: jax.Array, output: Any, function: Any) -> None:
    # While JAX differentiates, what depends on the parameters is a tracer of another class than what does not.
    if in_kaun(getattr(getattr(function, "__code__", None), "co_filename", "")):
        return  # update_statistics trains nothing
    kinds = {type(leaf) for leaf in jax.tree_util.tree_leaves(output) if is_traced(leaf)}
    if kinds and type(value) not in kinds:
        raise TypeError(
            f"loss {locate(function)} has no gradient: no parameter would train. It does not depend on the model's "
            "output, or only through argmax, round, a comparison, a cast to integers or stop_gradient. Write a loss "
            "that is smooth in the output, such as losses.cross_entropy_sparse(logits, labels), and measure the other "
            "with reports.validate or as a scalar beside it: lambda out: (loss(out), {'accuracy': accuracy(out)})."
        )


def _with_scalars(function: Any, returned: Any) -> TracedLoss:
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)):
        return TracedLoss(_value(returned, function), _weight(returned), {}, {}, {})
    value, given = _value(returned[0], function), dict(returned[1])
    wrong = [name for name, v in given.items() if not isinstance(name, str) or name in RESERVED or not _is_beside(v)]
    if wrong:
        name = wrong[0]
        why = "the name is kaun's own" if name in RESERVED else f"received {_received(given[name])}"
        raise TypeError(
            f"loss {locate(function)} must return (loss, dict of scalars by name); {name!r}: {why}. A scalar is a real "
            "number, an array of shape (), jnp.mean(value), a losses.Mean(total, weight) of two, or the parts of a "
            f"metric, metrics.Counted.of(metrics.f1).parts(predictions, targets). Names that are taken: "
            f"{', '.join(sorted(RESERVED))}."
        )
    given = {name: given[name] for name in sorted(given)}
    parts = {name: jax.tree_util.tree_map(_array, v) for name, v in given.items() if isinstance(v, CountedParts)}
    scalars = {name: v.value if isinstance(v, Mean) else v for name, v in given.items() if name not in parts}
    weights = {name: weight for name, v in given.items() if (weight := _weight(v)) is not None}
    scalars = {name: tree.host_scalar(v) for name, v in scalars.items()}
    return TracedLoss(value, _weight(returned[0]), scalars, weights, parts)


def _array(leaf: Any) -> jax.Array:
    """A count as an array without a weak type."""
    array = jnp.asarray(leaf)
    return array.astype(array.dtype)


def _weight(returned: Any) -> jax.Array | None:
    return tree.host_scalar(returned.weight) if isinstance(returned, Mean) else None


def _value(returned: Any, function: Any) -> jax.Array:
    """The loss as a scalar."""
    if not isinstance(returned, Mean):
        return check_scalar(returned, function, source="the model's output", role="loss")
    total = returned.total
    if not (_is_scalar(returned) and isinstance(total, jax.Array) and jnp.issubdtype(total.dtype, jnp.floating)):
        raise TypeError(
            f"loss {locate(function)} must return losses.Mean(total, weight) of two real scalars, the total a floating "
            f"one that is computed from the model's output by JAX; received {_received(returned)}. Write "
            "losses.Mean((weights * values).sum(), weights.sum())."
        )
    return returned.value


def _is_beside(value: Any) -> bool:
    """Whether a loss may return a value in addition to its own."""
    if isinstance(value, CountedParts):
        return all(map(tree.is_real, jax.tree_util.tree_leaves(value)))
    return _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    each = (value.total, value.weight) if isinstance(value, Mean) else (value,)
    return all(map(tree.is_real_scalar, each))


def _received(value: Any) -> str:
    if isinstance(value, Mean):
        return f"Mean({tree.describe(value.total)}, {tree.describe(value.weight)})"
    if isinstance(value, CountedParts):
        return f"parts of {', '.join(map(tree.describe, jax.tree_util.tree_leaves(value)))}"
    return tree.describe(value)


def trace_function(
    key: LossKey, arrays: Sequence[Any], given: tuple[Any, ...], check: Callable[[Any], Any], role: str
) -> Any:
    """Trace a captured function, refuse what it must not do, and give what ``check`` makes of its result."""
    function = describe.subject(key)
    where = f"{role} {locate(function)}"

    def run(draw: jax.Array, given: tuple[Any, ...], arrays: Sequence[Any]) -> Any:
        rebuilt = Rebuilt(key, arrays)
        try:
            with rng.scope(draw):
                value = rebuilt.function(*given)
        except AttributeError as error:
            reason = rebuilt.watch.explain(error)
            if not reason:
                raise
            raise CaptureError(f"{where} {reason}") from None
        except UnforeseenError as error:
            raise CaptureError(f"{where} {error}") from None
        except TypeError as error:
            if is_refused(error):
                _refuse_call(function, role, given)
            raise
        finally:
            wrote = rebuilt.watch.restore()
        if wrote:
            raise CaptureError(
                f"{where} writes to a list, dict or object that it captures. A compiled {where.split()[0]} runs as "
                "Python only when it is traced, so the write would happen once and then never again. Keep values "
                "outside: read the loss in report(step, loss, state), or call trainer.predict(state, x) there and "
                "store what you need."
            )
        return check(value)

    arguments = (rng.next_key(), given, list(arrays))
    closed, out = jax.make_jaxpr(run, return_shape=True)(*arguments)
    _refuse_constants(closed, key, where)
    # What was looked at is what runs: the loss is not traced a second time.
    leaves = run_program(closed, jax.tree_util.tree_leaves(arguments))
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(out), leaves)


def _refuse_call(function: Any, role: str, given: tuple[Any, ...]) -> None:
    """Refuse a loss or a metric that cannot be called with what it is given."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*given)
    except TypeError:
        takes = ", ".join(p.name for p in signature.parameters.values() if p.default is p.empty)
        name = f"losses.{function.__name__}" if (function.__module__ or "").startswith("kaun.losses.") else "f"
        called, fix = "(predictions, targets)", "Bind other arguments with functools.partial(f, ...)."
        if role == "loss":
            called = "the model's output alone"
            fix = f"Write data.with_loss({name}) for items (x, y), or lambda output: {name}(output, y)."
        raise TypeError(f"{role} {locate(function)} takes ({takes}), and is called with {called}. {fix}") from None


def _refuse_constants(closed: Any, key: LossKey, where: str) -> None:
    known = {id(value) for value in key.objects()}
    for constant in constants_in(closed):
        # NumPy arrays made while the loss ran, np.array([0.1, 0.9]), are part of its code. A tracer belongs to the
        # user's own jit around the step, and is an argument there. Arrays in a class are part of the key.
        if is_traced(constant) or not isinstance(constant, jax.Array) or id(constant) in known:
            continue
        kind = where.split()[0]
        bound = "loss = lambda output: losses.mse(output, y)" if kind == "loss" else "metric = lambda p, t: (p - t) @ y"
        raise CaptureError(
            f"{where} reads an array {tree.describe(constant)} through an object that kaun cannot inspect, so it "
            f"cannot be read again for the next batch: the compiled {kind} would keep using this one. Assign it to a "
            f"variable first,\n    y = batch.y\n    {bound}"
        )
