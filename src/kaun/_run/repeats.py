"""Warnings for loops that repeat what they meant to continue: one random pass, and one state."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kaun import tree
from kaun._jax import any_traced
from kaun._messages import user_line, warn
from kaun.data import key_text, random_passes, stages_of
from kaun.state import TrainState

__all__ = ["Repeats"]

_MOST = 64
_WARNED = 1 << 62  # no step is beyond it


class Repeats:
    """What one trainer was given again.

    Attributes:
        passes: The random passes.
        states: The states.
    """

    def __init__(self) -> None:
        self.passes = RepeatedPasses()
        self.states = RepeatedStates()


class RepeatedPasses:
    """The random passes that one trainer was trained on, and the first step of each run on them."""

    def __init__(self) -> None:
        self._first: OrderedDict[Any, int] = OrderedDict()  # the step before the passes
        self._lock = threading.Lock()

    def check_data(self, data: Any, key: jax.Array, step: jax.Array) -> None:
        """``check`` the data of a fit."""
        self.check("fit", stages_of(data), key, step)

    def check(self, entry: str, stages: Sequence[Any], key: jax.Array, step: jax.Array) -> None:
        """Warn once where a state that came out of training on a random pass is trained on the same pass again.

        Args:
            entry: ``"fit"`` or ``"step"``.
            stages: Those of the pipeline.
            key: The run's key, of the state before the pass.
            step: The number of steps of that state.
        """
        found = None if any_traced((key, step)) else random_passes(stages)
        if found is None:
            return
        run, count = (*found, key_text(key)), int(np.asarray(tree.readable(step)).max())
        with self._lock:
            first = self._first.setdefault(run, count)
            if first < count:
                self._first[run] = _WARNED
            while len(self._first) > _MOST:
                self._first.popitem(last=False)
        if first < count:
            loop = {
                "fit": "for e in range(3): state = trainer.fit(state, train.epoch(e))",
                "step": "for x, loss in train.epochs(3): _, state = trainer.step(state, x, loss=loss)",
            }[entry]
            warn(
                f"{entry} received a pass on which this run was trained already, from step {first} on. Each "
                "iteration of a shuffled or random pipeline has the same order and the same random numbers. For others "
                "in each epoch write trainer.fit(state, train.epochs(3)), or take pass e as train.epoch(e):\n"
                f"    {loop}"
            )


class RepeatedStates:
    """Which state one trainer was given last, and what became of the states that it returned for it."""

    def __init__(self) -> None:
        self._newest = 0  # the id of that state
        self._warned = False
        self._lock = threading.Lock()
        self._first: weakref.ref[TrainState] | None = None
        self._forget(None, None)

    def _forget(self, given: TrainState | None, line: tuple[str, str | None] | None) -> None:
        self._given = None if given is None else weakref.ref(given)
        self._line, self._calls, self._returned, self._used = line, 1, list[_Returned](), False

    def returned(self, entry: str, given: TrainState | None, after: TrainState, *seen: Any) -> TrainState:
        """Return the state to return, and warn, once, where a loop drops it.

        That is where the same state was given in three calls of one line in a row, and what they returned is gone, and
        was never read. All other uses of one state many times are right; once one is seen, nothing more is looked at
        for that state.

        Args:
            entry: ``"fit"`` or ``"step"``.
            given: The state before; None if it is gone.
            after: The state after.
            *seen: What else may have seen the states: a report, checkpoints.
        """
        if id(given) != self._newest or given is None or not all(map(_only_shows, seen)):
            self._newest, self._first = id(given), weakref.ref(after)
            return after
        if self._warned or (self._used and self._given is not None and self._given() is given):
            return after
        return self._again(entry, given, after)

    def _again(self, entry: str, given: TrainState, after: TrainState) -> TrainState:
        # Each test of pytest is a program, as far as a loop is concerned.
        line, returned = (user_line(), os.environ.get("PYTEST_CURRENT_TEST")), _Returned(after)
        with self._lock:
            if self._given is None or self._given() is not given or self._line != line:
                if self._line is not None and self._line != line:
                    self._first = None
                self._forget(given, line)
            self._calls += 1
            self._used = self._is_used() or (self._calls > 2 and _is_timed())
            if self._used:
                self._returned.clear()
                return after
            self._warned = self._calls > 2 and any(each.is_dropped for each in self._returned)
            self._returned = [*self._returned[-1:], returned]
            calls = self._calls
        if self._warned:
            call = "trainer.fit(state, data)" if entry == "fit" else "trainer.step(state, x, loss=loss)"
            result = "state" if entry == "fit" else "value, state"
            warn(
                f"{entry} was given the same state {calls} times in a row, and the states that it returned were not "
                f"used: a state never changes, so each call began at the same place. Write {result} = {call}. In a "
                "measurement wait for the state, jax.block_until_ready(state)."
            )
        return returned.state()

    def _is_used(self) -> bool:
        """Whether one of the returned states was read, or one is kept that a loop has had the time to drop."""
        first = self._calls > 2 and self._first is not None and self._first() is not None
        return first or any(each.read for each in self._returned) or any(r.is_kept for r in self._returned[:-1])


def _is_timed() -> bool:
    """Whether ``timeit`` repeats the call, in a program or in a notebook: a result is dropped there on purpose."""
    frame = sys._getframe()  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame.f_code.co_filename not in ("<timeit-src>", "<magic-timeit>"):
        frame = frame.f_back
    return frame is not None


def _only_shows(seen: Any) -> bool:
    return seen is None or getattr(seen, "only_shows", False) is True


class _Returned:
    """A state that was returned, whose fields are made when they are first read, so that this is known."""

    def __init__(self, after: TrainState) -> None:
        self.read = False
        self._made: TrainState | None = TrainState.later(lambda: self._of(after))
        self._alive = weakref.ref(self._made)

    def _of(self, after: TrainState) -> TrainState:
        self.read = True
        return after

    def state(self) -> TrainState:
        """The state; it is given away once."""
        made, self._made = self._made, None
        assert made is not None
        return made

    @property
    def is_kept(self) -> bool:
        """Whether it is still there; one that was not given away yet is not."""
        return self._made is None and self._alive() is not None

    @property
    def is_dropped(self) -> bool:
        """Whether it is gone and was not read."""
        return self._made is None and self._alive() is None and not self.read
