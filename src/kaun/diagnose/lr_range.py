"""The learning rate range test: the loss while the rate rises (Smith, 2017, arXiv:1506.01186)."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kaun import rng, tree
from kaun._calls import explained, shown
from kaun._messages import locate, optional_package, set_on
from kaun._paths import saved_picture
from kaun._processes import is_first
from kaun._report import Report
from kaun._step import Rate, find_rate, learning_rate, state_nodes
from kaun.context import Context
from kaun.data import Data, known_length
from kaun.errors import EarlyStop, NonFiniteLoss
from kaun.state import TrainState, check_state
from kaun.train import Trainer

__all__ = ["RateRange", "lr_range"]

_DIVERGED = 3  # the loss diverges where it rises above its lowest value by this many times its fall or that value
_SMOOTHED = 20  # the running average has the weight of about a twentieth of the steps
_ROUGH = 10  # a slope spans two tenths of the steps, and the first tenth is not used to detect divergence
_COUNTS = 4096  # the number of counts at which a schedule is evaluated to find its highest rate


@dataclasses.dataclass(frozen=True, eq=False)
class RateRange:
    """The losses of a learning rate range test. It prints as text.

    Attributes:
        rates: The learning rate of each update, float64 of shape (n,), rising.
        losses: The loss before each update, of shape (n,).
        smoothed: Their running average, each with about a twentieth of the steps before it.
        suggestion: The rate at which the smoothed loss falls fastest; None if it never falls.
        diverged: Whether the test ended because the loss rose far above its lowest value or was not finite.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float | None
    diverged: bool = False

    def __repr__(self) -> str:
        lowest = int(np.argmin(self.smoothed))
        advice = "which never falls" if self.suggestion is None else f"and falls fastest at {self.suggestion:.2g}"
        end = " The test ended there, because the loss diverged." if self.diverged else ""
        return (
            f"{len(self.rates)} steps with learning rates from {self.rates[0]:.2g} to {self.rates[-1]:.2g}: the "
            f"smoothed loss is lowest, {self.smoothed[lowest]:.4g}, at {self.rates[lowest]:.2g}, {advice}.{end}"
        )

    @overload
    def plot(self, path: None = None) -> Any: ...

    @overload
    def plot(self, path: str | os.PathLike[str]) -> Path: ...

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the losses and the smoothed losses over the rate with matplotlib, as ``history().plot``.

        Args:
            path: The file to write; the suffix is the format (``.png``, ``.svg``, ``.pdf``), default ``.png``. By
                default none is written, and the figure is returned.

        Returns:
            The path of the file, or the figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        optional_package("lr_range(...).plot", "matplotlib", "plot")
        from matplotlib.figure import Figure  # without pyplot, whose figures and settings are the user's

        figure: Any = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, color="#a9c6e8", linewidth=1, label="loss")
        axes.plot(self.rates, self.smoothed, color="#1f5fa8", linewidth=2, label="smoothed")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, color="0.4", linestyle="--", label=f"suggestion, {self.suggestion:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.set_ylim(*_shown(self.losses, self.smoothed))
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left")
        return saved_picture("lr_range(...).plot", figure, path, writes=is_first())


