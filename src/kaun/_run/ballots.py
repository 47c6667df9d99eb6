"""What the votes of the processes of a fit amount to: computed in one process, and the same for all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from kaun._run.same import differences
from kaun.data import different_items

__all__ = ["combine", "packed", "unpacked"]

_WORST = ("failed", "exit", "stopped", "data")  # what ends a fit, where several things do


def packed(ballot: Mapping[str, Any]) -> str:
    """A ballot as text."""
    return json.dumps(ballot)


def unpacked(text: str) -> dict[str, Any]:
    """The ballot of a text."""
    return json.loads(text)


def combine(texts: dict[int, str]) -> str:
    """What the ballots of all processes amount to.

    Args:
        texts: The ballots by process. What they may hold: ``at`` and ``wait``, the steps that were dispatched and those
            that wait; ``end``, how the fit ends in this process (``"failed"``, ``"exit"``, ``"stopped"``, ``"data"``),
            with ``what`` and ``code``; ``steps``, whether the state that is left would be saved; and what the votes of
            ``Agreement`` ask.
    """
    ballots = {process: unpacked(text) for process, text in texts.items()}
    first = ballots[min(ballots)]
    ended = {process: ballot["wait"] for process, ballot in ballots.items() if ballot.get("end") == "data"}
    each = lambda name: [ballot[name] for ballot in ballots.values() if ballot.get(name) is not None]
    found: dict[str, Any] = {
        "next": min(each("next"), default=1), "want": min(each("want"), default=None),
        "limit": first.get("limit"), "due": first.get("due", False), "best": first.get("best", False),
        "at": min(each("at"), default=0), "wait": min(each("wait"), default=0),
        "apart": len(set(each("at"))) > 1, "rescue": all(each("steps")),
        "pending": next(iter(each("pending")), None),
        "same": len(set(each("state"))) == 1 and len(each("state")) == len(ballots),
        "end": _end(ballots), "ended": [process for process, waits in ended.items() if waits == min(each("wait"))],
        "unlike": [],
    }  # fmt: skip
    if found["end"] is None:
        found["unlike"] = _unlike(ballots)
    if found["want"] is not None:
        found["next"] = min(found["next"], found["want"] - found["at"] - found["wait"])
    if "began" in first:
        found |= _begin(ballots.values())
    return packed(found)


def _end(ballots: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    for kind in _WORST:
        for process, ballot in ballots.items():
            if ballot.get("end") == kind:
                code, what = ballot.get("code", 1), ballot.get("what", kind)
                return {"kind": kind, "process": process, "what": what, "code": code}
    return None


def _begin(ballots: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    starts = [ballot for ballot in ballots if "began" in ballot]
    totals = {ballot["total"] for ballot in starts}
    numbers: dict[str, int] = {}
    for name, n in (pair for ballot in starts for pair in ballot["numbers"].items()):
        numbers[name] = math.gcd(n, numbers.get(name, 0))
    certain = len(totals) == 1 and None not in totals
    turns = max(ballot["turns"] for ballot in starts)
    return {"turns": turns, "numbers": numbers, "asks": any(ballot["asks"] for ballot in starts), "certain": certain}


def _unlike(ballots: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """In words, how the processes differ where they must not."""
    number = min(ballots)
    first = ballots[number]
    if all("began" in ballot for ballot in ballots.values()):
        return differences(first, ballots)
    for process, ballot in ballots.items():
        if any(ballot.get(name) != first.get(name) for name in ("at", "wait")) or ("items" in ballot) != (
            "items" in first
        ):
            return [
                f"after {first.get('at')} steps, process {number} has {first.get('wait')} next items of one kind, and "
                f"process {process} has {ballot.get('wait')}, after {ballot.get('at')} steps"
            ]
    difference = different_items({p: b["items"] for p, b in ballots.items()}) if "items" in first else ""
    return [difference] if difference else []
