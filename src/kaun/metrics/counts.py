"""Counts for classification, which add up over batches, and the scores computed from them.

Without weights counts are int32 and add up exactly on the device, with weights they are summed on the host in float64.
The score of concrete counts is a float, computed in float64; the score of traced counts is a scalar JAX array.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun import tree
from kaun._calls import shown
from kaun.losses.checks import as_array, class_indices, equal_shapes, floats, index_shape, not_empty, zeros_and_ones
from kaun.metrics.parts import RowValues, as_floats, settle
from kaun.metrics.weights import Weights, blank, check_weights, nothing_to_average

__all__ = [
    "Average",
    "ClassCounts",
    "Matrix",
    "MatrixCounts",
    "Score",
    "Share",
    "averaged",
    "binary_share",
    "check_average",
    "class_counts",
    "class_share",
    "matrix",
    "matrix_counts",
    "share",
    "top_k_share",
]

Average = Literal["macro", "micro", "weighted"]
Score = float | jax.Array
Matrix = np.ndarray[Any, Any] | jax.Array


class Share(NamedTuple):
    """The number of rows that are predicted right, of all rows, and of rows with invalid values; or sums of weights."""

    right: Any
    total: Any
    invalid: Any


class ClassCounts(NamedTuple):
    """True positives, false positives and false negatives by class (``[classes]``), and rows with invalid values."""

    tp: Any
    fp: Any
    fn: Any
    invalid: Any


class MatrixCounts(NamedTuple):
    """Rows by target and predicted class (``[classes, classes]``), and rows with invalid values."""

    rows: Any
    invalid: Any


class _Ids(NamedTuple):
    """Predicted and target classes, which rows are valid, the number of classes, and the weights of the rows."""

    predicted: Any
    wanted: Any
    valid: Any
    classes: int
    weights: Weights


def class_share(where: str, predictions: Any, targets: Any, weights: Any = None) -> Any:
    """The share of rows whose predicted class is the target, as counts."""
    ids = _class_ids(where, predictions, targets, 2**31 - 1, weights)
    return _share_of(ids.predicted == ids.wanted, ids.valid, ids.weights)


def top_k_share(where: str, predictions: Any, targets: Any, k: int, weights: Any = None) -> Any:
    """The share of rows whose target is among the classes with the ``k`` largest scores, as counts."""
    scores = floats(where, "predictions", predictions)
    ids = _class_ids(where, scores, targets, None, weights)
    if k > ids.classes:
        raise ValueError(
            f"{where} expected at least {k} classes, received predictions {tree.describe(scores)}: each row would be "
            f"right. Write top_k_accuracy({max(1, ids.classes - 1)})."
        )
    scores = blank(scores, ids.weights.counted)
    own = jnp.take_along_axis(scores, ids.wanted[..., None], axis=-1)
    # Of equal scores the last class comes first.
    later = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1) > ids.wanted[..., None]
    before = jnp.sum((scores > own) | ((scores == own) & later), axis=-1)
    return _share_of(before < k, ids.valid, ids.weights)


def binary_share(where: str, predictions: Any, targets: Any, threshold: Any, weights: Any = None) -> Any:
    """The share of elements where ``predictions > threshold`` agrees with the target, as counts."""
    scores, labels = floats(where, "predictions", predictions), as_array(where, "targets", targets)
    equal_shapes(where, "predictions", scores, "targets", labels)
    checked = check_weights(where, weights, scores.shape)
    scores = blank(scores, checked.counted)
    ones, valid = zeros_and_ones(where, "targets", blank(targets, checked.counted))
    return _share_of((scores > threshold) == ones, valid & ~jnp.isnan(scores), checked)


def share(counts: Any, **settings: Any) -> Score:
    """The quotient of the counts; NaN if some rows have invalid values, ValueError if all weights are 0.

    Settings are those of the metric that its counts alone depend on.
    """
    (right, total, invalid), xp = settle(counts)
    if xp is jnp:
        return jnp.where(invalid > 0, jnp.nan, right / total)
    if not invalid and not total:
        raise nothing_to_average()
    return math.nan if invalid else right.item() / total.item()


def class_counts(where: str, predictions: Any, targets: Any, num_classes: int | None, weights: Any = None) -> Any:
    """Counts by class; the number of classes is that of the scores' columns or, for class indices, ``num_classes``."""
    predicted, wanted, valid, classes, checked = _counted_ids(where, predictions, targets, num_classes, weights)
    if checked.values is not None:
        return RowValues(_flat(predicted, wanted, checked.values, ~valid), _weighted_classes, (classes,))
    counted = valid & checked.counted
    right, wrong = counted & (predicted == wanted), (counted & (predicted != wanted)).astype(jnp.int32)
    none = jnp.zeros(classes, jnp.int32)
    return ClassCounts(
        tp=none.at[wanted].add(right.astype(jnp.int32)),
        fp=none.at[predicted].add(wrong),
        fn=none.at[wanted].add(wrong),
        invalid=jnp.sum(~valid, dtype=jnp.int32),
    )


def matrix_counts(where: str, predictions: Any, targets: Any, num_classes: int | None, weights: Any = None) -> Any:
    """The number of rows, or the sum of their weights, by target and predicted class."""
    predicted, wanted, valid, classes, checked = _counted_ids(where, predictions, targets, num_classes, weights)
    if checked.values is not None:
        return RowValues(_flat(predicted, wanted, checked.values, ~valid), _weighted_matrix, (classes,))
    counted = (valid & checked.counted).astype(jnp.int32)
    rows = jnp.zeros((classes, classes), jnp.int32).at[wanted, predicted].add(counted)
    return MatrixCounts(rows, jnp.sum(~valid, dtype=jnp.int32))


