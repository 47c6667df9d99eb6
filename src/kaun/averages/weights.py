"""The average as a part of the optimizer's state: made, updated after each update of the weights, and read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kaun import tree
from kaun._messages import locate
from kaun.averages.rules import Average, FromOptimizer, Swa

__all__ = [
    "AveragedWeights", "add_average", "averaged_vars", "find_average", "is_average", "put_average", "take_average",
    "without_weights",
]  # fmt: skip


class AveragedWeights(NamedTuple):
    """The optimizer's state with an average of the parameters that train. Checkpoints hold these names.

    Attributes:
        rule: The argument ``average``; static, without arrays.
        average: The average, None for frozen parameters. For float32 parameters complex64: the real part is the
            average, and the imaginary part is what rounding lost of it. One array and not two, because XLA:CPU writes
            two in two passes: for 235,000 parameters these took 0.24 ms of CPU time, and this one 0.08 ms (float32
            alone 0.03 ms). For float64 parameters float64, for others float32. With ``from_optimizer`` it is ``()`` for
            each parameter that trains.
        updates: The number of updates that the state has had, an int32 scalar.
        statistics: The layers' state from ``update_statistics``; before its first call, the initial one.
        statistics_at: The number of updates at which that was computed, an int32 scalar; -1 before the first call.
        inner: The optimizer's own state.
    """

    rule: Average
    average: Any
    updates: jax.Array
    statistics: Any
    statistics_at: jax.Array
    inner: Any


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
    fresh = (lambda param: ()) if isinstance(rule, FromOptimizer) else _fresh
    average = jax.tree_util.tree_map(fresh, params)
    return AveragedWeights(rule, average, jnp.int32(0), layer_state, jnp.int32(-1), opt_state)


def _fresh(param: jax.Array) -> jax.Array:
    if param.dtype == jnp.float32:
        return lax.complex(param, jnp.zeros_like(param))
    return param.astype(jnp.float64 if param.dtype == jnp.float64 else jnp.float32)


def without_weights(opt_state: Any) -> Any:
    """Return an optimizer state without the arrays of its average, which an update of the weights does not need.

    They are not checked for values that are not finite, because a mean of finite numbers is finite.
    """
    strip = lambda node: node._replace(average=None, statistics=None) if is_average(node) else node
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
        average = before.average
        if not isinstance(rule, FromOptimizer):
            _check_fits(average, params)
            wide = jnp.result_type(float)
            share = jnp.where(node.updates > before.updates, rule.weight(node.updates, wide), 0)
            average = jax.tree_util.tree_map(functools.partial(_moved, share), average, params)
        return node._replace(average=average, statistics=before.statistics)

    return jax.tree_util.tree_map(put, opt_state, is_leaf=is_average)


def _moved(share: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Return an average moved towards new values by a share of the difference, exactly to them by a share of 1."""
    whole = share >= 1
    if not jnp.issubdtype(old.dtype, jnp.complexfloating):
        share, about, new = share.astype(old.dtype), jnp.finfo(new.dtype), new.astype(old.dtype)
        # Without this XLA uses parameters of half precision as they were before they were rounded.
        new = lax.reduce_precision(new, about.nexp, about.nmant)
        return jnp.where(whole, new, old + share * (new - old))
    share, high, low = share.astype(new.dtype), jnp.real(old), jnp.imag(old)
    high, low = jnp.where(whole, new, high), jnp.where(whole, 0, low)
    step = low + share * ((new - high) - low)
    total = high + step
    return lax.complex(total, step - (total - high))


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
        ValueError: If the state has no average.
        TypeError: If the function of ``from_optimizer`` returns other shapes.
    """
    node = find_average(opt_state)
    if node is None:
        raise ValueError(
            "state.averaged: this state has no average of its weights. Write Trainer(..., average=averages.ema(0.999)) "
            "and make the state with that trainer: trainer.init(), or trainer.make_state(state.vars)."
        )
    if isinstance(node.rule, FromOptimizer):
        params = _from_optimizer(node.rule.f, node, vars.params)
    else:
        params = _read(node.updates > 0, node.average, vars.params)
    return vars.replace(params=params, state=_read(node.statistics_at == node.updates, node.statistics, vars.state))


def is_average(value: Any) -> bool:
    """Return whether a part of an optimizer state is that of an average."""
    return isinstance(value, AveragedWeights)


@jax.jit
def _read(known: jax.Array, values: Any, others: Any) -> Any:
    """Return the values in the dtypes of others; the others where a value is None, and everywhere unless ``known``."""

    def pick(a: Any, b: jax.Array) -> jax.Array:
        if a is None:
            return b
        a = jnp.real(a) if jnp.iscomplexobj(a) and not jnp.iscomplexobj(b) else a
        return jnp.where(known, a if a.dtype == b.dtype else a.astype(b.dtype), b)

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
