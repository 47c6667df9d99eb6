"""Metrics as parts that add up over batches, and their totals over all batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import losses, tree
from kaun._calls import foreign_function, shown
from kaun._engine import Packing
from kaun.metrics import BatchMean, Counted, Counts, MetricSums, Part, Ratio, result_of

__all__ = ["MemberTotals", "Metric", "MetricTotals", "PackedMetrics", "check_metrics", "part_of", "with_counts"]

Metric = Callable[..., Any]
_AT_ONCE, _MOST_BYTES = 64, 1 << 20  # batches on the host that are added up in one go: NumPy costs by the call


def check_metrics(where: str, metrics: Any) -> dict[str, Metric]:
    """The metrics by name, sorted by name.

    Raises:
        TypeError: If they are not a mapping from strings to functions.
        ValueError: If there are none.
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"{where} expected metrics as a dict from names to functions (predictions, targets), received "
            f'{tree.describe(metrics)}. Write {{"accuracy": metrics.accuracy}}.'
        )
    for name, metric in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f'{where} expected names of metrics as strings, received {shown(name)}. Write "{name}".')
        if (foreign := foreign_function(metric, "metrics")) is not None:
            raise TypeError(f"{where} expected the metric {name!r} to be a function of JAX arrays, {foreign}")
        if not callable(metric):
            raise TypeError(
                f"{where} expected the metric {name!r} to be a function (predictions, targets), received "
                f'{tree.describe(metric)}. Write {{"{name}": metrics.accuracy}}, or your own function.'
            )
    if not metrics:
        fix = 'Write {"accuracy": metrics.accuracy}.'
        raise ValueError(f"{where} expected at least one metric, received none. {fix}")
    return {name: metrics[name] for name in sorted(metrics)}


def with_counts(metric: Metric) -> Metric:
    """The function that gives a batch's counts where the metric has them, or its mean, otherwise the metric itself."""
    parts = Counted.find(metric)
    if parts is None:
        return losses.parts_of(metric)
    counts = parts.counts
    # A function and not a partial: a function's captures are found again quickly, for each item.
    return lambda predictions, targets, **rows: Counts(counts(predictions, targets, **rows))


def part_of(where: str, value: Any, predictions: Any, targets: Any) -> Part:
    """What a metric returned for a batch, in a form that adds up over batches.

    Raises:
        TypeError: If the value is not a real scalar or a pair of them, or, of counts, not a pytree of real numbers.
        ValueError: If the value is a mean, and the number of examples is unknown.
    """
    if isinstance(value, Counts):
        for path, leaf in tree.flatten(value.sums)[0].items():
            if not tree.is_real(leaf):
                raise TypeError(
                    f"{where} must count in real numbers, received {tree.describe(leaf)}"
                    f"{f' at {path!r}' if path else ''}. Return arrays that add up over batches."
                )
        return value
    if isinstance(value, losses.Mean):
        value = (value.total, value.weight)
    if isinstance(value, tuple) and len(value) == 2 and tree.is_real_scalar(value[0]) and tree.is_real_scalar(value[1]):
        return Ratio(value[0], value[1])
    if not tree.is_real_scalar(value):
        inside = f"a tuple of ({', '.join(map(tree.describe, value))})" if isinstance(value, tuple) else ""
        received = inside or ("None" if value is None else tree.describe(value))
        fix = (
            "Return its mean, value.mean(), or (value.sum(), value.size)."
            if getattr(value, "shape", ())
            else ("Return one JAX scalar.")
        )
        raise TypeError(f"{where} must return a real scalar or a pair (sum, count) of them, received {received}. {fix}")
    return BatchMean(value, _examples(where, predictions, targets))


def _examples(where: str, predictions: Any, targets: Any) -> int:
    """The number of examples in a batch: the length along axis 0 of its targets, or without any of its predictions."""
    leaves = tree.flatten(targets)[0]
    what = "targets" if leaves else "predictions"
    leaves = leaves or tree.flatten(predictions)[0]
    lengths = {leaf.shape[0] if getattr(leaf, "shape", ()) else None for leaf in leaves.values()}
    (length,) = lengths if len(lengths) == 1 else (None,)
    if length is None:
        found = ", ".join(f"{p}: {tree.describe(v)}" if p else tree.describe(v) for p, v in leaves.items())
        raise ValueError(
            f"{where} returns a scalar, which is weighted by the number of examples, but the {what} do not all have "
            f"one length along axis 0 ({found or 'no arrays'}). Return a pair (sum, count)."
        )
    return length


