"""Metrics of classification: functions of ``(predictions, targets)``.

For concrete inputs a metric returns a Python float, computed in float64 from exact counts; in compiled code it returns
a scalar JAX array. Invalid values are never counted as wrong predictions: a class index out of range is an error where
the values are known, and makes the result NaN in compiled code; a NaN among the scores always makes the result NaN. A
row of weight 0 counts nothing, whatever its values are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from kaun._calls import public
from kaun.losses.checks import Array
from kaun.metrics import counts
from kaun.metrics.counts import Average, Matrix, Score

__all__ = [
    "accuracy", "binary_accuracy", "binary_counts", "confusion_matrix", "f1", "matrix_counts", "mean_iou", "precision",
    "recall", "score", "score_counts", "top_k_accuracy", "top_k_counts", "top_k_share",
]  # fmt: skip


@public
def accuracy(predictions: Array, targets: Array, *, weights: Array | None = None) -> Score:
    """Return the share of rows whose predicted class is the target.

    Args:
        predictions: Scores, float [..., classes], whose largest entry is the prediction (the first one of equal
            scores); or class indices, integers [...].
        targets: Class indices, integers [...].
        weights: Numbers of at least 0, bools or integers or floats, of the shape of the targets or of its leading axes.
            The result is scikit-learn's with them as ``sample_weight``. By default each row weighs 1.

    Returns:
        The share, from 0 to 1.

    Raises:
        TypeError: If an argument is not an array, targets are not integers, or predictions are neither floating nor
            integers.
        ValueError: If the shapes do not match, there are no rows, a target (of known value) is not a class, a weight
            is negative or not finite, or all weights are 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.accuracy(jnp.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), jnp.array([0, 1, 1]))
        0.6666666666666666
    """
    return counts.share(counts.class_share("accuracy", predictions, targets, weights))


@public
def binary_accuracy(
    predictions: Array, targets: Array, threshold: float = 0.5, *, weights: Array | None = None
) -> Score:
    """Return the share of elements where ``predictions > threshold`` agrees with the target.

    Args:
        predictions: Float [...]: probabilities, or logits with ``threshold=0.0``.
        targets: Zeros and ones as bools, integers or floats, of the same shape as the predictions.
        threshold: A prediction above it is a 1. Default 0.5.
        weights: As in ``accuracy``.

    Returns:
        The share, from 0 to 1.

    Raises:
        TypeError: If an argument is not an array, or predictions are not floating.
        ValueError: If the shapes differ, there are no elements, a target (of known value) is neither 0 nor 1, or the
            weights are wrong, as in ``accuracy``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.binary_accuracy(jnp.array([0.9, 0.2, 0.6, 0.5]), jnp.array([1, 0, 0, 1]))
        0.5
    """
    return counts.share(binary_counts(predictions, targets, threshold, weights=weights))


@public
def precision(
    predictions: Array,
    targets: Array,
    average: Average = "macro",
    *,
    num_classes: int | None = None,
    weights: Array | None = None,
) -> Score:
    """Return the precision: the share of true positives among the predictions of a class, averaged over classes.

    Every column of the scores is a class; a class that is never predicted (or is never a target) scores 0 and counts in
    the macro average. The result is scikit-learn's ``precision_score(targets, ids, labels=range(classes),
    average=average, zero_division=0)``. The mean of the precision of batches is not the precision of the whole data
    set; ``trainer.evaluate`` sums counts over the batches and gives the latter.

    Args:
        predictions: Scores, float [..., classes], whose largest entry is the prediction; or, with ``num_classes``,
            class indices, integers [...].
        targets: Class indices, integers [...].
        average: ``"macro"`` (default), the plain mean over all classes; ``"weighted"``, the mean weighted by how often
            each class is the target; ``"micro"``, one share over all predictions, which equals the accuracy.
        num_classes: The number of classes, for predictions that are class indices.
        weights: As in ``accuracy``.

    Returns:
        The average, from 0 to 1.

    Raises:
        TypeError: If an argument is not an array, targets are not integers, or predictions are neither floating nor
            integers.
        ValueError: If the shapes do not match, there are no rows, the average is unknown, class indices come without
            ``num_classes``, an index (of known value) is not a class, or the weights are wrong, as in ``accuracy``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.precision(jnp.array([0, 1, 1, 1]), jnp.array([0, 1, 0, 0]), num_classes=2)
        0.6666666666666666
    """
    return _score("precision", predictions, targets, average, num_classes, weights)


@public
def recall(
    predictions: Array,
    targets: Array,
    average: Average = "macro",
    *,
    num_classes: int | None = None,
    weights: Array | None = None,
) -> Score:
    """Return the recall: the share of the targets of a class that are predicted, averaged over classes.

    A class that is never a target scores 0. The result is scikit-learn's ``recall_score(..., labels=range(classes),
    zero_division=0)``.

    Args:
        predictions: As in ``precision``.
        targets: As in ``precision``.
        average: As in ``precision``. Default ``"macro"``.
        num_classes: As in ``precision``.
        weights: As in ``accuracy``.

    Returns:
        The average, from 0 to 1.

    Raises:
        TypeError: As ``precision``.
        ValueError: As ``precision``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.recall(jnp.array([0, 1, 1, 1]), jnp.array([0, 1, 0, 1]), num_classes=2)
        0.75
    """
    return _score("recall", predictions, targets, average, num_classes, weights)


@public
def f1(
    predictions: Array,
    targets: Array,
    average: Average = "macro",
    *,
    num_classes: int | None = None,
    weights: Array | None = None,
) -> Score:
    """Return the F1 score: the harmonic mean of the precision and recall of a class, averaged over classes.

    A class that is never predicted and never a target scores 0. The result is scikit-learn's ``f1_score(...,
    labels=range(classes), zero_division=0)``: the mean of the F1 scores of the classes, not the F1 score of the mean
    precision and the mean recall (van Rijsbergen, "Information Retrieval", 1979).

    Args:
        predictions: As in ``precision``.
        targets: As in ``precision``.
        average: As in ``precision``. Default ``"macro"``.
        num_classes: As in ``precision``.
        weights: As in ``accuracy``.

    Returns:
        The average, from 0 to 1.

    Raises:
        TypeError: As ``precision``.
        ValueError: As ``precision``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.f1(jnp.array([0, 1, 1, 1]), jnp.array([0, 1, 0, 0]), num_classes=2)
        0.5
    """
    return _score("f1", predictions, targets, average, num_classes, weights)


@public
def top_k_accuracy(k: int) -> Callable[..., Score]:
    """Return the metric that is the share of rows whose target is among the classes with the ``k`` largest scores.

    It is scikit-learn's ``top_k_accuracy_score(targets, scores, k=k, labels=range(classes))``: of equal scores the
    class with the largest index comes first (``accuracy`` takes the first one).

    Args:
        k: How many classes, at least 1 and at most the number of columns of the scores.

    Returns:
        A metric of ``(predictions, targets, *, weights=None)`` as ``accuracy`` is, of scores, float [..., classes].

    Raises:
        TypeError: If k is not an int; when the metric is called, as in ``accuracy``.
        ValueError: If k is less than 1; when the metric is called, if there are fewer than k classes, or as in
            ``accuracy``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> scores = jnp.array([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
        >>> metrics.top_k_accuracy(2)(scores, jnp.array([1, 0]))
        0.5
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"top_k_accuracy expected an int, received {type(k).__name__}. Write top_k_accuracy(5).")
    if k < 1:
        raise ValueError(f"top_k_accuracy expected k of at least 1, received {k}. Write top_k_accuracy(5).")
    return functools.partial(top_k_share, k=int(k))


@public
def confusion_matrix(
    predictions: Array, targets: Array, *, num_classes: int | None = None, weights: Array | None = None
) -> Matrix:
    """Return the number of rows, or the sum of their weights, by target (axis 0) and predicted class (axis 1).

    It is scikit-learn's ``confusion_matrix(targets, ids, labels=range(classes))``.

    Args:
        predictions: As in ``precision``.
        targets: As in ``precision``.
        num_classes: As in ``precision``.
        weights: As in ``accuracy``.

    Returns:
        A NumPy array [classes, classes]: int64, or float64 with weights that are floats or where values are invalid; in
        compiled code a JAX array of float32.

    Raises:
        TypeError: As ``precision``.
        ValueError: As ``precision``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.confusion_matrix(jnp.array([0, 1, 1, 1]), jnp.array([0, 1, 0, 0]), num_classes=2)
        array([[1, 2],
               [0, 1]])
    """
    return counts.matrix(matrix_counts(predictions, targets, num_classes=num_classes, weights=weights))


@public
def mean_iou(
    predictions: Array, targets: Array, *, num_classes: int | None = None, weights: Array | None = None
) -> Score:
    """Return the mean over classes of the intersection over union of the predictions and the targets of a class.

    A class that is never predicted and never a target scores 0 and counts in the mean, as in ``f1``. The result is
    scikit-learn's ``jaccard_score(targets, ids, labels=range(classes), average="macro", zero_division=0)`` (Jaccard,
    1912).

    Args:
        predictions: As in ``precision``; for segmentation scores [batch, height, width, classes].
        targets: As in ``precision``; for segmentation [batch, height, width].
        num_classes: As in ``precision``.
        weights: As in ``accuracy``; for segmentation bools [batch, height, width] leave pixels out.

    Returns:
        The mean, from 0 to 1.

    Raises:
        TypeError: As ``precision``.
        ValueError: As ``precision``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.mean_iou(jnp.array([0, 1, 1, 1]), jnp.array([0, 1, 0, 1]), num_classes=2)
        0.5833333333333333
    """
    return _score("mean_iou", predictions, targets, "macro", num_classes, weights)


def top_k_share(predictions: Array, targets: Array, *, k: int, weights: Array | None = None) -> Score:
    """The metric that ``top_k_accuracy`` makes."""
    return counts.share(top_k_counts(predictions, targets, k=k, weights=weights))


def binary_counts(predictions: Any, targets: Any, threshold: float = 0.5, *, weights: Any = None) -> Any:
    """The counts of ``binary_accuracy``."""
    return counts.binary_share("binary_accuracy", predictions, targets, threshold, weights)


def top_k_counts(predictions: Any, targets: Any, *, k: int = 1, weights: Any = None) -> Any:
    """The counts of ``top_k_share``."""
    return counts.top_k_share("top_k_accuracy", predictions, targets, k, weights)


def matrix_counts(predictions: Any, targets: Any, *, num_classes: int | None = None, weights: Any = None) -> Any:
    """The counts of ``confusion_matrix``."""
    return counts.matrix_counts("confusion_matrix", predictions, targets, num_classes, weights)


_RATIOS: dict[str, Callable[[Any, Any, Any], tuple[Any, Any]]] = {
    "precision": lambda tp, fp, fn: (tp, tp + fp),
    "recall": lambda tp, fp, fn: (tp, tp + fn),
    "f1": lambda tp, fp, fn: (2 * tp, 2 * tp + fp + fn),
    "mean_iou": lambda tp, fp, fn: (tp, tp + fp + fn),
}


def score_counts(
    where: str,
    predictions: Any,
    targets: Any,
    average: str = "macro",
    *,
    num_classes: int | None = None,
    weights: Any = None,
) -> Any:
    """The counts of a score that is averaged over classes."""
    counts.check_average(where, average)
    return counts.class_counts(where, predictions, targets, num_classes, weights)


def score(where: str, sums: Any, average: str = "macro", **settings: Any) -> Score:
    """The score of counts; settings are those of the metric that its counts alone depend on."""
    return counts.averaged(sums, average, _RATIOS[where])


def _score(where: str, predictions: Any, targets: Any, average: str, num_classes: Any, weights: Any) -> Score:
    found = score_counts(where, predictions, targets, average, num_classes=num_classes, weights=weights)
    return score(where, found, average)