def matrix(counts: Any, **settings: Any) -> Matrix:
    """The matrix of the counts in int64 or float64, traced in float32; NaN if some rows have invalid values."""
    (rows, invalid), xp = settle(counts)
    if xp is jnp:
        return jnp.where(invalid > 0, jnp.nan, as_floats(jnp, rows))
    if invalid:
        return np.full(rows.shape, np.nan)
    if not rows.any():
        raise nothing_to_average()
    return rows


def check_average(where: str, average: Any) -> None:
    """Raise ValueError for an unknown average."""
    if average not in get_args(Average):
        raise ValueError(f'{where} expected average="macro", "micro" or "weighted", received {shown(average)}.')


def averaged(counts: Any, average: str, of: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Score:
    """The average over classes of ``of(tp, fp, fn)``, a numerator and a denominator; 0 / 0 is 0."""
    (tp, fp, fn, invalid), xp = settle(counts)  # NumPy divides integer counts in float64
    if xp is np and not invalid and not (tp + fn).any():
        raise nothing_to_average()

    def ratio(a: Any, b: Any) -> Any:
        return a / xp.where(b == 0, 1, b)

    weights = ratio(tp + fn, (tp + fn).sum())
    if average == "micro":
        tp, fp, fn = tp.sum(), fp.sum(), fn.sum()
    scores = ratio(*of(tp, fp, fn))
    score = (scores * weights).sum() if average == "weighted" else scores.mean()
    score = xp.where(invalid > 0, xp.nan, score)
    return score if xp is jnp else float(score)


def _share_of(right: jax.Array, valid: jax.Array, weights: Weights) -> Any:
    valid = valid & weights.valid
    if weights.values is not None:
        return RowValues(_flat(right & valid, weights.values, ~valid), _weighted_share)
    count = lambda rows: jnp.sum(rows, dtype=jnp.int32)
    total = right.size if weights.counted is True else count(weights.counted)
    return Share(right=count(right & valid & weights.counted), total=total, invalid=count(~valid))


def _weighted_share(xp: Any, right: Any, weights: Any, invalid: Any) -> Share:
    weights = _real(xp, weights)
    return Share(xp.where(right, weights, 0).sum(), weights.sum(), invalid.sum())


def _weighted_classes(xp: Any, predicted: Any, wanted: Any, weights: Any, invalid: Any, classes: int) -> ClassCounts:
    weights, right = _real(xp, weights), predicted == wanted
    hit, missed = xp.where(right, weights, 0), xp.where(right, 0, weights)
    return ClassCounts(
        tp=_sum_by(xp, wanted, hit, classes),
        fp=_sum_by(xp, predicted, missed, classes),
        fn=_sum_by(xp, wanted, missed, classes),
        invalid=invalid.sum(),
    )


def _weighted_matrix(xp: Any, predicted: Any, wanted: Any, weights: Any, invalid: Any, classes: int) -> MatrixCounts:
    sums = _sum_by(xp, wanted * classes + predicted, _real(xp, weights), classes * classes)
    return MatrixCounts(sums.reshape(classes, classes), invalid.sum())


def _sum_by(xp: Any, ids: Any, values: Any, length: int) -> Any:
    if xp is jnp:
        return jnp.zeros(length, values.dtype).at[ids].add(values)
    return np.bincount(ids, values, length).astype(values.dtype)  # bincount adds in float64


def _real(xp: Any, weights: Any) -> Any:
    """Weights in compiled code as floats: sums of large int32 weights would overflow. On the host they are wide."""
    return weights if xp is np else as_floats(xp, weights)


def _flat(*columns: Any) -> tuple[Any, ...]:
    return tuple(column.reshape(-1) for column in columns)


def _counted_ids(where: str, predictions: Any, targets: Any, num_classes: int | None, weights: Any) -> _Ids:
    ids = _class_ids(where, predictions, targets, num_classes, weights)
    if num_classes not in (None, ids.classes):
        raise ValueError(
            f"{where} expected as many classes as the scores have columns, received num_classes={num_classes!r} and "
            f"predictions {tree.describe(predictions)}. Leave num_classes out."
        )
    return ids


def _class_ids(where: str, predictions: Any, targets: Any, num_classes: int | None, weights: Any) -> _Ids:
    scores, labels = as_array(where, "predictions", predictions), as_array(where, "targets", targets)
    not_empty(where, "predictions", scores)
    if jnp.issubdtype(scores.dtype, jnp.floating):
        index_shape(where, "predictions", scores, "targets", labels)
        checked, classes = check_weights(where, weights, labels.shape), scores.shape[-1]
        scores = blank(scores, checked.counted)
        wanted, valid = class_indices(where, "targets", blank(targets, checked.counted), classes)
        valid = valid & ~jnp.isnan(scores).any(axis=-1) & checked.valid
        return _Ids(jnp.argmax(scores, axis=-1).astype(jnp.int32), wanted, valid, classes, checked)
    if not isinstance(num_classes, (int, np.integer)) or num_classes < 1:
        raise ValueError(
            f"{where} of class indices expected the number of classes, received num_classes={num_classes!r}. Write "
            f"{where}(predictions, targets, num_classes=10), or pass scores [..., classes]."
        )
    equal_shapes(where, "predictions", scores, "targets", labels)
    checked = check_weights(where, weights, labels.shape)
    predicted, known = class_indices(where, "predictions", blank(predictions, checked.counted), num_classes)
    wanted, valid = class_indices(where, "targets", blank(targets, checked.counted), num_classes)
    return _Ids(predicted, wanted, valid & known & checked.valid, int(num_classes), checked)
