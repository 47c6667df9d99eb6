"""Channel: where some processes meet, each time to exchange a value."""

from __future__ import annotations

import contextlib
import enum
import functools
import json
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax

from kaun._processes.calls import (
    Call,
    Waits,
    calls_of,
    count_as,
    failure_of,
    has_given,
    leave,
    note_failure,
    note_given,
    waits_at,
)
from kaun._processes.failures import came_late, crossed, failed_elsewhere, missing, unreachable
from kaun._processes.service import client_of_all, end_of, timeout_of

__all__ = ["Channel", "barrier"]

_SLICE = 1.0  # seconds of one call into C, in which Python handles no signal
_FIRST_SLICE = 0.1
_ABSENT = ("DEADLINE_EXCEEDED", "NOT_FOUND")
_LEFT = "left"


class Channel:
    """A place where some processes meet again and again, each time to exchange a value.

    The first of them collects the values and tells them all, so that a meeting costs each of the others two calls,
    however many they are, and all decide from the same values.

    A process that waits here for one that waits elsewhere for it says so at once: it has left out a call that the
    other one makes, or makes another one before. That is seen between the main threads of the processes.

    Args:
        name: The same in each process, and of no other channel.
        processes: Their numbers; None for all processes of the program.
        what: What they meet for, in messages.
        timeout: The seconds of ``timeout_of``.
        call: The call in which they meet, None outside of one.

    Attributes:
        processes: Their numbers.
        came_late: Whether the others had left when this process came.
    """

    def __init__(
        self, name: str, processes: Sequence[int] | None = None, what: str = "", timeout: float | None = None,
        call: Call | None = None,
    ) -> None:  # fmt: skip
        self.processes: Sequence[int] = range(jax.process_count()) if processes is None else processes
        self._name, self._what, self._timeout = name, what or name, timeout
        self._call, self._number = str(call or self._what), 0 if call is None else call.number
        self._entry = "" if call is None else call.entry
        self._me, self._meetings, self.came_late = jax.process_index(), 0, False

    @classmethod
    def of(cls, call: Call, what: str) -> Channel:
        """Return the channel of a call; see the arguments of the class."""
        return cls(call.name, call.processes, what, call=call)

    def exchange(self, value: str, combine: Callable[[dict[int, str]], str]) -> str:
        """Give the other processes a value, and return what the first of them made of the values of all.

        Args:
            value: The value of this process.
            combine: Called in the first process with all values, by the number of the process.

        Raises:
            FailedElsewhere: If one does not come in time, or says that it will not come, or the service that they meet
                in does not answer.
        """
        if len(self.processes) == 1:
            return combine({self._me: value})
        client, timeout = client_of_all(), timeout_of(self._timeout)
        place, before = f"kaun/{self._name}/{self._meetings}/", f"kaun/{self._name}/{self._meetings - 1}/"
        deadline = time.monotonic() + timeout
        try:
            client.key_value_set(f"{place}{self._me}", f"={calls_of(self.processes)} {value}", True)
            note_given(self._name, self._meetings + 1)
            if self._me == self.processes[0]:
                answer = self._collect(client, place, deadline, combine)
                client.key_value_set(f"{place}all", answer, True)
                if self._meetings:  # all have come here, so all have read that answer
                    client.key_value_delete(before)
            else:
                answer = self._read(client, place, deadline)
        except jax.errors.JaxRuntimeError as error:
            raise unreachable(self.processes[0], self._what, error) from error
        if not answer.startswith("="):
            *late, others = answer.rpartition(_LEFT)
            absent = [int(p) for p in others.split()]
            if self._me in absent:
                late, absent = [_LEFT], [self.processes[0]]
            left = self.why_left(absent[0])
            if left:
                raise failed_elsewhere(absent[0], left[0])
            if not any(late):
                raise missing(absent, self._me, self._what, timeout)
            error, self.came_late = came_late(absent, self._me, self._what, timeout), True
            if self._entry:  # the others are in their next call, or come to it, and this process does not
                note_failure(Call.new(self._entry, self.processes), str(error))
            raise error
        self._meetings += 1
        calls, _, answer = answer[1:].partition(" ")
        count_as(self.processes, int(calls))
        return answer

    def leave(self, why: str, at: int = -1, *, votes: bool = False) -> None:
        """Tell those who wait for this process here, or on their devices, that it will not come.

        Args:
            why: What happened.
            at: How many steps it has dispatched, whose end the others may wait for; -1 where these have failed too.
            votes: Whether it will come once more, to say what happened.
        """
        leave(self._name, self._me, why, self.processes, at, votes=votes)

    def why_left(self, process: int) -> tuple[str, int] | None:
        """What another process gave to ``leave``, None where it did not."""
        left = self._left(process)
        return None if left is None else (left[0], left[1])

    def _left(self, process: int) -> tuple[str, int, bool] | None:
        try:
            why, at, votes, calls = json.loads(client_of_all().key_value_try_get(f"kaun/{self._name}/left/{process}"))
        except jax.errors.JaxRuntimeError:  # not there; or the service is gone, which the next meeting says
            why = failure_of(self.processes, self._number, process) if self._number else None
            why = why or end_of(process)
            return None if why is None else (why, -1, False)
        count_as(self.processes, calls)
        return why, at, votes

    def _comes(self, process: int, *, voted: bool = False) -> _Comes:
        """Whether another process may still do its part of the meeting for which this one waits.

        Args:
            process: Its number.
            voted: Whether its value is there.
        """
        left = self._left(process)
        if left is not None and not (voted and left[2]):
            return _Comes.PERHAPS if left[2] else _Comes.NO
        if voted or threading.current_thread() is not threading.main_thread():
            return _Comes.YES
        there = waits_at(process)
        if there is not None and self._me in there.processes and not has_given(there.name, there.meeting):
            error = crossed(self._me, self._call, process, there.call)
            # Inside of the call in which the other one waits, this one ends that call by a vote.
            leave(there.name, self._me, error.what, there.processes, votes=has_given(there.name))
            count_as(there.processes, there.calls)
            raise error
        return _Comes.YES

    @contextlib.contextmanager
    def _waiting(self, client: Any) -> Generator[Callable[[], None]]:
        """A block in which the others may be told where this process waits, by the function that the block is given."""
        told, place = list[bool](), f"kaun/waits/{self._me}"

        def tell() -> None:
            if not told and threading.current_thread() is threading.main_thread():
                told.append(True)
                processes = list(self.processes)
                here = Waits(self._name, self._meetings, self._call, processes, calls_of(processes))
                client.key_value_set(place, json.dumps(here), True)

        try:
            yield tell
        finally:
            if told:
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    client.key_value_delete(place)

    def _collect(self, client: Any, place: str, deadline: float, combine: Callable[[dict[int, str]], str]) -> str:
        found: dict[int, str | None] = {}
        with self._waiting(client) as tell:
            for p in self.processes:
                found[p] = _get(client, f"{place}{p}", deadline, tell, functools.partial(self._comes, p))
        absent = [p for p, text in found.items() if text is None]
        if absent:
            return " ".join(map(str, absent))
        left = [p for p, text in found.items() if text == _LEFT]
        if left:
            return f"{_LEFT} {left[0]}"
        pairs = {p: text[1:].partition(" ") for p, text in found.items() if text}
        calls = max(int(count) for count, _, _ in pairs.values())
        return f"={calls} {combine({p: value for p, (_, _, value) in pairs.items()})}"

    def _read(self, client: Any, place: str, deadline: float) -> str:
        first = self.processes[0]

        def here() -> list[int]:
            values = dict(client.key_value_dir_get(place))
            return [p for p in self.processes if values.get(f"{place}{p}", _LEFT) != _LEFT]

        with self._waiting(client) as tell:
            comes = lambda: self._comes(first, voted=first in here())
            answer = _get(client, f"{place}all", deadline, tell, comes)
        if answer is not None:
            return answer
        found = here()
        client.key_value_set(f"{place}{self._me}", _LEFT, True)
        return " ".join(map(str, [p for p in self.processes if p not in found] or [first]))


