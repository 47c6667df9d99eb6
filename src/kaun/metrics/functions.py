"""Metrics: functions of ``(predictions, targets)``, means of them over a data set, and a tracker of named means.

Every metric is a Python float (computed in float64 from exact counts) for concrete inputs, and a scalar JAX array when
it is compiled. What cannot be counted is never counted as wrong: a class index out of range is an error where the
values are known, and makes the result NaN in compiled code; a score that is NaN makes it NaN everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from kaun import tree
from kaun.losses.checks import Array
from kaun.metrics import counts
from kaun.metrics.counts import Average, Score

__all__ = [
    "Counted",
    "accuracy",
    "binary_accuracy",
    "f1",
    "precision",
    "recall",
]


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
    return counts.share(_accuracy(predictions, targets))


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
    return counts.share(_binary_accuracy(predictions, targets, threshold))


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
    zero_division=0)``. The mean of it over batches is not that of the whole data set; ``trainer.evaluate`` sums counts.

    Raises:
        TypeError: not arrays, targets not integers, predictions neither floating nor integers.
        ValueError: shapes do not fit, no rows, an unknown average, class ids without ``num_classes``, an id (of known
            value) that is not one of the classes.

    >>> import jax.numpy as jnp
    >>> from kaun import metrics
    >>> metrics.precision(jnp.array([0, 1, 1, 1]), jnp.array([0, 1, 0, 0]), num_classes=2)
    0.6666666666666666
    """
    return _score("precision", predictions, targets, average, num_classes)


def recall(predictions: Array, targets: Array, average: Average = "macro", *, num_classes: int | None = None) -> Score:
    """The share of a class's targets that are predicted, averaged over the classes, from 0 to 1.

    Arguments, averages and errors are those of ``precision``; a class that is never a target scores 0. It is
    scikit-learn's ``recall_score(..., labels=range(classes), zero_division=0)``.

    >>> import jax.numpy as jnp
    >>> from kaun import metrics
    >>> metrics.recall(jnp.array([0, 1, 1, 1]), jnp.array([0, 1, 0, 1]), num_classes=2)
    0.75
    """
    return _score("recall", predictions, targets, average, num_classes)


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
    return _score("f1", predictions, targets, average, num_classes)


@dataclasses.dataclass(frozen=True)
class Counted:
    """A metric in two parts, so that its value over many batches is that of all their rows at once.

    ``trainer.evaluate`` sums the counts of all batches and takes the result of the sums. Called like any metric it is
    ``result(counts(predictions, targets))``.

    Attributes:
        counts: ``counts(predictions, targets)`` is a pytree of arrays that add up over batches; runs compiled.
        result: ``result(sums)`` is the float for their sums, in that tree; runs on the host, once, on NumPy arrays
            (int64 for integers and bools, float64 for floats).

    >>> import jax.numpy as jnp
    >>> from kaun import metrics
    >>> def squares(predictions, targets):
    ...     return {"error": ((predictions - targets) ** 2).sum(), "rows": targets.size}
    >>> rmse = metrics.Counted(counts=squares, result=lambda sums: float((sums["error"] / sums["rows"]) ** 0.5))
    >>> round(rmse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])), 4)
    1.4142
    """

    counts: Callable[[Any, Any], Any]
    result: Callable[[Any], Any]

    def __call__(self, predictions: Any, targets: Any) -> Any:
        return self.result(self.counts(predictions, targets))

    @classmethod
    def of(cls, metric: Any) -> Counted:
        """The parts of ``accuracy``, ``binary_accuracy``, ``precision``, ``recall`` or ``f1``, or of a partial of one.

        Use them where predictions or targets are more than one array.

        Raises:
            TypeError: for a metric that has no such parts.

        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> f1 = metrics.Counted.of(metrics.f1)
        >>> f1_of_head = metrics.Counted(lambda outputs, y: f1.counts(outputs["head"], y), f1.result)
        >>> f1_of_head({"head": jnp.array([[0.9, 0.1], [0.2, 0.8]])}, jnp.array([0, 1]))
        1.0
        """
        found = cls.find(metric)
        if found is None:
            raise TypeError(
                f"Counted.of expected a metric that adds up from counts, received {tree.describe(metric)}. Write "
                'Counted.of(metrics.f1), Counted.of(functools.partial(metrics.f1, average="weighted")), or your own '
                "Counted(counts=..., result=...)."
            )
        return found

    @classmethod
    def find(cls, metric: Any) -> Counted | None:
        """As ``of``, with None for a metric that has no such parts."""
        if isinstance(metric, Counted):
            return metric
        if isinstance(metric, functools.partial) and not metric.args and (inner := cls.find(metric.func)):
            bind = functools.partial
            return cls(bind(inner.counts, **metric.keywords), bind(inner.result, **metric.keywords))
        return next((parts for whole, parts in _COUNTED if whole is metric), None)


# The metrics above in their two parts. Settings are given to both.


def _accuracy(predictions: Any, targets: Any) -> counts.Share:
    return counts.class_share("accuracy", predictions, targets)


def _binary_accuracy(predictions: Any, targets: Any, threshold: float = 0.5) -> counts.Share:
    return counts.binary_share("binary_accuracy", predictions, targets, threshold)


def _share(sums: counts.Share, **settings: Any) -> Score:
    return counts.share(sums)


_RATIOS: dict[str, Callable[[Any, Any, Any], tuple[Any, Any]]] = {
    "precision": lambda tp, fp, fn: (tp, tp + fp),
    "recall": lambda tp, fp, fn: (tp, tp + fn),
    "f1": lambda tp, fp, fn: (2 * tp, 2 * tp + fp + fn),
}


def _counts(
    where: str, predictions: Any, targets: Any, average: str = "macro", *, num_classes: int | None = None
) -> counts.ClassCounts:
    counts.check_average(where, average)
    return counts.class_counts(where, predictions, targets, num_classes)


def _average(where: str, sums: counts.ClassCounts, average: str = "macro", **settings: Any) -> Score:
    return counts.averaged(sums, average, _RATIOS[where])


def _score(where: str, predictions: Any, targets: Any, average: str, num_classes: int | None) -> Score:
    return _average(where, _counts(where, predictions, targets, average, num_classes=num_classes), average)


_COUNTED: list[tuple[Any, Counted]] = [
    (accuracy, Counted(_accuracy, _share)),
    (binary_accuracy, Counted(_binary_accuracy, _share)),
    *(
        (metric, Counted(functools.partial(_counts, metric.__name__), functools.partial(_average, metric.__name__)))
        for metric in (precision, recall, f1)
    ),
]
