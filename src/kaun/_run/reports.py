"""What ``fit`` does with a report: asks which steps it wants, hands it losses in blocks, and calls it."""

from __future__ import annotations

import bisect
import contextlib
import inspect
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kaun._engine import StepResults
from kaun._messages import locate
from kaun.errors import EarlyStop

__all__ = ["ReportCaller"]

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


class ReportCaller:
    """A report as ``fit`` uses it; every part of it is optional.

    Arguments:
        report: a function ``(step, loss, state)``, or an object with more of the protocol in ``kaun.reports.core``.
        total: the number of the fit's last step, None where that is not known.
        done: how many steps were done before, in a run that goes on.
        before: ``state.step`` before the fit's first step.
        mode: ``"raise"`` where a step that goes wrong is none, and the last one.
        again: the loss of the last step done, where its report was interrupted and has to be called once more.
        heard: gives a block in which a signal may interrupt the report.

    Attributes:
        again: the loss of the step for which the report did not come back.

    Raises:
        TypeError: when the report cannot be called, or not with three arguments.
        ValueError: when it watches a value that nothing in it measures.
    """

    def __init__(
        self,
        report: Callable[..., Any] | None,
        total: int | None,
        done: int = 0,
        before: Any = 0,
        mode: str = "ignore",
        again: float | None = None,
        heard: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
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
        self._waiting: list[StepResults] = []
        self._steps = 0
        self._next = time.monotonic() + _PATIENCE
        self._total, self._done, self._before, self._raises = total, done, before, mode == "raise"
        self.again, self._heard = again, heard
        self._asked = self._wanted = done if again is None else done - 1
        self._clock = time.perf_counter()
        self._seconds = 0.0  # of compilation since then
        self._over = False  # a step went wrong, and what comes after it is no step of this run

    def begin(self) -> None:
        """Tell the report that the fit begins: with the number of its first step and of its last, where known."""
        self._clock = time.perf_counter()
        begin = getattr(self._report, "begin", None)
        if begin is not None:
            begin(self._done + 1, self._total)

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

    def ran(self, ran: StepResults) -> None:
        """Take the numbers of a block of steps, which may not be done yet."""
        if self._block is None:
            return
        self._waiting.append(ran)
        self._steps += ran.steps
        if self._steps >= _BLOCK or time.monotonic() >= self._next:
            ready = bisect.bisect_left(self._waiting, True, key=lambda ran: not ran.losses.is_ready())
            self._deliver(ready)

    def stops(self, step: int, loss: Any, state: Any) -> bool:
        """Call the report; whether it asked to stop. This waits for the step to be done."""
        self._deliver(len(self._waiting))
        assert self._report is not None
        self.again = float(loss)
        stops = False
        try:
            with self._heard():
                self._report(step, self.again, state)
        except EarlyStop:
            stops = True
        self.again = None
        self._clock, self._seconds = time.perf_counter(), 0.0  # an evaluation is no part of a step
        return stops

    def compiled(self, seconds: float) -> None:
        """Tell the report that a program was compiled, and how long that took."""
        self._seconds += seconds
        if self._compiled is not None:
            self._compiled(seconds)

    def finish(self) -> None:
        """Hand over the numbers that are left, as they get ready."""
        while self._waiting:
            self._deliver(1)

    def end(self) -> None:
        """Tell the report that the fit is over, however it ended."""
        if self._end is not None:
            self._end()

    def _deliver(self, blocks: int) -> None:
        ready, self._waiting = self._waiting[:blocks], self._waiting[blocks:]
        self._next = time.monotonic() + _PATIENCE
        self._steps -= sum(ran.steps for ran in ready)
        values: list[tuple[StepResults, dict[str, Any]]] = []
        for ran in ready:
            steps = ran.finite_steps() if self._raises else ran.steps
            if not self._over:
                values.append((ran, ran.values(steps)))
            self._over = self._over or steps < ran.steps
        taken = sum(len(v["loss"]) for _, v in values)
        now = time.perf_counter()
        seconds = max(now - self._clock - self._seconds, 0.0) / max(taken, 1)
        self._clock, self._seconds = now, 0.0
        for _, group in itertools.groupby(values, lambda pair: pair[0].names):
            members = list(group)
            joined = {name: np.concatenate([v[name] for _, v in members]) for name in members[0][1]}
            if self._block is not None and len(joined["loss"]):
                first = members[0][0].first
                examples = [np.full(len(v["loss"]), ran.examples or np.nan) for ran, v in members]
                self._block(first, self._completed(first, joined, np.concatenate(examples), seconds))

    def _completed(self, first: int, values: dict[str, Any], examples: Any, seconds: float) -> dict[str, Any]:
        """What the block of a report gets: numbers of the steps, with their place and their speed."""
        n = len(values["loss"])
        good = values.pop("finite", None)
        values["step"] = np.arange(n) + (int(self._before) - self._done + first)
        values["step_time"] = np.full(n, seconds, np.float32)
        if not np.isnan(examples).any():
            values["examples_per_second"] = (examples / max(seconds, 1e-9)).astype(np.float32)
        if good is not None:
            values["skipped"] = good == 0
        return values
