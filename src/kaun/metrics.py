"""Metrics: functions of ``(predictions, targets)``, means of them over a data set, and a tracker of named means.

Every metric is a Python float (computed in float64 from exact counts) for concrete inputs, and a scalar JAX array when
it is compiled. What cannot be counted is never counted as wrong: a class index out of range is an error where the
values are known, and makes the result NaN in compiled code; a score that is NaN makes it NaN everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kaun import tree
from kaun.errors import locate
from kaun.losses import Array, as_array, class_indices, equal_shapes, floats, index_shape, not_empty, zeros_and_ones

__all__ = ["Tracker", "accuracy", "binary_accuracy", "evaluate", "evaluate_many", "f1", "precision", "recall"]

Average = Literal["macro", "micro", "weighted"]
Score = float | jax.Array


def accuracy(predictions: Array, targets: Array) -> Score:
    """The share of rows whose predicted class is the target, from 0 to 1.

    Arguments:
        predictions: scores, float [..., classes], whose largest entry is the prediction (the first of equal ones); or
            class ids, integers [...].
        targets: class ids, integers [...].

    Raises:
        TypeError: not arrays, targets not integers, predictions neither floating nor integers.
        ValueError: shapes do not fit, no rows, a target (of known value) that is not one of the classes.

    >>> import jax.numpy as jnp
    >>> from kaun import metrics
    >>> metrics.accuracy(jnp.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), jnp.array([0, 1, 1]))
    0.6666666666666666
    """
    predicted, wanted, valid, _ = _class_ids("accuracy", predictions, targets, 2**31 - 1)
    return _share(predicted == wanted, valid)


def binary_accuracy(predictions: Array, targets: Array, threshold: float = 0.5) -> Score:
    """The share of elements where ``predictions > threshold`` agrees with the target, from 0 to 1.

    Arguments:
        predictions: float [...]: probabilities, or logits with ``threshold=0.0``.
        targets: of the same shape: zeros and ones as bools, integers or floats.
        threshold: what a prediction of 1 must exceed, default 0.5.

    Raises:
        TypeError: not arrays, predictions not floating.
        ValueError: shapes differ, no elements, a target (of known value) that is neither 0 nor 1.

    >>> import jax.numpy as jnp
    >>> from kaun import metrics
    >>> metrics.binary_accuracy(jnp.array([0.9, 0.2, 0.6, 0.5]), jnp.array([1, 0, 0, 1]))
    0.5
    """
    where = "binary_accuracy"
    scores, labels = floats(where, "predictions", predictions), as_array(where, "targets", targets)
    equal_shapes(where, "predictions", scores, "targets", labels)
    ones, valid = zeros_and_ones(where, "targets", targets)
    return _share((scores > threshold) == ones, valid & ~jnp.isnan(scores))


def precision(
    predictions: Array, targets: Array, average: Average = "macro", *, num_classes: int | None = None
) -> Score:
    """The share of right ones among the predictions of a class, averaged over the classes, from 0 to 1.

    Arguments:
        predictions: scores, float [..., classes], whose largest entry is the prediction; or, with ``num_classes``,
            class ids, integers [...].
        targets: class ids, integers [...].
        average: ``"macro"`` (default), the plain mean over all classes; ``"weighted"``, the mean by how often each is
            the target; ``"micro"``, one share over all predictions, which equals the accuracy.
        num_classes: how many classes there are, for predictions that are class ids.

    All columns of the scores are classes: one that is never predicted (or never present) scores 0 and counts in the
    macro mean. That is scikit-learn's ``precision_score(targets, ids, labels=range(classes), average=average,
    zero_division=0)``. The mean of it over batches is not that of the whole data set: predict first, then score.

    Raises:
        TypeError: not arrays, targets not integers, predictions neither floating nor integers.
        ValueError: shapes do not fit, no rows, an unknown average, class ids without ``num_classes``, an id (of known
            value) that is not one of the classes.

    >>> import jax.numpy as jnp
    >>> from kaun import metrics
    >>> metrics.precision(jnp.array([0, 1, 1, 1]), jnp.array([0, 1, 0, 0]), num_classes=2)
    0.6666666666666666
    """
    return _score("precision", predictions, targets, average, num_classes, lambda tp, fp, fn: (tp, tp + fp))


def recall(predictions: Array, targets: Array, average: Average = "macro", *, num_classes: int | None = None) -> Score:
    """The share of a class's targets that are predicted, averaged over the classes, from 0 to 1.

    Arguments, averages and errors are those of ``precision``; a class that is never a target scores 0. It is
    scikit-learn's ``recall_score(..., labels=range(classes), zero_division=0)``.

    >>> import jax.numpy as jnp
    >>> from kaun import metrics
    >>> metrics.recall(jnp.array([0, 1, 1, 1]), jnp.array([0, 1, 0, 1]), num_classes=2)
    0.75
    """
    return _score("recall", predictions, targets, average, num_classes, lambda tp, fp, fn: (tp, tp + fn))


def f1(predictions: Array, targets: Array, average: Average = "macro", *, num_classes: int | None = None) -> Score:
    """The harmonic mean of a class's precision and recall, averaged over the classes, from 0 to 1.

    Arguments, averages and errors are those of ``precision``; a class never predicted and never a target scores 0. It
    is scikit-learn's ``f1_score(..., labels=range(classes), zero_division=0)``: the mean of the classes' F1 and not the
    F1 of the mean precision and recall (van Rijsbergen, "Information Retrieval", 1979).

    >>> import jax.numpy as jnp
    >>> from kaun import metrics
    >>> metrics.f1(jnp.array([0, 1, 1, 1]), jnp.array([0, 1, 0, 0]), num_classes=2)
    0.5
    """
    return _score("f1", predictions, targets, average, num_classes, lambda tp, fp, fn: (2 * tp, 2 * tp + fp + fn))


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
        self._totals: dict[str, _Total] = {}

    def observe(self, name: str, value: Any) -> None:
        """Adds a value to ``name``: a number or a NumPy or JAX scalar; TypeError if it is no real one, or traced."""
        value = _real_scalar(f"Tracker.observe({name!r}, value)", "expected a real scalar", value)
        self._totals.setdefault(name, _Total(_UNREAD)).add(value, 1)

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

    def _total(self, name: str) -> _Total:
        if name not in self._totals:
            present = ", ".join(map(repr, sorted(self._totals))) or "nothing"
            raise LookupError(f"Tracker has no {name!r}; it has {present}. Call observe({name!r}, value) first.")
        return self._totals[name]


# How many results may wait on the device. In an evaluation each holds its batch until it is computed, so few; what a
# Tracker observes are scalars and nothing else.
_AHEAD = 16
_UNREAD = 2048


class _Total:
    """Sums of values and of counts, exact on the host; the newest are still on the device."""

    __slots__ = ("_counts", "_pending", "_sums", "_window", "added")

    def __init__(self, window: int) -> None:
        self._window = window
        self.added = 0
        self._pending: list[tuple[Any, Any]] = []
        self._sums: list[float] = []
        self._counts: list[float] = []

    def add(self, value: Any, count: Any) -> None:
        self._pending.append((value, count))
        self.added += 1
        if len(self._pending) >= self._window:
            # The older half: while this waits for it, the device has the newer half to work on.
            self._fetch(self._window // 2)

    def mean(self, name: str) -> float:
        self._fetch(len(self._pending))
        if not (count := sum(self._counts)):
            raise ValueError(f"The counts{f' of {name!r}' if name else ''} add up to 0: there is nothing to average.")
        return sum(self._sums) / count

    def _fetch(self, n: int) -> None:
        fetched: list[tuple[Any, Any]] = jax.device_get(self._pending[:n])
        self._sums = _exact([*self._sums, *(float(value) for value, _ in fetched)])
        self._counts = _exact([*self._counts, *(float(count) for _, count in fetched)])
        del self._pending[:n]


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


def _means(where: str, f: Any, data: Any) -> dict[str, float]:
    if not callable(f) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise TypeError(
            f"{where} expected a function of an item and an iterable of items, received {tree.describe(f)} and "
            f"{tree.describe(data)}. Write {where}(f, data)."
        )
    totals: dict[str, _Total] = {}
    for i, item in enumerate(cast("Iterable[Any]", data)):
        results = f(item) if where == "evaluate_many" else {"": f(item)}
        if not isinstance(results, dict):
            raise TypeError(
                f"{where}: {locate(f)} must return a dict from names to real scalars or pairs (sum, count), received "
                f'{tree.describe(results)}. Write: return {{"accuracy": ...}}.'
            )
        totals = totals or {name: _Total(_AHEAD) for name in sorted(results)}
        if not results or results.keys() != totals.keys():
            raise ValueError(
                f"{where}: {locate(f)} must return the same names for every item, at least one; received "
                f"{sorted(results)} for item {i}, and {sorted(totals)} for the first."
            )
        for name, total in totals.items():
            total.add(*_value_and_count(f"{where}: {locate(f)}", name, results[name]))
    if not totals:
        raise ValueError(f"{where} expected at least one item, received none: the mean of nothing is not a number.")
    return {name: total.mean(name) for name, total in totals.items()}


def _value_and_count(where: str, name: str, result: Any) -> tuple[Any, Any]:
    must = f"must return{f' for {name!r}' if name else ''} a real scalar or a pair (sum, count) of them"
    pair = cast("tuple[Any, ...]", result) if isinstance(result, tuple) else (result, 1)
    if len(pair) != 2:
        raise TypeError(f"{where} {must}, received a tuple of {len(pair)}.")
    return _real_scalar(where, must, pair[0]), _real_scalar(where, must, pair[1])


def _real_scalar(where: str, must: str, value: Any) -> Any:
    """The value, not waited for, once it is known to be a real number or an array of shape () that holds one."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{where} received a value that JAX is tracing, {tree.describe(value)}: there is no number yet. Return it "
            "from the compiled function, and use it outside."
        )
    real = isinstance(value, (bool, int, float))
    if tree.is_array(value):
        real = value.shape == () and any(jnp.issubdtype(value.dtype, k) for k in (jnp.floating, jnp.integer, jnp.bool_))
    if not real:
        fix = " Take its mean, value.mean()." if getattr(value, "shape", ()) else ""
        raise TypeError(f"{where} {must}, received {tree.describe(value)}.{fix}")
    return tree.snapshot(value)


