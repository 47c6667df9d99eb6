"""The learning rate of each step, from its schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun._calls import public, shown
from kaun._messages import locate, warn
from kaun._report import Report
from kaun._run import saved_values
from kaun._step import state_nodes
from kaun.state import Members, count_steps
from kaun.train import TrainState

__all__ = ["learning_rate"]

CHUNK = 4096  # counts that are evaluated at once
# The parts of an optimizer's state that count its updates for a schedule.
_COUNTING = ("ScaleByScheduleState", "InjectHyperparamsState", "InjectStatefulHyperparamsState")
# Those that collect gradients for an update: of ``Trainer(accumulate=)`` and of optax.
_WINDOWS = ("Window", "MultiStepsState")


@public
def learning_rate(schedule: Callable[[Any], Any]) -> Report:
    """Return the report that adds ``"learning_rate"``, the learning rate of each step, to the blocks of other reports.

    It is the schedule at the number of updates before the step. That number is read from the optimizer's state when a
    fit begins; a step that was skipped, and a step of ``Trainer(accumulate=)`` or ``optax.MultiSteps`` inside its
    window, make no update. The rate is NaN, with a warning when the fit begins, where the state says that it cannot be
    known: schedules at different counts, or a rate that ``reduce_on_plateau`` scales.

    The schedule is evaluated on JAX's CPU device for 4096 counts at once, well ahead of the steps, so that ``fit``
    waits for it at its first block only. The reports of one ``all_of`` get it in any order; it replaces a learning rate
    that ``fit`` knows itself (of ``optax.inject_hyperparams``, or of an optimizer of optax with one rate, such as
    ``optax.adam(schedule)``, which needs no such report). Without other reports it has no effect.

    Args:
        schedule: The function of the count that the optimizer has; any of optax's.

    Raises:
        TypeError: If ``schedule`` is not a function, or does not return a scalar.
        RuntimeError: If JAX has no CPU device in this process.

    Examples:
        >>> import numpy as np, optax
        >>> from kaun import reports
        >>> history = []
        >>> class Rates(reports.Report):
        ...     def block(self, first_step, values): history.extend(values["learning_rate"].tolist())
        >>> report = reports.all_of(Rates(), reports.learning_rate(optax.linear_schedule(1.0, 0.0, 4)))
        >>> report.block(1, {"loss": np.zeros(3, np.float32), "step": np.array([1, 2, 3])})  # fit does this
        >>> history
        [1.0, 0.75, 0.5]
    """
    if not callable(schedule):
        raise TypeError(
            f"learning_rate expected a schedule, a function of the count of updates, received {shown(schedule)}. For a "
            "constant rate write learning_rate(optax.constant_schedule(1e-3))."
        )
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError as err:
        raise RuntimeError(
            "learning_rate evaluates the schedule on JAX's CPU device, and this process has none. Add it to the "
            "platforms: JAX_PLATFORMS=cuda,cpu in the environment."
        ) from err
    return _LearningRate(schedule, device)


def _inner(window: Any) -> Any:
    return window.inner if hasattr(window, "inner") else window.inner_opt_state


def _updates(window: Any) -> Any:
    return window.updates if hasattr(window, "updates") else window.gradient_step


class _LearningRate(Report):
    measures = ("learning_rate",)

    def __init__(self, schedule: Callable[[Any], Any], device: Any) -> None:
        self.__name__ = "learning_rate"
        self._schedule, self._device = schedule, device
        self._rates = jax.jit(jax.vmap(self._rate))
        self._chunks: dict[int, Any] = {}
        self._skipped = 0  # how many steps of the state's life made no update
        self._updates: int | None = None  # those of a window so far, where the schedule is inside of it
        self._from_state = self._unknown = False

    def __repr__(self) -> str:
        return f"learning_rate({locate(self._schedule)})"

    def block(self, first_step: int, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        count = len(values["loss"])
        if self._unknown:
            return {"learning_rate": np.full(count, np.nan, np.float32)}
        first = int(values["step"][0]) if "step" in values else first_step
        if first == 1 and not self._from_state:
            self._skipped = 0
        skipped = values.get("skipped", np.zeros(count, bool)).astype(np.int64)
        if self._updates is not None:
            skipped = 1 - np.diff(values["updates"], prepend=self._updates)
            self._updates = int(values["updates"][-1])
        before = np.arange(first - 1, first - 1 + count) - self._skipped - (np.cumsum(skipped) - skipped)
        self._skipped += int(skipped.sum())
        return {"learning_rate": self._at(before)}

    def begin(
        self, first_step: int, total: int | None, measured: frozenset[str] = frozenset(), every: int = 1,
        state: TrainState | None = None, /,
    ) -> None:  # fmt: skip
        if state is not None:
            self._read(state)
        done = first_step - 1 if state is None else count_steps(state)
        self._ahead(max(0, done - self._skipped) // CHUNK)

    def _read(self, state: TrainState) -> None:
        """Find the number of updates in the optimizer's state; of an ensemble, of the member with the most steps."""
        if isinstance(state.opt_state, Members):
            state = state.member(int(state.step.argmax()))
        outer = state_nodes(state.opt_state, *_WINDOWS, *_COUNTING)
        windows = [node for node in outer if type(node).__name__ in _WINDOWS]
        counts = {int(node.count) for node in outer if type(node).__name__ in _COUNTING}
        inner = {int(node.count) for window in windows for node in state_nodes(_inner(window), *_COUNTING)}
        why = ""
        if state_nodes(state.opt_state, "ReduceLROnPlateauState"):
            why = "reduce_on_plateau scales it"
        elif len(windows) > 1 or len(counts | inner) > 1 or (counts and inner):
            why = f"the optimizer's state has schedules at different counts ({sorted(counts | inner)})"
        self._unknown = bool(why)
        if why:
            warn(
                f"learning_rate(schedule) cannot know the learning rate, and gives NaN: {why}. Leave this report out, "
                "and write the optimizer with optax.inject_hyperparams, whose rate fit knows:\n"
                "    optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)"
            )
        inside = bool(windows) and not counts
        self._updates = int(_updates(windows[0])) if inside and not why else None
        known = counts or inner or ({self._updates} if inside else set())
        self._from_state = bool(known)
        if known and not why:
            (updates,) = known
            self._skipped = int(state.step) - int(updates or 0)

    def snapshot(self) -> dict[str, Any]:
        return {"skipped": self._skipped}

    def restore(self, values: Mapping[str, Any]) -> None:
        (self._skipped,) = saved_values(self, values, "skipped")

    def _at(self, counts: np.ndarray) -> np.ndarray:
        indices = np.unique(counts // CHUNK).tolist()
        for index in indices:
            self._ahead(index)
            # The device works in order: steps that were dispatched after this chunk, and are done, prove it done.
            self._chunks[index] = np.asarray(self._chunks[index])
            self._ahead(index + 1)
        rates = np.concatenate([self._chunks[index] for index in indices])
        self._chunks = {index: chunk for index, chunk in self._chunks.items() if index >= indices[-1]}
        return rates[np.searchsorted(indices, counts // CHUNK) * CHUNK + counts % CHUNK]

    def _ahead(self, index: int) -> None:
        if index not in self._chunks:
            counts = np.arange(index * CHUNK, (index + 1) * CHUNK, dtype=np.int32)
            self._chunks[index] = self._rates(jax.device_put(counts, self._device))

    def _rate(self, count: jax.Array) -> jax.Array:
        # As the optimizer's updates: some of optax's schedules promote dtypes.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            rate = jnp.asarray(self._schedule(count))
        if rate.shape:
            raise TypeError(
                f"learning_rate expected a schedule that returns a scalar; {locate(self._schedule)} returned shape "
                f"{rate.shape}. Pass the schedule that the optimizer uses."
            )
        return rate.astype(jnp.float64 if rate.dtype == jnp.float64 else jnp.float32)
