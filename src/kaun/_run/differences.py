"""What differs between the data of a checkpoint and the data given to resume with, in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

__all__ = ["differences"]

Fact = dict[str, Any]

_CODE = re.compile(r"(python\d+\.\d+):\w+")
_CHANGE_NO_ITEM = frozenset(["Data.prefetch"])
_ITEM_BY_ITEM = frozenset(["Data.map", "Data.random_map", "Data.with_loss"])  # they make one item of each
_COUNTS = frozenset(["Data.epochs", "Data.take"])
_KEYED = ("Data.random_map", "Data.mix", "Data.sample")  # their keys are not those of a shuffle


def differences(saved: Sequence[Fact], now: Sequence[Fact], done: int, *, exact: bool = True) -> list[str]:
    """One line for each difference between the data of a checkpoint and the data of now; none for the same data.

    The count of the last ``epochs(n)``, ``take(n)`` or ``repeat(n)`` may differ, and such a stage may be added or
    removed at the end, as long as ``done`` items are there: the items up to then are the same. The number in
    ``prefetch(n)`` changes no item. Code is compared within one version of Python.

    Args:
        saved: The facts in the checkpoint.
        now: The facts of the data given to resume with.
        done: How many items the run has taken.
        exact: Whether there are as many items as the data of now says; a loader may say another number.

    Examples:
        >>> from kaun import Data
        >>> from kaun._run.differences import differences
        >>> from kaun._run.identity import describe_data
        >>> old, new = (describe_data(Data.from_items(range(9)).batch(n).epochs(2)) for n in (2, 3))
        >>> differences(old, new, 1)
        ['Data.batch: n was 2, is 3']
    """
    before, current = map(_that_change_items, (saved, now))
    open_before, open_current = _without_last_count(before), _without_last_count(current)
    pairs = [(before, current), (before, open_current), (open_before, current), (open_before, open_current)]
    if all(_lines(*pair) for pair in pairs):
        same_end = [f["stage"] for f in open_before] == [f["stage"] for f in open_current]
        return _lines(*(pairs[3] if same_end else pairs[0]))
    length = current[-1]["length"]
    if exact and length is not None and length < done:
        last = next((f["stage"] for f in reversed(current) if f["stage"] not in _ITEM_BY_ITEM), "the data")
        return [f"{last}: there are {length} items now, and the run has taken {done} already"]
    return []


def _that_change_items(facts: Sequence[Fact]) -> list[Fact]:
    return [fact for fact in facts if fact["stage"] not in _CHANGE_NO_ITEM]


def _without_last_count(facts: list[Fact]) -> list[Fact]:
    """The facts without the last count that may differ."""
    for i in reversed(range(len(facts))):
        name = facts[i]["stage"]
        if name == "Data.repeat":
            return [*facts[:i], {**facts[i], "n": None}, *facts[i + 1 :]]
        if name in _COUNTS:
            return [*facts[:i], *facts[i + 1 :]]
        if name not in _ITEM_BY_ITEM:
            break
    return facts


def _lines(before: list[Fact], current: list[Fact]) -> list[str]:
    """The differences, stage by stage up to the first that is another one."""
    names, found = [f["stage"] for f in before], [f["stage"] for f in current]
    lines: list[str] = []
    for i, (old, new) in enumerate(zip(before, current, strict=False)):
        if old["stage"] != new["stage"]:
            break
        where = old["stage"] if names.count(old["stage"]) == 1 else f"{old['stage']} (stage {i + 1})"
        for name in dict.fromkeys([*old, *new]):
            # Another seed is another state too; older checkpoints have no states.
            known = name == "length" or (
                name == "generators" and (name not in old or old.get("seed") != new.get("seed"))
            )
            lines += [] if known else _changes(where, name, old.get(name), new.get(name))
    if names != found:
        lines.append(f"the stages were {', '.join(names)}; they are {', '.join(found)}")
    return lines


def _changes(where: str, name: str, a: Any, b: Any) -> list[str]:
    """The differences of one parameter, or of the parts of it."""
    if _is_same(a, b):
        return []
    if name == "sources":
        return _changes_of_sources(where, a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        old, new = cast("Fact", a), cast("Fact", b)
        if "function" in old and "function" in new:
            return _changes_of_function(where, old, new)
        lines: list[str] = []
        for part in dict.fromkeys([*old, *new]):
            inner = part if name == "item" and part else f"{name} at {part!r}" if part else name
            lines += _changes(where, inner, old.get(part), new.get(part))
        return lines
    if name == "key":
        why = "another seed, or keys drawn in another order under rng.scope" if a and b else "shuffled or not"
        kind = "key" if where.startswith(_KEYED) else "shuffle key"
        return [f"{where}: the {kind} was {_describe(a)}, is {_describe(b)} ({why})"]
    if name.startswith("generators at "):
        return [
            f"{where}: the random generator {name.removeprefix('generators at ')[1:-1]} has another state: it is not "
            "seeded, or was drawn from since. Make it again from a seed before each fit"
        ]
    return [f"{where}: {_change(name, a, b)}"]


def _changes_of_sources(where: str, a: list[list[Fact]], b: list[list[Fact]]) -> list[str]:
    """The differences of the pipelines that a stage puts together, each with the number of its source."""
    lines = [] if len(a) == len(b) else [f"{where}: it had {len(a)} sources, and has {len(b)}"]
    for k, (old, new) in enumerate(zip(a, b, strict=False)):
        found = _lines(_that_change_items(old), _that_change_items(new))
        lines += [f"{where}, source {k} (counted from 0): {line}" for line in found]
    return lines


def _changes_of_function(where: str, a: Fact, b: Fact) -> list[str]:
    f = a["function"]
    if f != b["function"]:
        return [f"{where}: the function was {f}, is {b['function']}"]
    lines = [] if _is_same(a.get("code"), b.get("code")) else [f"{where}: the code of {f} has changed"]
    for name in dict.fromkeys([*a["reads"], *b["reads"]]):
        lines += _changes(where, f"`{name}`, which {f} reads,", a["reads"].get(name), b["reads"].get(name))
    return lines or [f"{where}: {f} has changed"]


def _is_same(a: Any, b: Any) -> bool:
    """Whether two facts are equal, but for code where the versions of Python differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        old, new = cast("Fact", a), cast("Fact", b)
        return all(_is_same(old.get(k), new.get(k)) for k in {*old, *new})
    if isinstance(a, list) and isinstance(b, list):
        ones, others = cast("list[Any]", a), cast("list[Any]", b)
        return len(ones) == len(others) and all(map(_is_same, ones, others))
    if isinstance(a, str) and isinstance(b, str):
        one, other = _CODE.search(a), _CODE.search(b)
        if one and other and one[1] != other[1]:
            return _CODE.sub("", a) == _CODE.sub("", b)
    return type(a) is type(b) and a == b


def _change(name: str, a: Any, b: Any) -> str:
    old, new = _describe(a), _describe(b)
    if old != new:
        return f"{name} was {old}, is {new}"
    inside = isinstance(a, str) and isinstance(b, str) and _CODE.sub("", a) == _CODE.sub("", b)
    return f"the {'code' if inside else 'content'} of {name} has changed ({old})"


def _describe(value: Any) -> str:
    """A fact in words, without the digests in it."""
    if isinstance(value, dict):
        return str(cast("Fact", value).get("function", f"a tree of {len(value)} parts"))
    if isinstance(value, str):
        return _CODE.sub("", value).partition(" sha256:")[0].strip()
    return "nothing" if value is None else str(value)