class _Counts(NamedTuple):
    """How often each class was right, wrongly predicted, missed (int32 [classes]), and how many rows cannot count."""

    tp: Any
    fp: Any
    fn: Any
    invalid: Any


def _class_counts(where: str, predictions: Any, targets: Any, num_classes: int | None) -> _Counts:
    predicted, wanted, valid, classes = _class_ids(where, predictions, targets, num_classes)
    if num_classes not in (None, classes):
        raise ValueError(
            f"{where} expected as many classes as the scores have columns, received num_classes={num_classes!r} and "
            f"predictions {tree.describe(predictions)}. Leave num_classes out."
        )
    right, wrong = valid & (predicted == wanted), (valid & (predicted != wanted)).astype(jnp.int32)
    none = jnp.zeros(classes, jnp.int32)
    return _Counts(
        tp=none.at[wanted].add(right.astype(jnp.int32)),
        fp=none.at[predicted].add(wrong),
        fn=none.at[wanted].add(wrong),
        invalid=jnp.sum(~valid, dtype=jnp.int32),
    )


def _score(where: str, predictions: Any, targets: Any, average: str, num_classes: int | None, of: Any) -> Score:
    """The average over classes of ``of(tp, fp, fn)``, a numerator and a denominator; 0 / 0 is 0."""
    if average not in get_args(Average):
        raise ValueError(f'{where} expected average="macro", "micro" or "weighted", received {average!r}.')
    counts = _class_counts(where, predictions, targets, num_classes)
    traced = isinstance(counts.tp, Tracer)
    xp: Any = jnp if traced else np  # NumPy divides the int32 counts in float64

    def ratio(a: Any, b: Any) -> Any:
        return a / xp.where(b == 0, 1, b)

    tp, fp, fn, invalid = counts if traced else jax.device_get(counts)
    weights = ratio(tp + fn, (tp + fn).sum())
    if average == "micro":
        tp, fp, fn = tp.sum(), fp.sum(), fn.sum()
    scores = ratio(*of(tp, fp, fn))
    score = (scores * weights).sum() if average == "weighted" else scores.mean()
    score = xp.where(invalid > 0, xp.nan, score)
    return score if traced else float(score)


