"""The report protocol, and the reports made of other reports: ``every``, ``all_of``, ``each_epoch``.

A report is a function ``(step, loss, state) -> None``, and a plain function is called after every step. An object that
can be called so may have any of these methods too; ``fit`` looks for each and does without those that are missing:

``wants(step) -> bool``
    Asked once for each step, ahead of it and in order; the report is called after exactly the steps it answered True
    to. ``fit`` may ask for several steps ahead before it calls the report for the first of them. Between two steps
    that are wanted ``fit`` never waits for the device.
``block(first_step, values) -> None``
    Called once for each finished block of consecutive steps, in order and without gaps, ahead of the report's call
    for the block's last step. ``values`` holds one host array for each thing recorded, one number for each step;
    ``values["loss"]``, float32 of shape (n,), is always there, and ``values["step"]``, int64, is ``state.step`` after
    each step. It never makes ``fit`` wait.
``thinned(first_step, values, n) -> None``
    Called in place of ``block`` where the report stands in ``every(n, report)``: a whole block, of whose steps the
    report is to take the multiples of ``n``. A report without it gets ``block`` there, too.
``begin(first_step, total) -> None``
    Called when a fit starts, with the number of its first step (1, unless a run is resumed) and the number of its last
    step, None where the data's length is unknown.
``end() -> None``
    Called when the fit ends, whichever way: at the end of the data, by EarlyStop, by any exception.
``compiled(seconds) -> None``
    Called when a program was compiled within the fit, ahead of the block of the steps that it ran: how long that took.
``snapshot() -> dict[str, Any]``
    Called between steps when a checkpoint is made, when every block up to there was handed over: what the report needs
    to go on after a restart, as JSON values, NumPy arrays and TrainStates by name.
``restore(values) -> None``
    Called with what ``snapshot`` gave, ahead of the ``begin`` of the fit that goes on. Where the run was interrupted in
    the report's call for a step, the report is called for that step again, ahead of the first block.

Reports of one ``all_of`` hand values to each other, by name, in whatever order they stand:

``measures``
    The names of the values that a report measures. Its call returns them, a mapping from names to floats, or None.
    What a report without ``measures`` returns is not looked at.
``observe(step, values) -> None``
    Called with the values that another report measured after this step, when all reports were called for the step;
    also where this one does not want it. It may raise EarlyStop.
``judge(step, values, state) -> None``
    In place of ``observe``, where the report needs the state after the step too. To keep it costs a copy, not to look
    at it nothing.
``watches``
    The names without which a report cannot work. ``fit`` refuses to start unless one of its reports measures each.
``beside(measured) -> None``
    Called ahead of ``begin`` with the names of all that the reports measure.
``adds(first_step, values) -> dict[str, np.ndarray]``
    Called with each block ahead of all reports' ``block``: arrays of shape (n,), which these find in their ``values``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import numpy as np

from kaun import tree
from kaun._messages import locate
from kaun.errors import EarlyStop
from kaun.reports import report_state
from kaun.train import Report, TrainState

__all__ = ["all_of", "each_epoch", "every"]

Block = Callable[[int, Mapping[str, np.ndarray]], None]
Thinned = Callable[[int, Mapping[str, np.ndarray], int], None]
Adds = Callable[[int, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def every(n: int, f: Report) -> Report:
    """The report that calls ``f`` after each ``n``-th step; in between, ``fit`` never waits for the device.

    Where ``f`` itself has ``wants`` it is asked for those steps only (an ``each_epoch`` or ``validate`` runs at common
    multiples), and a logger (``jsonl``, ``csv``, ``tensorboard``, ``wandb``, ``mlflow``) writes the values of those
    steps only, besides what other reports measure; everything else that it has of the report protocol works as if it
    were passed to ``fit`` alone. Steps are those of the fit, from 1; a resumed run counts on.

    Arguments:
        n: the number of steps from one call to the next, at least 1.
        f: any report.

    Raises:
        TypeError: when ``n`` is not an int, or ``f`` not callable with ``(step, loss, state)``.
        ValueError: when ``n`` is less than 1.

    >>> from kaun import reports
    >>> report = reports.every(100, lambda step, loss, state: print(f"{step}: {loss:.3f}"))
    >>> [step for step in range(1, 301) if report.wants(step)]
    [100, 200, 300]
    >>> report(100, 0.25, None)
    100: 0.250
    """
    if isinstance(n, bool) or not isinstance(n, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"every expected a number of steps as an int, received {n!r}. Write every(100, report).")
    if n < 1:
        raise ValueError(f"every expected a number of steps of at least 1, received {n}. Write every(100, report).")
    _must_take("every", "a report", f, "step, loss, state")
    if isinstance(f, _AllOf):  # so that what one of them measures is handed to reports outside, too
        return _AllOf(tuple([_Every(n, report) for report in f.reports]))
    return _Every(n, f)


def all_of(*reports: Report) -> Report:
    """The report that calls each of ``reports`` in the given order, after the steps that it wants.

    When one raises EarlyStop, the later ones that want this step are still called, so that a logger after a stopper
    does not miss the last step; then ``fit`` stops. Any other exception goes through at once. What one measures
    (``validate``, say) is handed to the others that observe (``progress``, ``history``), whatever their order. Without
    any reports it wants no step.

    Raises:
        TypeError: when one of them is not callable with ``(step, loss, state)``.

    >>> from kaun import reports
    >>> history = reports.history()
    >>> report = reports.all_of(history, reports.every(50, lambda step, loss, state: print(step)))
    >>> [step for step in range(1, 101) if report.wants(step)]
    [50, 100]
    """
    for position, report in enumerate(reports, start=1):
        _must_take("all_of", f"a report as argument {position}", report, "step, loss, state")
    flat = [inner for report in reports for inner in (report.reports if isinstance(report, _AllOf) else (report,))]
    return _AllOf(tuple(flat))


def each_epoch(train: Sized, f: Callable[[int, TrainState], None]) -> Report:
    """The report that calls ``f(epoch, state)`` after each pass over ``train`` within one ``fit``.

    Arguments:
        train: the pipeline of one epoch, of known length: ``fit`` gets ``train.epochs(n)``.
        f: called with the number of the pass in this fit, from 1 (a resumed run counts on), and the TrainState after
            it; may raise EarlyStop.

    Raises:
        TypeError: when the length of ``train`` is unknown, or ``f`` not callable with ``(epoch, state)``.
        ValueError: when ``train`` is empty.

    >>> from kaun import reports
    >>> train = ["batch"] * 40
    >>> report = reports.each_epoch(train, lambda epoch, state: print(f"epoch {epoch}"))
    >>> for step in range(1, 41 + 40):
    ...     if report.wants(step):
    ...         report(step, 0.5, None)
    epoch 1
    epoch 2
    """
    _must_take("each_epoch", "a function", f, "epoch, state")
    return _EachEpoch(steps_of_a_pass("each_epoch", train, "every(steps_per_epoch, report)"), f)


def steps_of_a_pass(where: str, train: Sized, fix: str) -> int:
    """The length of a one-epoch pipeline, which must be known and not 0."""
    try:
        length = len(train)
    except TypeError:
        raise TypeError(
            f"{where} needs the number of steps in one pass, received a {type(train).__name__} of unknown length. "
            f"Count the steps yourself: {fix}."
        ) from None
    if length == 0:
        raise ValueError(f"{where} expected the pipeline of one epoch, received an empty one (length 0).")
    return length


class _Every:
    # Each there only where f has it: to collect values costs, and what has nothing to restore is not missed.
    block: Block
    thinned: Thinned
    judge: Callable[[int, Mapping[str, float], TrainState], None]
    adds: Adds
    snapshot: Callable[[], dict[str, Any]]
    restore: Callable[[Mapping[str, Any]], None]

    def __init__(self, n: int, f: Report) -> None:
        self._n = n
        self._f = f
        self.__name__ = report_state.report_kind(f)
        self.measures, self.watches = names_of(f, "measures"), names_of(f, "watches")
        for name in ("judge", "adds", "snapshot", "restore"):
            if (method := getattr(f, name, None)) is not None:
                setattr(self, name, method)
        if (thinned := getattr(f, "thinned", None)) is not None:
            self.block = lambda first_step, values: thinned(first_step, values, n)
            self.thinned = lambda first_step, values, m: thinned(first_step, values, math.lcm(m, n))
        elif (block := getattr(f, "block", None)) is not None:
            self.block = block

    def wants(self, step: int) -> bool:
        return step % self._n == 0 and _wants(self._f, step)

    def __call__(self, step: int, loss: float, state: TrainState, /) -> Any:
        # fit calls for wanted steps only; a user's own function may hand on every one.
        return self._f(step, loss, state) if step % self._n == 0 else None

    def observe(self, step: int, values: Mapping[str, float]) -> None:
        _tell(self._f, "observe", step, values)

    def beside(self, measured: frozenset[str]) -> None:
        _tell(self._f, "beside", measured)

    def begin(self, first_step: int, total: int | None) -> None:
        _tell(self._f, "begin", first_step, total)

    def compiled(self, seconds: float) -> None:
        _tell(self._f, "compiled", seconds)

    def end(self) -> None:
        _tell(self._f, "end")


class _AllOf:
    block: Block  # there only where one of the reports has one: to collect the values costs
    snapshot: Callable[[], dict[str, Any]]
    restore: Callable[[Mapping[str, Any]], None]

    def __init__(self, reports: tuple[Report, ...]) -> None:
        self.reports = reports
        self.measures = frozenset[str]().union(*[names_of(report, "measures") for report in reports])
        self.watches = frozenset[str]().union(*[names_of(report, "watches") for report in reports])
        # Who answered True, by step, until the step's call; one dict for each fit that is running (fits may nest).
        self._wanted: list[dict[int, list[Report]]] = [{}]
        blocks: list[Block] = [b for b in (getattr(r, "block", None) for r in reports) if b is not None]
        adds: list[Adds] = [a for a in (getattr(r, "adds", None) for r in reports) if a is not None]
        if blocks:
            self.block = functools.partial(_hand_out, blocks, adds)
        stateful = [report for report in reports if hasattr(report, "snapshot")]
        if stateful:
            self.snapshot = functools.partial(report_state.snapshot, stateful)
            self.restore = functools.partial(report_state.restore, stateful)

    def wants(self, step: int) -> bool:
        wanted = [report for report in self.reports if _wants(report, step)]
        if wanted:
            self._wanted[-1][step] = wanted
        return bool(wanted)

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        wanted = self._wanted[-1].pop(step, None)
        if wanted is None:
            raise RuntimeError(
                f"all_of(...) was called for step {step}, which it was not asked about, so its reports cannot all be "
                "served. Do not call it from a function of your own; give that function to it, and it to fit:\n"
                "    trainer.fit(state, data, report=reports.all_of(..., your_function))"
            )
        stops: list[EarlyStop] = []
        measured: list[tuple[Report, Any]] = []
        for report in wanted:
            try:
                values: Any = report(step, loss, state)
                if values is not None and names_of(report, "measures"):
                    measured.append((report, _named(values, report)))
            except EarlyStop as err:
                stops.append(err.with_traceback(None))
        for report, values in measured:
            stops += _observed(step, values, [other for other in self.reports if other is not report], state)
        _raise_first(stops)

    def observe(self, step: int, values: Mapping[str, float]) -> None:
        _raise_first(_observed(step, values, self.reports, None))

    def judge(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        _raise_first(_observed(step, values, self.reports, state))

    def begin(self, first_step: int, total: int | None) -> None:
        self._wanted.append({})
        for report in self.reports:
            _tell(report, "beside", self.measures)
            _tell(report, "begin", first_step, total)

    def compiled(self, seconds: float) -> None:
        for report in self.reports:
            _tell(report, "compiled", seconds)

    def end(self) -> None:
        if len(self._wanted) > 1:
            self._wanted.pop()
        with contextlib.ExitStack() as stack:  # each gets its end, also when another's raises
            for report in reversed(self.reports):
                stack.callback(_tell, report, "end")


class _EachEpoch:
    def __init__(self, length: int, f: Callable[[int, TrainState], None]) -> None:
        self._length = length
        self._f = f

    def wants(self, step: int) -> bool:
        return step % self._length == 0

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        if self.wants(step):
            self._f(step // self._length, state)


def _hand_out(blocks: list[Block], adds: list[Adds], first_step: int, values: Mapping[str, np.ndarray]) -> None:
    for added in [add(first_step, values) for add in adds]:
        values = {**values, **added}
    for block in blocks:
        block(first_step, values)


def _observed(
    step: int, values: Mapping[str, float], reports: Iterable[Report], state: TrainState | None
) -> list[EarlyStop]:
    stops: list[EarlyStop] = []
    for report in reports:
        try:
            if state is not None and hasattr(report, "judge"):
                _tell(report, "judge", step, values, state)
            else:
                _tell(report, "observe", step, values)
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


def _wants(report: Report, step: int) -> bool:
    wants = getattr(report, "wants", None)
    return wants is None or bool(wants(step))


def _named(values: Any, report: Any) -> Mapping[str, float]:
    if not isinstance(values, Mapping):
        raise TypeError(
            f"A report with `measures` must return a dict from these names to floats, or None; {locate(report)} "
            f'returned {tree.describe(values)}. Write return {{"{min(names_of(report, "measures"))}": value}}.'
        )
    return values


def names_of(report: Any, what: str) -> frozenset[str]:
    """The names in a report's ``measures`` or ``watches``, none where it has no such attribute."""
    return frozenset(getattr(report, what, ()))


def _tell(report: Any, method: str, *values: Any) -> None:
    """Call a method of the protocol, where the report has it."""
    if (found := getattr(report, method, None)) is not None:
        found(*values)


def _must_take(where: str, what: str, f: Any, arguments: str) -> None:
    """Refuse what cannot be called with these arguments now, not after the first thousand steps."""
    if not callable(f):
        raise TypeError(f"{where} expected {what}, callable as ({arguments}), received {f!r}.")
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError:
        raise TypeError(
            f"{where} expected {what}, callable as ({arguments}), received {locate(f)}, which takes {signature}. "
            f"Write def report({arguments}): ..., or call it first if it makes a report."
        ) from None
