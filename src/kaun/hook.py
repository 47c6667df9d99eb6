"""What ``fit`` does with a report: asks which steps it wants, hands it losses in blocks, and calls it."""

from __future__ import annotations

import bisect
import inspect
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kaun.errors import EarlyStop, locate

__all__ = ["Hook"]

_BLOCK = 64
_SLICE = 8
_PATIENCE = 0.05  # seconds after which the losses that are ready are handed over, however few they are


def _check_arguments(report: Any) -> None:
    try:
        inspect.signature(report).bind(1, 0.0, None)
    except TypeError:
        raise TypeError(
            f"report {locate(report)} must take three arguments, (step, loss, state). Write "
            "report=lambda step, loss, state: print(step, loss), or call it if it makes a report: "
            "reports.progress()."
        ) from None
    except ValueError:
        pass  # a builtin that does not tell


def _check_names(report: Any) -> None:
    measured = sorted(getattr(report, "measures", ()))
    missing = sorted(set(getattr(report, "watches", ())) - set(measured))
    if missing:
        raise ValueError(
            f"A report watches {missing[0]!r}, which no report of this fit measures; measured are "
            f"{', '.join(map(repr, measured)) or 'none'}. Put one beside it: reports.all_of(reports.validate(trainer, "
            f'valid, {{"{missing[0]}": ...}}, each=train), ...).'
        )


class Hook:
    """A report as ``fit`` uses it; every part of it is optional.

    Arguments:
        report: a function ``(step, loss, state)``, or an object with more of the protocol in ``kaun.reports.core``.
        total: how many steps the fit will take, None where that is not known.

    Raises:
        TypeError: when the report cannot be called, or not with three arguments.
        ValueError: when it watches a value that nothing in it measures.
    """

    def __init__(self, report: Callable[..., Any] | None, total: int | None) -> None:
        if report is not None and not callable(report):
            raise TypeError(
                f"report expected a function (step, loss, state) -> None, received {report!r}. Write "
                "report=lambda step, loss, state: print(step, loss), or use kaun.reports."
            )
        if report is not None:
            _check_arguments(report)
        self._report = report
        self._wants: Callable[[int], bool] | None = getattr(report, "wants", None)
        self._block: Callable[..., None] | None = getattr(report, "block", None)
        self._end: Callable[[], None] | None = getattr(report, "end", None)
        self._compiled: Callable[[float], None] | None = getattr(report, "compiled", None)
        _check_names(report)
        self._losses: list[Any] = []
        self._first = 1
        self._next = time.monotonic() + _PATIENCE
        self._total = total

    def begin(self) -> None:
        """Tell the report that the fit begins: with the number of its first step and of its last, where known."""
        begin = getattr(self._report, "begin", None)
        if begin is not None:
            begin(1, self._total)

    def wants(self, step: int, loss: Any) -> bool:
        """Whether the report is to be called for this step."""
        if self._block is not None:
            self._losses.append(loss)
            # The newest block is left in flight: the losses of the one before it are there without waiting.
            if len(self._losses) >= 2 * _BLOCK:
                self._deliver(_BLOCK)
            elif time.monotonic() >= self._next:
                self._deliver(bisect.bisect_left(self._losses, True, key=lambda loss: not loss.is_ready()))
        if self._report is None:
            return False
        return self._wants is None or bool(self._wants(step))

    def stops(self, step: int, loss: Any, state: Any) -> bool:
        """Call the report; whether it asked to stop. This waits for the step to be done."""
        if self._block is not None:
            self._deliver(len(self._losses))
        assert self._report is not None
        try:
            self._report(step, float(loss), state)
        except EarlyStop:
            return True
        return False

    def compiled(self, seconds: float) -> None:
        """Tell the report that a program was compiled, and how long that took."""
        if self._compiled is not None:
            self._compiled(seconds)

    def finish(self) -> None:
        """Hand over the losses that are left, as they get ready."""
        while self._losses:
            self._deliver(_SLICE)

    def end(self) -> None:
        """Tell the report that the fit is over, however it ended."""
        if self._end is not None:
            self._end()

    def _deliver(self, count: int) -> None:
        ready, self._losses = self._losses[:count], self._losses[count:]
        self._next = time.monotonic() + _PATIENCE
        if ready and self._block is not None:
            first, self._first = self._first, self._first + len(ready)
            # One by one: jax.device_get of a list takes ten times as long.
            self._block(first, {"loss": np.array([np.asarray(loss) for loss in ready], np.float32)})
