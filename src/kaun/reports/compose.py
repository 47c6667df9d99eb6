"""Reports made of other reports: ``every``, ``all_of`` and ``each_epoch``."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from types import FunctionType
from typing import Any

import numpy as np

from kaun._calls import explained, public, shown
from kaun._messages import locate
from kaun._report import (
    Composite,
    Report,
    ReportFunction,
    check_report,
    check_takes,
    measured_by_call,
    member,
    names_of,
    numbers_of,
)
from kaun._run import StepValues, check_returned, keeping, match_reports, report_kind, snapshot_reports
from kaun.data import stages_of
from kaun.errors import EarlyStop
from kaun.train import TrainState

__all__ = ["ValuesOf", "all_of", "each_epoch", "every", "steps_of_a_pass"]


class ValuesOf(dict[str, float]):
    """Values that a report measured of another state than that after the step; observers get that state with them."""

    def __init__(self, values: Mapping[str, float], state: TrainState) -> None:
        super().__init__(values)
        self.state = state


@explained("reports.every")
def every(n: int, f: Report | ReportFunction) -> Report:
    """Return the report that calls ``f`` after each ``n``-th step; ``fit`` does not wait for the device in between.

    If ``f`` itself has ``wants``, it is asked for those steps only (an ``each_epoch`` or ``validate`` runs at common
    multiples), and a logger (``jsonl``, ``csv``, ``tensorboard``, ``wandb``, ``mlflow``) writes the values of those
    steps only, besides what other reports measure. All else in ``f`` works as if it were passed to ``fit`` alone.
    Steps are those of the fit, from 1; a resumed run continues the count.

    Args:
        n: The number of steps from one call to the next, at least 1.
        f: Any report.

    Raises:
        TypeError: If ``n`` is not an int, or ``f`` is not callable with ``(step, loss, state)`` or not a valid report.
        ValueError: If ``n`` is less than 1.

    Examples:
        >>> from kaun import reports
        >>> report = reports.every(100, lambda step, loss, state: print(f"{step}: {loss:.3f}"))
        >>> [step for step in range(1, 301) if report.wants(step)]
        [100, 200, 300]
        >>> report(100, 0.25, None)
        100: 0.250
    """
    if isinstance(n, bool) or not isinstance(n, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"every expected a number of steps as an int, received {shown(n)}. Write every(100, report).")
    if n < 1:
        raise ValueError(f"every expected a number of steps of at least 1, received {n}. Write every(100, report).")
    check_report(f, "every")
    if isinstance(f, _AllOf):  # so that the reports outside also receive what one of them measures
        return _AllOf([_Every(n, report) for report in f.reports])
    return _Every(n, f)


@public
def all_of(*reports: Report | ReportFunction) -> Report:
    """Return the report that calls each of ``reports`` in the given order, after the steps that it wants.

    When one raises EarlyStop, the later ones that want this step are still called, so that a logger after a stopper
    does not miss the last step; then ``fit`` stops. Any other exception is raised at once. What one measures
    (``validate``) is passed to the others that observe (``progress``, ``history``), in any order. Without
    any reports it wants no step.

    Raises:
        TypeError: If one of them is not callable with ``(step, loss, state)`` or not a valid report.

    Examples:
        >>> from kaun import reports
        >>> history = reports.history()
        >>> report = reports.all_of(history, reports.every(50, lambda step, loss, state: print(step)))
        >>> [step for step in range(1, 101) if report.wants(step)]
        [50, 100]
    """
    for position, report in enumerate(reports, start=1):
        check_report(report, "all_of", f"a report as argument {position}")
    return _AllOf(
        [inner for report in reports for inner in (report.reports if isinstance(report, _AllOf) else [report])]
    )


@explained("reports.each_epoch")
def each_epoch(train: Sized, f: Callable[[int, TrainState], None]) -> Report:
    """Return the report that calls ``f(epoch, state)`` after each pass over ``train`` within one ``fit``.

    Args:
        train: The pipeline of one epoch, of known length; ``fit`` gets ``train.epochs(n)``. Of that, one epoch counts.
        f: Called with the number of the pass in this fit, from 1 (a resumed run continues the count), and the
            TrainState after it; may raise EarlyStop.

    Raises:
        TypeError: If the length of ``train`` is unknown, or ``f`` is not callable with ``(epoch, state)``.
        ValueError: If ``train`` is empty, or is a part of several epochs.

    Examples:
        >>> from kaun import reports
        >>> train = ["batch"] * 40
        >>> report = reports.each_epoch(train, lambda epoch, state: print(f"epoch {epoch}"))
        >>> for step in range(1, 41 + 40):
        ...     if report.wants(step):
        ...         report(step, 0.5, None)
        epoch 1
        epoch 2
    """
    if isinstance(train, int):
        raise TypeError(
            f"each_epoch expected the pipeline of one epoch first, received {train!r}. Write each_epoch(train, f), "
            f"where fit gets train.epochs(n); for each {train} steps every({train}, report)."
        )
    check_takes("each_epoch", "a function", f, "epoch, state")
    return _EachEpoch(steps_of_a_pass("each_epoch", train, "every(steps_per_epoch, report)"), f)


def steps_of_a_pass(where: str, train: Sized, fix: str) -> int:
    """Return the length of a one-epoch pipeline, which must be known and not 0; of ``epochs(n)`` that of one epoch."""
    try:
        length = len(train)
    except TypeError:
        raise TypeError(
            f"{where} needs the number of steps in one pass, received a {type(train).__name__} of unknown length. "
            f"Count the steps yourself: {fix}."
        ) from None
    if length == 0:
        raise ValueError(f"{where} expected the pipeline of one epoch, received an empty one (length 0).")
    return _one_pass(where, train, length)


def _one_pass(where: str, train: Any, length: int) -> int:
    stages = stages_of(train)
    first = next((i for i, stage in enumerate(stages) if stage.name == "Data.epochs"), None)
    if first is None:
        return length
    epochs, before = 1, stages[first - 1].length
    for stage in stages[first:]:
        epochs *= stage.given["n"] if stage.name == "Data.epochs" else 1
        if before is None or stage.length != epochs * before:  # a stage after it cuts or joins items
            raise ValueError(
                f"{where} expected the pipeline of one epoch, received {train!r}, whose items are not whole epochs. "
                "Pass the pipeline of which fit gets epochs(n): each=train, with trainer.fit(state, train.epochs(n))."
            )
    return length // epochs


def _shown(report: Any) -> str:
    return locate(report) if isinstance(report, FunctionType) else repr(report)


class _Every(Report):
    def __init__(self, n: int, f: Report | ReportFunction) -> None:
        self._n, self._f = n, f
        self.__name__ = report_kind(f)
        self.measures, self.watches, self.numbers = measured_by_call(f), names_of(f, "watches"), numbers_of(f)
        self.adds_values = _adds_values(f)
        self.path = getattr(f, "path", "")
        self._wants, self._begin = member(f, "wants"), member(f, "begin")
        # All else is that of f. A member that f lacks stays the default, for which `fit` does no work.
        for name in ("block", "end", "compiling", "observe", "snapshot", "restore"):
            if (method := member(f, name)) is not None:
                setattr(self, name, method)

    def __repr__(self) -> str:
        return f"every({self._n}, {_shown(self._f)})"

    def wants(self, step: int) -> bool:
        return step % self._n == 0 and (self._wants is None or bool(self._wants(step)))

    def __call__(self, step: int, loss: float, state: TrainState, /) -> Any:
        # fit calls for wanted steps only; a user's own function may call it after each step.
        if step % self._n:
            return None
        value = self._f(step, loss, state)
        check_returned(self._f, value, state)
        return value

    def begin(
        self, first_step: int, total: int | None, measured: frozenset[str] = frozenset(), every: int = 1,
        state: TrainState | None = None, /,
    ) -> None:  # fmt: skip
        if self._begin is not None:
            self._begin(first_step, total, measured, math.lcm(self._n, every), state)


class _AllOf(Composite):
    def __init__(self, reports: Sequence[Report | ReportFunction]) -> None:
        self.reports = reports
        self._measured = frozenset[str]().union(*[measured_by_call(report) for report in reports])
        self.measures = self._measured
        self.watches = frozenset[str]().union(*[names_of(report, "watches") for report in reports])
        numbers: dict[str, int] = {}
        for name, n in (pair for report in reports for pair in numbers_of(report).items()):
            numbers[name] = math.gcd(n, numbers.get(name, 0))
        self.numbers = numbers
        # The reports that answered True, by step, until its call; one dict for each running fit (fits may nest).
        self._wanted: list[dict[int, list[Report | ReportFunction]]] = [{}]
        self._wants = [(report, member(report, "wants")) for report in reports]
        self._observers = _members(reports, "observe")
        self._begins, self._ends = _members(reports, "begin"), _members(reports, "end")
        self._compilings = _members(reports, "compiling")
        adding = _members([report for report in reports if _adds_values(report)], "block")
        blocks = _members([report for report in reports if not _adds_values(report)], "block")
        if adding or blocks:  # only then does `fit` collect the values
            self.block = functools.partial(_hand_out, [block for _, block in adding], [block for _, block in blocks])
        if kept := keeping(self):  # methods of its own would be a cycle, which keeps states alive
            self.snapshot = functools.partial(snapshot_reports, kept)
            self.restore = functools.partial(_restore, kept)

    def __repr__(self) -> str:
        return f"all_of({', '.join(map(_shown, self.reports))})"

    def wants(self, step: int) -> bool:
        wanted = [report for report, wants in self._wants if wants is None or wants(step)]
        if wanted:
            self._wanted[-1][step] = wanted
        return bool(wanted)

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        _raise_first(self.call_all(step, loss, state)[1])

    def call_all(self, step: int, loss: float, state: TrainState) -> tuple[dict[str, float], list[EarlyStop]]:
        wanted = self._wanted[-1].pop(step, None)
        if wanted is None:
            raise RuntimeError(
                f"all_of(...) was called for step {step}, but its wants({step}) was not called before, so it does "
                "not know which reports to call. Do not call it from your own function; pass that function to it:\n"
                "    trainer.fit(state, data, report=reports.all_of(..., your_function))"
            )
        stops: list[EarlyStop] = []
        measured: list[tuple[Any, Any]] = []
        for report in wanted:
            try:
                values = check_returned(report, report(step, loss, state), state)
                if values is not None:
                    measured.append((report, values))
            except EarlyStop as err:
                stops.append(err.with_traceback(None))
        found: dict[str, float] = {}
        for source, values in measured:
            of = values.state if isinstance(values, ValuesOf) else state
            stops += _observed(self._observers, step, values, of, source)
            found = {**values, **found}  # of two values of one name the first counts, as it does for the observers
        return found, stops

    def observe(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        _raise_first(_observed(self._observers, step, values, state, None))

    def begin(
        self, first_step: int, total: int | None, measured: frozenset[str] = frozenset(), every: int = 1,
        state: TrainState | None = None, /,
    ) -> None:  # fmt: skip
        self._wanted.append({})
        for _, begin in self._begins:
            begin(first_step, total, measured | self._measured, every, state)

    def compiling(self, where: str) -> Callable[[float], None]:
        compiled = [done for done in [compiling(where) for _, compiling in self._compilings] if callable(done)]

        def call_all(seconds: float) -> None:
            for done in compiled:
                done(seconds)

        return call_all

    def end(self) -> None:
        if len(self._wanted) > 1:
            self._wanted.pop()
        with contextlib.ExitStack() as stack:  # each gets its end, also when another's raises
            for _, end in reversed(self._ends):
                stack.callback(end)


class _EachEpoch(Report):
    def __init__(self, length: int, f: Callable[[int, TrainState], None]) -> None:
        self._length = length
        self._f = f

    def __repr__(self) -> str:
        return f"each_epoch({self._length} steps, {_shown(self._f)})"

    def wants(self, step: int) -> bool:
        return step % self._length == 0

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        if self.wants(step):
            check_returned(self._f, self._f(step // self._length, state), state)


def _members(reports: Iterable[Any], name: str) -> list[tuple[Any, Callable[..., Any]]]:
    """The reports that have a method, with it."""
    return [(report, method) for report in reports if (method := member(report, name)) is not None]


def _adds_values(report: Any) -> bool:
    """Whether the blocks of the others have to wait for what its own returns."""
    return report.adds_values if isinstance(report, _Every) else bool(names_of(report, "measures"))


def _hand_out(
    adding: list[Callable[..., Any]],
    blocks: list[Callable[..., Any]],
    first_step: int,
    values: Mapping[str, np.ndarray],
) -> None:
    for added in [block(first_step, values) for block in adding]:
        values = StepValues.of(first_step, values).replaced(added or {})
    for block in blocks:
        block(first_step, values)


def _observed(
    observers: Iterable[tuple[Any, Callable[..., Any]]], step: int, values: Any, state: TrainState, source: Any
) -> list[EarlyStop]:
    """Give values to all observers but the one that measured them; the EarlyStops that they raised."""
    stops: list[EarlyStop] = []
    for report, observe in observers:
        try:
            if report is not source:
                observe(step, values, state)
        except EarlyStop as err:
            stops.append(err.with_traceback(None))
    return stops


def _raise_first(stops: list[EarlyStop]) -> None:
    try:
        if stops:
            raise stops[0]
    finally:
        # A cycle of an exception and its frames would keep the state in these frames, and fit would copy it.
        stops.clear()


def _restore(reports: Sequence[Any], values: Mapping[str, Any]) -> None:
    matched, gone = match_reports(reports, values)
    if gone:
        raise ValueError("The reports are not those of the run that was saved:\n  " + "\n  ".join(gone))
    for report, kept in matched:
        restore = member(report, "restore")
        assert restore is not None
        restore(kept)
