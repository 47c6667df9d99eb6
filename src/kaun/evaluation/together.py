"""One pass over data in several processes: all of them take the same number of items, or none goes on."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

from kaun._processes import Channel, failed_elsewhere
from kaun.data import has_exact_length, known_length, makes_items
from kaun.sharding import Sharding

__all__ = ["in_step"]

_numbers = itertools.count()
_END = object()


@contextlib.contextmanager
def in_step(items: Iterable[Any], data: Any, sharding: Sharding | None, entry: str) -> Generator[Iterable[Any]]:
    """The items of a pass, of which each process takes as many; one process alone gets them as they are.

    A program that one process runs and another does not would never end. So they vote before each item, 1 ms for two
    processes on one machine, unless the number of items is known and no code of the user makes them.

    Args:
        items: An iterator over the data.
        data: What the user gave.
        sharding: Where the arrays of the trainer lie. Its processes take part.
        entry: ``"evaluate"`` or ``"predict"``.

    Raises:
        ValueError: If they have different numbers of items.
        FailedElsewhere: If another process fails, or does not come.
    """
    processes = () if sharding is None else sorted({device.process_index for device in sharding.mesh.devices.flat})
    if len(processes) < 2:
        yield items
        return
    channel = Channel(f"{entry}/{next(_numbers)}", processes, f"the items of {entry}")
    try:
        yield _voted(iter(items), data, channel, entry)
    except BaseException as error:
        channel.leave(f"{type(error).__name__}: {error}"[:2000])
        raise


def _voted(items: Iterator[Any], data: Any, channel: Channel, entry: str) -> Iterator[Any]:
    certain = has_exact_length(data) and not makes_items(data)
    lengths = _votes(channel, known_length(data) if certain else None)
    if None not in lengths.values():
        _check_lengths(lengths, entry)
        yield from items
        return
    for count in itertools.count():
        item, failed = _END, None
        try:
            item = next(items, _END)
        except BaseException as error:
            failed = error
        votes = _votes(channel, item is not _END if failed is None else f"{type(failed).__name__}: {failed}"[:2000])
        if failed is not None:
            raise failed
        for process, vote in votes.items():
            if isinstance(vote, str):
                raise failed_elsewhere(process, vote)
        _check_lengths({process: count + vote for process, vote in votes.items()}, entry)
        if item is _END:
            return
        yield item


def _votes(channel: Channel, mine: Any) -> dict[int, Any]:
    """What each process says, a JSON value, by its number."""
    told = channel.exchange(json.dumps(mine), json.dumps)
    return {int(process): json.loads(vote) for process, vote in json.loads(told).items()}


def _check_lengths(lengths: Mapping[int, int], entry: str) -> None:
    fewest = min(lengths.values())
    if len({*lengths.values()}) > 1:
        ended = [process for process, n in lengths.items() if n == fewest]
        raise ValueError(
            f"{entry} expected as many items in each process, but the data of process {', '.join(map(str, ended))} "
            f"ended after {fewest} items, and that of the others has more. Give every process the same number of "
            "items; a loader that is split by process, with drop_last=True."
        )
