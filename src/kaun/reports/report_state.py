"""What reports keep in a checkpoint, and how they get it back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["packed", "report_kind", "restore", "saved", "snapshot", "unpacked"]

Results = list[tuple[int, dict[str, float]]]


def report_kind(report: Any) -> str:
    """What a report is called in a checkpoint and in messages."""
    return getattr(report, "__name__", None) or type(report).__name__


def snapshot(reports: Sequence[Any]) -> dict[str, Any]:
    """What each of these reports keeps, in one flat dict; keys are position, kind and the report's own name for it."""
    keys = _keys(reports)
    kept: dict[str, Any] = {"reports": keys}
    for key, report in zip(keys, reports, strict=True):
        kept |= {f"{key}/{name}": value for name, value in report.snapshot().items()}
    return kept


def restore(reports: Sequence[Any], values: Mapping[str, Any]) -> None:
    """Give each report back what it kept.

    Raises:
        ValueError: when these are other reports than those of ``snapshot``.
    """
    was, now = list[str](values.get("reports", ())), _keys(reports)
    if was != now:
        lines = [f"saved, and not there now: {key}" for key in was if key not in now]
        lines += [f"there now, and not saved: {key}" for key in now if key not in was]
        names = ", ".join(f"{key.partition(' ')[2]}(...)" for key in was) or "...  # without those"
        raise ValueError(
            "The reports are not those of the run that was saved. By position among those that keep something, and "
            "kind:\n  " + "\n  ".join(lines) + f"\nPass the same ones in the same order: reports.all_of({names})."
        )
    for key, report in zip(now, reports, strict=True):
        report.restore({name[len(key) + 1 :]: value for name, value in values.items() if name.startswith(f"{key}/")})


def saved(report: Any, values: Mapping[str, Any], *names: str) -> list[Any]:
    """What a report kept under these names.

    Raises:
        ValueError: when one is missing: another report kept these values.
    """
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(
            f"{report_kind(report)} cannot go on from what was saved, which is of other reports: it needs "
            f"{missing[0]!r}, saved are {', '.join(map(repr, sorted(values))) or 'none'}. Pass the same reports as in "
            "that run."
        )
    return [values[name] for name in names]


def packed(results: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, Any]:
    """Steps and values by name, as arrays and names."""
    results = list(results)
    names = sorted({name for _, values in results for name in values})
    table = np.zeros((len(results), len(names)))
    there = np.zeros(table.shape, bool)
    for row, (_, values) in enumerate(results):
        for column, name in enumerate(names):
            if name in values:
                table[row, column], there[row, column] = values[name], True
    steps = np.array([step for step, _ in results], np.int64)
    return {"names": names, "result_steps": steps, "results": table, "measured": there}


def unpacked(report: Any, values: Mapping[str, Any]) -> Results:
    """The results that ``packed`` made arrays of."""
    names, steps, table, there = saved(report, values, "names", "result_steps", "results", "measured")
    return [
        (int(step), {name: float(table[row, column]) for column, name in enumerate(names) if there[row, column]})
        for row, step in enumerate(steps)
    ]


def _keys(reports: Sequence[Any]) -> list[str]:
    return [f"{position} {report_kind(report)}" for position, report in enumerate(reports, start=1)]
