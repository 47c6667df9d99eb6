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
        self._waiting: list[tuple[int, Any]] = []
        self._steps = 0
        self._first = 1
        self._next = time.monotonic() + _PATIENCE
        self._total = total
        self._asked = 0
        self._wanted = 0

    def begin(self) -> None:
        """Tell the report that the fit begins: with the number of its first step and of its last, where known."""
        begin = getattr(self._report, "begin", None)
        if begin is not None:
            begin(1, self._total)

    def ahead(self, done: int, most: int) -> int:
        """How many steps after those done may run before the report is called, at most ``most``."""
        if self._report is None:
            return most
        if self._wants is None:
            return 1
        while self._wanted <= done and self._asked < done + most:
            self._ask()
        return min(self._wanted - done, most) if self._wanted > done else most

    def wants(self, step: int) -> bool:
        """Whether the report is to be called for this step."""
        if self._report is None:
            return False
        if self._wants is None:
            return True
        while self._asked < step:
            self._ask()
        return step == self._wanted

    def _ask(self) -> None:
        assert self._wants is not None
        self._asked += 1
        if self._wants(self._asked):
            self._wanted = self._asked

    def ran(self, count: int, losses: Any) -> None:
        """Take the losses of a block of steps, which may not be done yet."""
        if self._block is None:
            return
        self._waiting.append((count, losses))
        self._steps += count
        if self._steps >= _BLOCK or time.monotonic() >= self._next:
            ready = bisect.bisect_left(self._waiting, True, key=lambda block: not block[1].is_ready())
            self._deliver(ready)

    def stops(self, step: int, loss: Any, state: Any) -> bool:
        """Call the report; whether it asked to stop. This waits for the step to be done."""
        if self._block is not None:
            self._deliver(len(self._waiting))
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
        while self._waiting:
            self._deliver(1)

    def end(self) -> None:
        """Tell the report that the fit is over, however it ended."""
        if self._end is not None:
            self._end()

    def _deliver(self, blocks: int) -> None:
        ready, self._waiting = self._waiting[:blocks], self._waiting[blocks:]
        self._next = time.monotonic() + _PATIENCE
        if ready and self._block is not None:
            count = sum(n for n, _ in ready)
            first, self._first, self._steps = self._first, self._first + count, self._steps - count
            losses = np.concatenate([np.asarray(losses)[:n] for n, losses in ready])
            self._block(first, {"loss": losses.astype(np.float32)})
