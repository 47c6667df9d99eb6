"""The average as a part of the optimizer's state: made, updated after each update of the weights, and read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from kaun import tree
from kaun._messages import locate
from kaun.averages.rules import Average, Ema, FromOptimizer, Swa
from kaun.errors import Unavailable

__all__ = [
    "AveragedWeights", "add_average", "averaged_vars", "find_average", "is_average", "put_average", "take_average",
    "without_weights",
]  # fmt: skip


# `average` is joined to `earlier` after this many updates that count. The rounding error grows with it: over 1,500
# updates of constant parameters, for decays from 0.5 to 0.99999 and for swa, the average stayed within 3.2e-7 of
# float64, relative to the parameter, and with 64 updates within 6.1e-7.
_JOINED = 16


T = TypeVar("T")


class AveragedWeights(NamedTuple):
    """The optimizer's state with an average of the parameters that train. Checkpoints hold these names.

    Attributes:
        rule: The argument ``average``; static, without arrays.
        average: The average, None for frozen parameters: float64 for float64 parameters, float32 for others. For a
            float32 parameter it has only the updates since the last join (``_JOINED``), and the average is
            ``(1 - weight) * earlier + average``. An update reads and writes this array alone, and what rounding takes
            from its small values is little of the average. For 235,000 parameters (``bench.averages``, mlp) a step
            takes 1.02 times the CPU time of one without an average: of 2.1 ms an update takes 0.034, as fast as memory
            allows, and a join 0.10 once in 16 updates. Where each update also writes what rounding loses, a step took
            0.02 of its time more. With ``from_optimizer`` it is ``()`` for each parameter that trains.
        earlier: The average at the last join, for float32 parameters; ``()`` for others.
        weight: The weight of the updates since then, a float32 scalar; ``()`` with ``from_optimizer``.
        updates: The number of updates that the state has had, an int32 scalar.
        statistics: The layers' state from ``update_statistics``; before its first call, the initial one.
        statistics_at: The number of updates at which that was computed, an int32 scalar; -1 before the first call.
        inner: The optimizer's own state.
    """

    rule: Average
    average: Any
    earlier: Any
    weight: Any
    updates: jax.Array
    statistics: Any
    statistics_at: jax.Array
    inner: Any

    def __repr__(self) -> str:
        return tree.short_repr(self)


def add_average(rule: Average | None, opt_state: Any, params: Any, layer_state: Any) -> Any:
    """Return a fresh optimizer state as a trainer with this average keeps it.

    Args:
        rule: The argument ``average``.
        opt_state: The optimizer's own state.
        params: The parameters that train.
        layer_state: The layers' state.
    """
    if rule is None:
        return opt_state
    own = isinstance(rule, FromOptimizer)
    average = jax.tree_util.tree_map(lambda p: () if own else jnp.zeros_like(p, dtype=_average_dtype(p)), params)
    earlier = jax.tree_util.tree_map(lambda p: jnp.zeros_like(p) if not own and p.dtype == jnp.float32 else (), params)
    weight = () if own else jnp.float32(0)
    return AveragedWeights(rule, average, earlier, weight, jnp.int32(0), layer_state, jnp.int32(-1), opt_state)


def _average_dtype(param: jax.Array) -> Any:
    return jnp.float64 if param.dtype == jnp.float64 else jnp.float32


def without_weights(opt_state: Any) -> Any:
    """Return an optimizer state without the arrays of its average, which an update of the weights does not need.

    They are not checked for values that are not finite, because a mean of finite numbers is finite.
    """
    nothing = dict.fromkeys(("average", "earlier", "weight", "statistics"))
    strip = lambda node: node._replace(**nothing) if is_average(node) else node
    return jax.tree_util.tree_map(strip, opt_state, is_leaf=is_average)


def take_average(rule: Average | None, opt_state: Any) -> tuple[AveragedWeights | None, Any]:
    """Return the average in a state, None without one, and the state without the arrays of the average.

    Raises:
        ValueError: If the state has another average than ``rule``. The decay of ``ema`` may be another one.
    """
    node = find_average(opt_state)
    had = None if node is None else node.rule
    if type(had) is not type(rule) or (isinstance(rule, Swa) and had != rule):
        raise ValueError(
            f"The state was made with average={had}, but this trainer has average={rule}: the state belongs to a "
            "trainer with another average. Write state = trainer.make_state(state.vars)."
        )
    return node, opt_state if node is None else without_weights(opt_state)


def put_average(rule: Average | None, before: AveragedWeights | None, opt_state: Any, params: Any) -> Any:
    """Return the state after a step with the arrays of its average, updated where the step has made an update.

    Args:
        rule: The argument ``average``.
        before: The average in the state before the step, as ``take_average`` returns it.
        opt_state: The optimizer state after the step, without the arrays of its average.
        params: The parameters that train after the step.

    Raises:
        ValueError: If the average belongs to other parameters.
    """
    if rule is None or before is None:
        return opt_state

    def put(node: Any) -> Any:
        if not is_average(node):
            return node
        after = before._replace(updates=node.updates, statistics_at=node.statistics_at, inner=node.inner)
        if isinstance(rule, FromOptimizer):
            return after
        _check_fits(before.average, params)
        return _moved(rule, after, node.updates > before.updates, params)

    return jax.tree_util.tree_map(put, opt_state, is_leaf=is_average)


def _moved(rule: Ema | Swa, node: AveragedWeights, updated: jax.Array, params: Any) -> AveragedWeights:
    """Return the average moved towards the parameters, where they were updated and count."""
    number, counts = rule.place(node.updates)
    counts &= updated
    joins = counts & (number % _JOINED == 1)
    share = rule.weight(number, jnp.result_type(float))
    weight = jnp.where(counts, _toward(share, node.weight, jnp.float32(1)), node.weight)
    move = lambda average: jax.tree_util.tree_map(functools.partial(_toward, share), average, params)
    join = lambda kept: tuple(jax.tree_util.tree_map(functools.partial(f, weight), *kept) for f in (_rest, _joined))
    average = _if_due(counts, move, node.average)
    average, earlier = _if_due(joins, join, (average, node.earlier))
    return node._replace(average=average, earlier=earlier, weight=jnp.where(joins, 0, weight))


def _if_due(due: jax.Array, function: Callable[[T], T], values: T) -> T:
    """Return ``function(values)`` where that is due, and the values unchanged elsewhere.

    It is a loop of zero steps or one: XLA:CPU writes to the arrays of a loop in place, and copies those of a condition.
    """
    return lax.fori_loop(0, due.astype(jnp.int32), lambda _, values: function(values), values)


def _toward(share: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Return values moved towards new ones by a share of the difference, exactly to them by a share of 1."""
    whole, share, about, new = share >= 1, share.astype(old.dtype), jnp.finfo(new.dtype), new.astype(old.dtype)
    # Without this XLA uses parameters of half precision as they were before they were rounded.
    rounded = lax.reduce_precision(new, about.nexp, about.nmant)
    if about.dtype == jnp.float16:  # of which it makes zeros of those below the smallest normal number
        step = float(about.smallest_subnormal)
        rounded = jnp.where(jnp.abs(new) < float(about.smallest_normal), jnp.round(new / step) * step, rounded)
    return jnp.where(whole, rounded, old + share * (rounded - old))


