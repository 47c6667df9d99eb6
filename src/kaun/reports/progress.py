"""The progress bar."""

from __future__ import annotations

import importlib
import io
import math
import os
import sys
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Protocol, TextIO

import numpy as np

from kaun._calls import explained, shown
from kaun._processes import is_first
from kaun._report import Report
from kaun._run import StepValues
from kaun.train import TrainState

__all__ = ["progress"]

REDRAW_SECONDS = 0.1  # in a terminal or a notebook
LINE_SECONDS, LONGEST_LINE_SECONDS = 10.0, 600.0  # anywhere else
QUIET_SECONDS, QUIET_STEPS = 10.0, 20  # without news, after which it asks for a step


@explained("reports.progress")
def progress(total: int | None = None, *, description: str | None = None, file: TextIO | None = None) -> Report:
    """Return the report that shows a tqdm bar: step, total if known, time, steps per second, the loss, and results.

    Results are what other reports of one ``all_of`` measured last (``validate``), by name; as ``valid_loss`` and the
    like where the training has a value of that name. Where ``fit`` gets ``train.epochs(n)`` the loss is the mean over
    the current pass so far, in which each step counts by its weight, and otherwise that of the newest step; steps that
    weigh 0 are left out. While a program compiles the bar says ``compiling``, afterwards how many seconds that took;
    they do not count in the steps per second.

    A terminal or a notebook gets a bar, redrawn about 10 times a second, of which a saved notebook keeps the last line;
    in a narrow terminal the loss stays. Anything else, a log file or a pipe, gets a line after 10 seconds and then one
    every 10 seconds to 10 minutes, the longer the run the fewer. Both end with a line for the last step. What is shown
    comes from finished blocks of steps; only if these bring nothing new does ``fit`` wait for the device, at one step
    in twenty at most, or one in ten seconds. One ``progress()`` can be used for several fits, also nested ones; each
    gets its own bar. ``TQDM_DISABLE=1`` in the environment silences it.

    In a terminal, a ``print`` in another report appears behind the bar; ``tqdm.tqdm.write(text)`` prints above it.

    Args:
        total: The number of the last step, default the length of the data if it is known.
        description: The text at the left of the bar, default none.
        file: A text stream, default standard error.

    Raises:
        TypeError: If ``total`` is not an int.
        ValueError: If ``total`` is negative.

    Examples:
        >>> import sys
        >>> from kaun import reports
        >>> report = reports.progress(description="digits", file=sys.stdout)
        >>> report.begin(1, 200)
        >>> report(200, 0.25, None)
        >>> report.end()
        digits: 100% 200/200 [00:00<00:00, ...step/s, loss=0.25]
    """
    if total is not None and (isinstance(total, bool) or not isinstance(total, int)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"progress expected a number of steps as total, an int, received {shown(total)}: progress(1000)."
        )
    if total is not None and total < 0:
        raise ValueError(f"progress expected a total of at least 0 steps, received {total}: progress(1000).")
    return _Progress(total, description, file)


