"""Averaged weights: what ``Trainer(average=)`` keeps beside the weights that train, for evaluation.

The average lives in the optimizer's state, so a step that is discarded leaves it as it was, and checkpoints hold it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from kaun import rng, tree
from kaun._messages import locate
from kaun.context import Context

__all__ = ["ema", "from_optimizer", "swa", "update_statistics"]

S = TypeVar("S")

STATISTICS_ROWS = "statistics_rows"
"""The name in a Context that tells ``batch_norm`` how many rows it has seen before a batch, and how many are in it."""


@dataclasses.dataclass(frozen=True)
class Ema:
    """The argument ``average`` that ``ema(...)`` makes."""

    decay: float

    def __repr__(self) -> str:
        return f"averages.ema({self.decay})"

    def weight(self, count: jax.Array, dtype: Any) -> jax.Array:
        """Return the weight of the parameters after update ``count``: (1 - decay) / (1 - decay ** count)."""
        # decay ** count is near 1 at the start, and 1 minus it would have few correct digits.
        exponent = count.astype(dtype) * (math.log(self.decay) if self.decay else -math.inf)
        return jnp.where(count > 1, (1 - self.decay) / -jnp.expm1(exponent), 1)


@dataclasses.dataclass(frozen=True)
class Swa:
    """The argument ``average`` that ``swa(...)`` makes."""

    start: int
    every: int

    def __repr__(self) -> str:
        return f"averages.swa(start={self.start}, every={self.every})"

    def weight(self, count: jax.Array, dtype: Any) -> jax.Array:
        """Return the weight of the parameters after update ``count``: 1 before the first that counts, 0 between two."""
        since = count - self.start
        share = 1 / (since // self.every + 1).astype(dtype)
        return jnp.where(since < 0, 1, jnp.where(since % self.every == 0, share, 0))


@dataclasses.dataclass(frozen=True)
class FromOptimizer:
    """The argument ``average`` that ``from_optimizer(...)`` makes."""

    f: Callable[[Any, Any], Any]

    def __repr__(self) -> str:
        return f"averages.from_optimizer({getattr(self.f, '__name__', self.f)})"


Average = Ema | Swa | FromOptimizer


def ema(decay: float) -> Ema:
    """Make the exponential moving average: after each update ``decay * average + (1 - decay) * params``.

    It is debiased at the start, as Adam's moments are: the weights of the updates so far add up to 1, and the initial
    parameters have none. Before the first update the averaged weights are those that train.

    It is kept in ``opt_state``, in float32 for parameters of half precision, and in float64 for those of float64. For a
    float32 parameter it takes 8 bytes and not 4: what rounding would lose is kept too, because with a decay of 0.9999
    an average in float32 alone stands still as soon as it is within 0.03 % of the parameters.

    Args:
        decay: The weight of the old average, in [0, 1). Typically 0.99 to 0.9999.

    Raises:
        TypeError: If ``decay`` is not a number.
        ValueError: If it is outside [0, 1).

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, averages, layers, losses, rng
        >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[1.0], [3.0]])
        >>> with rng.scope(0):
        ...     trainer = kaun.Trainer(
        ...         model=layers.linear(1, 1), optimizer=optax.sgd(0.5), average=averages.ema(0.9)
        ...     )
        ...     state = trainer.init()
        >>> state = trainer.fit(state, Data.repeat(200, (x, lambda out: losses.mse(out, y))))
        >>> trainer.predict(state.averaged, jnp.array([[2.0]])).round(3)
        Array([[5.]], dtype=float32)
    """
    if isinstance(decay, bool) or not tree.is_real_scalar(decay):
        raise TypeError(f"averages.ema expected decay as a number, received {decay!r}. Write averages.ema(0.999).")
    if not 0 <= float(decay) < 1:
        raise ValueError(
            f"averages.ema expected a decay of at least 0 and below 1, received {decay}. It is the weight of the old "
            "average: write averages.ema(0.999)."
        )
    return Ema(float(decay))


def swa(*, start: int, every: int) -> Swa:
    """Make the mean of the parameters after the updates ``start``, ``start + every``, ..., counted from 1.

    Before the update ``start`` the averaged weights are those that train. A step that is discarded is no update. It is
    kept as ``ema`` is.

    Args:
        start: The first update whose parameters count, at least 1.
        every: The number of updates from one that counts to the next, at least 1; typically those of an epoch.

    Raises:
        TypeError: If one of them is not an int.
        ValueError: If one of them is below 1.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import averages, layers, losses
        >>> trainer = kaun.Trainer(
        ...     model=layers.linear(1, 1), optimizer=optax.sgd(0.1), average=averages.swa(start=2, every=2)
        ... )
        >>> state, seen = trainer.init(), []
        >>> for _ in range(4):
        ...     _, state = trainer.step(state, jnp.ones((1, 1)), loss=lambda out: losses.mse(out, jnp.zeros((1, 1))))
        ...     seen.append(state.vars.params["weight"])
        >>> bool(jnp.allclose(state.averaged.vars.params["weight"], (seen[1] + seen[3]) / 2))
        True
    """
    for name, value in (("start", start), ("every", every)):
        fix = f"received {name}={value!r}. Write averages.swa(start=1000, every=100)."
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"averages.swa expected numbers of updates as ints, {fix}")
        if value < 1:
            raise ValueError(f"averages.swa expected numbers of updates of at least 1, {fix}")
    return Swa(int(start), int(every))


def from_optimizer(f: Callable[[Any, Any], Any]) -> FromOptimizer:
    """Make the average that the optimizer itself has, as ``optax.contrib.schedule_free`` does. No weights are kept.

    Args:
        f: ``f(opt_state, params) -> params``, called by ``state.averaged`` with the optimizer's own state and the
            parameters that train (None in the place of frozen ones), such as
            ``optax.contrib.schedule_free_eval_params``.

    Raises:
        TypeError: If ``f`` is not a function; when ``state.averaged`` is read, if it returns other shapes.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import averages, layers, losses
        >>> trainer = kaun.Trainer(
        ...     model=layers.linear(1, 1), optimizer=optax.contrib.schedule_free_sgd(0.1),
        ...     average=averages.from_optimizer(optax.contrib.schedule_free_eval_params),
        ... )
        >>> x = jnp.ones((1, 1))
        >>> _, state = trainer.step(trainer.init(), x, loss=lambda out: losses.mse(out, x))
        >>> trainer.predict(state.averaged, x).shape
        (1, 1)
    """
    if not callable(f):
        raise TypeError(
            f"averages.from_optimizer expected a function (opt_state, params) -> params, received {f!r}. Write "
            "averages.from_optimizer(optax.contrib.schedule_free_eval_params)."
        )
    return FromOptimizer(f)


class _Trainer(Protocol):
    """What ``update_statistics`` uses of a ``Trainer``, which is above this module."""

    @property
    def fit(self) -> Callable[..., Any]: ...
    @property
    def make_state(self) -> Callable[..., Any]: ...


def update_statistics(trainer: _Trainer, state: S, data: Iterable[Any], *, ctx: Context | None = None) -> S:
    """Return a state whose ``.averaged`` has the statistics of ``batch_norm`` that its weights give on this data.

    Without it ``.averaged`` has the layers' state of the weights that train, whose running statistics belong to other
    weights. One pass over the data runs the model in training mode with the averaged weights. A running mean or
    variance is then the mean of those of all batches, each with the weight of its rows: no momentum, and nothing of the
    statistics before. A layer that is not ``batch_norm`` updates its state as in training, from the live one on. Layers
    that are frozen as a whole keep theirs.

    Weights, optimizer state, ``step``, ``key`` and the live layers' state stay as they are, and so does the result of
    ``predict(state, x)``. The next update of the weights discards the statistics: ``.averaged`` has the live ones
    again.

    Args:
        trainer: The trainer of the state.
        state: A state of a trainer with ``average=``.
        data: The training data: a ``Data`` or any iterable of ``(x, loss)``, ``(x, y)`` or these with a Context. Of an
            item x and the Context are used.
        ctx: A Context for the layers, at each batch.

    Raises:
        TypeError: If the trainer or an item is of the wrong kind.
        ValueError: If the state has no average, or there are no items.
        NonFiniteLoss: If a statistic would not be finite.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, averages, layers, losses
        >>> model = layers.sequential([layers.linear(1, 2), layers.batch_norm(2), layers.linear(2, 1)])
        >>> trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.1), average=averages.ema(0.9))
        >>> x = jnp.arange(8.0)[:, None]
        >>> train = Data.batches((x, 2 * x), batch_size=4).with_loss(losses.mse)
        >>> state = trainer.fit(trainer.init(), train.epochs(5))
        >>> state = averages.update_statistics(trainer, state, train)
        >>> trainer.predict(state.averaged, x).shape
        (8, 1)
    """
    if not (dataclasses.is_dataclass(trainer) and hasattr(trainer, "make_state")):
        raise TypeError(
            f"update_statistics expected a Trainer first, received {tree.describe(trainer)}. Write "
            "averages.update_statistics(trainer, state, train)."
        )
    averaged: Any = cast("Any", state).averaged
    still = _without_updates(trainer)
    with rng.scope(0):  # its key is not used
        begin = still.make_state(averaged.vars)
    after = still.fit(begin.replace(step=averaged.step, key=averaged.key), _statistics_items(data), ctx=ctx)

    def update(node: Any) -> Any:
        return node._replace(statistics=after.vars.state, statistics_at=node.updates) if _is_node(node) else node

    opt_state = jax.tree_util.tree_map(update, averaged.opt_state, is_leaf=_is_node)
    return cast("Any", state).replace(opt_state=opt_state)


def _without_updates(trainer: Any) -> Any:
    """Return the same trainer with an optimizer that changes nothing; it lives as long, with its compiled programs."""
    held = vars(trainer)
    if "_without_updates" not in held:
        changes: dict[str, Any] = {"average": None, "microbatches": 1, "on_nonfinite": "raise"}
        held["_without_updates"] = dataclasses.replace(trainer, optimizer=optax.set_to_zero(), **changes)
    return held["_without_updates"]


def _statistics_items(data: Iterable[Any]) -> Generator[Any]:
    before = 0
    for number, item in enumerate(data, start=1):
        if not (isinstance(item, (tuple, list)) and len(cast("Any", item)) in (2, 3)):
            raise TypeError(
                "update_statistics expected items (x, loss), (x, y), or these with a Context; item "
                f"{number} is {tree.describe(item)}. Pass the data of fit."
            )
        x, _, *own = cast("Any", item)
        context = own[0] if own and own[0] is not None else Context()
        mask = context.get("row_mask")
        shapes = [np.shape(a) for a in jax.tree_util.tree_leaves(x)]
        rows = next((shape[0] for shape in shapes if shape), 1) if mask is None else int(np.sum(mask))
        yield x, _no_loss, context.set(STATISTICS_ROWS, np.array([before, rows], np.int32))
        before += rows


def _no_loss(output: Any) -> jax.Array:
    return jnp.zeros((), jnp.float32)


# What the optimizer's state holds


class AveragedWeights(NamedTuple):
    """The optimizer's state with an average of the parameters that train. Checkpoints hold these names.

    Attributes:
        average: The average, None for frozen parameters. For float32 parameters complex64: the real part is the
            average, and the imaginary part is what rounding lost of it. One array and not two, because XLA:CPU writes
            two in two passes, which cost a step of 235,000 parameters 0.24 ms, and this one 0.08 ms. For float64
            parameters float64, for others float32. Of ``from_optimizer`` no arrays, but the function, as a
            ``jax.tree_util.Partial``, whose argument has () for each parameter that trains.
        updates: How many updates the state has had, an int32 scalar.
        statistics: The layers' state of ``update_statistics``, before its first call that of the start.
        statistics_at: The number of updates for which that holds, an int32 scalar; -1 before the first call.
        inner: The optimizer's own state.
    """

    average: Any
    updates: jax.Array
    statistics: Any
    statistics_at: jax.Array
    inner: Any


def check_average(average: Any) -> None:
    """Check the argument ``average``.

    Raises:
        TypeError: If it is neither None nor one of this module's averages.
    """
    if average is not None and not isinstance(average, Average):
        called = ". Did you forget to call it?" if callable(average) else "."
        raise TypeError(
            "Trainer(average=...) expected averages.ema(decay), averages.swa(start=, every=) or "
            f"averages.from_optimizer(f), received {average!r}{called} Write average=averages.ema(0.999)."
        )


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
    if isinstance(rule, FromOptimizer):
        average: Any = jax.tree_util.Partial(rule.f, jax.tree_util.tree_map(lambda p: (), params))
    else:
        average = jax.tree_util.tree_map(_fresh, params)
    return AveragedWeights(average, jnp.int32(0), layer_state, jnp.int32(-1), opt_state)


def _fresh(param: jax.Array) -> jax.Array:
    if param.dtype == jnp.float32:
        return lax.complex(param, jnp.zeros_like(param))
    return param.astype(jnp.float64 if param.dtype == jnp.float64 else jnp.float32)


def without_weights(opt_state: Any) -> Any:
    """Return an optimizer state without the arrays of its average: what an update of the weights is computed with.

    They need no look for values that are not finite, because a mean of finite numbers is finite.
    """
    strip = lambda node: node._replace(average=None, statistics=None) if _is_node(node) else node
    return jax.tree_util.tree_map(strip, opt_state, is_leaf=_is_node)


def take_average(rule: Average | None, opt_state: Any) -> tuple[AveragedWeights | None, Any]:
    """Return what a state has of an average, and the state without its arrays.

    Raises:
        ValueError: If the state has an average and should not, should have one and does not, or has another kind.
    """
    node = find_average(opt_state)
    by_optimizer = node is not None and isinstance(node.average, jax.tree_util.Partial)
    if (node is None) != (rule is None) or by_optimizer != isinstance(rule, FromOptimizer):
        has = "no average" if node is None else "an average" if rule is None else "an average of another kind"
        wants = "keeps none" if rule is None else f"has average={rule}"
        raise ValueError(
            f"The state has {has} of the weights, but this trainer {wants}: the state belongs to a trainer with "
            "another average. Write state = trainer.make_state(state.vars)."
        )
    return node, opt_state if node is None else without_weights(opt_state)


def put_average(rule: Average | None, before: AveragedWeights | None, opt_state: Any, params: Any) -> Any:
    """Return the state after a step with the arrays of its average, updated where the step has made an update.

    Args:
        rule: The argument ``average``.
        before: What the state had of an average before the step.
        opt_state: The state after the step, as ``take_average`` gave it before.
        params: The parameters that train after the step.

    Raises:
        ValueError: If the average is one of other parameters.
    """
    if rule is None or before is None:
        return opt_state

    def put(node: Any) -> Any:
        if not _is_node(node):
            return node
        average = before.average
        if not isinstance(rule, FromOptimizer):
            _check_fits(average, params)
            wide = jnp.result_type(float)
            share = jnp.where(node.updates > before.updates, rule.weight(node.updates, wide), 0)
            average = jax.tree_util.tree_map(functools.partial(_moved, share), average, params)
        return node._replace(average=average, statistics=before.statistics)

    return jax.tree_util.tree_map(put, opt_state, is_leaf=_is_node)


def _moved(share: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Return an average moved towards new values by a share of the difference, exactly to them by a share of 1."""
    whole = share >= 1
    if not jnp.issubdtype(old.dtype, jnp.complexfloating):
        share, about, new = share.astype(old.dtype), jnp.finfo(new.dtype), new.astype(old.dtype)
        # Without it XLA takes parameters of half precision as they were before they were rounded.
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