def _terms(weight: jax.Array, average: jax.Array, earlier: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return two arrays whose sum is the average of a parameter.

    Below a weight of a half the second is small, and so is what rounding loses of it. From there on the first is, and
    ``1 - weight`` is exact.
    """
    near = weight < 0.5
    # Both with a number chosen by the weight, and not chosen of two arrays: XLA:CPU then joins an array in half the
    # time (0.10 ms and not 0.22 for 235,000 parameters).
    return jnp.where(near, 1, 1 - weight) * earlier, average - jnp.where(near, weight, 0) * earlier


def _value(weight: Any, average: jax.Array, earlier: Any) -> jax.Array:
    return average if isinstance(earlier, tuple) else lax.add(*_terms(weight, average, earlier))


def _joined(weight: jax.Array, average: jax.Array, earlier: Any) -> Any:
    """Return ``earlier`` after a join."""
    return earlier if isinstance(earlier, tuple) else _value(weight, average, earlier)


def _rest(weight: jax.Array, average: jax.Array, earlier: Any) -> jax.Array:
    """Return ``average`` after a join: what ``earlier`` lost by rounding."""
    if isinstance(earlier, tuple):
        return average
    one, other = _terms(weight, average, earlier)
    return other - ((one + other) - one)


def _check_fits(average: Any, params: Any) -> None:
    shapes = [
        jax.tree_util.tree_map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), t) for t in (params, average)
    ]
    lines = tree.difference(*shapes)
    if lines:
        raise ValueError(
            "The average in the state does not fit the trainable parameters, so it belongs to a trainer with another "
            "trainable (expected is a parameter that trains):\n  "
            + "\n  ".join(lines[:10])
            + "\nWrite state = trainer.make_state(state.vars)."
        )


def find_average(opt_state: Any) -> AveragedWeights | None:
    """Return the average in an optimizer state, also where it is nested inside other parts; None without one."""
    nodes = [node for node in jax.tree_util.tree_leaves(opt_state, is_leaf=is_average) if is_average(node)]
    return nodes[0] if nodes else None


def averaged_vars(opt_state: Any, vars: Any) -> Any:
    """Return the variables with the averaged parameters; frozen parameters are unchanged.

    Args:
        opt_state: An optimizer state.
        vars: The ``Vars`` of the weights that train.

    Raises:
        Unavailable: If the state has no average.
        TypeError: If the function of ``from_optimizer`` returns other shapes.
    """
    node = find_average(opt_state)
    if node is None:
        raise Unavailable(
            "state.averaged: this state has no average of its weights. Write Trainer(..., average=averages.ema(0.999)) "
            "and make the state with that trainer: trainer.init(), or trainer.make_state(state.vars)."
        )
    if isinstance(node.rule, FromOptimizer):
        params = _from_optimizer(node.rule.f, node, vars.params)
    else:
        counted, _ = node.rule.place(node.updates)
        params = _read(counted > 0, _values(node.weight, node.average, node.earlier), vars.params)
    return vars.replace(params=params, state=_read(node.statistics_at == node.updates, node.statistics, vars.state))


def is_average(value: Any) -> bool:
    """Return whether a part of an optimizer state is that of an average."""
    return isinstance(value, AveragedWeights)


@jax.jit
def _values(weight: jax.Array, average: Any, earlier: Any) -> Any:
    return jax.tree_util.tree_map(functools.partial(_value, weight), average, earlier)


@jax.jit
def _read(known: jax.Array, values: Any, others: Any) -> Any:
    """Return the values in the dtypes of others; the others where a value is None, and everywhere unless ``known``.

    The others also where neither is finite: the average of a weight that is inf, as in a mask, is that weight, but was
    computed from differences of inf.
    """

    def pick(a: Any, b: jax.Array) -> jax.Array:
        if a is None:
            return b
        a = a if a.dtype == b.dtype else a.astype(b.dtype)
        usable = jnp.isfinite(a) | jnp.isfinite(b) if jnp.issubdtype(b.dtype, jnp.inexact) else True
        return jnp.where(known & usable, a, b)

    return jax.tree_util.tree_map(pick, values, others, is_leaf=lambda a: a is None)


def _from_optimizer(f: Callable[[Any, Any], Any], node: AveragedWeights, params: Any) -> Any:
    is_mark = lambda a: a is None or a == ()
    keep = lambda mark, p: None if mark is None else p
    trained = jax.tree_util.tree_map(keep, node.average, params, is_leaf=is_mark)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as the optimizer's update
        try:
            made = f(node.inner, trained)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise _unfit(f, f"raises {type(error).__name__}: {error}") from error
    shape = lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.float32)
    lines = tree.difference(*(jax.tree_util.tree_map(shape, each) for each in (trained, made)))
    if lines:
        listed = "\n  ".join(lines[:10])
        raise _unfit(f, f"returns other shapes (expected is a parameter that trains):\n  {listed}\n")
    pick = lambda a, p: p if a is None else jnp.asarray(a, p.dtype)
    return jax.tree_util.tree_map(pick, made, params, is_leaf=lambda a: a is None)


def _unfit(f: Any, what: str) -> TypeError:
    return TypeError(
        f"averages.from_optimizer(f) expected a function that returns parameters; {locate(f)} {what}"
        f"{'' if what.endswith(chr(10)) else '. '}It is called with the optimizer's own state and the parameters that "
        "train. For optax.chain(...) write averages.from_optimizer(lambda opt_state, params: f(opt_state[1], params))."
    )
