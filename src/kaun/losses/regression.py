"""Losses of real numbers; the rules that all share are in the docstring of the package."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kaun.losses.checks import (
    Array,
    as_array,
    equal_dtypes,
    equal_shapes,
    floats,
    floats_alike,
    inside,
    known,
    positive_number,
)
from kaun.losses.mean import Mean, scalar_like, with_parts
from kaun.losses.weighting import Weighting, weighting

__all__ = ["gaussian_nll", "huber", "log_cosh", "mae", "mse", "poisson_nll"]

_LEAST_VARIANCE = 1e-6  # PyTorch's eps


def _mse(predictions: Array, targets: Array, *, weights: Array | None = None, where: Array | None = None) -> Mean:
    p, t, counted = _pairs("mse", predictions, targets, weights, where)
    return counted.mean(optax.losses.squared_error(p, t))


@with_parts(_mse)
def mse(predictions: Array, targets: Array, *, weights: Array | None = None, where: Array | None = None) -> jax.Array:
    """The mean squared error over elements.

    It is the mean of ``optax.losses.squared_error``, without a factor 1/2.

    Args:
        predictions: Float ``[...]``.
        targets: Of the same shape and dtype.
        weights: ``[...]`` or of leading axes of that, the weight of each element or row.
        where: Bool, of such a shape: which elements count.

    Returns:
        A scalar of the same dtype.

    Raises:
        TypeError: If an argument is not a floating array, the dtypes differ, or ``where`` is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, a weight is negative or not finite,
            or no element counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> losses.mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
        Array(2., dtype=float32)
        >>> losses.mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]), weights=jnp.array([3.0, 1.0]))
        Array(1., dtype=float32)
    """
    return scalar_like(predictions, _mse(predictions, targets, weights=weights, where=where))


def _mae(predictions: Array, targets: Array, *, weights: Array | None = None, where: Array | None = None) -> Mean:
    p, t, counted = _pairs("mae", predictions, targets, weights, where)
    errors = p - t
    # Not jnp.abs, whose derivative at 0 is 1: it would move predictions that are already right.
    return counted.mean(errors * jnp.sign(errors))


@with_parts(_mae)
def mae(predictions: Array, targets: Array, *, weights: Array | None = None, where: Array | None = None) -> jax.Array:
    """The mean absolute error over elements; its gradient is 0 where the error is 0.

    Args:
        predictions: Float ``[...]``.
        targets: Of the same shape and dtype.
        weights: ``[...]`` or of leading axes of that, the weight of each element or row.
        where: Bool, of such a shape: which elements count.

    Returns:
        A scalar of the same dtype.

    Raises:
        TypeError: If an argument is not a floating array, the dtypes differ, or ``where`` is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, a weight is negative or not finite,
            or no element counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> losses.mae(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
        Array(1., dtype=float32)
    """
    return scalar_like(predictions, _mae(predictions, targets, weights=weights, where=where))


def _huber(
    predictions: Array,
    targets: Array,
    delta: float | Array = 1.0,
    *,
    weights: Array | None = None,
    where: Array | None = None,
) -> Mean:
    p, t, counted = _pairs("huber", predictions, targets, weights, where)
    turn = positive_number("huber", "delta", delta, p.dtype, "1.0")
    return counted.mean(optax.losses.huber_loss(p, t, delta=turn))


@with_parts(_huber)
def huber(
    predictions: Array,
    targets: Array,
    delta: float | Array = 1.0,
    *,
    weights: Array | None = None,
    where: Array | None = None,
) -> jax.Array:
    """The mean Huber loss over elements: quadratic near the target, linear beyond ``delta``.

    An error ``e`` costs ``e**2 / 2`` up to ``delta`` and ``delta * (|e| - delta / 2)`` beyond (Huber, "Robust
    Estimation of a Location Parameter", 1964). It is the mean of ``optax.losses.huber_loss``.

    Args:
        predictions: Float ``[...]``.
        targets: Of the same shape and dtype.
        delta: The error at which the loss becomes linear, a positive number in the unit of the targets. Default: 1. A
            traced ``delta`` cannot be checked; the loss is NaN if it is not positive.
        weights: ``[...]`` or of leading axes of that, the weight of each element or row.
        where: Bool, of such a shape: which elements count.

    Returns:
        A scalar of the predictions' dtype.

    Raises:
        TypeError: If an argument is not a floating array, the dtypes differ, ``delta`` is not a number, or ``where`` is
            not bool.
        ValueError: If shapes do not fit, there are no elements, ``delta`` is not positive and finite in that dtype, or,
            of known value, a weight is negative or not finite, or no element counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> losses.huber(jnp.array([1.0, 2.0]), jnp.array([1.5, 4.0]))
        Array(0.8125, dtype=float32)
    """
    return scalar_like(predictions, _huber(predictions, targets, delta, weights=weights, where=where))


def _log_cosh(predictions: Array, targets: Array, *, weights: Array | None = None, where: Array | None = None) -> Mean:
    p, t, counted = _pairs("log_cosh", predictions, targets, weights, where)
    return counted.mean(optax.losses.log_cosh(p, t))


@with_parts(_log_cosh)
def log_cosh(
    predictions: Array, targets: Array, *, weights: Array | None = None, where: Array | None = None
) -> jax.Array:
    """The mean over elements of ``log(cosh(error))``: quadratic near the target, linear far from it, and smooth.

    It is the mean of ``optax.losses.log_cosh`` (Chen et al., "Log Hyperbolic Cosine Loss Improves Variational
    Auto-Encoder", 2018).

    Args:
        predictions: Float ``[...]``.
        targets: Of the same shape and dtype.
        weights: ``[...]`` or of leading axes of that, the weight of each element or row.
        where: Bool, of such a shape: which elements count.

    Returns:
        A scalar of the same dtype.

    Raises:
        TypeError: If an argument is not a floating array, the dtypes differ, or ``where`` is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, a weight is negative or not finite,
            or no element counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> print(f"{losses.log_cosh(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])):.4f}")
        0.6625
    """
    return scalar_like(predictions, _log_cosh(predictions, targets, weights=weights, where=where))


def _gaussian_nll(
    mean: Array, variance: Array, targets: Array, *, weights: Array | None = None, where: Array | None = None
) -> Mean:
    name = "gaussian_nll"
    m, t = floats_alike(name, "mean", mean, "targets", targets)
    v = floats_alike(name, "mean", mean, "variance", variance)[1]
    counted = weighting(name, m, m.shape, weights, where)
    if (host := known(variance)) is not None:
        fix = "Write jax.nn.softplus(variance) or jnp.exp(log_variance)"
        inside(name, "variance", host, host >= 0, "0 to the largest number", fix, counted.kept(host.ndim))
    m, v, t = counted.safe(m), counted.safe(v, 1), counted.safe(t)
    # The gradient is as if the variance were the least one where it is below: else it could not grow again.
    least = v + lax.stop_gradient(jnp.maximum(v, _LEAST_VARIANCE) - v)
    elements = (jnp.log(least) + (m - t) ** 2 / least) / 2
    return counted.mean(jnp.where(v >= 0, elements, jnp.nan))


@with_parts(_gaussian_nll)
def gaussian_nll(
    mean: Array, variance: Array, targets: Array, *, weights: Array | None = None, where: Array | None = None
) -> jax.Array:
    """The mean over elements of the negative log likelihood of a normal distribution, without its constant.

    An element costs ``(log(variance) + (mean - target)**2 / variance) / 2`` (Nix and Weigend, "Estimating the Mean and
    Variance of the Target Probability Distribution", 1994). A variance below 1e-6 counts as 1e-6, as in PyTorch's
    ``gaussian_nll_loss``.

    Args:
        mean: Float ``[...]``.
        variance: Of the same shape and dtype, not negative. In compiled code a negative one makes the loss NaN.
        targets: Of the same shape and dtype.
        weights: ``[...]`` or of leading axes of that, the weight of each element or row.
        where: Bool, of such a shape: which elements count.

    Returns:
        A scalar of the same dtype.

    Raises:
        TypeError: If an argument is not a floating array, the dtypes differ, or ``where`` is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, a variance is negative, a weight is
            negative or not finite, or no element counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> losses.gaussian_nll(jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0]), jnp.array([1.0, 4.0]))
        Array(1., dtype=float32)
    """
    return scalar_like(mean, _gaussian_nll(mean, variance, targets, weights=weights, where=where))


def _poisson_nll(log_rate: Array, counts: Array, *, weights: Array | None = None, where: Array | None = None) -> Mean:
    name = "poisson_nll"
    rates, given = floats(name, "log_rate", log_rate), as_array(name, "counts", counts)
    equal_shapes(name, "log_rate", rates, "counts", given)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        equal_dtypes(name, ("log_rate", rates), ("counts", given))
    counted = weighting(name, rates, rates.shape, weights, where)
    if (host := known(counts)) is not None:
        fix = "Leave out what is missing with where="
        inside(name, "counts", host, host >= 0, "0 to the largest number", fix, counted.kept(host.ndim))
    rates, given = counted.safe(rates), counted.safe(given.astype(rates.dtype))
    return counted.mean(jnp.where(given >= 0, jnp.exp(rates) - given * rates, jnp.nan))


@with_parts(_poisson_nll)
def poisson_nll(
    log_rate: Array, counts: Array, *, weights: Array | None = None, where: Array | None = None
) -> jax.Array:
    """The mean over elements of the negative log likelihood of a Poisson distribution, without its constant.

    An element costs ``exp(log_rate) - count * log_rate`` (Nelder and Wedderburn, "Generalized Linear Models", 1972), as
    in PyTorch's ``poisson_nll_loss``.

    Args:
        log_rate: Float ``[...]``, the logarithm of the expected count.
        counts: Of the same shape, not negative: of that dtype, or integers. In compiled code a negative one makes the
            loss NaN.
        weights: ``[...]`` or of leading axes of that, the weight of each element or row.
        where: Bool, of such a shape: which elements count.

    Returns:
        A scalar of the dtype of ``log_rate``.

    Raises:
        TypeError: If an argument is not an array, ``log_rate`` is not floating, the counts have another floating dtype,
            or ``where`` is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, a count is negative, a weight is
            negative or not finite, or no element counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> losses.poisson_nll(jnp.array([0.0, 0.0]), jnp.array([1, 3]))
        Array(1., dtype=float32)
    """
    return scalar_like(log_rate, _poisson_nll(log_rate, counts, weights=weights, where=where))


def _pairs(
    name: str, predictions: Any, targets: Any, weights: Any, where: Any
) -> tuple[jax.Array, jax.Array, Weighting]:
    """Predictions and targets, with zeros where they do not count, and what counts."""
    p, t = floats_alike(name, "predictions", predictions, "targets", targets)
    counted = weighting(name, p, p.shape, weights, where)
    return counted.safe(p), counted.safe(t), counted
