"""ReportCaller: which steps a report wants, the blocks of values it gets, and its call."""

from __future__ import annotations

import bisect
import contextlib
import difflib
import itertools
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from kaun import tree
from kaun._engine import StepResults
from kaun._messages import locate
from kaun._report import NUMBERS, Composite, check_report, measured_by_call, member, names_of, numbers_of
from kaun._run.agree import Agreement
from kaun._run.notices import DiscardedSteps
from kaun._run.values import StepValues
from kaun.data import PassLength
from kaun.errors import EarlyStop
from kaun.state import TrainState

__all__ = ["ReportCaller", "check_best_is_measured", "check_returned"]

_BLOCK = 64
_PATIENCE = 0.05  # seconds after which the values that are ready are passed on, however few they are


def check_returned(report: Any, value: Any, state: Any) -> Mapping[str, float] | None:
    """Return the values that a report's call measured, by name; None if it has no ``measures`` or returned None.

    Args:
        report: The report, or the user's function inside of one.
        value: What its call returned.
        state: The state that it was called with. To return that changes nothing: ``kept.setdefault(step, state)``.

    Raises:
        TypeError: If that is a state, which ``fit`` would not use, or is not a dict of measured values.
        ValueError: If it has a name that is not in ``measures``.
    """
    if isinstance(value, TrainState) and value is not state:
        raise TypeError(
            f"The report {locate(report)} returned a TrainState, and a report cannot change the state of its fit: what "
            "it returns is not used. To change the state between steps, write the loop yourself,\n"
            "    for x, loss in train:\n        _, state = trainer.step(state, x, loss=loss)\n"
            "and between passes, call fit for each:\n"
            "    for epoch in range(3):\n        state = change(trainer.fit(state, train.epoch(epoch)))\n"
            "A report that keeps states returns None."
        )
    names = names_of(report, "measures") if value is not None else ()
    if not names:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(
            f"A report with `measures` must return a dict from these names to floats, or None; {locate(report)} "
            f'returned {tree.describe(value)}. Write return {{"{min(names)}": value}}.'
        )
    values = cast("Mapping[str, float]", value)
    unknown = next((name for name in values if name not in names), None)
    if unknown is not None:
        nearest = next(iter(difflib.get_close_matches(str(unknown), sorted(names), n=1, cutoff=0)), "")
        raise ValueError(
            f"The report {locate(report)} returned a value {unknown!r}, which is not in its `measures`, so no other "
            f"report can ask for it; the nearest of these names is {nearest!r}. Return that name, or write measures = "
            f"{(*sorted(names), unknown)!r}."
        )
    return values


def _check_watched(report: Any) -> None:
    measured = measured_by_call(report)
    missing = sorted(names_of(report, "watches") - set(measured))
    if missing:
        raise _not_measured("A report watches", missing[0], measured)


def check_best_is_measured(name: str, report: Any) -> None:
    """Refuse a ``Directory(best=)`` whose value no report of the fit measures.

    Raises:
        TypeError: If the report is not a valid one.
        ValueError: If it does not measure the value.
    """
    if report is not None:
        check_report(report, "fit")
    measured = measured_by_call(report)
    if name not in measured:
        training = " The training loss of a step is that of the state before it." if name == "loss" else ""
        raise _not_measured("checkpoint.Directory(best=...) names", name, measured, training)


def _not_measured(who: str, name: str, measured: Iterable[str], more: str = "") -> ValueError:
    names = frozenset(measured)
    text = f"{who} {name!r}, which no report of this fit measures; measured names: "
    text += f"{', '.join(map(repr, sorted(names))) or 'none'}."
    plain = name.removeprefix("valid_").removeprefix("val_")
    if plain != name:
        code = f'early_stopping("{plain}", ...)' if who.startswith("A report") else f'best=("{plain}", ...)'
        add = "" if plain in names else f', and reports.validate(trainer, valid, {{"{plain}": ...}}, each=train)'
        return ValueError(
            f'{text} A value has the name that validate was given; only columns and the bar add "valid_". Write '
            f"{code}{add}."
        )
    return ValueError(
        f"{text}{more} Add a report that measures it: "
        f'reports.all_of(reports.validate(trainer, valid, {{"{name}": ...}}, each=train), ...).'
    )