@jax.tree_util.register_pytree_node_class
class PackedMetrics:
    """The parts of one batch by name, in one vector for each dtype: reading from the device costs by the array.

    Attributes:
        form: The layout of the parts in the vectors, and their pytree structure.
        vectors: The vectors; on the host with batches along axis 0.
    """

    __slots__ = ("form", "vectors")

    def __init__(self, form: tuple[Packing, Any], vectors: Any) -> None:
        self.form: tuple[Packing, Any] = form
        self.vectors: Any = vectors

    @classmethod
    def of(cls, parts: Mapping[str, Part]) -> PackedMetrics:
        """Pack parts, traced or not."""
        leaves, structure = jax.tree_util.tree_flatten(dict(parts))
        arrays = [jnp.asarray(leaf) for leaf in leaves]
        packing = Packing([(a.shape, a.dtype) for a in arrays])
        return cls((packing, structure), packing.pack(arrays))

    @staticmethod
    def stacked(form: tuple[Packing, Any], batches: list[PackedMetrics]) -> dict[str, Any]:
        """The parts of some batches of one form that are on the host, with batches along axis 0."""
        packing, structure = form
        stacks = [np.concatenate(vectors) for vectors in zip(*[b.vectors for b in batches], strict=True)]
        held = {stack.dtype: stack for stack in stacks}
        leaves = [
            held[dtype][:, start : start + math.prod(shape)].reshape(-1, *shape)
            for dtype, shape, start in packing.layout
        ]
        return jax.tree_util.tree_unflatten(structure, leaves)

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        """Called by JAX: the children, and the rest."""
        return (self.vectors,), self.form

    @classmethod
    def tree_unflatten(cls, form: Any, children: tuple[Any]) -> PackedMetrics:
        """Called by JAX: the pytree made again."""
        return cls(form, children[0])


class MetricTotals:
    """The metrics of all batches together."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics
        self._sums = MetricSums()
        self._host: list[PackedMetrics] = []

    def take(self, batches: PackedMetrics) -> None:
        """Add some batches, whose vectors are on the host with the batches along axis 0."""
        self._host.append(batches)
        if len(self._host) >= _AT_ONCE or sum(v.nbytes for b in self._host for v in b.vectors) >= _MOST_BYTES:
            self._add()

    def results(self) -> dict[str, float]:
        """The value of each metric by name, a float or an array."""
        self._add()
        return {name: self._result(name, metric) for name, metric in self._metrics.items()}

    def _add(self) -> None:
        batches, self._host = self._host, []
        for form, group in itertools.groupby(batches, key=lambda batch: batch.form):
            for name, part in PackedMetrics.stacked(form, list(group)).items():
                self._sums.add(name, part)

    def _result(self, name: str, metric: Metric) -> float:
        counted = Counted.find(metric)
        if counted is None:
            return self._sums[name]
        return result_of(f"metric {name!r}", counted, self._sums[name])


class MemberTotals:
    """The metrics of all batches together, of each member of an ensemble.

    Args:
        metrics: The functions by name.
        size: The number of members.
    """

    def __init__(self, metrics: Mapping[str, Metric], size: int) -> None:
        self._each = [MetricTotals(metrics) for _ in range(size)]

    def take(self, batches: list[PackedMetrics]) -> None:
        """Read some batches from the device, whose vectors have the members along axis 0, and add them."""
        for batch in batches:
            vectors = [np.asarray(vector) for vector in batch.vectors]
            for i, totals in enumerate(self._each):
                totals.take(PackedMetrics(batch.form, [vector[i][None] for vector in vectors]))

    def results(self) -> dict[str, np.ndarray[Any, Any]]:
        """The values of each metric by name, with the members along axis 0."""
        each = [totals.results() for totals in self._each]
        return {name: np.stack([results[name] for results in each]) for name in each[0]}
