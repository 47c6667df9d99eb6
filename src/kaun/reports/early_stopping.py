"""The report that keeps the best state, and ends a fit when a value stops improving."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np

from kaun._report import Report
from kaun._run import saved_values
from kaun.errors import EarlyStop
from kaun.train import TrainState

__all__ = ["EarlyStopping", "early_stopping"]


def early_stopping(
    monitor: str, *, mode: Literal["max", "min"], patience: int, min_delta: float = 0.0
) -> EarlyStopping:
    """Return the report that keeps the best state by a value, and ends the fit when that value stops improving.

    The value is what another report of the same ``all_of`` measures under this name (for example ``validate``). If none
    measures ``"loss"``, ``monitor="loss"`` is the training loss: its mean over the steps since the last time, at the
    steps of the ``every(n, ...)`` that contains the report. Without ``every`` it waits for each step.

    The best state is kept whatever stopped the run: the end of the data, this report, another, an exception. Only a
    better state is copied. Passed to several fits, it continues from where it was.

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
            f'early_stopping expected monitor as a name, received {monitor!r}. Write early_stopping("accuracy", '
            'mode="max", patience=5).'
        )
    if mode not in ("max", "min"):
        raise ValueError(
            f'early_stopping expected mode "max" (more is better) or "min" (less is better), received {mode!r}.'
        )
    if isinstance(patience, bool) or not isinstance(patience, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"early_stopping expected patience as a number of values, an int, received {patience!r}.")
    if patience < 1:
        raise ValueError(f"early_stopping expected a patience of at least 1 value, received {patience}.")
    if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"early_stopping expected min_delta as a float, received {min_delta!r}.")
    if not 0 <= min_delta < math.inf:
        raise ValueError(f"early_stopping expected a min_delta of at least 0, and finite, received {min_delta}.")
    kind = _TrainingLossStopping if monitor == "loss" else EarlyStopping
    return kind(monitor, 1.0 if mode == "max" else -1.0, patience, float(min_delta))


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

    def __init__(self, monitor: str, sign: float, patience: int, min_delta: float) -> None:
        self.watches = frozenset({monitor})
        self._monitor, self._sign, self._patience, self._min_delta = monitor, sign, patience, min_delta
        self._best: TrainState | None = None
        self._value = -math.inf  # of the best state; this and the next are negated for "min"
        self._passed = -math.inf  # what a value must pass by min_delta
        self._waited = 0
        self._judged = 0  # the last step, of this fit
        self._sum, self._count = 0.0, 0  # of the training loss since the last time, where that is judged

    @property
    def best(self) -> TrainState:
        """The state after the step with the best value.

        Raises:
            RuntimeError: If there was no value yet; so do ``best_value`` and ``best_step``.
        """
        if self._best is None:
            raise RuntimeError(
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
        return int(self.best.step)

    def begin(self, first_step: int, total: int | None, measured: frozenset[str] = frozenset(), every: int = 1) -> None:
        """Begin a fit; called by ``fit``."""
        if first_step <= self._judged:
            self._judged = 0

    def observe(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        """Judge what another report measured; called by ``all_of``."""
        if self._monitor in values:
            self._judge(step, float(values[self._monitor]), state)

    def snapshot(self) -> dict[str, Any]:
        """Return the best state and what decides about the next ones, for a checkpoint."""
        numbers = np.array([self._value, self._passed, self._sum])
        kept = {"numbers": numbers, "waited": self._waited, "judged": self._judged, "count": self._count}
        return kept if self._best is None else {**kept, "best": self._best}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        saved = saved_values(self, values, "numbers", "waited", "judged", "count")
        numbers, self._waited, self._judged, self._count = saved
        self._value, self._passed, self._sum = map(float, numbers)
        self._best = values.get("best")

    def _judge(self, step: int, value: float, state: TrainState) -> None:
        if step == self._judged:  # a second time, in a run that was interrupted while this step was reported
            return
        self._judged = step
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
    """``early_stopping("loss")``: if no report of the fit measures a ``"loss"``, the training loss is judged."""

    def __init__(self, monitor: str, sign: float, patience: int, min_delta: float) -> None:
        super().__init__(monitor, sign, patience, min_delta)
        self.__name__ = "EarlyStopping"  # in checkpoints
        self.watches = ()
        self._measured = False  # whether another report of this fit measures it

    def begin(self, first_step: int, total: int | None, measured: frozenset[str] = frozenset(), every: int = 1) -> None:
        super().begin(first_step, total, measured, every)
        self._measured = self._monitor in measured

    def wants(self, step: int) -> bool:
        return not self._measured

    def block(self, first_step: int, values: Mapping[str, np.ndarray]) -> None:
        self._sum += float(values["loss"].astype(np.float64).sum())
        self._count += len(values["loss"])

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        if not self._measured:
            value = self._sum / self._count if self._count else loss
            self._sum, self._count = 0.0, 0
            self._judge(step, value, state)
