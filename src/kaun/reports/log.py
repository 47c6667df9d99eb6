"""What the loggers share: rows, one for each step, made of blocks and of what other reports measured.

The loggers are ``files``, ``tensorboard``, ``wandb`` and ``mlflow``. With ``history`` they share ``epochs``, the
averages over a pass.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from kaun._messages import warn
from kaun._processes import is_first
from kaun._report import Report
from kaun._run import StepValues, saved_values
from kaun.reports.epochs import PassMeans
from kaun.state import count_steps
from kaun.train import TrainState

__all__ = ["Log", "Row", "Sink", "decoded", "encoded", "loss_array"]

Row = dict[str, Any]  # "step", an int, first; then float, int or bool by name

_NOT_LOGGED = ("step", "examples_per_step", "loss_weight")
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Sink(Protocol):
    """Where rows are written.

    Attributes:
        name: The name of the report.
        run: The id of the run that is written to; empty for files.
        path: The file or folder; empty for services.
    """

    name: str
    path: str
    run: str

    def check(self) -> None:
        """Raise OSError, with the path, where nothing can be written."""
        ...

    def cut(self, step: int) -> tuple[int, int] | None:
        """Open it, and remove the rows of this step and later ones, which come again or belong to an earlier run.

        Returns:
            The first and the last step that are removed, or that stay and make it ignore new values of these steps;
            None where there is none, or it cannot tell.
        """
        ...

    def write(self, rows: Sequence[Row]) -> None:
        """Write rows of ascending steps, so that others can read them."""
        ...

    def sync(self) -> None:
        """Make sure that what was written survives a crash."""
        ...

    def close(self, error: BaseException | None) -> None:
        """Close it; ``error`` is the exception that ended the fit. Also called if it was not opened."""
        ...


class _InFirstProcess:
    """A sink that is written to in process 0 alone, where a program has several."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self.name, self.path = sink, sink.name, sink.path

    @property
    def run(self) -> str:
        return self._sink.run

    @run.setter
    def run(self, value: str) -> None:
        self._sink.run = value

    def check(self) -> None:
        if is_first():
            self._sink.check()

    def cut(self, step: int) -> tuple[int, int] | None:
        return self._sink.cut(step) if is_first() else None

    def write(self, rows: Sequence[Row]) -> None:
        if is_first():
            self._sink.write(rows)

    def sync(self) -> None:
        if is_first():
            self._sink.sync()

    def close(self, error: BaseException | None) -> None:
        if is_first():
            self._sink.close(error)