class ReportCaller:
    """Calls a report for ``fit``: asks which steps it wants, and passes on values, compilations, begin and end.

    Args:
        report: A function ``(step, loss, state)`` or an object with the members of ``reports.Report``, or None.
        total: The number of the fit's last step, None if it is unknown.
        done: How many steps were done before, in a resumed run.
        before: ``state.step`` before the fit's first step.
        mode: ``on_nonfinite``: under ``"raise"`` a step that is not finite is discarded, and is the last one.
        pending_report_loss: The loss of the last step that was done if its report was interrupted, None otherwise. The
            report is then called for that step again.
        interruptible: Returns a context in which a signal may interrupt the report; None where none may.
        passes: How the data are cut into passes, None where they are one.
        rate: The learning rate of every step, None where it is unknown or a step knows its own.
        windows: ``accumulate``, and under ``"skip"`` the number of updates before, as ``DiscardedSteps`` takes them.
        together: What several processes agree on, None in one.
        is_best: Called with (step, values) after the report measured values: whether they are the best so far.
        save_best: Called with (step, state) where they are, and the fit does not end there.

    Attributes:
        pending_report_loss: The loss of the step for which the report was called and did not return.
        numbers: What the report wants each step to compute, with the n of "every n steps" for each name.
        wants: Returns whether the report of any process is to be called for a step.
        takes_results: Whether ``ran`` is to be called.

    Raises:
        TypeError: If the report is not callable with three arguments, or not a valid report.
        ValueError: If it watches a value that nothing in it measures.
    """

    def __init__(
        self,
        report: Callable[..., Any] | None,
        total: int | None,
        done: int = 0,
        before: Any = 0,
        mode: str = "ignore",
        pending_report_loss: float | None = None,
        interruptible: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
        passes: PassLength | None = None,
        rate: float | None = None,
        windows: tuple[int, int] = (1, 0),
        together: Agreement | None = None,
        is_best: Callable[[int, Mapping[str, float]], bool] = lambda step, values: False,
        save_best: Callable[[int, Any], None] = lambda step, state: None,
    ) -> None:
        if report is not None:
            check_report(report, "fit")
            _check_watched(report)
        self._together, self._is_best, self._save_best = together, is_best, save_best
        self.numbers = numbers_of(report) if together is None else together.numbers
        self.wants: Callable[[int], bool] = self._wants_here if together is None else together.wanted
        self._report, self._rate = report, rate
        self._wants, self._block = member(report, "wants"), member(report, "block")
        self._begin, self._end = member(report, "begin"), member(report, "end")
        self._compiling = member(report, "compiling")
        self._compiled: Any = None  # what the report's `compiling` returned
        self._waiting: list[StepResults] = []
        self._steps = 0
        self._next = time.monotonic() + _PATIENCE
        self._total, self._done, self._before, self._raises = total, done, before, mode == "raise"
        self._discarded = DiscardedSteps(*windows) if mode == "skip" else None
        self.takes_results: bool = self._block is not None or self._discarded is not None
        self.pending_report_loss, self._interruptible = pending_report_loss, interruptible
        nothing_more = not isinstance(report, Composite) and not names_of(report, "measures") and self._block is None
        self._is_function = nothing_more and together is None and interruptible is None
        self._asked = self._wanted = done if pending_report_loss is None else done - 1
        self._clock = time.perf_counter()
        self._seconds = 0.0  # of compilation since then
        self._passes = passes
        self._over = False  # a step was not finite and is discarded, as are those dispatched after it

    def begin(self, now: Callable[[], Any]) -> None:
        """Call the report's ``begin``; ``now`` returns the state before the first step."""
        self._clock = time.perf_counter()
        if self._begin is not None:
            self._begin(self._done + 1, self._total, measured_by_call(self._report), 1, now())

    def ahead(self, done: int, most: int) -> int:
        """Return how many steps after those done may run before the report is called, at most ``most``."""
        if self._report is None:
            return most
        if self._wants is None:
            return 1
        if self._total is not None:
            # Steps after the last one are not asked about; a loader may yield more items than it said.
            most = min(most, max(self._total - done, 0))
            if not most:
                return 1
        while self._wanted <= done and self._asked < done + most:
            self._ask()
        return min(self._wanted - done, most) if self._wanted > done else most

    def next_call(self, done: int, most: int) -> tuple[int, bool]:
        """Return what ``ahead`` does, and whether the report of this process is then called."""
        count = self.ahead(done, most)
        beyond = self._total is not None and done + count > self._total  # not asked about before there is such a step
        return count, self._report is not None and (beyond or self._wants_here(done + count))

    def _wants_here(self, step: int) -> bool:
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
        """Take the results of a dispatch, which may not be done yet."""
        if self._discarded is not None:
            self._discarded.ran(ran)
        if self._block is None:
            return
        self._waiting.append(ran)
        self._steps += ran.steps
        if self._steps >= _BLOCK or time.monotonic() >= self._next:
            ready = bisect.bisect_left(self._waiting, True, key=lambda ran: not ran.losses.is_ready())
            self._deliver(ready)

    def stops(self, step: int, loss: Any, state: Any) -> bool:
        """Call the report, and return whether it raised EarlyStop. Waits for the step to be done."""
        if self._waiting:
            self._deliver(len(self._waiting))
        values, stops = None, False
        if self._together is None or self._wants_here(step):
            self.pending_report_loss = loss = float(loss)
            if self._interruptible is None:
                values, stops = self._call(step, loss, state)
            else:
                with self._interruptible():
                    values, stops = self._call(step, loss, state)
            self.pending_report_loss = None
        best = bool(values) and self._is_best(step, values or {})
        if self._together is not None:
            stops, best = self._together.reported(step, stops=stops, best=best)
        if best and not stops:  # the last step is saved anyway
            self._save_best(step, state)
        self._clock, self._seconds = time.perf_counter(), 0.0  # an evaluation does not count as part of a step
        return stops

    def _calls_function(self, step: int, loss: Any, state: Any) -> bool:
        """Do what ``stops`` does where nothing but a call comes of it."""
        report: Any = self._report
        self.pending_report_loss = loss = float(loss)
        try:
            value = report(step, loss, state)
        except EarlyStop:
            self.pending_report_loss = None
            return True
        if value is not None:
            check_returned(report, value, state)
        self.pending_report_loss = None
        return False

    def _call(self, step: int, loss: float, state: Any) -> tuple[Mapping[str, float] | None, bool]:
        """Call the report, and return what it measured, and whether it raised EarlyStop."""
        assert self._report is not None
        if isinstance(self._report, Composite):
            values, stops = self._report.call_all(step, loss, state)
            return values, bool(stops)
        try:
            value = self._report(step, loss, state)
            return None if value is None else check_returned(self._report, value, state), False
        except EarlyStop:
            return None, True

    def stops_at(self, step: int, loss: Any, now: Callable[[], TrainState]) -> bool:
        """Call the report with the state of ``now``, if it is read, as ``stops``. A state that is kept stays valid."""
        state = TrainState.later(now)
        kept = weakref.ref(state)
        try:
            return self._calls_function(step, loss, state) if self._is_function else self.stops(step, loss, state)
        finally:
            del state
            outlives = kept()
            if outlives is not None:
                outlives.now()  # before the next step overwrites its memory

    def compiling(self, where: str) -> None:
        """Call the report's ``compiling``."""
        self._compiled = None if self._compiling is None else self._compiling(where)

    def compiled(self, seconds: float) -> None:
        """Note how long a program took to compile, and call what the report's ``compiling`` returned."""
        self._seconds += seconds
        compiled, self._compiled = self._compiled, None
        if callable(compiled):
            compiled(seconds)

    def finish(self, *, last: bool = False) -> None:
        """Pass on the values that are left, as they get ready; ``last`` says that the fit ends with them."""
        if self._discarded is not None:
            self._discarded.finish(last=last)
        while self._waiting:
            self._deliver(1)

    def returned(self, before: TrainState, after: TrainState) -> TrainState:
        """Return the state that ``fit`` returns, the one after its last step flushed; warn if no update was made."""
        if self._discarded is not None:
            self._discarded.returned(before, after)
        return after

    def end(self) -> None:
        """Call the report's ``end``."""
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
        for _, group in itertools.groupby(values if self._block is not None else (), lambda pair: pair[0].layout.kind):
            members = [(ran, own) for ran, own in group if len(own["loss"])]
            if members:
                assert self._block is not None
                self._block(members[0][0].first, self._joined(members, seconds))

    def _joined(self, members: list[tuple[StepResults, dict[str, Any]]], seconds: float) -> StepValues:
        """The values of a block, with the place of its steps in the state's life, their speed and their weights."""
        first, join = members[0][0].first, _join
        values = {name: join([own[name] for _, own in members]) for name in members[0][1]}
        n = len(values["loss"])
        examples = join([ran.counts(len(own["loss"])) for ran, own in members])
        good = values.pop("finite", None)
        values["step"] = np.arange(n) + (int(self._before) - self._done + first)
        values["step_time"] = np.full(n, seconds, np.float32)
        values["examples_per_step"] = np.where(np.isnan(examples), 1, examples).astype(np.int64)
        if not np.isnan(examples).any():
            values["examples_per_second"] = (examples / max(seconds, 1e-9)).astype(np.float32)
        weights = _weights(members, values["examples_per_step"])
        if self._rate is not None:
            values.setdefault("learning_rate", np.full(n, self._rate, np.float32))
        for name, every in self.numbers.items():
            not_computed = values["step"] % every != 0
            if not_computed.any():
                columns = {c: values[c] for c in values if c.startswith(NUMBERS[name])}
                values |= {c: np.ma.masked_array(column, not_computed) for c, column in columns.items()}
        if good is not None:
            values["skipped"] = good <= 0
            weights = {name: np.where(good <= 0, 0.0, weight) for name, weight in weights.items()}
            if "learning_rate" in values:  # the state has the rate of the update before
                values["learning_rate"] = np.where(good <= 0, np.nan, values["learning_rate"])
        values["loss_weight"] = weights["loss"]
        parts = [ran.layout.parts(ran.numbers, len(own["loss"])) for ran, own in members]
        stacked = jax.tree_util.tree_map(lambda *stacks: join(stacks), *parts)
        return StepValues(first, values, weights, stacked, self._passes)


def _join(arrays: Sequence[Any]) -> Any:
    masked = any(isinstance(array, np.ma.MaskedArray) for array in arrays)
    return (np.ma if masked else np).concatenate(arrays)


def _weights(members: list[tuple[StepResults, dict[str, Any]]], examples: Any) -> dict[str, Any]:
    """The weights of the loss and of the scalars that it returned, by name."""
    found: list[dict[str, Any]] = [ran.weights(len(own["loss"])) for ran, own in members]
    return {
        name: examples.astype(np.float64) if own is None else np.concatenate([weights[name] for weights in found])
        for name, own in found[0].items()
    }
