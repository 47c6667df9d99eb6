"""Sums that are exact on the host, and the pass over items that adds them up while the device works on newer ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from kaun import tree
from kaun.metrics.counted import CountedParts
from kaun.metrics.parts import adds_exactly, merge, on_host, outline

__all__ = [
    "BatchMean", "CountSums", "Counts", "DelayedReader", "ExactMean", "MetricSums", "Part", "Ratio", "add_results",
    "run_ahead",
]  # fmt: skip

# How many results may wait on the device. In an evaluation each holds its batch until it is computed, so few.
_AHEAD = 16


class BatchMean(NamedTuple):
    """The mean of a batch, and the number of examples that it is the mean of."""

    value: Any
    examples: Any


class Ratio(NamedTuple):
    """The sum of a batch, and what the sum of all batches is divided by."""

    total: Any
    count: Any


class Counts(NamedTuple):
    """The counts of a batch, a pytree."""

    sums: Any


Part = BatchMean | Ratio | Counts
"""What a metric gives for one batch, in a form that adds up over batches."""


class DelayedReader:
    """Passes values on in order and some values late, so that the device has newer work while they are read.

    Args:
        window: How many values may wait.
        take: Called with lists of values; it reads them from the device.
    """

    __slots__ = ("_pending", "_take", "_window")

    def __init__(self, window: int, take: Callable[[list[Any]], None]) -> None:
        self._window, self._take = window, take
        self._pending: list[Any] = []

    def push(self, value: Any) -> None:
        """Add a value that the device may still be working on."""
        self._pending.append(value)
        if len(self._pending) >= self._window:
            # The older half: while the host waits for it, the device has the newer half to work on.
            self._pass_on(self._window // 2)

    def flush(self) -> None:
        """Pass on all values that still wait."""
        if self._pending:
            self._pass_on(len(self._pending))

    def _pass_on(self, n: int) -> None:
        self._take(self._pending[:n])
        del self._pending[:n]


def run_ahead(items: Iterable[Any], compute: Callable[[Any, int], Any], take: Callable[[list[Any]], None]) -> int:
    """Make one pass over items, and return how many there were.

    Args:
        items: Any iterable.
        compute: ``compute(item, number)``, numbers from 1, starts the work for one item and does not wait for it.
        take: Called with lists of what ``compute`` returned, in order and some items late; it reads them.
    """
    reader, number = DelayedReader(_AHEAD, take), 0
    for number, item in enumerate(items, start=1):
        reader.push(compute(item, number))
    reader.flush()
    return number


class MetricSums:
    """The sums of the parts of named metrics."""

    __slots__ = ("_sums",)

    def __init__(self) -> None:
        self._sums: dict[str, ExactMean | CountSums] = {}

    def add(self, name: str, part: Part) -> None:
        """Add parts of some batches, stacked along axis 0 on the host."""
        if name not in self._sums:
            self._sums[name] = CountSums(name) if isinstance(part, Counts) else ExactMean(name)
        self._sums[name].add(part)

    def __getitem__(self, name: str) -> Any:
        """The mean of a metric as a float, or the sums of its counts as their pytree."""
        return self._sums[name].result()


def add_results(sums: MetricSums, items: list[dict[str, Ratio | CountedParts]]) -> None:
    """Read the ratios and the parts of some items from the device in one call, and add them."""
    by_name: dict[str, list[Any]] = {}
    for results in jax.device_get(jax.tree_util.tree_map(tree.readable, items)):
        for name, result in results.items():
            by_name.setdefault(name, []).append(result)
    for name, results in by_name.items():
        if isinstance(results[0], CountedParts):
            for parts in results:
                sums.add(name, Counts(jax.tree_util.tree_map(lambda a: np.asarray(a)[None], parts.counts)))
        else:
            sums.add(name, Ratio([float(total) for total, _ in results], [float(count) for _, count in results]))


class ExactMean:
    """Sums of values and of counts, without any rounding, and their quotient."""

    __slots__ = ("_counts", "_name", "_totals")

    def __init__(self, name: str) -> None:
        self._name = name
        self._totals: list[float] = []
        self._counts: list[float] = []

    def add(self, part: Any) -> None:
        """Add means or ratios, stacked along axis 0."""
        totals, counts = (np.asarray(values, np.float64) for values in part)
        if isinstance(part, BatchMean):
            # Exact for a mean in float32: its 24 bits and those of the number of examples fit.
            totals = totals * counts
        self._totals = _exact([*self._totals, *totals.tolist()])
        self._counts = _exact([*self._counts, *counts.tolist()])

    @property
    def weight(self) -> float:
        """The sum of the counts."""
        return sum(self._counts)

    def result(self) -> float:
        """The sum of the values over the sum of the counts; ValueError if the counts add up to 0."""
        if not (count := self.weight):
            of = f" of {self._name!r}" if self._name else ""
            raise ValueError(f"The counts{of} add up to 0: there is nothing to average.")
        return sum(self._totals) / count

    def snapshot(self) -> dict[str, Any]:
        """The sums as lists of floats."""
        return {"totals": self._totals, "counts": self._counts}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue with the sums of a snapshot."""
        self._totals, self._counts = list(saved["totals"]), list(saved["counts"])


