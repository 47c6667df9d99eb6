"""Metrics: functions of ``(predictions, targets)``, and metrics in two parts that add up over batches.

For concrete inputs a metric returns a Python float, computed in float64 from exact counts; in compiled code it returns
a scalar JAX array. Invalid values are never counted as wrong predictions: a class index out of range is an error where
the values are known, and makes the result NaN in compiled code; a NaN among the scores always makes the result NaN.
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
    """Return the share of rows whose predicted class is the target.

    Args:
        predictions: scores, float [..., classes], whose largest entry is the prediction (the first one of equal
            scores); or class indices, integers [...].
        targets: class indices, integers [...].

    Returns:
        The share, from 0 to 1.

    Raises:
        TypeError: when an argument is not an array, targets are not integers, or predictions are neither floating nor
            integers.
        ValueError: when the shapes do not match, there are no rows, or a target (of known value) is not a class.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.accuracy(jnp.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), jnp.array([0, 1, 1]))
        0.6666666666666666
    """
    return counts.share(_accuracy(predictions, targets))


def binary_accuracy(predictions: Array, targets: Array, threshold: float = 0.5) -> Score:
    """Return the share of elements where ``predictions > threshold`` agrees with the target.

    Args:
        predictions: float [...]: probabilities, or logits with ``threshold=0.0``.
        targets: zeros and ones as bools, integers or floats, of the same shape as the predictions.
        threshold: a prediction above it is a 1. Default 0.5.

    Returns:
        The share, from 0 to 1.

    Raises:
        TypeError: when an argument is not an array, or predictions are not floating.
        ValueError: when the shapes differ, there are no elements, or a target (of known value) is neither 0 nor 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.binary_accuracy(jnp.array([0.9, 0.2, 0.6, 0.5]), jnp.array([1, 0, 0, 1]))
        0.5
    """
    return counts.share(_binary_accuracy(predictions, targets, threshold))


def precision(
    predictions: Array, targets: Array, average: Average = "macro", *, num_classes: int | None = None
) -> Score:
    """Return the precision: the share of true positives among the predictions of a class, averaged over classes.

    Every column of the scores is a class; a class that is never predicted (or is never a target) scores 0 and counts in
    the macro average. The result is scikit-learn's ``precision_score(targets, ids, labels=range(classes),
    average=average, zero_division=0)``. The mean of the precision of batches is not the precision of the whole data
    set; ``trainer.evaluate`` sums counts over the batches and gives the latter.

    Args:
        predictions: scores, float [..., classes], whose largest entry is the prediction; or, with ``num_classes``,
            class indices, integers [...].
        targets: class indices, integers [...].
        average: ``"macro"`` (default), the plain mean over all classes; ``"weighted"``, the mean weighted by how often
            each class is the target; ``"micro"``, one share over all predictions, which equals the accuracy.
        num_classes: the number of classes, for predictions that are class indices.

    Returns:
        The average, from 0 to 1.

    Raises:
        TypeError: when an argument is not an array, targets are not integers, or predictions are neither floating nor
            integers.
        ValueError: when the shapes do not match, there are no rows, the average is unknown, class indices come without
            ``num_classes``, or an index (of known value) is not a class.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.precision(jnp.array([0, 1, 1, 1]), jnp.array([0, 1, 0, 0]), num_classes=2)
        0.6666666666666666
    """
    return _score("precision", predictions, targets, average, num_classes)


def recall(predictions: Array, targets: Array, average: Average = "macro", *, num_classes: int | None = None) -> Score:
    """Return the recall: the share of the targets of a class that are predicted, averaged over classes.

    A class that is never a target scores 0. The result is scikit-learn's ``recall_score(..., labels=range(classes),
    zero_division=0)``.

    Args:
        predictions: as in ``precision``.
        targets: as in ``precision``.
        average: as in ``precision``. Default ``"macro"``.
        num_classes: as in ``precision``.

    Returns:
        The average, from 0 to 1.

    Raises:
        TypeError: as ``precision``.
        ValueError: as ``precision``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.recall(jnp.array([0, 1, 1, 1]), jnp.array([0, 1, 0, 1]), num_classes=2)
        0.75
    """
    return _score("recall", predictions, targets, average, num_classes)


def f1(predictions: Array, targets: Array, average: Average = "macro", *, num_classes: int | None = None) -> Score:
    """Return the F1 score: the harmonic mean of the precision and recall of a class, averaged over classes.

    A class that is never predicted and never a target scores 0. The result is scikit-learn's ``f1_score(...,
    labels=range(classes), zero_division=0)``: the mean of the F1 scores of the classes, not the F1 score of the mean
    precision and the mean recall (van Rijsbergen, "Information Retrieval", 1979).

    Args:
        predictions: as in ``precision``.
        targets: as in ``precision``.
        average: as in ``precision``. Default ``"macro"``.
        num_classes: as in ``precision``.

    Returns:
        The average, from 0 to 1.

    Raises:
        TypeError: as ``precision``.
        ValueError: as ``precision``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.f1(jnp.array([0, 1, 1, 1]), jnp.array([0, 1, 0, 0]), num_classes=2)
        0.5
    """
    return _score("f1", predictions, targets, average, num_classes)


@dataclasses.dataclass(frozen=True)
class Counted:
    """A metric in two parts, so that its value over many batches is that of all their rows together.

    ``trainer.evaluate`` sums the counts of all batches and computes the result from the sums. Called like any metric,
    it is ``result(counts(predictions, targets))``.

    Attributes:
        counts: ``counts(predictions, targets)`` returns a pytree of arrays that add up over batches; it is compiled.
        result: ``result(sums)`` returns the float for their sums, in the same tree; it runs once, on the host, on NumPy
            arrays (int64 for integers and bools, float64 for floats).

    Examples:
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
        """Return the value of the metric for one batch."""
        return self.result(self.counts(predictions, targets))

    @classmethod
    def of(cls, metric: Any) -> Counted:
        """Return the two parts of ``accuracy``, ``binary_accuracy``, ``precision``, ``recall`` or ``f1``.

        Use them where predictions or targets consist of more than one array.

        Args:
            metric: one of these metrics, a ``functools.partial`` of one with keyword arguments, or a ``Counted``.

        Raises:
            TypeError: for a metric that has no such parts.

        Examples:
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
        """Return the two parts of a metric as ``of`` does, or None for a metric that has none.

        Args:
            metric: any metric.

        Examples:
            >>> from kaun import losses, metrics
            >>> print(metrics.Counted.find(losses.mse))
            None
        """
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
