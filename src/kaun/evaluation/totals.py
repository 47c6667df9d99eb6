"""Metrics as sums over batches: what a compiled program gives for one batch, and the totals of all on the host."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._engine import Packing
from kaun._messages import locate
from kaun.metrics import AHEAD, Counted, DelayedReader, ExactMean, is_real_scalar

__all__ = ["Counts", "Mean", "PackedMetrics", "Ratio", "Scores", "checked", "part_of", "summed"]

Metric = Callable[[Any, Any], Any]
_AT_ONCE, _MOST_BYTES = 64, 1 << 20  # batches on the host that are added up in one go: NumPy costs by the call


class Mean(NamedTuple):
    """A batch's mean, and how many examples it is the mean of."""

    value: Any
    examples: Any


class Ratio(NamedTuple):
    """A batch's sum, and what it is to be divided by."""

    total: Any
    count: Any


class Counts(NamedTuple):
    """A batch's counts, a pytree."""

    sums: Any


def checked(where: str, metrics: Any) -> dict[str, Metric]:
    """The metrics by name, sorted.

    Raises:
        TypeError: when it is no mapping from strings to functions.
        ValueError: when it is empty.
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"{where} expected metrics as a dict from names to functions (predictions, targets), received "
            f'{tree.describe(metrics)}. Write {{"accuracy": metrics.accuracy}}.'
        )
    for name, metric in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f'{where} expected names of metrics as strings, received {name!r}. Write "{name}".')
        if not callable(metric):
            raise TypeError(
                f"{where} expected the metric {name!r} to be a function (predictions, targets), received "
                f'{tree.describe(metric)}. Write {{"{name}": metrics.accuracy}}, or a function of your own.'
            )
    if not metrics:
        fix = 'Write {"accuracy": metrics.accuracy}.'
        raise ValueError(f"{where} expected at least one metric, received none. {fix}")
    return {name: metrics[name] for name in sorted(metrics)}


def summed(metric: Metric) -> Metric:
    """The function that gives a batch's counts where the metric has them, and the metric itself where not."""
    parts = Counted.find(metric)
    return metric if parts is None else functools.partial(_as_counts, parts.counts)


def _as_counts(counts: Metric, predictions: Any, targets: Any) -> Counts:
    return Counts(counts(predictions, targets))


def part_of(where: str, value: Any, predictions: Any, targets: Any) -> Mean | Ratio | Counts:
    """What a metric returned for a batch, as something that adds up.

    Raises:
        TypeError: when it is no real scalar, no pair of them, and no tree of numbers where it is counts.
        ValueError: when it is the mean of nobody knows how many examples.
    """
    if isinstance(value, Counts):
        for path, leaf in tree.flatten(value.sums)[0].items():
            if not _is_real(leaf):
                raise TypeError(
                    f"{where} must count in real numbers, received {tree.describe(leaf)}"
                    f"{f' at {path!r}' if path else ''}. Return arrays that add up over batches."
                )
        return value
    if isinstance(value, tuple) and len(value) == 2 and is_real_scalar(value[0]) and is_real_scalar(value[1]):
        return Ratio(value[0], value[1])
    if not is_real_scalar(value):
        inside = f"a tuple of ({', '.join(map(tree.describe, value))})" if isinstance(value, tuple) else ""
        received = inside or ("None" if value is None else tree.describe(value))
        fix = (
            "Return its mean, value.mean(), or (value.sum(), value.size)."
            if getattr(value, "shape", ())
            else ("Return one JAX scalar.")
        )
        raise TypeError(f"{where} must return a real scalar or a pair (sum, count) of them, received {received}. {fix}")
    return Mean(value, _examples(where, predictions, targets))


def _examples(where: str, predictions: Any, targets: Any) -> int:
    """How many examples a batch has: the one length along axis 0 of its targets, or of the predictions without any."""
    leaves = tree.flatten(targets)[0]
    what = "targets" if leaves else "predictions"
    leaves = leaves or tree.flatten(predictions)[0]
    lengths = {leaf.shape[0] if getattr(leaf, "shape", ()) else None for leaf in leaves.values()}
    (length,) = lengths if len(lengths) == 1 else (None,)
    if length is None:
        found = ", ".join(f"{p}: {tree.describe(v)}" if p else tree.describe(v) for p, v in leaves.items())
        raise ValueError(
            f"{where} returns a scalar, to be weighted by the number of examples, which the {what} do not tell: they "
            f"have no one length along axis 0 ({found or 'no arrays'}). Return a pair (sum, count)."
        )
    return length


def _is_real(leaf: Any) -> bool:
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return isinstance(leaf, (bool, int, float)) or (
        tree.is_array(leaf) and any(jnp.issubdtype(leaf.dtype, k) for k in kinds)
    )


