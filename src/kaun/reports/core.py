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
    ``values["loss"]``, float32 of shape (n,), is always there. It never makes ``fit`` wait.
``begin(first_step, total) -> None``
    Called when a fit starts, with the number of its first step (1, unless a run is resumed) and the number of its last
    step, None where the data's length is unknown.
``end() -> None``
    Called when the fit ends, whichever way: at the end of the data, by EarlyStop, by any exception.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sized
from typing import Any

import numpy as np

from kaun.errors import EarlyStop, locate
from kaun.train import Report, TrainState

__all__ = ["all_of", "each_epoch", "every"]

Block = Callable[[int, Mapping[str, np.ndarray]], None]


def every(n: int, f: Report) -> Report:
    """The report that calls ``f`` after each ``n``-th step; in between, ``fit`` never waits for the device.

    Where ``f`` itself has ``wants`` it is asked for those steps only; its ``block``, ``begin`` and ``end``, where it
    has them, are called as if it were passed to ``fit`` alone.

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
    return _Every(n, f)


def all_of(*reports: Report) -> Report:
    """The report that calls each of ``reports`` in the given order, after the steps that it wants.

    When one raises EarlyStop, the later ones that want this step are still called, so that a logger after a stopper
    does not miss the last step; then ``fit`` stops. Any other exception goes through at once. ``block``, ``begin`` and
    ``end`` go to those that have them. Without any reports it wants no step.

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
    return _AllOf(reports)


def each_epoch(train: Sized, f: Callable[[int, TrainState], None]) -> Report:
    """The report that calls ``f(epoch, state)`` after each pass over ``train`` within one ``fit``.

    Arguments:
        train: the pipeline of one epoch, of known length: ``fit`` gets ``train.epochs(n)``.
        f: called with the number of the pass (1-based) and the TrainState after it; may raise EarlyStop.

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
    try:
        length = len(train)
    except TypeError:
        raise TypeError(
            f"each_epoch needs the number of steps in one pass, received a {type(train).__name__} of unknown length. "
            "Count the steps yourself: every(steps_per_epoch, report)."
        ) from None
    if length == 0:
        raise ValueError("each_epoch expected the pipeline of one epoch, received an empty one (length 0).")
    return _EachEpoch(length, f)


class _Every:
    block: Block  # there only where f has one: to collect the values costs

    def __init__(self, n: int, f: Report) -> None:
        self._n = n
        self._f = f
        if (block := getattr(f, "block", None)) is not None:
            self.block = block

    def wants(self, step: int) -> bool:
        return step % self._n == 0 and _wants(self._f, step)

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        # fit calls for wanted steps only; a user's own function may hand on every one.
        if step % self._n == 0:
            self._f(step, loss, state)

    def begin(self, first_step: int, total: int | None) -> None:
        _begin(self._f, first_step, total)

    def end(self) -> None:
        _end(self._f)


class _AllOf:
    block: Block  # there only where one of the reports has one: to collect the values costs

    def __init__(self, reports: tuple[Report, ...]) -> None:
        self._reports = reports
        # Who answered True, by step, until the step's call; one dict for each fit that is running (fits may nest).
        self._wanted: list[dict[int, list[Report]]] = [{}]
        blocks: list[Block] = [b for b in (getattr(r, "block", None) for r in reports) if b is not None]
        if blocks:

            def block(first_step: int, values: Mapping[str, np.ndarray]) -> None:
                for each in blocks:
                    each(first_step, values)

            self.block = block

    def wants(self, step: int) -> bool:
        wanted = [report for report in self._reports if _wants(report, step)]
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
        stop: EarlyStop | None = None
        for report in wanted:
            try:
                report(step, loss, state)
            except EarlyStop as err:
                stop = err if stop is None else stop
        if stop is not None:
            raise stop

    def begin(self, first_step: int, total: int | None) -> None:
        self._wanted.append({})
        for report in self._reports:
            _begin(report, first_step, total)

    def end(self) -> None:
        if len(self._wanted) > 1:
            self._wanted.pop()
        with contextlib.ExitStack() as stack:  # each gets its end, also when another's raises
            for report in reversed(self._reports):
                stack.callback(_end, report)


class _EachEpoch:
    def __init__(self, length: int, f: Callable[[int, TrainState], None]) -> None:
        self._length = length
        self._f = f

    def wants(self, step: int) -> bool:
        return step % self._length == 0

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        if self.wants(step):
            self._f(step // self._length, state)


def _wants(report: Report, step: int) -> bool:
    wants = getattr(report, "wants", None)
    return wants is None or bool(wants(step))


def _begin(report: Report, first_step: int, total: int | None) -> None:
    if (begin := getattr(report, "begin", None)) is not None:
        begin(first_step, total)


def _end(report: Report) -> None:
    if (end := getattr(report, "end", None)) is not None:
        end()


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
