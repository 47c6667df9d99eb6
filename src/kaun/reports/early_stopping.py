"""The report that keeps the best state, and ends a fit when a value stops improving."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax
import numpy as np

from kaun import _html, tree
from kaun._calls import explained, shown, with_advice
from kaun._report import Report
from kaun._run import StepValues, saved_values
from kaun.errors import EarlyStop, Unavailable
from kaun.state import count_steps
from kaun.train import TrainState

__all__ = ["EarlyStopping", "early_stopping"]


@explained("reports.early_stopping")
def early_stopping(
    monitor: str, *, mode: Literal["max", "min"], patience: int, min_delta: float = 0.0
) -> EarlyStopping:
    """Return the report that keeps the best state by a value, and ends the fit when that value stops improving.

    The value is what another report of the same ``all_of`` measures under this name, such as ``validate``. ``fit``
    returns the last state; the best one is ``stopper.best``, whatever stopped the run: the end of the data, this
    report, another, an exception. Only a better state is copied. With ``validate(..., of=f)`` it is ``f(state)``, such
    as ``state.averaged``.

    ``"loss"`` is the one that a report of the fit measures, and if none does the training loss: ``repr(stopper)`` says
    which. A step computes the training loss of the state before it, so ``best`` is then the state before the step whose
    loss was best. In ``every(n, stopper)`` the value is the mean loss of the n steps of a window, and the state is the
    one at the window's start. A step counts by its weight: the number of examples of its batch, or the weight of a
    ``losses.Mean``. Steps that were skipped, and batches that are masked as a whole, weigh 0; a window without any
    others has no value. A state is copied for each window; without ``every`` that is each step, for which ``fit``
    waits.

    Passed to a further fit of the same run, one that begins where the last one ended or later, it continues from where
    it was. A fit of another run, of another state or from an earlier step, begins without a best state.

    Args:
        monitor: The name of the value.
        mode: ``"max"`` if a larger value is better, ``"min"`` if a smaller one is.
        patience: The number of values in a row without a better one after which the fit ends, at least 1.
        min_delta: By how much a value must be better to count for ``patience``, at least 0, default 0. The best state
            is the best one, by however little. A value that is NaN is never better.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``mode`` is another word, ``patience`` is less than 1 or ``min_delta`` less than 0; in the fit,
            if no report measures the value.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, layers, losses, reports, rng
        >>> x = jnp.arange(8.0).reshape(4, 2)
        >>> pairs = Data.batches((x, x @ jnp.array([[1.0], [2.0]])), batch_size=2)
        >>> trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.adam(0.1))
        >>> train = pairs.with_loss(losses.mse)
        >>> stopper = reports.early_stopping("mse", mode="min", patience=20)
        >>> validation = reports.validate(trainer, pairs, {"mse": losses.mse}, each=train)
        >>> with rng.scope(0):
        ...     state = trainer.init()
        >>> state = trainer.fit(state, train.epochs(10_000), report=reports.all_of(validation, stopper))
        >>> stopper.best_value == min(values["mse"] for step, values in validation.results)
        True
        >>> int(state.step) - stopper.best_step  # 20 passes of 2 steps
        40
    """
    if not isinstance(monitor, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f'early_stopping expected monitor as a name, received {shown(monitor)}. Write early_stopping("accuracy", '
            'mode="max", patience=5).'
        )
    if mode not in ("max", "min"):
        raise ValueError(
            f'early_stopping expected mode "max" (more is better) or "min" (less is better), received {shown(mode)}.'
        )
    if isinstance(patience, bool) or not isinstance(patience, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"early_stopping expected patience as a number of values, an int, received {shown(patience)}.")
    if patience < 1:
        raise ValueError(f"early_stopping expected a patience of at least 1 value, received {patience}.")
    if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"early_stopping expected min_delta as a float, received {shown(min_delta)}.")
    if not 0 <= min_delta < math.inf:
        raise ValueError(f"early_stopping expected a min_delta of at least 0, and finite, received {min_delta}.")
    kind = _TrainingLossStopping if monitor == "loss" else EarlyStopping
    return kind(monitor, 1.0 if mode == "max" else -1.0, patience, float(min_delta))


@with_advice
class EarlyStopping(Report):
    """The best state so far, by a value; made by ``early_stopping(...)``. See there.

    Attributes:
        watches: The name of the value; empty for ``"loss"``, which may be the training loss.

    Examples:
        >>> from kaun import reports
        >>> stopper = reports.early_stopping("accuracy", mode="max", patience=2)
        >>> for step, accuracy in [(100, 0.8), (200, 0.9), (300, 0.85)]:
        ...     stopper.observe(step, {"accuracy": accuracy}, f"state {step}")  # all_of does this
        >>> stopper.best, stopper.best_value
        ('state 200', 0.9)
    """

    watches: Collection[str]
    _held = "after the step at which it was measured"
    _which = ""  # loss it is

    def __init__(self, monitor: str, sign: float, patience: int, min_delta: float) -> None:
        self.watches = frozenset({monitor})
        self._monitor, self._sign, self._patience, self._min_delta = monitor, sign, patience, min_delta
        self._run: bytes | None = None  # the key of the run that it judges, None where that is not known
        self._offset = 0  # from the fit's steps to those of the state
        self._last = 0  # the step of the newest state that it has seen
        self._judged = 0  # the last step, of this fit
        self._forget()

    def _forget(self) -> None:
        self._best: TrainState | None = None
        self._value = -math.inf  # of the best state; this and the next are negated for "min"
        self._passed = -math.inf  # what a value must pass by min_delta
        self._waited = 0

    @property
    def best(self) -> TrainState:
        """The state with the best value: after the step at which it was measured.

        For the training loss it is the state before the steps whose mean loss was best: that is the state, or the first
        of the states, that had this loss.

        Raises:
            Unavailable: If there was no value yet; so do ``best_value`` and ``best_step``.
        """
        if self._best is None:
            raise Unavailable(
                f"early_stopping has no best state: {self._monitor!r} was not measured yet, or was always NaN. "
                "Pass the report to fit, and measure earlier: reports.validate(..., each=100)."
            )
        return self._best

    @property
    def best_value(self) -> float:
        """The best value so far."""
        _ = self.best  # raises if there is none
        return self._sign * self._value

    @property
    def best_step(self) -> int:
        """The step of the best state: ``int(best.step)``."""
        return count_steps(self.best)

    def __repr__(self) -> str:
        mode = "max" if self._sign > 0 else "min"
        held = "no value yet, .best is empty"
        if self._best is not None:
            held = (
                f"best value {self.best_value:g}; .best is the state {self._held}, of step {self.best_step}; since "
                f"then {self._waited} of {self._patience} values without a better one"
            )
        return f"<early_stopping({self._monitor!r}, mode={mode!r}, patience={self._patience}){self._which}: {held}>"

    def _repr_html_(self) -> str:
        mode = "max" if self._sign > 0 else "min"
        shown: list[tuple[str, Any]] = [("watches", f"{self._monitor!r}{self._which}, mode={mode!r}")]
        if self._best is not None:
            shown += [("best value", self.best_value), (".best", f"the state {self._held}, of step {self.best_step}")]
        shown += [("values without a better one", f"{self._waited} of {self._patience}")]
        return _html.document("early_stopping", _html.facts(shown))

    def begin(
        self, first_step: int, total: int | None, measured: frozenset[str] = frozenset(), every: int = 1,
        state: TrainState | None = None, /,
    ) -> None:  # fmt: skip
        """Begin a fit; called by ``fit``."""
        if first_step <= self._judged:
            self._judged = 0
        if state is None:
            return
        key = jax.random.key_data(state.key) if tree.is_key(state.key) else state.key
        key, step = np.asarray(key).tobytes(), count_steps(state)
        if self._run is not None and (key != self._run or step < self._last):
            self._forget()
        self._run, self._last, self._offset = key, step, step + 1 - first_step

    def observe(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        """Judge what another report measured; called by ``all_of``."""
        if self._monitor in values:
            self._judge(step, float(values[self._monitor]), state)

    def snapshot(self) -> dict[str, Any]:
        """Return the best state and what decides about the next ones, for a checkpoint."""
        numbers = np.array([self._value, self._passed])
        kept = {"numbers": numbers, "waited": self._waited, "judged": self._judged}
        return kept if self._best is None else {**kept, "best": self._best}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        numbers, self._waited, self._judged = saved_values(self, values, "numbers", "waited", "judged")
        self._value, self._passed = map(float, numbers[:2])
        self._best = values.get("best")
        self._run = None  # the run of the next fit

    def _judge(self, step: int, value: float, state: TrainState) -> None:
        if step == self._judged:  # a second time, in a run that was interrupted while this step was reported
            return
        self._judged, self._last = step, max(self._last, step + self._offset)
        value *= self._sign
        if value > self._value:
            self._value, self._best = value, state
        if value > self._passed + self._min_delta:
            self._passed, self._waited = value, 0
            return
        self._waited += 1
        if self._waited >= self._patience:
            raise EarlyStop


class _TrainingLossStopping(EarlyStopping):
    """``early_stopping("loss")``: if no report of the fit measures a ``"loss"``, the training loss is judged.

    A step's loss is that of the state before it. The value is the mean loss of the steps from one call to the next, its
    window, and the state that is kept for it is the one before the first of them.
    """

    def __init__(self, monitor: str, sign: float, patience: int, min_delta: float) -> None:
        super().__init__(monitor, sign, patience, min_delta)
        self.__name__ = "EarlyStopping"  # in checkpoints
        self.watches = ()
        self._measured = False  # whether another report of this fit measures it
        self._known = False  # whether that is known: in a fit, and after one
        self._resumed = False
        self._open_window(None)

    def _open_window(self, start: TrainState | None) -> None:
        self._start = start
        self._mean, self._weight, self._count = 0.0, 0.0, 0  # of the losses, with their weights, and all steps

    @property
    def _which(self) -> str:
        return f" of the {'validated' if self._measured else 'training'} loss" if self._known else ""

    @property
    def _held(self) -> str:
        return EarlyStopping._held if self._measured else "before the steps whose mean loss this is"

    def begin(
        self, first_step: int, total: int | None, measured: frozenset[str] = frozenset(), every: int = 1,
        state: TrainState | None = None, /,
    ) -> None:  # fmt: skip
        super().begin(first_step, total, measured, every, state)
        self._measured = self._monitor in measured
        self._known = True
        start = None if self._measured else state
        if not self._resumed:
            self._open_window(start)
        elif not self._count:
            self._start = start
        self._resumed = False

    def wants(self, step: int) -> bool:
        return not self._measured

    def block(self, first_step: int, values: Mapping[str, np.ndarray]) -> None:
        losses = values["loss"].tolist()
        self._count += len(losses)
        weights = StepValues.of(first_step, values).weights["loss"]
        # One by one, so that the value does not depend on how the steps are cut into blocks.
        for loss, weight in zip(losses, weights.tolist(), strict=True):
            if weight:
                self._weight += weight
                self._mean += (loss - self._mean) * (weight / self._weight)

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        if self._measured or step == self._judged:
            return
        start, value = self._start, self._mean if self._count else loss
        has_value = self._weight > 0 or not self._count
        self._open_window(state)
        if start is not None and has_value:
            self._judge(step, value, start)
        else:
            self._judged = step

    def snapshot(self) -> dict[str, Any]:
        window = {"mean": self._mean, "weight": self._weight, "count": self._count, "measured": self._measured}
        # The state at the beginning of a window that has no steps yet is the one that the checkpoint has anyway.
        start = {} if self._start is None or not self._count else {"start": self._start}
        return super().snapshot() | window | start

    def restore(self, values: Mapping[str, Any]) -> None:
        super().restore(values)
        self._mean, self._weight, self._count = saved_values(self, values, "mean", "weight", "count")
        self._start, self._resumed = values.get("start"), True
        self._known = self._known or "measured" in values
        self._measured = bool(values.get("measured", self._measured))  # no fit begins where the run is finished