# Read by ``TrainState.averaged``


def find_average(opt_state: Any) -> AveragedWeights | None:
    """Return what an optimizer state has of an average, which may be inside of other parts; None without one."""
    nodes = [node for node in jax.tree_util.tree_leaves(opt_state, is_leaf=_is_node) if _is_node(node)]
    return nodes[0] if nodes else None


def averaged_vars(opt_state: Any, vars: Any) -> Any:
    """Return the variables with the averaged parameters, those that are frozen as they are.

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
    if isinstance(node.average, jax.tree_util.Partial):
        params = _from_optimizer(node.average, node.inner, vars.params)
    else:
        params = _read(node.updates > 0, node.average, vars.params)
    return vars.replace(params=params, state=_read(node.statistics_at == node.updates, node.statistics, vars.state))


def _is_node(value: Any) -> bool:
    return isinstance(value, AveragedWeights)


@jax.jit
def _read(known: jax.Array, values: Any, others: Any) -> Any:
    """Return values in the dtypes of others; these where a value is None, and all of them unless values are known."""

    def pick(a: Any, b: jax.Array) -> jax.Array:
        if a is None:
            return b
        a = jnp.real(a) if jnp.iscomplexobj(a) and not jnp.iscomplexobj(b) else a
        return jnp.where(known, a if a.dtype == b.dtype else a.astype(b.dtype), b)

    return jax.tree_util.tree_map(pick, values, others, is_leaf=lambda a: a is None)


def _from_optimizer(average: Any, opt_state: Any, params: Any) -> Any:
    is_mark = lambda a: a is None or a == ()
    (marks,) = average.args
    trained = jax.tree_util.tree_map(lambda mark, p: None if mark is None else p, marks, params, is_leaf=is_mark)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as the optimizer's update
        try:
            made = average.func(opt_state, trained)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise _unfit(average.func, f"raises {type(error).__name__}: {error}") from error
    shape = lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.float32)
    lines = tree.difference(*(jax.tree_util.tree_map(shape, each) for each in (trained, made)))
    if lines:
        listed = "\n  ".join(lines[:10])
        raise _unfit(average.func, f"returns other shapes (expected is a parameter that trains):\n  {listed}\n")
    pick = lambda a, p: p if a is None else jnp.asarray(a, p.dtype)
    return jax.tree_util.tree_map(pick, made, params, is_leaf=lambda a: a is None)


def _unfit(f: Any, what: str) -> TypeError:
    return TypeError(
        f"averages.from_optimizer(f) expected a function that returns parameters; {locate(f)} {what}"
        f"{'' if what.endswith(chr(10)) else '. '}It is called with the optimizer's own state and the parameters that "
        "train. For optax.chain(...) write averages.from_optimizer(lambda opt_state, params: f(opt_state[1], params))."
    )