class _Progress(Report):
    only_shows = True  # read by RepeatedStates

    def __init__(self, total: int | None, description: str | None, file: TextIO | None) -> None:
        self._total = total
        self._description = description
        self._file = file
        self._fits: list[_Fit] = []  # one for each fit that is running (fits may nest)

    def __repr__(self) -> str:
        given = ("" if self._total is None else self._total, self._description and f"description={self._description!r}")
        return f"progress({', '.join(str(each) for each in given if each)})"

    def begin(self, first_step: int, total: int | None, *_: Any) -> None:
        known = total if self._total is None else self._total
        self._fits.append(_Fit(_display(first_step - 1, known, self._description, self._file), first_step - 1))

    def wants(self, step: int) -> bool:
        return self._current(step).wants(step)

    def block(self, first_step: int, values: Mapping[str, np.ndarray]) -> None:
        self._current(first_step).block(StepValues.of(first_step, values))

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        self._current(step).called(step, loss)

    def observe(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        self._current(step).observed(values)

    def compiling(self, where: str) -> Callable[[float], None] | None:
        return self._fits[-1].compiling() if self._fits else None

    def end(self) -> None:
        if self._fits:
            self._fits.pop().close()

    def _current(self, step: int) -> _Fit:
        if not self._fits:
            self.begin(step, None)  # called by a user's own function, which did not call begin
        return self._fits[-1]


class _Fit:
    """One fit's progress: its display, the last step known of, and when it was last drawn."""

    def __init__(self, display: _Display, step: int) -> None:
        self._display = display
        self._step = step
        self._loss: float | None = None
        self._epoch, self._mean, self._weight = 1, 0.0, 0.0  # the pass that is running
        self._values: dict[str, float] = {}
        self._names = {"loss"}  # of the training's values
        self._compiled, self._compiling = 0.0, False
        self._wanted: int | None = None
        self._drawn = monotonic()

    def wants(self, step: int) -> bool:
        quiet = monotonic() - self._drawn
        # Blocks cost nothing. A call for a step makes fit wait for it, and while it waits it cannot prepare the
        # next: one step in twenty keeps that below 5%.
        if quiet < self._display.pause() or (quiet < QUIET_SECONDS and step - self._step < QUIET_STEPS):
            return False
        # Counted as drawn now: fit may ask for many steps ahead before the first of them is there to draw.
        self._drawn = monotonic()
        self._wanted = step
        return True

    def block(self, values: StepValues) -> None:
        self._names |= values.keys()
        for number, part, _ in values.by_pass():
            if number != self._epoch:
                self._epoch, self._mean, self._weight = number, 0.0, 0.0
            counted = part.weights["loss"] != 0
            losses, weights = part["loss"][counted].astype(np.float64), part.weights["loss"][counted]
            if len(losses) and values.passes is None:
                self._loss = float(losses[-1])
            elif len(losses):
                self._weight += float(weights.sum())
                self._loss = self._mean = self._mean + float(((losses - self._mean) * weights).sum()) / self._weight
        self._reached(values.first_step + len(values["loss"]) - 1)

    def called(self, step: int, loss: float) -> None:
        if step > self._step:  # else a block had it before
            self._loss = loss
        self._reached(step)

    def _reached(self, step: int) -> None:
        self._step = step
        self._draw(due=step == self._wanted)

    def observed(self, values: Mapping[str, float]) -> None:
        self._values.update(values)
        self._draw(due=False)

    def compiling(self) -> Callable[[float], None]:
        self._compiling = True
        self._draw(due=self._display.live)
        return self._is_compiled

    def _is_compiled(self, seconds: float) -> None:
        self._compiling, self._compiled = False, self._compiled + seconds
        self._display.exclude(seconds)
        if self._display.live:
            self._draw(due=True)

    def close(self) -> None:
        self._display.close(self._step, self._postfix())

    def _draw(self, *, due: bool) -> None:
        if due or monotonic() - self._drawn >= self._display.pause():
            self._wanted = None
            self._display.draw(self._step, self._postfix())
            self._drawn = monotonic()

    def _postfix(self) -> str:
        measured = {f"valid_{name}" if name in self._names else name: value for name, value in self._values.items()}
        named = ({} if self._loss is None else {"loss": self._loss}) | measured
        shown = [f"{name}={value:.4g}" for name, value in named.items()]
        if self._compiling:
            shown.insert(self._loss is not None, "compiling")
        elif self._compiled > 0:  # last, so that on a narrow terminal it is cut off first
            shown.append(f"compiled in {self._compiled:.1f} s")
        return ", ".join(shown)


class _Display(Protocol):
    """Where a fit is drawn.

    Attributes:
        live: Whether a drawing replaces the one before, so that any number of them may be made.
    """

    live: bool

    def pause(self) -> float:
        """Return the seconds from one drawing to the next."""
        ...

    def draw(self, step: int, postfix: str) -> None: ...

    def exclude(self, seconds: float) -> None:
        """Leave this time, which has just passed, out of the speed."""
        ...

    def close(self, step: int, postfix: str) -> None: ...


def _display(done: int, total: int | None, description: str | None, file: TextIO | None) -> _Display:
    if not is_first():
        return _Nothing()
    stream = sys.stderr if file is None else file
    if stream is None or os.environ.get("TQDM_DISABLE"):
        stream = io.StringIO()  # a program without a console has no standard error
    if type(stream).__module__.startswith("ipykernel"):
        stream = _Cell()
    if isinstance(stream, _Cell) or stream.isatty():
        return _Bar(_tqdm(), done, total, description, stream)
    return _Lines(done, total, description, stream)


class _Cell(io.StringIO):
    """Shows the newest line written to it as an output of a notebook's cell, in the place of the one before.

    A saved or exported notebook has the last line alone. A stream would keep each line that a carriage return was meant
    to replace, and a widget the first one.
    """

    encoding = "utf-8"
    _handle: Any = None

    def write(self, text: str) -> int:
        line = text.rpartition("\r")[2].strip()
        if self._handle is not None and line:
            self._handle.update({"text/plain": line}, raw=True)
        elif line:
            display: Any = importlib.import_module("IPython.display").display
            self._handle = display({"text/plain": line}, raw=True, display_id=True)
        return len(text)


def _tqdm() -> Any:
    """tqdm's bar class without the thread that monitors all bars: these are redrawn by their own clock."""
    from tqdm.std import TqdmDefaultWriteLock, tqdm  # pyright: ignore[reportAttributeAccessIssue]

    own = {"monitor_interval": 0, "excluded": 0.0, "format_dict": property(_overall), "__str__": _within_columns}
    bar: Any = type("Bar", (tqdm,), own)
    # tqdm would make a lock for processes too, and with it fix multiprocessing's start method for the whole program.
    bar.set_lock(TqdmDefaultWriteLock.th_lock)
    return bar


def _overall(bar: Any) -> dict[str, Any]:
    """tqdm's ``format_dict``; the overall speed, which it shows at the end, leaves out the excluded time.

    Where there are too few columns for the loss after them, bar, time and speed are left out.
    """
    base: Any = super(type(bar), bar)
    shown: dict[str, Any] = base.format_dict
    steps, seconds = bar.n - bar.initial, shown["elapsed"] - bar.excluded
    if shown["rate"] is None and bar.excluded and steps and seconds > 0:
        shown["rate"] = steps / seconds
    until, compiling, _ = (shown["postfix"] or "").partition("compiling")
    first = until + compiling if compiling else until.partition(", ")[0]  # the loss
    least = len(bar.format_meter(**{**shown, "ncols": 0, "postfix": first})) + len("| ")  # and of the bar one character
    if shown["ncols"] and least > shown["ncols"]:
        done = "{percentage:3.0f}% {n_fmt}/{total_fmt}" if shown["total"] else "{n_fmt}step"
        shown["bar_format"] = ("{desc}: " if shown["prefix"] else "") + done + "{postfix}"
    return shown


def _within_columns(bar: Any) -> str:
    """What is drawn; tqdm before 4.69 does not cut a line that has no bar in it."""
    from tqdm.utils import disp_trim

    shown = bar.format_dict
    line = bar.format_meter(**shown)
    return disp_trim(line, shown["ncols"]) if shown["ncols"] else line


class _Nothing:
    """What the other processes of a program show: process 0 has the bar."""

    live = False

    def pause(self) -> float:
        return math.inf

    def draw(self, step: int, postfix: str) -> None:
        pass

    def exclude(self, seconds: float) -> None:
        pass

    def close(self, step: int, postfix: str) -> None:
        pass


class _Bar:
    """A bar that is redrawn in its place."""

    live = True

    def __init__(self, kind: Any, done: int, total: int | None, description: str | None, stream: TextIO) -> None:
        # tqdm's own rate limits are off: each update draws.
        limits = {"miniters": 1, "mininterval": 0}
        self._bar = kind(
            initial=done, total=total, desc=description, file=stream, unit="step", dynamic_ncols=True, **limits
        )

    def pause(self) -> float:
        return REDRAW_SECONDS

    def draw(self, step: int, postfix: str) -> None:
        self._bar.set_postfix_str(postfix, refresh=False)
        if not self._bar.update(step - self._bar.n):
            self._bar.refresh()

    def exclude(self, seconds: float) -> None:
        if not self._bar.disable:
            self._bar.excluded += seconds
            # tqdm measures the time to its next update, which its average speed includes, from here.
            self._bar.last_print_t += seconds

    def close(self, step: int, postfix: str) -> None:
        self._bar.n = step
        self._bar.set_postfix_str(postfix, refresh=False)
        self._bar.close()


class _Lines:
    """Lines in a file, each with what a bar would have shown."""

    live = False

    def __init__(self, done: int, total: int | None, description: str | None, stream: TextIO) -> None:
        self._fixed: dict[str, Any] = {
            "initial": done,
            "total": total,
            "prefix": description or "",
            "unit": "step",
            "ncols": 0,  # no bar, and nothing cut off
        }
        from tqdm.std import tqdm  # imported here, because it is a tenth of the time that importing kaun takes

        self._format: Callable[..., str] = tqdm.format_meter
        self._stream = stream
        self._start = monotonic()
        self._first, self._excluded = done, 0.0
        self._last_step, self._last_time = done, self._start

    def pause(self) -> float:
        elapsed = monotonic() - self._start
        return min(max(LINE_SECONDS, elapsed / 10), LONGEST_LINE_SECONDS)

    def draw(self, step: int, postfix: str) -> None:
        now = monotonic()
        # The speed since the line before; the last line has the overall one.
        self._print(step, postfix, rate=(step - self._last_step) / max(now - self._last_time, 1e-9))
        self._last_step, self._last_time = step, now

    def exclude(self, seconds: float) -> None:
        self._excluded += seconds
        self._last_time += seconds

    def close(self, step: int, postfix: str) -> None:
        seconds = monotonic() - self._start - self._excluded
        self._print(step, postfix, rate=(step - self._first) / seconds if step > self._first and seconds > 0 else None)

    def _print(self, step: int, postfix: str, rate: float | None) -> None:
        elapsed = monotonic() - self._start
        line = self._format(n=step, elapsed=elapsed, rate=rate, postfix=postfix, **self._fixed)
        print(line, file=self._stream, flush=True)
