"""Counts for classification, which add up over batches, and the scores computed from them.

Counts are int32 and add up exactly. The score of concrete counts is a float, computed in float64; the score of traced
counts is a scalar JAX array.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._jax import is_traced
from kaun.losses.checks import as_array, class_indices, equal_shapes, floats, index_shape, not_empty, zeros_and_ones

__all__ = [
    "Average",
    "ClassCounts",
    "Score",
    "Share",
    "averaged",
    "binary_share",
    "check_average",
    "class_counts",
    "class_share",
    "share",
]

Average = Literal["macro", "micro", "weighted"]
Score = float | jax.Array


class Share(NamedTuple):
    """The number of rows that are predicted right, of all rows, and of rows with invalid values."""

    right: Any
    total: Any
    invalid: Any


class ClassCounts(NamedTuple):
    """True positives, false positives and false negatives by class (int32 [classes]), and rows with invalid values."""

    tp: Any
    fp: Any
    fn: Any
    invalid: Any


def class_share(where: str, predictions: Any, targets: Any) -> Share:
    """The share of rows whose predicted class is the target, as counts."""
    predicted, wanted, valid, _ = _class_ids(where, predictions, targets, 2**31 - 1)
    return _share_of(predicted == wanted, valid)


def binary_share(where: str, predictions: Any, targets: Any, threshold: Any) -> Share:
    """The share of elements where ``predictions > threshold`` agrees with the target, as counts."""
    scores, labels = floats(where, "predictions", predictions), as_array(where, "targets", targets)
    equal_shapes(where, "predictions", scores, "targets", labels)
    ones, valid = zeros_and_ones(where, "targets", targets)
    return _share_of((scores > threshold) == ones, valid & ~jnp.isnan(scores))


def share(counts: Share) -> Score:
    """The quotient of the counts; NaN if some rows have invalid values."""
    if is_traced(counts.right):
        return jnp.where(counts.invalid > 0, jnp.nan, counts.right / counts.total)
    right, total, invalid = jax.device_get(counts)
    return math.nan if invalid else int(right) / int(total)


def class_counts(where: str, predictions: Any, targets: Any, num_classes: int | None) -> ClassCounts:
    """Counts by class; the number of classes is that of the scores' columns or, for class indices, ``num_classes``."""
    predicted, wanted, valid, classes = _class_ids(where, predictions, targets, num_classes)
    if num_classes not in (None, classes):
        raise ValueError(
            f"{where} expected as many classes as the scores have columns, received num_classes={num_classes!r} and "
            f"predictions {tree.describe(predictions)}. Leave num_classes out."
        )
    right, wrong = valid & (predicted == wanted), (valid & (predicted != wanted)).astype(jnp.int32)
    none = jnp.zeros(classes, jnp.int32)
    return ClassCounts(
        tp=none.at[wanted].add(right.astype(jnp.int32)),
        fp=none.at[predicted].add(wrong),
        fn=none.at[wanted].add(wrong),
        invalid=jnp.sum(~valid, dtype=jnp.int32),
    )


def check_average(where: str, average: Any) -> None:
    """Raise ValueError for an unknown average."""
    if average not in get_args(Average):
        raise ValueError(f'{where} expected average="macro", "micro" or "weighted", received {average!r}.')


def averaged(counts: ClassCounts, average: str, of: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Score:
    """The average over classes of ``of(tp, fp, fn)``, a numerator and a denominator; 0 / 0 is 0."""
    traced = is_traced(counts.tp)
    xp: Any = jnp if traced else np  # NumPy divides the integer counts in float64

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


def _share_of(right: jax.Array, valid: jax.Array) -> Share:
    count = lambda rows: jnp.sum(rows, dtype=jnp.int32)
    return Share(right=count(right & valid), total=right.size, invalid=count(~valid))


def _class_ids(where: str, predictions: Any, targets: Any, num_classes: int | None) -> tuple[Any, Any, Any, int]:
    """Predicted and target classes, which rows are valid, and the number of classes."""
    scores, labels = as_array(where, "predictions", predictions), as_array(where, "targets", targets)
    not_empty(where, "predictions", scores)
    if jnp.issubdtype(scores.dtype, jnp.floating):
        index_shape(where, "predictions", scores, "targets", labels)
        classes = scores.shape[-1]
        wanted, valid = class_indices(where, "targets", targets, classes)
        return jnp.argmax(scores, axis=-1).astype(jnp.int32), wanted, valid & ~jnp.isnan(scores).any(axis=-1), classes
    if not isinstance(num_classes, (int, np.integer)) or num_classes < 1:
        raise ValueError(
            f"{where} of class indices expected the number of classes, received num_classes={num_classes!r}. Write "
            f"{where}(predictions, targets, num_classes=10), or pass scores [..., classes]."
        )
    equal_shapes(where, "predictions", scores, "targets", labels)
    predicted, known = class_indices(where, "predictions", predictions, num_classes)
    wanted, valid = class_indices(where, "targets", targets, num_classes)
    return predicted, wanted, valid & known, int(num_classes)
