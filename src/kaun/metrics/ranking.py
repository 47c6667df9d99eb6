"""Metrics of how scores rank rows of two classes. They look at all rows at once, so their counts are the rows."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from kaun._calls import public
from kaun._jax import any_traced
from kaun.losses.checks import Array, as_array, equal_shapes, floats, zeros_and_ones
from kaun.metrics.counts import Score
from kaun.metrics.parts import RowValues, as_floats, settle
from kaun.metrics.weights import blank, check_weights, nothing_to_average, own_values

__all__ = ["auc", "auc_of", "average_precision", "average_precision_of", "ranks"]


@public
def auc(predictions: Array, targets: Array, *, weights: Array | None = None) -> Score:
    """Return the area under the receiver operating characteristic curve.

    It is the probability that a row with target 1 has a larger score than one with target 0, where equal scores count
    one half (Hanley and McNeil, 1982), and scikit-learn's ``roc_auc_score(targets, scores)``. It is exact and not
    binned: ``trainer.evaluate`` keeps score, target and weight of each row on the host until the end, 9 bytes a row for
    float32 scores and weights, 5 without weights, and sorts them once.

    Args:
        predictions: Scores of target 1, float [...]: probabilities, logits, or anything that grows with them. All
            elements are ranked together.
        targets: Zeros and ones as bools, integers or floats, of the same shape.
        weights: Numbers of at least 0, bools or integers or floats, of the shape of the targets or of its leading axes.
            The result is scikit-learn's with them as ``sample_weight``. By default each element weighs 1.

    Returns:
        The area, from 0 to 1; NaN without a target 1, without a target 0, or when a score is NaN.

    Raises:
        TypeError: If an argument is not an array, or predictions are not floating.
        ValueError: If the shapes differ, there are no elements, a target (of known value) is neither 0 nor 1, a
            weight is negative or not finite, or all weights are 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.auc(jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1]))
        0.75
    """
    return auc_of(ranks("auc", predictions, targets, weights=weights))


@public
def average_precision(predictions: Array, targets: Array, *, weights: Array | None = None) -> Score:
    """Return the mean of the precision at the score of each row with target 1.

    It is scikit-learn's ``average_precision_score(targets, scores)``, the area under the steps of the curve of
    precision and recall, without interpolation. It is exact, and keeps rows as ``auc`` does.

    Args:
        predictions: As in ``auc``.
        targets: As in ``auc``.
        weights: As in ``auc``.

    Returns:
        The mean, from 0 to 1; 0 without a target 1, and NaN when a score is NaN.

    Raises:
        TypeError: As ``auc``.
        ValueError: As ``auc``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.average_precision(jnp.array([0.1, 0.4, 0.35, 0.8]), jnp.array([0, 0, 1, 1]))
        0.8333333333333333
    """
    return average_precision_of(ranks("average_precision", predictions, targets, weights=weights))


def ranks(where: str, predictions: Any, targets: Any, *, weights: Any = None) -> RowValues:
    """The counts of both: scores, which are NaN where a row is not valid, targets, and weights if there are some."""
    scores, labels = floats(where, "predictions", predictions), as_array(where, "targets", targets)
    equal_shapes(where, "predictions", scores, "targets", labels)
    checked = check_weights(where, weights, scores.shape)
    ones, valid = zeros_and_ones(where, "targets", blank(targets, checked.counted))
    if any_traced([predictions, targets, weights]):
        scores = jnp.where(valid & checked.valid, blank(scores, checked.counted), jnp.nan)
    else:
        scores = blank(own_values(predictions, scores), checked.counted)
    return RowValues(tuple(a.reshape(-1) for a in (scores, ones, *checked.columns)), None)


def auc_of(counts: Any, **settings: Any) -> Score:
    """The area under the curve of the rows."""
    found, xp = settle(counts)
    scores, ones, weights = _columns(xp, found)
    above, upto, (rows,) = _cumulated(xp, scores, ones * weights)
    negative = (1 - ones) * weights
    # The positives above each negative, which are all added up: nothing is subtracted.
    area = (negative * (rows[above] + rows[upto])).sum() / 2
    return _score(xp, scores, weights, area, rows[-1] * negative.sum(), np.nan)


def average_precision_of(counts: Any, **settings: Any) -> Score:
    """The average precision of the rows."""
    found, xp = settle(counts)
    scores, ones, weights = _columns(xp, found)
    positive = ones * weights
    _, upto, (hits, rows) = _cumulated(xp, scores, positive, weights)
    precision = hits[upto] / xp.where(rows[upto] == 0, 1, rows[upto])
    return _score(xp, scores, weights, (positive * precision).sum(), positive.sum(), 0.0)


def _columns(xp: Any, rows: RowValues) -> tuple[Any, Any, Any]:
    scores, ones, *weights = rows.columns
    scores, ones, *weights = (as_floats(xp, column) for column in (scores, ones, *weights))
    return scores, ones.astype(scores.dtype), weights[0].astype(scores.dtype) if weights else xp.ones_like(scores)


def _cumulated(xp: Any, scores: Any, *values: Any) -> tuple[Any, Any, list[Any]]:
    """How many rows have a larger score than each row, how many one as large or larger, and the sums from the top."""
    order = xp.argsort(-scores)
    falling = -scores[order]
    sums = [xp.concatenate([xp.zeros_like(v[:1]), xp.cumsum(v[order])]) for v in values]
    return xp.searchsorted(falling, -scores, side="left"), xp.searchsorted(falling, -scores, side="right"), sums


def _score(xp: Any, scores: Any, weights: Any, total: Any, whole: Any, otherwise: float) -> Score:
    if xp is np and not weights.any():
        raise nothing_to_average()
    value = xp.where(whole == 0, otherwise, total / xp.where(whole == 0, 1, whole))
    value = xp.where(xp.isnan(scores).any(), xp.nan, value)
    return value if xp is jnp else float(value)
