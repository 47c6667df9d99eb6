"""The report that ends a fit after a number of minutes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from time import monotonic
from typing import Any

from kaun._calls import public, shown
from kaun._report import Report
from kaun._run import saved_values
from kaun.errors import EarlyStop
from kaun.train import TrainState

__all__ = ["time_limit"]


@public
def time_limit(minutes: float) -> Report:
    """Return the report that ends the fit after the first step, or block of steps, that is done after the time limit.

    The time runs from the beginning of each fit and includes compilation and evaluation. A run that is resumed from a
    checkpoint has the time that is left: what the run had taken when the checkpoint was made counts.

    Args:
        minutes: How long the fit may take, more than 0.

    Raises:
        TypeError: If ``minutes`` is not a number.
        ValueError: If it is not more than 0, or not finite.

    Examples:
        >>> from kaun import reports
        >>> report = reports.time_limit(minutes=90)
        >>> report.begin(1, None)
        >>> report.wants(1)
        False
    """
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"time_limit expected a number of minutes, received {shown(minutes)}. Write time_limit(minutes=90)."
        )
    if not 0 < minutes < math.inf:
        raise ValueError(
            f"time_limit expected a finite number of minutes above 0, received {minutes}. Write time_limit(minutes=90)."
        )
    return _TimeLimit(60.0 * minutes)


class _TimeLimit(Report):
    def __init__(self, seconds: float) -> None:
        self.__name__ = "time_limit"
        self._seconds = seconds
        self._before = 0.0  # spent in the run before the checkpoint from which the next fit is resumed
        self._starts: list[float] = []  # for each fit that is running (fits may nest)

    def __repr__(self) -> str:
        return f"time_limit({self._seconds / 60:g})"

    def begin(self, first_step: int, total: int | None, *_: Any) -> None:
        self._starts.append(monotonic() - self._before)
        self._before = 0.0

    def end(self) -> None:
        if self._starts:
            self._starts.pop()

    def wants(self, step: int) -> bool:
        return self._spent() >= self._seconds

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        if self.wants(step):
            raise EarlyStop

    def snapshot(self) -> dict[str, Any]:
        return {"seconds": self._spent()}

    def restore(self, values: Mapping[str, Any]) -> None:
        (self._before,) = saved_values(self, values, "seconds")

    def _spent(self) -> float:
        return monotonic() - self._starts[-1] if self._starts else self._before
