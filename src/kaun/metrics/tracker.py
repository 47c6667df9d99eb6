"""Running means of named values, and means of a function over data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax

from kaun import tree
from kaun._calls import explained_methods, has_items, public
from kaun._jax import is_traced
from kaun._messages import locate
from kaun.losses import Mean
from kaun.metrics.counted import Counted, CountedParts, result_of
from kaun.metrics.sums import DelayedReader, MetricSums, Ratio, add_results, run_ahead

__all__ = ["Tracker", "evaluate", "evaluate_many"]

# What a Tracker observes are scalars and nothing else, so many may wait on the device.
_UNREAD = 2048


@public
def evaluate(f: Callable[[Any], Any], data: Iterable[Any]) -> float:
    """Compute the mean of a function's results over the items of ``data``, summed exactly on the host.

    For the metrics of a trained model, ``Trainer.evaluate`` is the usual way: it runs the model, compiles the metrics,
    and takes ``metrics.f1`` and the others as they are.

    Args:
        f: ``f(item)`` returns a pair ``(sum, count)``, a ``losses.Mean``, a scalar, which stands for ``(value, 1)``, or
            the parts of a metric, ``Counted.of(metrics.f1).parts(predictions, targets)``. They may be JAX's; they are
            read some items late, so that a compiled ``f`` runs ahead of the host.
        data: The items, a ``Data`` or any iterable.

    Returns:
        The sum of all sums over the sum of all counts; of parts the metric of all rows, an array where it is one.

    Raises:
        TypeError: If f is not callable or does not return real scalars or parts, or if data is not iterable.
        ValueError: If there are no items, the counts add up to 0, or parts are of several metrics.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> batches = [jnp.array([1.0, 2.0, 3.0]), jnp.array([6.0])]
        >>> metrics.evaluate(lambda b: b.mean(), batches), metrics.evaluate(lambda b: (b.sum(), b.size), batches)
        (4.0, 3.0)
    """
    return _means("evaluate", f, data)[""]


@public
def evaluate_many(f: Callable[[Any], dict[str, Any]], data: Iterable[Any]) -> dict[str, float]:
    """Compute the means of several named results over the items of ``data``, in one pass.

    Args:
        f: ``f(item)`` returns a dict from names, the same for every item, to scalars, pairs or parts as in
            ``evaluate``.
        data: The items, a ``Data`` or any iterable.

    Returns:
        The mean of each result, as in ``evaluate``, by name and sorted by name.

    Raises:
        TypeError: If f is not callable or does not return a dict of real scalars, or if data is not iterable.
        ValueError: If there are no items, the counts of a name add up to 0, or the names differ between items.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> batches = [jnp.array([1.0, 2.0, 3.0]), jnp.array([6.0])]
        >>> metrics.evaluate_many(lambda b: {"mean": (b.sum(), b.size), "largest": b.max()}, batches)
        {'largest': 4.5, 'mean': 3.0}
    """
    return _means("evaluate_many", f, data)


@explained_methods
class Tracker:
    """Running means of named scalars, summed exactly on the host.

    Observing does not wait for the device: a value is read when a mean is asked for or, to bound memory, about a
    thousand observations later.

    Examples:
        >>> from kaun import metrics
        >>> tracker = metrics.Tracker()
        >>> for loss, accuracy in [(0.5, 0.9), (0.3, 0.95)]:
        ...     tracker.observe("loss", loss)
        ...     tracker.observe("accuracy", accuracy)
        >>> tracker.mean("loss"), tracker.count("loss")
        (0.4, 2)
        >>> tracker.summary()
        'accuracy: 0.9250  loss: 0.4000'
    """

    __slots__ = ("_counts", "_reader", "_sums")

    def __init__(self) -> None:
        self.reset()

    def observe(self, name: str, value: Any) -> None:
        """Add a value to a name.

        Args:
            name: The name.
            value: A number, or a NumPy or JAX scalar.

        Raises:
            TypeError: If the value is not a real scalar, or is being traced by JAX.
        """
        value = _real_scalar(f"Tracker.observe({name!r}, value)", "expected a real scalar", value)
        self._counts[name] = self._counts.get(name, 0) + 1
        self._reader.push({name: Ratio(value, 1)})

    def mean(self, name: str) -> float:
        """Return the mean of the values observed under a name.

        Raises:
            LookupError: If there are none; the message lists the names that have some.
        """
        self.count(name)
        self._reader.flush()
        return self._sums[name]

    def count(self, name: str) -> int:
        """Return how many values were observed under a name.

        Raises:
            LookupError: If there are none; the message lists the names that have some.
        """
        if name not in self._counts:
            present = ", ".join(map(repr, sorted(self._counts))) or "nothing"
            raise LookupError(f"Tracker has no {name!r}; it has {present}. Call observe({name!r}, value) first.")
        return self._counts[name]

    def reset(self) -> None:
        """Remove all names and values."""
        self._counts: dict[str, int] = {}
        self._sums = MetricSums()
        self._reader = DelayedReader(_UNREAD, functools.partial(add_results, self._sums))

    def items(self) -> list[tuple[str, float]]:
        """Return the pairs of name and mean, sorted by name."""
        return [(name, self.mean(name)) for name in sorted(self._counts)]

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}: {count} values" for name, count in sorted(self._counts.items()))
        return f"Tracker({counts})"

    def summary(self) -> str:
        """Return names and means in one line, sorted by name, with four decimals."""
        return "  ".join(f"{name}: {mean:.4f}" for name, mean in self.items())


def _means(where: str, f: Any, data: Any) -> dict[str, float]:
    if not callable(f) or not has_items(data):
        raise TypeError(
            f"{where} expected a function of an item and an iterable of items, received {tree.describe(f)} and "
            f"{tree.describe(data)}. Write {where}(f, data)."
        )
    rows_of = getattr(data, "_real_rows", None)  # of a Data, which this package cannot import
    if rows_of is not None:
        data = rows_of("metrics.evaluate(f, data)", "Write trainer.evaluate(state, data, metrics)")
    sums, names, place = MetricSums(), list[str](), f"{where}: {locate(f)}"
    metrics: dict[str, Counted | None] = {}

    def measure(item: Any, number: int) -> dict[str, Ratio | CountedParts]:
        results = f(item) if where == "evaluate_many" else {"": f(item)}
        if not isinstance(results, dict):
            raise TypeError(
                f"{place} must return a dict from names to real scalars or pairs (sum, count), received "
                f'{tree.describe(results)}. Write: return {{"accuracy": ...}}.'
            )
        names[:] = names or sorted(results)
        if not results or results.keys() != set(names):
            raise ValueError(
                f"{place} must return the same names for every item, at least one; received "
                f"{sorted(results)} for item {number}, and {names} for the first."
            )
        for name, result in results.items():
            metric = result.counted if isinstance(result, CountedParts) else None
            if metrics.setdefault(name, metric) != metric:
                raise ValueError(
                    f"{place} must return the parts of one metric{f' for {name!r}' if name else ''} for every item; "
                    f"those of item {number} are of another one. Make the Counted once, before the function."
                )
        return {name: _part(place, name, results[name]) for name in names}

    if not run_ahead(cast("Iterable[Any]", data), measure, functools.partial(add_results, sums)):
        raise ValueError(f"{where} expected at least one item, received none: the mean of no items is undefined.")
    result = lambda name, metric: sums[name] if metric is None else result_of(place, metric, sums[name])
    return {name: result(name, metrics[name]) for name in names}


def _part(where: str, name: str, result: Any) -> Ratio | CountedParts:
    if isinstance(result, CountedParts):
        for leaf in jax.tree_util.tree_leaves(result):
            _refuse_traced(where, leaf)
        return result
    must = f"must return{f' for {name!r}' if name else ''} a real scalar or a pair (sum, count) of them"
    if isinstance(result, Mean):
        result = (result.total, result.weight)
    pair = cast("tuple[Any, ...]", result) if isinstance(result, tuple) else (result, 1)
    if len(pair) != 2:
        raise TypeError(f"{where} {must}, received a tuple of {len(pair)}.")
    return Ratio(_real_scalar(where, must, pair[0]), _real_scalar(where, must, pair[1]))


def _real_scalar(where: str, must: str, value: Any) -> Any:
    """The value, not waited for, once it is known to be a real number or an array of shape () that holds one."""
    _refuse_traced(where, value)
    if not tree.is_real_scalar(value):
        fix = " Take its mean, value.mean()." if getattr(value, "shape", ()) else ""
        raise TypeError(f"{where} {must}, received {tree.describe(value)}.{fix}")
    return tree.snapshot(value)


def _refuse_traced(where: str, value: Any) -> None:
    if is_traced(value):
        raise TypeError(
            f"{where} received a value that JAX is tracing, {tree.describe(value)}: there is no number yet. Return it "
            "from the compiled function, and use it outside."
        )