def _share(right: jax.Array, valid: jax.Array) -> Score:
    if isinstance(right, Tracer):
        return jnp.where(valid.all(), right.mean(), jnp.nan)
    return int(right.sum()) / right.size if bool(valid.all()) else math.nan


def _class_ids(where: str, predictions: Any, targets: Any, num_classes: int | None) -> tuple[Any, Any, Any, int]:
    """Predicted and wanted ids, which rows can be counted, how many classes (the scores' or, of ids, num_classes)."""
    scores, labels = as_array(where, "predictions", predictions), as_array(where, "targets", targets)
    not_empty(where, "predictions", scores)
    if jnp.issubdtype(scores.dtype, jnp.floating):
        index_shape(where, "predictions", scores, "targets", labels)
        classes = scores.shape[-1]
        wanted, valid = class_indices(where, "targets", targets, classes)
        return jnp.argmax(scores, axis=-1).astype(jnp.int32), wanted, valid & ~jnp.isnan(scores).any(axis=-1), classes
    if not isinstance(num_classes, (int, np.integer)) or num_classes < 1:
        raise ValueError(
            f"{where} of class ids expected the number of classes, received num_classes={num_classes!r}. Write "
            f"{where}(predictions, targets, num_classes=10), or pass scores [..., classes]."
        )
    equal_shapes(where, "predictions", scores, "targets", labels)
    predicted, known = class_indices(where, "predictions", predictions, num_classes)
    wanted, valid = class_indices(where, "targets", targets, num_classes)
    return predicted, wanted, valid & known, int(num_classes)
