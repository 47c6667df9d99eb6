"""Where a run is in its data: the rest of it after some items, and the place of a loader that can say it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kaun.data import Data, ResumableLoader, StageSpec, checked_count, replayed, stages_of

__all__ = ["position", "resume_from"]

# Stages through which the place of the source says all: they keep nothing between two of their items.
_KEEP_NOTHING = frozenset(["Data.map", "Data.with_loss", "Data.batch", "Data.map_batch", "Data.epochs", "Data.take"])


def resume_from(data: Iterable[Any], n: int, position: Mapping[str, Any] | None = None) -> Iterable[Any]:
    """The data from its item ``n`` on, for one run: at no cost where it has items by index or a ``position`` is known.

    Arguments:
        n: how many items were taken.
        position: what ``position`` said then; without one a stream pulls what comes before.

    Raises:
        TypeError: when it is a one-shot iterator without ``get_state()`` and ``set_state(state)``, also for ``n`` 0:
            it could not be resumed later.
        ValueError: for a position that is none.

    >>> from kaun import Data
    >>> from kaun._run.position import resume_from
    >>> list(resume_from(Data.from_items([1, 2, 3]).epochs(2), 4))
    [2, 3]
    """
    n = checked_count("after(data, n)", "n", n, 0)
    found = stages_of(data)
    source = found[0].given.get("source") if found else data
    if hasattr(source, "__next__") and not (_has_state(source) and _can_be_placed(found) and (position or not n)):
        raise TypeError(
            f"A run with checkpoints expected data that can be iterated again, received {type(source).__name__}, an "
            "iterator that can be iterated once: a run that is started again could not find its place in it. Pass a "
            "list, list(iterator); a Data, Data.batches((x, y), batch_size=64); or a function that makes a fresh one, "
            "Data.from_iterable(lambda: make_iterator())."
        )
    if isinstance(data, (list, tuple)):
        return data[n:] if n else data
    if isinstance(data, Data) and (isinstance(source, (list, tuple, range, type(None))) or not _can_be_placed(found)):
        return data.skip(n) if n else data
    if not found:
        return (
            ResumableLoader(source, position, n) if hasattr(data, "__iter__") or hasattr(data, "__getitem__") else data
        )
    tracked = ResumableLoader(source, position)
    length = found[0].length if position is None else None
    first = found[0]._replace(given={"source": tracked}, length=length)
    if position is None:
        return replayed(first, _calls(found[1:], 0, 0)).skip(n)
    return replayed(first, _calls(found[1:], n, tracked.passes))


def position(data: Iterable[Any]) -> dict[str, Any] | None:
    """Where the items end that were taken of data that ``after`` gave, as JSON; None where its loader cannot say it.

    It can where its iterators have ``get_state()``, to JSON or bytes, and ``set_state(state)``, as those of grain do,
    and where all stages after it are ``map``, ``with_loss``, ``batch``, ``map_batch``, then at most one ``epochs``,
    then ``take``. Ask between two items: a stage that pulls ahead is none of these.
    """
    found = stages_of(data)
    source = found[0].given.get("source") if found else data
    return source.place() if isinstance(source, ResumableLoader) else None


def _has_state(iterator: Any) -> bool:
    return hasattr(iterator, "get_state") and hasattr(iterator, "set_state")


def _can_be_placed(found: Sequence[StageSpec]) -> bool:
    """Whether the place of the source says where the items of the pipeline are."""
    names = [stage.name for stage in found[1:]]
    last_pass = names.index("Data.epochs") if "Data.epochs" in names else 0
    return (
        _KEEP_NOTHING.issuperset(names)
        and not {"Data.epochs", "Data.take"} & set(names[:last_pass])
        and (names.count("Data.epochs") <= 1)
    )


def _calls(rest: Sequence[StageSpec], n: int, passes: int) -> list[tuple[str, Mapping[str, Any]]]:
    """The methods that make the stages anew, of which ``n`` items and ``passes`` whole passes are done."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for stage in reversed(rest):
        given = dict(stage.given)
        match stage.name:
            case "Data.batch" | "Data.map_batch":
                n *= given["n"]
            case "Data.take":
                given["n"] = max(0, given["n"] - n)
            case "Data.epochs":
                given["n"] = max(0, given["n"] - passes)
            case _:
                pass
        found.append((stage.name.removeprefix("Data."), given))
    return found[::-1]
