"""The calls that processes make together, and where each of them waits for the others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax

from kaun._messages import user_line
from kaun._processes.service import client_of_all, tell_at_exit

__all__ = [
    "Call", "Waits", "calls_of", "count_as", "failure_of", "has_given", "leave", "note_failure", "note_given",
    "waits_at",
]  # fmt: skip

_calls: Counter[tuple[int, ...]] = Counter()  # how many calls some processes have made together
_given: dict[str, int] = {}  # to how many meetings of a channel this process has given its value
_LEFT_OUT = 1 << 62  # of one that it has left, so that it does not wait there for any more


class Call(NamedTuple):
    """A call of ``fit``, ``evaluate`` and the like that some processes make together.

    Attributes:
        entry: What is called.
        processes: Their numbers.
        number: The how many-th call of these processes it is.
        line: The file and line of the user's code.
        kind: What the others must call too for the processes to meet, by default the same ``entry``.
    """

    entry: str
    processes: tuple[int, ...]
    number: int
    line: str
    kind: str = ""

    @classmethod
    def new(cls, entry: str, processes: Sequence[int], kind: str = "") -> Call:
        """Return the next call."""
        tell_at_exit()
        _calls[tuple(processes)] += 1
        return cls(entry, tuple(processes), _calls[tuple(processes)], user_line(), kind)

    @property
    def name(self) -> str:
        """The name of its channel."""
        return f"{self.kind or self.entry}/{_words(self.processes)}/{self.number}"

    def __str__(self) -> str:
        return f"{self.entry} ({self.line}, call {self.number} of that process)"


def calls_of(processes: Sequence[int]) -> int:
    """How many calls these processes have made together."""
    return _calls[tuple(processes)]


def count_as(processes: Sequence[int], calls: int) -> None:
    """Count the calls that another process has begun, so that the next one is the same again in both."""
    _calls[tuple(processes)] = max(_calls[tuple(processes)], calls)


def note_given(name: str, meetings: int) -> None:
    """Note to how many meetings of a channel this process has given its value."""
    _given[name] = meetings


def has_given(name: str, meeting: int = 0) -> bool:
    """Whether this process has given its value to a meeting of a channel, or has left it."""
    return _given.get(name, 0) > meeting


def leave(name: str, me: int, why: str, processes: Sequence[int], at: int = -1, *, votes: bool = False) -> None:
    """Tell those who wait for process ``me`` in a channel that it will not come; see ``Channel.leave``."""
    told = json.dumps([why, at, votes, _calls[tuple(processes)]])
    _given[name] = _given.get(name, 0) if votes else _LEFT_OUT
    client_of_all().key_value_set(f"kaun/{name}/left/{me}", told, True)


def note_failure(call: Call, why: str) -> None:
    """Leave a note for the others, whatever they call, that a call has failed in this process."""
    place = f"kaun/failed/{_words(call.processes)}/{call.number}/{jax.process_index()}"
    client_of_all().key_value_set(place, f"={why}", True)


def failure_of(processes: Sequence[int], number: int, process: int) -> str | None:
    """Why a call has failed in another process, None where it has not; it is counted here too."""
    try:
        found = client_of_all().key_value_try_get(f"kaun/failed/{_words(processes)}/{number}/{process}")
    except jax.errors.JaxRuntimeError:
        return None
    count_as(processes, number)
    return found[1:]


def _words(processes: Sequence[int]) -> str:
    return "-".join(map(str, processes))


class Waits(NamedTuple):
    """Where a process waits.

    Attributes:
        name: The channel.
        meeting: The number of the meeting.
        call: The call, in words.
        processes: Who meets there.
        calls: How many calls of these the process has begun.
    """

    name: str
    meeting: int
    call: str
    processes: list[int]
    calls: int


def waits_at(process: int) -> Waits | None:
    """Where another process says that it waits, None where it does not say so."""
    try:
        return Waits(*json.loads(client_of_all().key_value_try_get(f"kaun/waits/{process}")))
    except jax.errors.JaxRuntimeError:
        return None