def _exact(values: list[float]) -> list[float]:
    """The exact sum as a few floats: the rounded sum, what the rounding left, and so on."""
    parts: list[float] = []
    try:
        while rest := math.fsum([*values, *(-part for part in parts)]):
            if not math.isfinite(rest):
                return [rest]
            parts.append(rest)
    except (OverflowError, ValueError):  # beyond the largest float, or inf - inf
        return [sum(values)]
    return parts


class CountSums:
    """Sums of pytrees of counts: integers and bools in int64, floats in float64, and rows that are kept."""

    __slots__ = ("_groups", "_name", "_saved")

    def __init__(self, name: str) -> None:
        self._name = name
        self._saved: Mapping[str, Any] | None = None  # until the structure of the counts is known
        # Sizes fall: two groups of one size are merged at once. So rows that are kept are copied a few times only.
        self._groups: list[tuple[int, Any]] = []

    def add(self, part: Any) -> None:
        """Add counts, stacked along axis 0; ValueError if their shapes are not those of before."""
        counts, size = on_host(part.sums, batches=True), 1
        if self._saved is not None:
            build = functools.partial(jax.tree_util.tree_unflatten, jax.tree_util.tree_structure(counts))
            self._groups = [
                (n, build(leaves)) for n, leaves in zip(self._saved["sizes"], self._saved["sums"], strict=True)
            ]
            self._saved = None
        if self._groups and (changed := tree.difference(outline(self._groups[0][1]), outline(counts))):
            raise ValueError(
                f"metric {self._name!r}: counts must have the same shapes in all batches to add up; in a later one\n  "
                + "\n  ".join(changed[:10])
                + "\nMake their shapes independent of the batch's, for example by the number of classes."
            )
        while self._groups and self._groups[-1][0] == size:
            counts, size = merge(self._groups.pop()[1], counts), 2 * size
        self._groups.append((size, counts))

    @property
    def empty(self) -> bool:
        """Whether nothing was added."""
        return not self._groups and self._saved is None

    def add_each(self, part: Counts) -> None:
        """Add counts, stacked along axis 0, with sums that do not depend on how they were cut into such parts."""
        if adds_exactly(part.sums):
            self.add(part)
            return
        for i in range(len(jax.tree_util.tree_leaves(part.sums)[0])):
            self.add(Counts(jax.tree_util.tree_map(lambda a, i=i: a[i : i + 1], part.sums)))

    def snapshot(self) -> dict[str, Any]:
        """The sums as lists of arrays."""
        if self._saved is not None:
            return dict(self._saved)
        leaves = [list(map(np.asarray, jax.tree_util.tree_leaves(counts))) for _, counts in self._groups]
        return {"sizes": [n for n, _ in self._groups], "sums": leaves}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue with the sums of a snapshot."""
        self._saved = saved

    def result(self) -> Any:
        """The sums, in the tree of the counts."""
        return functools.reduce(merge, (counts for _, counts in self._groups))