@jax.tree_util.register_pytree_node_class
class PackedMetrics:
    """The parts of one batch by name in one vector for each dtype: fetching costs by the array."""

    __slots__ = ("form", "vectors")

    def __init__(self, form: tuple[Packing, Any], vectors: Any) -> None:
        self.form, self.vectors = form, vectors

    @classmethod
    def of(cls, parts: Mapping[str, Mean | Ratio | Counts]) -> PackedMetrics:
        leaves, structure = jax.tree_util.tree_flatten(dict(parts))
        arrays = [jnp.asarray(leaf) for leaf in leaves]
        packing = Packing([(a.shape, a.dtype) for a in arrays])
        return cls((packing, structure), packing.pack(arrays))

    @staticmethod
    def stacked(form: tuple[Packing, Any], batches: list[PackedMetrics]) -> dict[str, Any]:
        """The parts of some batches of one form that are on the host, along a new axis 0."""
        packing, structure = form
        stacks = [np.stack(vectors) for vectors in zip(*[b.vectors for b in batches], strict=True)]
        held = {stack.dtype: stack for stack in stacks}
        leaves = [
            held[dtype][:, start : start + math.prod(shape)].reshape(-1, *shape)
            for dtype, shape, start in packing.layout
        ]
        return jax.tree_util.tree_unflatten(structure, leaves)

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        return (self.vectors,), self.form

    @classmethod
    def tree_unflatten(cls, form: Any, children: tuple[Any]) -> PackedMetrics:
        return cls(form, children[0])


class Scores:
    """The totals of some metrics over batches, exact on the host; the newest are still on the device."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics
        self._totals: dict[str, ExactMean | CountSums] = {}
        self._lagging = DelayedReader(AHEAD, self._read)
        self._host: list[PackedMetrics] = []

    def add(self, batch: PackedMetrics) -> None:
        """Add one batch's, without waiting for it."""
        self._lagging.push(batch)

    def results(self) -> dict[str, float]:
        """The metrics of all batches together."""
        self._lagging.flush()
        self._take()
        return {name: self._result(name, self._totals[name]) for name in self._metrics}

    def _read(self, batches: list[PackedMetrics]) -> None:
        # One by one: jax.device_get takes four times as long.
        self._host += [PackedMetrics(batch.form, [np.asarray(vector) for vector in batch.vectors]) for batch in batches]
        if len(self._host) >= _AT_ONCE or sum(v.nbytes for b in self._host for v in b.vectors) >= _MOST_BYTES:
            self._take()

    def _take(self) -> None:
        batches, self._host = self._host, []
        for form, group in itertools.groupby(batches, key=lambda batch: batch.form):
            for name, part in PackedMetrics.stacked(form, list(group)).items():
                total = self._totals.setdefault(name, CountSums() if isinstance(part, Counts) else ExactMean(AHEAD))
                if isinstance(total, CountSums):
                    total.add(name, part.sums)
                    continue
                sums, counts = (np.asarray(a, np.float64) for a in part)
                # Exact for a mean in float32: its 24 bits and those of the number of examples fit.
                sums = sums * counts if isinstance(part, Mean) else sums
                total.take(list(zip(sums.tolist(), counts.tolist(), strict=True)))

    def _result(self, name: str, total: ExactMean | CountSums) -> float:
        if isinstance(total, ExactMean):
            return total.mean(name)
        parts = Counted.find(self._metrics[name])
        assert parts is not None
        result = parts.result(total.sums)
        if not is_real_scalar(result):
            raise TypeError(
                f"metric {name!r}: the result {locate(parts.result)} of its counts must be a real number, received "
                f"{'None' if result is None else tree.describe(result)}. Return a float."
            )
        return float(result)


class CountSums:
    """Sums of trees of counts, in int64 and float64."""

    def __init__(self) -> None:
        self.sums: Any = None

    def add(self, name: str, counts: Any) -> None:
        """Add the counts of some batches, along axis 0."""
        counts = jax.tree_util.tree_map(_sum_of, counts)
        if self.sums is None:
            self.sums = counts
            return
        if changed := tree.difference(self.sums, counts):
            raise ValueError(
                f"metric {name!r}: counts must have the same shapes in all batches to add up; in a later batch\n  "
                + "\n  ".join(changed[:10])
                + "\nMake their shapes independent of the batch's, say by the number of classes."
            )
        self.sums = jax.tree_util.tree_map(np.add, self.sums, counts)


def _sum_of(counts: Any) -> Any:
    return counts.sum(axis=0, dtype=np.float64 if jnp.issubdtype(counts.dtype, jnp.floating) else np.int64)
