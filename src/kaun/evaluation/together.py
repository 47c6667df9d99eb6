"""One pass over data in several processes: all of them take the same items, or none goes on."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

from kaun._engine import StepInputs
from kaun._messages import contextmanager
from kaun._processes import Call, Channel, mark_told
from kaun.data import checksums, different_items, has_exact_length, known_length, makes_items, stages_in_words
from kaun.sharding.core import Sharding, processes_of

__all__ = ["Pass", "in_step"]


class Pass:
    """A pass of one process over its data.

    Args:
        items: Its items.

    Attributes:
        items: As the argument.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items

    def ready(self, inputs: StepInputs) -> None:
        """Called with an item whose program is compiled, before it runs: here all that can fail alone has been done."""


@contextmanager
def in_step(items: Iterable[Any], data: Any, sharding: Sharding | None, entry: str) -> Generator[Pass]:
    """A pass over data, in which each process takes as many items and runs the same programs.

    A program that one process runs and another does not would never end. So they vote before each program runs, 1 ms
    for two processes on one machine; where the number of items is known and no code of the user makes them, before the
    first of each kind.

    Args:
        items: An iterator over the data.
        data: What the user gave.
        sharding: Where the arrays of the trainer lie. Its processes take part.
        entry: ``"evaluate"`` or ``"predict"``.

    Raises:
        ValueError: If they have other data, or different numbers of items.
        FailedElsewhere: If another process fails, or does not come.
    """
    processes = () if sharding is None else processes_of(sharding, ())
    if len(processes) < 2:
        yield Pass(items)
        return
    call = Call.new(entry, processes)
    channel = Channel.of(call, f"the items of {entry}")
    try:
        yield _VotedPass(iter(items), data, channel, call)
    except BaseException as error:
        channel.leave(f"{type(error).__name__}: {error}"[:2000])
        mark_told(error)
        raise


class _VotedPass(Pass):
    """A pass in which several processes vote.

    Args:
        items: Its items.
        data: What the user gave.
        channel: Where the processes meet.
        call: The call.
    """

    def __init__(self, items: Iterator[Any], data: Any, channel: Channel, call: Call) -> None:
        super().__init__(self._counted(items))
        self._channel, self._entry, self._call, self._data = channel, call.entry, str(call), data
        self._certain = has_exact_length(data) and not makes_items(data)
        self._kinds = set[Any]()
        self._count = 0

    def _counted(self, items: Iterator[Any]) -> Iterator[Any]:
        length = known_length(self._data) if self._certain else None
        found = self._votes({"length": length, "stages": stages_in_words(self._data)})
        self._check_stages(found)
        lengths = {process: vote["length"] for process, vote in found.items()}
        self._certain = None not in lengths.values()
        if self._certain:
            self._check_counts(lengths)
        for item in items:
            self._count += 1
            yield item
        if not self._certain:
            self._check_counts({process: vote["count"] for process, vote in self._votes({}).items()})

    def ready(self, inputs: StepInputs) -> None:
        """Vote on an item, whose values are compared if it is the first of its kind."""
        known = inputs.key in self._kinds
        if known and self._certain:
            return
        self._kinds.add(inputs.key)
        found = self._votes({} if known else {"items": checksums(inputs.names(), inputs.leaves)})
        self._check_counts({process: vote["count"] for process, vote in found.items()})
        items = {process: vote.get("items") for process, vote in found.items()}
        if None in items.values() and len({each is None for each in items.values()}) > 1:
            first = min(process for process, each in items.items() if each is not None)
            raise self._differ(f"item {self._count} of process {first} has other shapes or another structure")
        if not known and (difference := different_items(items)):
            raise self._differ(f"of item {self._count}, {difference}")

    def _votes(self, mine: Mapping[str, Any]) -> dict[int, Any]:
        """What each process says, by its number."""
        told = self._channel.exchange(json.dumps({"count": self._count, "call": self._call, **mine}), json.dumps)
        return {int(process): json.loads(vote) for process, vote in json.loads(told).items()}

    def _check_stages(self, votes: Mapping[int, Any]) -> None:
        number = min(votes)
        stages = {process: " > ".join(vote["stages"])[:300] for process, vote in votes.items()}
        for process, vote in votes.items():
            if vote["stages"] != votes[number]["stages"]:
                here = f"the stages of the data are {stages[process]} in process {process}, and {stages[number]} in"
                calls = "; ".join(f"process {each} is in {found['call']}" for each, found in votes.items())
                raise self._differ(f"{here} process {number} ({calls})")

    def _check_counts(self, counts: Mapping[int, int]) -> None:
        fewest = min(counts.values())
        if len({*counts.values()}) > 1:
            ended = [process for process, n in counts.items() if n == fewest]
            raise ValueError(
                f"{self._entry} expected as many items in each process, but the data of process "
                f"{', '.join(map(str, ended))} ended after {fewest} items, and that of the others has more. Give every "
                "process the same number of items; a loader that is split by process, with drop_last=True."
            )

    def _differ(self, how: str) -> ValueError:
        return ValueError(
            f"{self._entry} expected the same data in each process: {how}. Every process makes the same calls, with "
            "the same seed (rng.scope) and the same pipeline, of which it takes the rows of its devices. Where each "
            "process holds arrays of its own, write\n"
            "    Data.from_iterable(lambda: Data.batches((x, y), batch_size=64)).assemble(s)"
        )