class Log(Report):
    """The report that writes a row for each step to ``sink``, in process 0 alone.

    A row is held back until something of a later step comes, so that it contains what is measured after its step.

    Args:
        sink: Where rows are written.
        epochs: Whether the row of the last step of each pass has the averages over the pass too.
    """

    __name__: str

    def __init__(self, sink: Sink, epochs: bool = False) -> None:
        self.__name__ = sink.name
        self.path: str = sink.path
        self._sink = _InFirstProcess(sink)
        self._fits = 0
        self._every = 1
        self._outer: BaseException | None = None
        self._open = False
        self._offset = 0  # from the fit's steps to those of the state
        self._names: set[str] = set()  # of the values in blocks
        self._row: Row | None = None  # the newest
        self._written = False  # whether that one is written
        self._means = PassMeans() if epochs else None  # of the pass that is running
        self._epoch, self._last = 1, 0  # its number, and its last step so far
        self._restored = False  # whether the next fit is resumed: it writes again what came after its checkpoint

    def __repr__(self) -> str:
        return f"{self.__name__}({repr(self.path) if self.path else ''})"

    def begin(
        self, first_step: int, total: int | None, measured: frozenset[str] = frozenset(), every: int = 1, *_: Any
    ) -> None:
        self._fits += 1
        if self._fits > 1:
            raise RuntimeError(
                f"{self._sink.name}(...) is used by a fit already, and a fit inside that one would overwrite its rows. "
                "Give the inner fit another report, with another path."
            )
        self._open, self._every = False, every
        if not self._restored:
            self._next_pass(1)
        self._outer = sys.exception()
        self._sink.check()

    def end(self) -> None:
        self._fits = max(0, self._fits - 1)
        if self._fits:
            return
        error = sys.exception()
        try:
            if self._open and self._means is not None and self._means.steps:
                self._average()
            self._put()
        finally:
            self._row, self._open, self._every = None, False, 1
            self._sink.close(error if error is not self._outer else None)

    def wants(self, step: int) -> bool:
        return False

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        # Called by a user's own function, which may never call `end`.
        after = count_steps(state) if hasattr(state, "step") else step
        self._add(step, {"loss": loss_array(loss), "step": np.array([after])}, 1)
        self._put()

    def block(self, first_step: int, values: Mapping[str, np.ndarray]) -> None:
        values = StepValues.of(first_step, values)
        if self._means is None:
            self._add(first_step, values, self._every)
            return
        for number, part, ends in values.by_pass():
            if number != self._epoch:
                self._next_pass(number)
            self._add(part.first_step, part, self._every)
            self._means.add(part)
            self._last = part.first_step + self._offset + len(part["loss"]) - 1
            if ends:
                self._average()
                self._next_pass(number + 1)

    def _next_pass(self, number: int) -> None:
        if self._means is not None:
            self._means, self._epoch = PassMeans(), number

    def _average(self) -> None:
        """Write the averages over the pass that is running into the row of its last step."""
        assert self._means is not None
        means = {f"epoch_{name}": value for name, value in self._means.results().items() if np.ndim(value) == 0}
        self._measured(self._last, {"epoch": self._epoch, **means})

    def _add(self, first_step: int, values: Mapping[str, np.ndarray], n: int) -> None:
        self._offset = int(values["step"][0]) - first_step if "step" in values else 0
        first = first_step + self._offset
        self._start(first)
        if self._row is not None and self._row["step"] >= first:  # that step comes again
            self._row = None
        self._names |= values.keys()
        rows = [] if self._row is None or self._written else [self._row]
        steps, start = _by_member(StepValues.of(first_step, values)), -first_step % n
        part = steps.at(slice(start, None, n))
        masked = {name: column for name, column in steps.masked.items() if column.ndim == 1}
        rows += _rows(first, {name: part[name] for name in part if name not in masked}, start, n)
        rows = _with_measured(rows, first, masked)
        if rows and rows[-1]["step"] >= first:
            self._row, self._written = rows.pop(), False
        else:
            self._row = None
        self._sink.write(rows)

    def observe(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        step += self._offset
        self._start(step)
        # Both training and held-out data have a "loss" and may have an "accuracy".
        self._measured(
            step, {(f"valid_{name}" if name in self._names else name): float(v) for name, v in values.items()}
        )

    def _measured(self, step: int, measured: Mapping[str, Any]) -> None:
        """Put values into the row of a step."""
        if self._row is None or self._row["step"] != step:
            self._put()
            self._row = {"step": step}
        elif self._written:
            self._sink.cut(step)
        self._row, self._written = {**self._row, **measured}, False

    def snapshot(self) -> dict[str, Any]:
        self._put()
        self._sink.sync()
        row = "" if self._row is None else encoded(self._row)
        kept = {"row": row, "offset": self._offset, "names": sorted(self._names), "run": self._sink.run}
        return kept if self._means is None else kept | {"epoch": self._epoch, "pass": self._means.snapshot()}

    def restore(self, values: Mapping[str, Any]) -> None:
        row, self._offset, names, self._sink.run = saved_values(self, values, "row", "offset", "names", "run")
        self._names, self._row, self._written = set(names), decoded(row) if row else None, True
        if self._means is not None:
            self._epoch, saved = saved_values(self, values, "epoch", "pass")
            self._means = PassMeans.restored(saved)
        self._restored = True

    def _start(self, step: int) -> None:
        """Open the sink at the first step of a fit, or at the step after which its run was interrupted."""
        if self._open:
            return
        if self._row is not None and self._row["step"] > step:
            self._row = None
        # What was measured after the newest row may come again, or not have come at all.
        self._written = False
        dropped = self._sink.cut(step if self._row is None else self._row["step"])
        if dropped is not None and not self._restored:
            self._warn(step, *dropped)
        self._open, self._restored = True, False

    def _warn(self, step: int, first: int, last: int) -> None:
        held = f"holds {f'steps {first} to {last}' if last > first else f'step {last}'} of an earlier fit"
        if self.path:
            warn(
                f"{self.__name__}: {self.path!r} {held}, which are removed, because this one begins with step {step}. "
                f'Give each run its own path: reports.{self.__name__}(f"run-{{i}}").'
            )
        else:
            warn(
                f"{self.__name__}: the run {self._sink.run!r} {held}. They stay, and what this fit has for these steps "
                f"is not logged. Make a report for each fit: reports.{self.__name__}(...)."
            )

    def _put(self) -> None:
        if self._row is not None and not self._written:
            self._sink.write([self._row])
            self._written = True


def _by_member(values: StepValues) -> StepValues:
    """Return the values with a column for each member of an ensemble, ``"loss/0"``, NaN where it did not run."""
    if "losses" not in values:
        return values
    losses = np.ma.filled(values["losses"], np.nan)
    return values.replaced({f"loss/{i}": losses[:, i] for i in range(losses.shape[1])})


def _rows(first: int, columns: Mapping[str, np.ndarray], start: int, n: int) -> list[Row]:
    kept = {name: column for name, column in columns.items() if name not in _NOT_LOGGED and column.ndim == 1}
    named = {name: _numbers(column) for name, column in kept.items()}
    steps = range(first + start, first + start + n * len(columns["loss"]), n)
    return [dict(zip(("step", *named), row, strict=True)) for row in zip(steps, *named.values(), strict=True)]


def _with_measured(rows: list[Row], first: int, columns: Mapping[str, Any]) -> list[Row]:
    """Return the rows with the values of masked columns, which have rows also at steps that have none."""
    if not columns:
        return rows
    by_step = {row["step"]: row for row in rows}
    for name, column in columns.items():
        steps = first + np.flatnonzero(~np.ma.getmaskarray(column))
        for step, value in zip(steps.tolist(), _numbers(column.compressed()), strict=True):
            by_step.setdefault(step, {"step": step})[name] = value
    return [by_step[step] for step in sorted(by_step)]


def _numbers(column: np.ndarray) -> list[Any]:
    if column.dtype.kind in "biu" or column.dtype == np.float64:
        return column.tolist()
    # The shortest digits that give the float32 again: 0.1 and not 0.10000000149011612.
    return [float(str(value)) for value in column.astype(np.float32)]


def loss_array(loss: float) -> np.ndarray:
    """Return the loss of one step as a block has it: in float32 where that holds it exactly, else in float64."""
    with np.errstate(over="ignore"):
        narrow = np.array([loss], np.float32)
    return narrow if math.isnan(loss) or float(narrow[0]) == loss else np.array([loss])


def encoded(row: Row) -> str:
    """Return a row as strict JSON: what is not finite is "NaN", "Infinity" or "-Infinity"."""
    return "{" + ", ".join([f"{_quoted(name)}: {_json(value)}" for name, value in row.items()]) + "}"


def decoded(line: str) -> Row:
    """Return the row that ``encoded`` wrote."""
    return {name: _WORDS[value] if isinstance(value, str) else value for name, value in json.loads(line).items()}


_quoted = functools.lru_cache(maxsize=256)(json.dumps)


def _json(value: Any) -> str:
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return '"NaN"' if math.isnan(value) else '"Infinity"' if value > 0 else '"-Infinity"'
    return repr(value)
