"""What reports keep in a checkpoint: their snapshots as JSON and a flat dict of arrays, and back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._messages import quoted
from kaun._report import Composite, measured_by_call, member, names_of
from kaun.checkpoint import is_elsewhere
from kaun.sharding import put
from kaun.state import TrainState

__all__ = [
    "keeping", "match_reports", "pack_results", "pack_snapshot", "report_kind", "saved_values", "snapshot_reports",
    "unpack_results", "unpack_snapshot",
]  # fmt: skip

_ARRAY, _STATE, _AVERAGED = "array:", "state:", "averaged:"


def pack_snapshot(snapshot: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a snapshot as JSON with the names of its arrays in their place, and the arrays by name.

    Args:
        snapshot: A dict of dicts, lists, JSON values, arrays and TrainStates.

    Raises:
        TypeError: If it holds anything else.
    """
    arrays: dict[str, Any] = {}

    def put(path: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): put(f"{path}/{name}" if path else str(name), v) for name, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [put(f"{path}/{i}", v) for i, v in enumerate(value)]
        if isinstance(value, TrainState):
            for name, leaf in tree.flatten(value)[0].items():
                arrays[f"{path}/{name}"] = _readable(jax.random.key_data(leaf) if tree.is_key(leaf) else leaf)
            return (_AVERAGED if value.is_averaged else _STATE) + path
        if isinstance(value, (jax.Array, np.ndarray)):
            arrays[path] = _readable(value)
            return _ARRAY + path
        if isinstance(value, str):
            return f"text:{value}"
        if isinstance(value, float):
            return f"float:{float(value).hex()}"  # JSON has no nan and no inf
        if value is None or isinstance(value, (bool, int)):
            return value
        raise TypeError(
            f"snapshot() of a report returned {tree.describe(value)} at {path!r}; a checkpoint holds dicts, lists, "
            "numbers, strings, None, arrays and TrainStates. Return values of these types, and rebuild the object from "
            "them in restore(values)."
        )

    return put("", snapshot), arrays


def _readable(array: Any) -> Any:
    """An array of NumPy; one of which other processes have parts stays as it is, and each of them saves its part."""
    return array if isinstance(array, jax.Array) and is_elsewhere(array) else np.asarray(array)


def unpack_snapshot(saved: Any, arrays: Mapping[str, Any], like: TrainState) -> Any:
    """Return the snapshot that ``pack_snapshot`` was called with.

    Args:
        saved: The JSON.
        arrays: The arrays by the names in it.
        like: A state with the structure, shapes and dtypes of the states in it.

    Raises:
        ValueError: If an array is missing or does not fit ``like``.
    """
    if isinstance(saved, Mapping):
        return {name: unpack_snapshot(value, arrays, like) for name, value in saved.items()}
    if isinstance(saved, list):
        return [unpack_snapshot(value, arrays, like) for value in saved]
    if not isinstance(saved, str):
        return saved
    kind, _, rest = saved.partition(":")
    if kind == "float":
        return float.fromhex(rest)
    if kind == "array":
        return _array(arrays, rest)
    if kind == "averaged":
        state = _state(arrays, rest, like)
        return state.with_averaged(state.vars)
    return _state(arrays, rest, like) if kind == "state" else rest


def _array(arrays: Mapping[str, Any], name: str) -> Any:
    if name not in arrays:
        raise ValueError(f"the checkpoint names the array {quoted(name)} of a report, but does not contain it")
    return arrays[name] if isinstance(arrays[name], jax.Array) else np.array(arrays[name])


def _state(arrays: Mapping[str, Any], path: str, like: TrainState) -> TrainState:
    leaves, structure = tree.flatten(like)
    restored: list[Any] = []
    for name, leaf in leaves.items():
        array = _array(arrays, f"{path}/{name}")
        expected = jax.eval_shape(jax.random.key_data, leaf) if tree.is_key(leaf) else leaf
        if array.shape != expected.shape or array.dtype != expected.dtype:
            raise ValueError(
                f"the state that a report saved has {tree.describe(array)} at {quoted(name)}; the state of this run "
                f"has {tree.describe(expected)} there"
            )
        made = jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if tree.is_key(leaf) else array
        restored.append(_placed(jnp.asarray(made), leaf))
    return structure.unflatten(restored)


def _placed(array: jax.Array, like: Any) -> jax.Array:
    """An array that each process has read, on the devices of all of them where those of the state are."""
    if not isinstance(like, jax.Array) or like.is_fully_addressable or not array.is_fully_addressable:
        return array
    where: Any = like.sharding
    return put(array, where)


def keeping(report: Any) -> list[Any]:
    """Return the reports of a fit that keep something in checkpoints."""
    reports = report.reports if isinstance(report, Composite) else [report]
    return [each for each in reports if member(each, "snapshot") is not None]


