"""The report that ends a fit after a number of minutes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from time import monotonic
from typing import Any

from kaun.errors import EarlyStop
from kaun.reports import report_state
from kaun.train import Report, TrainState


def time_limit(minutes: float) -> Report:
    """The report that ends the fit after the first step, or block of steps, that is done when the time is over.

    The time runs from the beginning of each fit, compilation and evaluation included. A run that goes on from a
    checkpoint has what is left: the time that the run had taken when the checkpoint was made counts.

    Arguments:
        minutes: how long the fit may take, more than 0.

    Raises:
        TypeError: when ``minutes`` is no number.
        ValueError: when it is not more than 0, or not finite.

    >>> from kaun import reports
    >>> report = reports.time_limit(minutes=90)
    >>> report.begin(1, None)
    >>> report.wants(1)
    False
    """
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"time_limit expected a number of minutes, received {minutes!r}. Write time_limit(minutes=90).")
    if not 0 < minutes < math.inf:
        raise ValueError(
            f"time_limit expected a finite number of minutes above 0, received {minutes}. Write time_limit(minutes=90)."
        )
    return _TimeLimit(60.0 * minutes)


class _TimeLimit:
    def __init__(self, seconds: float) -> None:
        self.__name__ = "time_limit"
        self._seconds = seconds
        self._before = 0.0  # spent in the run up to the checkpoint from which the next fit goes on
        self._begun: list[float] = []  # for each fit that is running (fits may nest)

    def begin(self, first_step: int, total: int | None) -> None:
        self._begun.append(monotonic() - self._before)
        self._before = 0.0

    def end(self) -> None:
        if self._begun:
            self._begun.pop()

    def wants(self, step: int) -> bool:
        return self._spent() >= self._seconds

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        if self.wants(step):
            raise EarlyStop

    def snapshot(self) -> dict[str, Any]:
        return {"seconds": self._spent()}

    def restore(self, values: Mapping[str, Any]) -> None:
        (self._before,) = report_state.saved(self, values, "seconds")

    def _spent(self) -> float:
        return monotonic() - self._begun[-1] if self._begun else self._before