@explained("kaun.lr_range")
def lr_range(
    trainer: Trainer[Any, Any],
    state: TrainState,
    data: Iterable[Any],
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    ctx: Context | None = None,
) -> RateRange:
    """Train a copy with a learning rate that rises from step to step, and return the losses, to choose a rate.

    The rate rises by the same factor in each step. The test ends early where the loss is not finite or has risen far
    above its lowest value. The state is not changed; the copy begins with its weights and a fresh optimizer state.
    Schedules of the optimizer are ignored. One program is compiled. With ``accumulate=k`` a step is a window of k
    items, and its loss their weighted mean. A step that a loss scale skips makes no update: it is left out, and one
    more item is used, so that the data may end before ``high`` is reached.

    Args:
        trainer: The trainer. Its optimizer is one of optax's whose learning rate can be found (``optax.adam(1e-3)``,
            with a schedule, in a chain), or is made by ``optax.inject_hyperparams``.
        state: The state whose weights are the start.
        data: At least ``steps`` items, as for ``fit``; with ``accumulate=k``, k times as many.
        low: The first rate.
        high: The last rate.
        steps: The number of steps, at least 10.
        ctx: A Context for the layers.

    Returns:
        A ``RateRange``, which prints as text: ``rates``, ``losses``, ``smoothed``, ``suggestion`` and ``plot(path)``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the rates do not rise, the data have too few items, or the optimizer's rate is not known.
        NonFiniteLoss: If the first step is not finite. ``kaun_state`` is the given state.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, layers, losses, rng
        >>> x = jnp.sin(jnp.arange(64.0).reshape(32, 2))
        >>> with rng.scope(0):
        ...     trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.adam(1e-3))
        ...     state = trainer.init()
        ...     data = Data.batches((x, x @ jnp.array([[1.0], [2.0]])), batch_size=16, shuffle=True)
        >>> data = data.with_loss(losses.mse).epochs(50)
        >>> found = kaun.lr_range(trainer, state, data, low=1e-5, high=10.0, steps=100)
        >>> 1e-3 < found.suggestion < 1, int(state.step)
        (True, 0)
    """
    if not isinstance(trainer, Trainer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"lr_range expected a Trainer first, received {tree.describe(trainer)}. Write lr_range(trainer, state, "
            "data)."
        )
    check_state(state, "lr_range")
    _check_range(low, high, steps)
    rates = np.geomspace(low, high, steps)
    optimizer = _rising(trainer.optimizer, state.opt_state, rates)
    tested = dataclasses.replace(trainer, optimizer=optimizer, on_nonfinite="raise", average=None)
    with rng.scope(0):  # the key comes from the state, so that no key of the caller's scope is drawn
        fresh = tested.make_state(state.vars)
    report = _Losses(steps, trainer.accumulate)
    # A loss scale skips steps: then the number of updates ends the fit, and not that of items.
    scaled = bool(state_nodes(fresh.opt_state, "LossScale"))
    items = _first(data, steps * trainer.accumulate, unlimited=scaled)
    try:
        tested.fit(fresh.replace(step=state.step, key=state.key), items, ctx=ctx, report=report)
    except NonFiniteLoss as error:
        if not report.losses:
            own = _nonfinite(error)
            set_on(own, "kaun_state", state)
            raise own from error.__cause__
        report.diverged |= not report.full
    except BaseException as error:
        set_on(error, "kaun_state", state)
        raise
    taken = len(report.losses)
    if taken < steps and not report.diverged and (report.items < steps * trainer.accumulate or not taken):
        raise _too_few(data, report.items, steps * trainer.accumulate)
    smoothed = np.array(report.smoothed)
    suggestion = _steepest(rates[:taken], smoothed, steps // _ROUGH)
    return RateRange(rates[:taken], np.array(report.losses), smoothed, suggestion, report.diverged)


class _Losses(Report):
    """Keeps the losses of updates and their running average, and ends the fit where they diverge or are enough."""

    def __init__(self, steps: int, items_each: int) -> None:
        self._steps, self._rough, self._items_each, self.items = steps, steps // _ROUGH, items_each, 0
        self._decay, self._sum, self._weight = 1 - min(1.0, _SMOOTHED / steps), 0.0, 0.0
        self._window: list[tuple[float, float]] = []  # the losses of its items and their weights
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.diverged = False

    @property
    def full(self) -> bool:
        """Whether there are as many updates as steps."""
        return len(self.losses) >= self._steps

    def wants(self, step: int) -> bool:
        return self.diverged or self.full

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        raise EarlyStop

    def block(self, first_step: int, values: Mapping[str, np.ndarray]) -> None:
        skipped = values.get("skipped", np.zeros(len(values["loss"]), bool))
        columns = (column.tolist() for column in (values["loss"], values["loss_weight"], skipped))
        for loss, weight, left_out in zip(*columns, strict=True):
            if self.diverged or self.full:
                return
            self.items += 1
            self._window += [] if left_out else [(loss, weight)]
            if self.items % self._items_each == 0:
                if self._window:
                    self._add(sum(w * one for one, w in self._window), sum(w for _, w in self._window))
                self._window = []

    def _add(self, total: float, weight: float) -> None:
        """Add the loss of an update; one of weight 0 leaves the running average as it is."""
        self._sum = self._decay * self._sum + (1 - self._decay) * total
        self._weight = self._decay * self._weight + (1 - self._decay) * weight
        self.losses.append(total / (weight or 1.0))
        self.smoothed.append(self._sum / (self._weight or 1.0))
        steady = self.smoothed[self._rough :]
        if steady:
            fall = max(abs(min(steady)), steady[0] - min(steady))
            self.diverged = steady[-1] - min(steady) > _DIVERGED * fall


class _Rising(NamedTuple):
    """The state of an optimizer whose rate rises.

    Attributes:
        updates: How many updates there were.
        inner: The state of the optimizer itself.
    """

    updates: jax.Array
    inner: Any


def _rising(optimizer: Any, opt_state: Any, rates: np.ndarray) -> Any:
    """Return the optimizer with these learning rates, one for each update."""
    injected, found = learning_rate(opt_state) is not None, find_rate(optimizer)
    why = ""
    if state_nodes(opt_state, "ReduceLROnPlateauState"):
        why = "reduce_on_plateau changes it"
    elif injected and _has_schedule(opt_state):
        why = "it is a schedule given to inject_hyperparams"
    elif not injected and found is None:
        why = "it is in none of the places where optax keeps one"
    if why:
        raise ValueError(
            f"lr_range cannot set the learning rate of the optimizer ({locate(optimizer.update)}): {why}. Pass a "
            "trainer with an optimizer whose rate can be set:\n"
            "    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)\n"
            "    trainer = dataclasses.replace(trainer, optimizer=optimizer)\n"
            "    kaun.lr_range(trainer, trainer.make_state(state.vars), data)"
        )
    table, (count, base) = jnp.asarray(rates, jnp.float32), (0, 1.0) if injected or found is None else _base(found)

    def init(params: Any) -> _Rising:
        return _Rising(jnp.zeros((), jnp.int32), optimizer.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, _Rising]:
        rate = table[state.updates]
        inner = _set_rate(state.inner, rate) if injected else _set_count(state.inner, count)
        updates, inner = optimizer.update(updates, inner, params, **extra)
        if not injected:
            updates = jax.tree_util.tree_map(lambda u: (u * (rate / base)).astype(u.dtype), updates)
        return updates, _Rising(state.updates + 1, inner)

    update.__signature__ = inspect.signature(optimizer.update)
    return optax.GradientTransformationExtraArgs(init, update)


def _has_schedule(opt_state: Any) -> bool:
    paths = [tree.path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(opt_state)[0]]
    return any("hyperparams_states.learning_rate" in path for path in paths)


def _base(found: Rate) -> tuple[int, float]:
    """Return the count at which a rate is highest, and that rate."""
    schedule = found.schedule
    if schedule is None:
        return 0, found.constant
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        values = np.asarray(jax.vmap(lambda count: jnp.asarray(schedule(count)))(jnp.arange(_COUNTS)))
    count = int(np.argmax(values))
    return count, float(values[count])


def _set_rate(opt_state: Any, rate: jax.Array) -> Any:
    def leaf(path: Any, old: Any) -> Any:
        is_rate = tree.path_name(path[-2:]) == "hyperparams.learning_rate"
        return rate.astype(old.dtype) if is_rate else old

    return jax.tree_util.tree_map_with_path(leaf, opt_state)


def _set_count(opt_state: Any, count: int) -> Any:
    is_one = lambda node: type(node).__name__ == "ScaleByScheduleState"
    replaced = lambda node: node._replace(count=jnp.full_like(node.count, count)) if is_one(node) else node
    return jax.tree_util.tree_map(replaced, opt_state, is_leaf=is_one)


def _first(data: Iterable[Any], items: int, *, unlimited: bool) -> Iterable[Any]:
    known = known_length(data)
    if known is not None and known < items:
        raise _too_few(data, known, items)
    if unlimited:
        return data
    return data.take(items) if isinstance(data, Data) else itertools.islice(data, items)


def _nonfinite(error: NonFiniteLoss) -> NonFiniteLoss:
    """Return the exception for a first step that is not finite; that of the fit is about a trainer made here."""
    text = (
        f"lr_range: step {error.step} is not finite (its loss is {error.loss:g}), and no step before it made an "
        "update. The given state is this exception's kaun_state. For the operation, its line, its layer and the rows "
        "of the batch, write\n"
        "    try:\n"
        '        dataclasses.replace(trainer, on_nonfinite="raise").fit(state, data)\n'
        "    except kaun.errors.NonFiniteLoss as err:\n"
        "        print(kaun.explain(trainer, err))"
    )
    return NonFiniteLoss(text, error.step, error.loss, error.parameters, error.leaves)


def _too_few(data: Iterable[Any], found: int, items: int) -> ValueError:
    if isinstance(data, Data):
        source = "train"
    elif isinstance(data, Sequence):
        source = "Data.from_items(items)"
    else:
        source = "Data.from_items(list(items))" if isinstance(data, Iterator) else "Data.from_iterable(loader)"
    return ValueError(
        f"lr_range expected at least {items} items, and the data have {found}. Write "
        f"lr_range(trainer, state, {source}.epochs({-(-items // max(found, 1))}), ...), or fewer steps."
    )


def _check_range(low: Any, high: Any, steps: Any) -> None:
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"lr_range expected {name} as a learning rate, received {shown(value)}. Write {name}=1e-3.")
    if not 0 < low < high < math.inf:
        raise ValueError(f"lr_range expected 0 < low < high, received {low} and {high}. Write low=1e-7, high=10.0.")
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"lr_range expected steps as an int, received {shown(steps)}. Write steps=100.")
    if steps < 10:
        raise ValueError(f"lr_range expected at least 10 steps, received {steps}. Write steps=100.")


def _steepest(rates: np.ndarray, smoothed: np.ndarray, half: int) -> float | None:
    """Return the rate around which a loss falls most, over ``half`` steps to each side, before its lowest point."""
    lowest = int(np.argmin(smoothed))
    rises = smoothed[2 * half : lowest + 1] - smoothed[: lowest + 1][: -2 * half]
    return float(rates[half + int(np.argmin(rises))]) if rises.size and rises.min() < 0 else None


def _shown(losses: np.ndarray, smoothed: np.ndarray) -> tuple[float, float]:
    """Return the limits of the loss axis, from the lowest loss to above the first one; divergence is cut off."""
    low, first = float(losses.min()), float(smoothed[0])
    room = max(first - low, abs(low) * 0.1, 1e-12)
    return low - 0.1 * room, first + room