def snapshot_reports(reports: Sequence[Any]) -> dict[str, Any]:
    """Return what each of some reports keeps, in one flat dict with keys of position, kind and the report's own name.

    By ``"reports"`` (positions and kinds), ``"names"`` and ``"paths"``, ``match_reports`` finds the same reports again.
    """
    if not reports:
        return {}
    keys = [f"{position} {report_kind(report)}" for position, report in enumerate(reports, start=1)]
    kept: dict[str, Any] = {"reports": keys, "names": [*map(_names, reports)], "paths": [*map(_path, reports)]}
    for key, report in zip(keys, reports, strict=True):
        snapshot = member(report, "snapshot")
        assert snapshot is not None
        kept |= {f"{key}/{name}": value for name, value in snapshot().items()}
    return kept


def match_reports(
    reports: Sequence[Any], kept: Mapping[str, Any]
) -> tuple[list[tuple[Any, dict[str, Any]]], list[str]]:
    """Return each report with what it had kept, where it had, and the lines about those that are gone.

    A report is the same if its kind and the names of the values that it watches and measures are. Among those, first
    come reports of the same path, then they are matched in order. Earlier versions saved no names and no paths, and
    what a report alone kept without its kind.

    Args:
        reports: The reports that keep something.
        kept: What ``snapshot_reports`` returned.

    Raises:
        ValueError: If it did not return that.
    """
    if kept and "reports" not in kept:
        if len(reports) == 1:
            return [(reports[0], dict(kept))], []
        return [], [f"one report was saved, and there are {len(reports)} now: {', '.join(map(_described, reports))}"]
    keys: Any = kept.get("reports", [])
    unknown = [None] * len(keys) if isinstance(keys, list) else []
    lists = keys, kept.get("names", unknown), kept.get("paths", unknown)
    if not all(map(_are_texts, lists)) or len(set(map(len, lists))) > 1 or None in keys:
        raise ValueError("the list of reports in the checkpoint is not one that kaun writes")
    saved = list(zip(*lists, strict=True))
    found: dict[int, str] = {}
    for same_path in (True, False):
        for key, names, path in saved:
            for i, report in enumerate(reports):
                same = report_kind(report) == key.partition(" ")[2] and names in (None, _names(report))
                if i not in found and key not in found.values() and same and (path == _path(report) or not same_path):
                    found[i] = key
    values = {key: {n[len(key) + 1 :]: v for n, v in kept.items() if n.startswith(f"{key}/")} for key in keys}
    gone = [
        f"saved, and not there now: {key.partition(' ')[2]}({', '.join(filter(None, (names, path and repr(path))))})"
        for key, names, path in saved
        if key not in found.values() and values[key]
    ]
    return [(reports[i], values[key]) for i, key in sorted(found.items())], gone


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, (str, type(None))) for text in cast("list[Any]", value))


def _names(report: Any) -> str:
    """The names by which reports of one kind are different ones."""
    return ", ".join(map(repr, sorted(names_of(report, "watches") | measured_by_call(report))))


def _path(report: Any) -> str:
    """Where a report writes, empty if that is nowhere."""
    path = getattr(report, "path", "")
    return str(path) if isinstance(path, (str, os.PathLike)) else ""


def _described(report: Any) -> str:
    return f"{report_kind(report)}({_names(report)})"


def pack_results(results: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, Any]:
    """Return results, pairs of a step and values by name, as arrays and a list of names, for a snapshot."""
    results = list(results)
    names = sorted({name for _, values in results for name in values})
    table = np.zeros((len(results), len(names)))
    measured = np.zeros(table.shape, bool)
    for row, (_, values) in enumerate(results):
        for column, name in enumerate(names):
            if name in values:
                table[row, column], measured[row, column] = values[name], True
    steps = np.array([step for step, _ in results], np.int64)
    return {"names": names, "result_steps": steps, "results": table, "measured": measured}


def unpack_results(report: Any, values: Mapping[str, Any]) -> list[tuple[int, dict[str, float]]]:
    """Return the results that ``pack_results`` was called with."""
    names, steps, table, measured = saved_values(report, values, "names", "result_steps", "results", "measured")
    return [
        (int(step), {name: float(table[row, column]) for column, name in enumerate(names) if measured[row, column]})
        for row, step in enumerate(steps)
    ]


def saved_values(report: Any, values: Mapping[str, Any], *names: str) -> list[Any]:
    """Return what a report saved under these names.

    Raises:
        ValueError: If one is missing, because another report saved these values.
    """
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(
            f"{report_kind(report)} cannot continue from these saved values, which belong to other reports: it "
            f"needs {missing[0]!r}; saved names: {', '.join(map(quoted, sorted(values))) or 'none'}. "
            "Pass the same reports as in that run."
        )
    return [values[name] for name in names]


def report_kind(report: Any) -> str:
    """Return what a report is called in a checkpoint and in messages."""
    return getattr(report, "__name__", None) or type(report).__name__
