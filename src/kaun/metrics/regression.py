"""Metrics of real predictions: functions of ``(predictions, targets)``, and the perplexity.

For concrete inputs a metric returns a Python float, computed in float64 on the host; in compiled code it returns a
scalar JAX array. A value that is not finite makes the result NaN or infinite. A row of weight 0 counts nothing,
whatever its values are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kaun import tree
from kaun._calls import public
from kaun._jax import any_traced
from kaun.losses.checks import Array, as_array, class_indices, equal_shapes, floats, index_shape
from kaun.metrics.counts import Score
from kaun.metrics.parts import RowValues, as_floats, settle
from kaun.metrics.weights import blank, check_weights, nothing_to_average, own_values

__all__ = [
    "absolute_errors", "likelihoods", "mean_absolute_error", "mean_of_columns", "moments", "perplexity",
    "perplexity_of", "r2", "r2_of", "rmse", "rmse_of", "squared_errors",
]  # fmt: skip


@public
def rmse(predictions: Array, targets: Array, *, weights: Array | None = None) -> Score:
    """Return the root of the mean squared error over rows, averaged over columns.

    It is scikit-learn's ``root_mean_squared_error(targets, predictions)``: with more axes than one, the mean of the
    roots of the columns. For one root over all elements pass both as [n], ``predictions.reshape(-1)``.

    Args:
        predictions: Float [rows, ...].
        targets: Real numbers of the same shape.
        weights: Numbers of at least 0, bools or integers or floats, of shape [rows] or of that of the targets. The
            result is scikit-learn's with them as ``sample_weight``. By default each row weighs 1.

    Returns:
        The error, in the unit of the targets.

    Raises:
        TypeError: If an argument is not an array, predictions are not floating, or targets are not real.
        ValueError: If the shapes differ, there are no rows, a weight (of known value) is negative or not finite, or
            all weights are 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.rmse(jnp.array([1.0, 2.0, 5.0]), jnp.array([1.0, 4.0, 4.0]), weights=jnp.array([1, 1, 0]))
        1.4142135623730951
    """
    return rmse_of(squared_errors(predictions, targets, weights=weights))


@public
def mean_absolute_error(predictions: Array, targets: Array, *, weights: Array | None = None) -> Score:
    """Return the mean of the absolute errors over rows, averaged over columns.

    It is scikit-learn's ``mean_absolute_error(targets, predictions)``.

    Args:
        predictions: As in ``rmse``.
        targets: As in ``rmse``.
        weights: As in ``rmse``.

    Returns:
        The error, in the unit of the targets.

    Raises:
        TypeError: As ``rmse``.
        ValueError: As ``rmse``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.mean_absolute_error(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
        1.0
    """
    return mean_of_columns(absolute_errors(predictions, targets, weights=weights))


@public
def r2(predictions: Array, targets: Array, *, weights: Array | None = None) -> Score:
    """Return the coefficient of determination: the share of the targets' variance that is predicted.

    It is scikit-learn's ``r2_score(targets, predictions)``, the mean over columns where there are more axes than one.
    A column of equal targets scores 1 where all of its predictions are right, else 0. No precision is lost where the
    targets' mean is large against their deviations.

    Args:
        predictions: As in ``rmse``.
        targets: As in ``rmse``.
        weights: As in ``rmse``.

    Returns:
        The coefficient, at most 1; negative for predictions worse than the mean of the targets, and NaN for less than
        two rows.

    Raises:
        TypeError: As ``rmse``.
        ValueError: As ``rmse``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> metrics.r2(jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 3.0, 2.0]))
        0.0
    """
    return r2_of(moments(predictions, targets, weights=weights))


@public
def perplexity(predictions: Array, targets: Array, *, weights: Array | None = None) -> Score:
    """Return the exponential of the mean negative log likelihood of the targets.

    It is the exponential of scikit-learn's ``log_loss`` of the probabilities. In compiled code, that of
    ``trainer.evaluate`` included, the likelihood of each target is computed in the dtype of the logits, at least in
    float32, as ``losses.cross_entropy_sparse`` does; ``evaluate`` adds them up in float64.

    Args:
        predictions: Logits, float [..., classes].
        targets: Class indices, integers [...].
        weights: Numbers of at least 0 of the shape of the targets or of its leading axes; for tokens usually bools that
            leave padding out. By default each target weighs 1.

    Returns:
        The perplexity, at least 1.

    Raises:
        TypeError: If an argument is not an array, predictions are not floating, or targets are not integers.
        ValueError: If the shapes do not match, there are no rows, a target (of known value) is not a class, a weight
            is negative or not finite, or all weights are 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import metrics
        >>> round(metrics.perplexity(jnp.zeros((2, 10)), jnp.array([3, 4])), 4)
        10.0
    """
    return perplexity_of(likelihoods(predictions, targets, weights=weights))


class Sums(NamedTuple):
    """By column the sum of values, each times its weight, and the sum of the weights."""

    total: Any
    weight: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """By column the targets' mean, and sums of squares about it and about the predictions.

    The mean is ``pivot + offset`` with a pivot in float32. The distance of float32 targets to it is exact in float64,
    so that nothing is lost where the mean is large against the deviations. Two are merged as by Chan, Golub and LeVeque
    ("Updating formulae and a pairwise algorithm for computing sample variances", 1979).

    Attributes:
        rows: The number of rows.
        weight: The sum of the weights.
        pivot: A number near the mean.
        offset: The mean without the pivot.
        about_mean: The sum of squares about the mean, each times its weight.
        about_predictions: The sum of squared errors, each times its weight.
    """

    rows: Any
    weight: Any
    pivot: Any
    offset: Any
    about_mean: Any
    about_predictions: Any

    def merged(self, other: Moments) -> Moments:
        """The moments of the rows of both."""
        weight = self.weight + other.weight
        share = other.weight / np.where(weight == 0, 1, weight)
        apart = (other.pivot - self.pivot) + (other.offset - self.offset)
        about_mean = self.about_mean + other.about_mean + apart**2 * share * self.weight
        empty = self.weight == 0
        pivot, offset = np.where(empty, other.pivot, self.pivot), np.where(empty, other.offset, self.offset)
        return Moments(
            rows=self.rows + other.rows,
            weight=weight,
            pivot=pivot,
            offset=np.where(empty, offset, offset + apart * share),
            about_mean=about_mean,
            about_predictions=self.about_predictions + other.about_predictions,
        )


def squared_errors(predictions: Any, targets: Any, *, weights: Any = None) -> RowValues:
    """The counts of ``rmse``."""
    return RowValues(_columns("rmse", predictions, targets, weights), _squares)


def absolute_errors(predictions: Any, targets: Any, *, weights: Any = None) -> RowValues:
    """The counts of ``mean_absolute_error``."""
    return RowValues(_columns("mean_absolute_error", predictions, targets, weights), _distances)


def moments(predictions: Any, targets: Any, *, weights: Any = None) -> RowValues:
    """The counts of ``r2``."""
    return RowValues(_columns("r2", predictions, targets, weights), _moments)


def likelihoods(predictions: Any, targets: Any, *, weights: Any = None) -> RowValues:
    """The counts of ``perplexity``."""
    where = "perplexity"
    logits, labels = floats(where, "predictions", predictions), as_array(where, "targets", targets)
    index_shape(where, "predictions", logits, "targets", labels)
    checked = check_weights(where, weights, labels.shape)
    safe, valid = class_indices(where, "targets", blank(targets, checked.counted), logits.shape[-1])
    if any_traced([predictions, targets, weights]):
        rows = blank(logits, checked.counted)
        values = optax.losses.softmax_cross_entropy_with_integer_labels(as_floats(jnp, rows), safe)
        values = jnp.where(valid & checked.valid, values, jnp.nan)
    else:
        rows = np.asarray(blank(own_values(predictions, logits), checked.counted))
        values = _likelihoods_on_host(rows.reshape(-1, rows.shape[-1]), np.asarray(safe).reshape(-1))
    return RowValues((values.reshape(-1), *(w.reshape(-1) for w in checked.columns)), _totals)


def rmse_of(counts: Any, **settings: Any) -> Score:
    """The root of the means, averaged over columns."""
    means, xp = _means(counts)
    return _score(xp, xp.sqrt(means).mean())


def mean_of_columns(counts: Any, **settings: Any) -> Score:
    """The mean of the means of columns."""
    means, xp = _means(counts)
    return _score(xp, means.mean())


def perplexity_of(counts: Any, **settings: Any) -> Score:
    """The exponential of the mean."""
    mean, xp = _means(counts)
    with np.errstate(over="ignore"):  # infinite, which is visible
        return _score(xp, xp.exp(mean))


def r2_of(counts: Any, **settings: Any) -> Score:
    """The coefficient of determination of the moments, averaged over columns."""
    found, xp = settle(counts)
    _refuse_no_weight(found.weight, xp)
    error, spread = found.about_predictions, found.about_mean
    flat = xp.where(error == 0, 1.0, xp.where(xp.isnan(error), xp.nan, 0.0))
    with np.errstate(invalid="ignore"):  # inf / inf is NaN, which is visible
        scores = xp.where(spread == 0, flat, 1 - error / xp.where(spread == 0, 1, spread))
    return _score(xp, xp.where(found.rows < 2, xp.nan, scores.mean()))


def _likelihoods_on_host(logits: np.ndarray[Any, Any], ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values, step = np.empty(len(ids)), max(1, 2**20 // logits.shape[-1])
    for start in range(0, len(ids), step):  # in parts: all logits of a large vocabulary in float64 need much memory
        rows = slice(start, start + step)
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is visible
            shifted = logits[rows].astype(np.float64)
            shifted -= shifted.max(axis=-1, keepdims=True)
            own = np.take_along_axis(shifted, ids[rows, None], axis=-1)[:, 0]
            values[rows] = np.log(np.exp(shifted).sum(axis=-1)) - own
    return values


def _columns(where: str, predictions: Any, targets: Any, weights: Any) -> tuple[Any, ...]:
    """Predictions, targets and weights, if there are some, as rows and columns."""
    left, right = floats(where, "predictions", predictions), as_array(where, "targets", targets)
    if not tree.is_real(right):
        raise TypeError(f"{where} expected targets that are real numbers, received {tree.describe(right)}.")
    equal_shapes(where, "predictions", left, "targets", right)
    checked = check_weights(where, weights, left.shape)
    if not any_traced([predictions, targets, weights]):
        left, right = own_values(predictions, left), own_values(targets, right)
    left, right = blank(left, checked.counted), blank(right, checked.counted)
    if checked.valid is not True:
        left = jnp.where(checked.valid, left, jnp.nan)
    rows = left.shape[0] if left.ndim else 1
    return tuple(a.reshape(rows, -1) for a in (left, right, *checked.columns))


def _squares(xp: Any, predictions: Any, targets: Any, weights: Any = None) -> Sums:
    return _totals(xp, _errors(xp, predictions, targets) ** 2, weights)


def _distances(xp: Any, predictions: Any, targets: Any, weights: Any = None) -> Sums:
    return _totals(xp, abs(_errors(xp, predictions, targets)), weights)


def _moments(xp: Any, predictions: Any, targets: Any, weights: Any = None) -> Moments:
    errors = _totals(xp, _errors(xp, predictions, targets) ** 2, weights)
    rows, targets = len(targets), as_floats(xp, targets)
    safe = xp.where(errors.weight == 0, 1, errors.weight)
    mean = _totals(xp, targets, weights).total / safe
    pivot = mean.astype(np.float32).astype(mean.dtype)
    offset = _totals(xp, targets - pivot[None], weights).total / safe
    spread = _totals(xp, ((targets - pivot[None]) - offset[None]) ** 2, weights).total
    return Moments(xp.asarray(rows), errors.weight, pivot, offset, spread, errors.total)


def _totals(xp: Any, values: Any, weights: Any = None) -> Sums:
    if weights is None:
        return Sums(values.sum(axis=0), xp.full(values.shape[1:], len(values), values.dtype))
    weights = as_floats(xp, weights).astype(values.dtype)
    return Sums((values * weights).sum(axis=0), weights.sum(axis=0))


def _errors(xp: Any, predictions: Any, targets: Any) -> Any:
    return as_floats(xp, targets) - as_floats(xp, predictions)


def _means(counts: Any) -> tuple[Any, Any]:
    (total, weight), xp = settle(counts)
    _refuse_no_weight(weight, xp)
    return total / weight, xp


def _refuse_no_weight(weight: Any, xp: Any) -> None:
    if xp is np and not weight.all():
        raise nothing_to_average()


def _score(xp: Any, value: Any) -> Score:
    return float(value) if xp is np else value