def barrier(name: str, timeout: float | None = None) -> None:
    """Wait until every process of the program has called this with the same name; any number of times for one name.

    Args:
        name: What they wait for, also in messages: ``"the parts of a checkpoint"``.
        timeout: How many seconds to wait, see ``timeout_of``.

    Raises:
        FailedElsewhere: If one of them does not come in time; the message says which.
    """
    if name not in _barriers:
        _barriers[name] = Channel(f"barrier/{name}", what=name, timeout=timeout)
    _barriers[name].exchange("", lambda values: "")


_barriers: dict[str, Channel] = {}


class _Comes(enum.Enum):
    """Whether a process comes to a meeting: one that has left the channel may do so once more, to say why."""

    YES, PERHAPS, NO = range(3)


def _get(client: Any, key: str, deadline: float, tell: Callable[[], None], comes: Callable[[], _Comes]) -> str | None:
    """The value of a key, None if nobody sets it in time, or nobody will.

    Args:
        client: JAX's service.
        key: The key.
        deadline: The time until which to wait.
        tell: Tells the others where this process waits; called where that is not over soon.
        comes: Whether the process that sets the key will come.
    """
    found, pause = 0, _FIRST_SLICE
    while (left := deadline - time.monotonic()) > 0:
        try:
            return client.blocking_key_value_get(key, max(1, int(min(left, pause) * 1000)))
        except jax.errors.JaxRuntimeError as error:
            if not str(error).startswith(_ABSENT):
                raise
        tell()
        answer = comes()
        # Twice in slices of full length: who has left may still be about to vote.
        found += answer is _Comes.PERHAPS and pause == _SLICE
        if answer is _Comes.NO or found > 1:
            break
        pause = min(2 * pause, _SLICE)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # it may have been set just before its process left
        return client.key_value_try_get(key)
    return None
