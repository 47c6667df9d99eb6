"""Running means of named values, and means of a function over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from kaun import tree
from kaun._jax import is_traced
from kaun._messages import locate
from kaun.metrics.sums import AHEAD, ExactMean, is_real_scalar


def evaluate(f: Callable[[Any], Any], data: Iterable[Any]) -> float:
    """The mean of a metric over the items of ``data``, a float summed exactly on the host.

    Arguments:
        f: ``f(item)`` is a pair ``(sum, count)`` or a scalar, which stands for ``(value, 1)``; the result is the sum of
            sums over the sum of counts. Scalars are fetched some items later: a compiled ``f`` runs ahead of the host.
        data: a ``Data`` or any iterable.

    Raises:
        TypeError: f not callable or not returning real scalars, data not iterable.
        ValueError: no items, counts that add up to 0.

    >>> import jax.numpy as jnp
    >>> from kaun import metrics
    >>> batches = [jnp.array([1.0, 2.0, 3.0]), jnp.array([6.0])]
    >>> metrics.evaluate(lambda b: b.mean(), batches), metrics.evaluate(lambda b: (b.sum(), b.size), batches)
    (4.0, 3.0)
    """
    return _means("evaluate", f, data)[""]


def evaluate_many(f: Callable[[Any], dict[str, Any]], data: Iterable[Any]) -> dict[str, float]:
    """The means of several metrics over the items of ``data``, floats by name, sorted by name.

    Arguments:
        f: ``f(item)`` is a dict from names, the same for every item, to scalars or pairs as in ``evaluate``.
        data: a ``Data`` or any iterable.

    Raises:
        TypeError: f not callable or not returning a dict of real scalars, data not iterable.
        ValueError: as ``evaluate``; an item's names are not those of the first, or are none.

    >>> import jax.numpy as jnp
    >>> from kaun import metrics
    >>> batches = [jnp.array([1.0, 2.0, 3.0]), jnp.array([6.0])]
    >>> metrics.evaluate_many(lambda b: {"mean": (b.sum(), b.size), "largest": b.max()}, batches)
    {'largest': 4.5, 'mean': 3.0}
    """
    return _means("evaluate_many", f, data)


class Tracker:
    """Running means of named scalars, summed exactly on the host.

    Observing does not wait for the device: a value is fetched when it is read or, to bound memory, a thousand later.

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

    __slots__ = ("_totals",)

    def __init__(self) -> None:
        self._totals: dict[str, ExactMean] = {}

    def observe(self, name: str, value: Any) -> None:
        """Adds a value to ``name``: a number or a NumPy or JAX scalar; TypeError if it is no real one, or traced."""
        value = _real_scalar(f"Tracker.observe({name!r}, value)", "expected a real scalar", value)
        self._totals.setdefault(name, ExactMean(_UNREAD)).add(value, 1)

    def mean(self, name: str) -> float:
        """The mean of what was observed under ``name``; LookupError, with the names present, if nothing was."""
        return self._total(name).mean(name)

    def count(self, name: str) -> int:
        """How many values were observed under ``name``; LookupError, with the names present, if none were."""
        return self._total(name).added

    def reset(self) -> None:
        """Forgets all names and values."""
        self._totals = {}

    def items(self) -> list[tuple[str, float]]:
        """Names and means, sorted by name."""
        return [(name, self.mean(name)) for name in sorted(self._totals)]

    def summary(self) -> str:
        """Names and means in one line, sorted by name, with four decimals."""
        return "  ".join(f"{name}: {mean:.4f}" for name, mean in self.items())

    def _total(self, name: str) -> ExactMean:
        if name not in self._totals:
            present = ", ".join(map(repr, sorted(self._totals))) or "nothing"
            raise LookupError(f"Tracker has no {name!r}; it has {present}. Call observe({name!r}, value) first.")
        return self._totals[name]


# What a Tracker observes are scalars and nothing else, so many may wait on the device.
_UNREAD = 2048


def _means(where: str, f: Any, data: Any) -> dict[str, float]:
    if not callable(f) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise TypeError(
            f"{where} expected a function of an item and an iterable of items, received {tree.describe(f)} and "
            f"{tree.describe(data)}. Write {where}(f, data)."
        )
    sums: dict[str, ExactMean] = {}
    for i, item in enumerate(cast("Iterable[Any]", data)):
        results = f(item) if where == "evaluate_many" else {"": f(item)}
        if not isinstance(results, dict):
            raise TypeError(
                f"{where}: {locate(f)} must return a dict from names to real scalars or pairs (sum, count), received "
                f'{tree.describe(results)}. Write: return {{"accuracy": ...}}.'
            )
        sums = sums or {name: ExactMean(AHEAD) for name in sorted(results)}
        if not results or results.keys() != sums.keys():
            raise ValueError(
                f"{where}: {locate(f)} must return the same names for every item, at least one; received "
                f"{sorted(results)} for item {i}, and {sorted(sums)} for the first."
            )
        for name, total in sums.items():
            total.add(*_value_and_count(f"{where}: {locate(f)}", name, results[name]))
    if not sums:
        raise ValueError(f"{where} expected at least one item, received none: the mean of nothing is not a number.")
    return {name: total.mean(name) for name, total in sums.items()}


def _value_and_count(where: str, name: str, result: Any) -> tuple[Any, Any]:
    must = f"must return{f' for {name!r}' if name else ''} a real scalar or a pair (sum, count) of them"
    pair = cast("tuple[Any, ...]", result) if isinstance(result, tuple) else (result, 1)
    if len(pair) != 2:
        raise TypeError(f"{where} {must}, received a tuple of {len(pair)}.")
    return _real_scalar(where, must, pair[0]), _real_scalar(where, must, pair[1])


def _real_scalar(where: str, must: str, value: Any) -> Any:
    """The value, not waited for, once it is known to be a real number or an array of shape () that holds one."""
    if is_traced(value):
        raise TypeError(
            f"{where} received a value that JAX is tracing, {tree.describe(value)}: there is no number yet. Return it "
            "from the compiled function, and use it outside."
        )
    if not is_real_scalar(value):
        fix = " Take its mean, value.mean()." if getattr(value, "shape", ()) else ""
        raise TypeError(f"{where} {must}, received {tree.describe(value)}.{fix}")
    return tree.snapshot(value)
