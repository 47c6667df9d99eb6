"""Agreement: what the processes of one fit decide together, so that all of them end after the same step.

Every process runs the same steps, each on its own devices. A step that one of them runs and another does not would
never end. So they vote: before a turn of the loop, on how many steps it has; before a dispatch, on how many of these
all have the items for; after the call of a report, on whether one of them stops; and before a checkpoint. Each vote
also says what ends the fit in a process, so that an exception there meets whatever vote the others are at.

With one process there is no ``Agreement``, and the loop asks for none.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax

from kaun._engine import StepInputs, StepLoop
from kaun._messages import add_note, contextmanager, warn
from kaun._processes import Call, Channel, failed_elsewhere, this_process, timeout_of, wait_until_ready
from kaun._run.ballots import combine, packed, unpacked
from kaun._run.same import check_begin, check_items
from kaun._run.signals import Signals, preempted
from kaun.data import checksums
from kaun.errors import FailedElsewhere

__all__ = ["Agreement", "EndedElsewhere", "agreement_of"]

_EVERY = 1000  # steps after which items are compared again
_GROWING = 8  # turns at the start of a fit, in which blocks grow
_RARELY = 16
_ANSWER = 5.0  # seconds in which a process that runs notices that the devices of another have failed
_SIGTERM = 128 + 15


class _Turns:
    """The number of turns of all fits: the preemption service wants numbers that grow, the same in all processes."""

    count = 0


class EndedElsewhere(Exception):
    """The data of another process has ended, so the fit ends in this one too; raised and caught inside of fit."""


@contextmanager
def agreement_of(processes: tuple[int, ...]) -> Generator[Agreement | None]:
    """The agreement of a fit in these processes, None where it is one; an exception in the block is told to all."""
    if len(processes) < 2:
        yield None
        return
    agreement = Agreement(processes)
    try:
        yield agreement
    except BaseException as error:
        agreement.fail(error)
        raise


class Agreement:
    """The votes of one fit.

    Args:
        processes: The numbers of the processes that take part.

    Attributes:
        broken: Whether one process is missing, or its devices have failed.
        due: Whether the clock of process 0 wants a checkpoint after this turn.
        certain: Whether the data of all processes has the same known length, and no code of the user makes its items.
        numbers: What the report of any process wants each step to compute, as ``Report.numbers``.
    """

    def __init__(self, processes: tuple[int, ...]) -> None:
        self._processes, self._me = processes, this_process()
        call = Call.new("fit", processes)
        self._call = str(call)
        self._channel = Channel.of(call, "the next steps of fit")
        self.broken = self.due = False
        self._cause: BaseException | None = None  # why it is broken
        self._over: BaseException | None = None  # what ends the fit here, because of another process
        self._raised: BaseException | None = None
        self._failed = False  # whether this process has told the others of its exception
        self._closed, self._allowed = False, 0  # after the last vote on steps: how many may still be dispatched
        self._rescue = False  # whether all processes go on to save the state that is left
        self._steps = False  # between the begin of the steps and the last checkpoint
        self.certain = self._asks = False
        self.numbers: dict[str, int] = {}
        self._agreed: Mapping[str, Any] | None = None
        self._wanted: int | None = None
        self._compared: set[int] = set()
        self._turn = 0
        self._loop: StepLoop | None = None
        self._next: Callable[[int], dict[str, Any]] = lambda done: {}
        self._signals = Signals(wanted=False)

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Compare what the processes begin with.

        Raises:
            ValueError: If they differ.
        """
        found = self._vote({**facts, "began": True, "call": self._call, "turns": _Turns.count})
        self._raise_if_over()
        _Turns.count = found["turns"]
        check_begin(found["unlike"])
        self.certain, self._asks, self.numbers = found["certain"], found["asks"], found["numbers"]

    def attach(
        self, loop: StepLoop, next_turn: Callable[[int], dict[str, Any]], signals: Signals, wanted: int | None
    ) -> None:
        """Give it what it asks, from the first step on.

        Args:
            loop: The steps of this process.
            next_turn: Returns what this process alone would do after some steps.
            signals: Those that this process has received.
            wanted: The step of an earlier run for which its report has to be called again.
        """
        self._loop, self._next, self._signals, self._steps = loop, next_turn, signals, True
        self._wanted = wanted

    # A turn of the loop

    def ahead(self, done: int) -> int:
        """How many steps the next turn has, in every process.

        Raises:
            FailedElsewhere, EndedElsewhere, SystemExit: If another process ends the fit.
        """
        assert self._loop is not None
        self._raise_if_over()
        _Turns.count += 1
        if preempted(_Turns.count):
            raise SystemExit(_SIGTERM)
        if self._loop.exhausted:  # the others may have more items than wait here
            self.end()
            return 1
        self._turn += 1
        agreed, self._agreed = self._agreed, None
        if agreed is None:
            mine = self._next(done)
            # What decides is then the same in all processes, without asking; but a signal in one of them may wait.
            if self.certain and not self._asks and self._turn > _GROWING and self._turn % _RARELY:
                return mine["next"]
            agreed = self._vote_on_turn(mine)
            self._raise_if_over()
        self._wanted, self.due, self._loop.limit = agreed["want"], agreed["due"], agreed["limit"]
        return agreed["next"]

    def wanted(self, step: int) -> bool:
        """Whether the report of one of the processes is to be called for this step."""
        return step == self._wanted

    def reported(self, step: int, *, stops: bool, best: bool) -> tuple[bool, bool]:
        """Return whether the fit stops after a step, and whether that step is the best, as all processes see it.

        Args:
            step: The step.
            stops: Whether the report of this process stopped the fit.
            best: Whether what it measured is the best so far.
        """
        self._wanted = None
        ballot = {"end": "stopped"} if stops else {**self._next(step), "best": best}
        self._agreed = self._vote_on_turn(ballot)
        self._raise_if_over()
        return self._closed, self._agreed.get("best", False)

    def _vote_on_turn(self, ballot: Mapping[str, Any]) -> Mapping[str, Any]:
        """Vote, or raise the signal that this process has received."""
        with self._signals.interruptible():
            pass
        return self._vote(ballot)

    # A dispatch

    def dispatch(self, first: int, count: int, inputs: StepInputs, values: Callable[[], list[Any]]) -> int:
        """Return how many of the ``count`` steps that wait here all processes have the items for, and will run.

        Args:
            first: The number of the first of them.
            count: How many wait.
            inputs: An item of their kind.
            values: Returns the arrays of the first of them.
        """
        if not self._closed:
            kind = hash(inputs.key)
            compares = kind not in self._compared or (first - 1) // _EVERY != (first + count - 1) // _EVERY
            if self.certain and not compares:
                return count
            self._compared.add(kind)
            items = {"items": checksums(inputs.names(), values())} if compares else {}
            found = self._vote({"at": first - 1, "wait": count, **items})
            if found["unlike"]:
                self._closed = True
                check_items(found["unlike"][0], first)
            if not self._closed:
                return count
        count = min(count, self._allowed)
        self._allowed -= count
        return count

    def dispatched(self) -> None:
        """Raise what ends the fit here because of another process."""
        self._raise_if_over()

    def wait(self, array: Any) -> None:
        """Wait for an array on the devices, unless another process has failed without running its part of it.

        Raises:
            FailedElsewhere: In that case.
        """
        wait_until_ready([array], self._check_others)

    def readable(self, arrays: list[Any]) -> bool:
        """Whether arrays have values, or will have them: after a failure of the devices they may never."""
        return not self.broken or all(array.is_ready() for array in arrays)

    def _check_others(self, seconds: float) -> None:
        """Raise where another process, or what is left of the agreement, makes it vain to wait any longer."""
        assert self._loop is not None
        if self._cause is not None:
            raise self._cause
        others = [process for process in self._processes if process != self._me]
        left = {process: why for process in others if (why := self._channel.why_left(process)) is not None}
        gone = next((process for process, (_, at) in left.items() if at < self._loop.done), None)
        limit = timeout_of()
        if gone is not None:
            raise self._break(failed_elsewhere(gone, left[gone][0]))
        if seconds >= limit:
            what = f"the devices did not finish a step within {limit:g} seconds, for which they need those of all"
            raise self._break(failed_elsewhere(others[0], what))

    def _break(self, error: BaseException) -> BaseException:
        """Note why the processes can agree no longer, and return that."""
        self.broken, self._closed, self._cause = True, True, self._cause or error
        return self._cause

    # The end

    def meet(self, *, last: bool = False) -> None:
        """Come together before a checkpoint, which one process alone cannot write; ``last`` is the last one."""
        self._vote({})
        self._raise_if_over()
        self._steps = self._steps and not last

    def end(self) -> None:
        """Agree that the data has ended, as it has here."""
        if not self._closed:
            self._vote({"end": "data"})
            self._raise_if_over()

    def finish(self) -> None:
        """Agree that nothing has failed, up to the very end of the fit."""
        self._closed, self._steps = True, False
        self.meet()

    def fail(self, error: BaseException) -> None:
        """Tell the other processes that an exception ends the fit in this one, and agree on the step."""
        if error is self._raised or self._failed:
            return
        self._failed = True
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, FailedElsewhere):
            what = f"process {error.process}, for which it waited, {error.what}" if self.broken else error.what
        vote: dict[str, Any] = {"end": "failed", "what": what[:2000]}
        if isinstance(error, SystemExit):
            vote |= {"end": "exit", "code": error.code if isinstance(error.code, int) else 1}
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._break(error)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            at = -1 if self.broken or self._loop is None else self._loop.done
            self._channel.leave(what[:2000], at, votes=not self.broken)
        try:
            self._vote(vote)
        except FailedElsewhere as missing:
            add_note(error, f"Also, {missing}")
        self._closed, self._over = True, None
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._call_the_roll(error)

    def _call_the_roll(self, error: BaseException) -> None:
        """Add to an error of the devices which processes do not answer: one that has ended is a usual reason."""
        deadline = time.monotonic() + min(timeout_of(), _ANSWER)
        silent = [process for process in self._processes if process != self._me]
        while silent and time.monotonic() < deadline:
            time.sleep(0.1)
            silent = [process for process in silent if self._channel.why_left(process) is None]
        if silent:
            add_note(
                error,
                f"Also, process {', '.join(map(str, silent))} does not answer. It has probably ended, which makes the "
                "devices of the others fail, and its own output says why.",
            )

    def all_have(self, state: str, pending: float | None) -> tuple[bool, float | None]:
        """Whether all processes have the same state left, so that they can save it; called where one has failed.

        Also returned is the ``pending`` of the first process that has one: a call of the report is one of all
        processes, so where it was interrupted in one, all repeat it.

        Args:
            state: Which state is left here.
            pending: The loss of the step whose report was interrupted here, None where none was.
        """
        try:
            found = self._vote({"state": state, "pending": pending}) if self._rescue else {"same": False}
        except FailedElsewhere:
            found = {"same": False}
        return found["same"], found.get("pending")

    # A vote

    def _vote(self, ballot: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give a ballot, and return what all of them amount to."""
        if self.broken:  # in what an exception leads to
            return {"unlike": [], "same": False}
        where = {} if self._loop is None else {"at": self._loop.done, "wait": self._loop.waiting}
        mine = {**where, "steps": self._steps, **ballot}
        try:
            found = unpacked(self._channel.exchange(packed(mine), combine))
        except BaseException as error:
            self._break(error)
            raise
        end = found["end"]
        if end is not None and "state" not in ballot:
            self._close(end, found, ballot.get("end", ""))
        return found

    def _close(self, end: Mapping[str, Any], found: Mapping[str, Any], mine: str) -> None:
        if not self._closed:
            self._closed, self._allowed = True, found["wait"]
        self._rescue, self.broken = found["rescue"], self.broken or found["apart"]
        kind, process = end["kind"], end["process"]
        if kind in ("failed", "exit") and mine not in ("failed", "exit"):
            self._over = failed_elsewhere(process, end["what"]) if kind == "failed" else SystemExit(end["code"])
            self._cause = self._over if found["apart"] else None
        elif kind == "data" and len(found["ended"]) < len(self._processes):
            if mine != "data":
                self._over = EndedElsewhere()
            who, steps = ", ".join(map(str, found["ended"])), found["at"] + found["wait"]
            warn(
                f"The data of process {who} ended after {steps} items, and that of the others has more. All processes "
                "end the fit there. Give every process the same number of items."
            )

    def _raise_if_over(self) -> None:
        over, self._over = self._over, None
        if over is not None:
            self._raised, self._failed = over, not isinstance(over, EndedElsewhere)
            raise over
