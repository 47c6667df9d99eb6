"""Losses of two classes, yes and no; the rules that all share are in the docstring of the package."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kaun import tree
from kaun.losses.checks import (
    Array,
    as_array,
    equal_dtypes,
    equal_shapes,
    factors,
    floats,
    inside,
    known,
    number,
    probabilities,
    zeros_and_ones_or_floats,
)
from kaun.losses.mean import Mean, scalar_like, with_parts
from kaun.losses.weighting import Weighting, weighting

__all__ = ["binary_cross_entropy", "focal", "hinge"]


def _binary_cross_entropy(
    logits: Array,
    labels: Array,
    *,
    pos_weight: float | Array | None = None,
    weights: Array | None = None,
    where: Array | None = None,
) -> Mean:
    name = "binary_cross_entropy"
    x, given, valid, counted = _yes_or_no(name, logits, labels, weights, where)
    if pos_weight is None:
        elements = optax.losses.sigmoid_binary_cross_entropy(x, given)
    else:
        factor = _pos_weight(name, pos_weight, x)
        elements = -factor * given * jax.nn.log_sigmoid(x) - (1 - given) * jax.nn.log_sigmoid(-x)
    return counted.mean(jnp.where(valid, elements, jnp.nan))


@with_parts(_binary_cross_entropy)
def binary_cross_entropy(
    logits: Array,
    labels: Array,
    *,
    pos_weight: float | Array | None = None,
    weights: Array | None = None,
    where: Array | None = None,
) -> jax.Array:
    """The mean over elements of the sigmoid cross entropy.

    It is the mean of ``optax.losses.sigmoid_binary_cross_entropy``.

    Args:
        logits: Float ``[...]``, the log odds of label 1 (before the sigmoid).
        labels: Of the logits' shape. In the logits' dtype: probabilities of label 1. As bool or integers: zeros and
            ones.
        pos_weight: What the loss of label 1 is multiplied by, a number or an array for the last axis. It is not a
            weight of the mean, which is still over the number of elements. Default: 1.
        weights: ``[...]`` or of leading axes of that, the weight of each element or row.
        where: Bool, of such a shape: which elements count.

    Returns:
        A scalar of the logits' dtype.

    Raises:
        TypeError: If an argument is not an array, the logits are not floating, the labels have another floating dtype,
            or ``where`` is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, an integer label is neither 0 nor 1
            or a float one outside of 0 to 1, a weight is negative or not finite, or no element counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> print(f"{losses.binary_cross_entropy(jnp.array([2.0, -2.0]), jnp.array([True, False])):.4f}")
        0.1269
    """
    return scalar_like(
        logits, _binary_cross_entropy(logits, labels, pos_weight=pos_weight, weights=weights, where=where)
    )


def _focal(
    logits: Array,
    labels: Array,
    alpha: float | Array | None = None,
    gamma: float | Array = 2.0,
    *,
    weights: Array | None = None,
    where: Array | None = None,
) -> Mean:
    name = "focal"
    x, given, valid, counted = _yes_or_no(name, logits, labels, weights, where)
    part = None if alpha is None else number(name, "alpha", alpha, x.dtype, 0, 1, "from 0 to 1", "0.25")
    most = float(jnp.finfo(x.dtype).max)
    power = number(name, "gamma", gamma, x.dtype, 0, most, "not negative and finite", "2.0")
    elements = optax.losses.sigmoid_focal_loss(x, given, alpha=part, gamma=power)
    return counted.mean(jnp.where(valid, elements, jnp.nan))


@with_parts(_focal)
def focal(
    logits: Array,
    labels: Array,
    alpha: float | Array | None = None,
    gamma: float | Array = 2.0,
    *,
    weights: Array | None = None,
    where: Array | None = None,
) -> jax.Array:
    """The mean over elements of the sigmoid focal loss, in which elements that are easy count less.

    It is the mean of ``optax.losses.sigmoid_focal_loss``: the sigmoid cross entropy times ``(1 - p) ** gamma``, with
    ``p`` the probability of the label (Lin et al., "Focal Loss for Dense Object Detection", 2017).

    Args:
        logits: Float ``[...]``, the log odds of label 1 (before the sigmoid).
        labels: Of the logits' shape. In the logits' dtype: probabilities of label 1. As bool or integers: zeros and
            ones.
        alpha: From 0 to 1: the loss of label 1 is multiplied by it, that of label 0 by ``1 - alpha``. It is not a
            weight of the mean. Default: None, neither is multiplied. The paper has 0.25.
        gamma: Not negative; 0 is the sigmoid cross entropy. Default: 2.
        weights: ``[...]`` or of leading axes of that, the weight of each element or row.
        where: Bool, of such a shape: which elements count.

    Returns:
        A scalar of the logits' dtype.

    Raises:
        TypeError: If an argument is not an array, the logits are not floating, the labels have another floating dtype,
            ``alpha`` or ``gamma`` is not a number, or ``where`` is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, a label, ``alpha`` or ``gamma`` is
            out of range, a weight is negative or not finite, or no element counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> print(f"{losses.focal(jnp.array([2.0, -2.0]), jnp.array([True, False]), alpha=0.25):.5f}")
        0.00090
    """
    return scalar_like(logits, _focal(logits, labels, alpha, gamma, weights=weights, where=where))


def _hinge(scores: Array, signs: Array, *, weights: Array | None = None, where: Array | None = None) -> Mean:
    name = "hinge"
    scores = floats(name, "scores", scores)
    given = as_array(name, "signs", signs)
    equal_shapes(name, "scores", scores, "signs", given)
    counted = weighting(name, scores, scores.shape, weights, where)
    if given.dtype == jnp.bool_:
        raise TypeError(f"{name} expected signs of -1 and 1, received {tree.describe(given)}. Write 2 * signs - 1.")
    if not jnp.issubdtype(given.dtype, jnp.integer):
        equal_dtypes(name, ("scores", scores), ("signs", given))
    host = known(signs)
    if host is not None:
        fix = "Write 2 * signs - 1 for labels that are 0 and 1"
        inside(name, "signs", host, (host == -1) | (host == 1), "-1 and 1", fix, counted.kept(host.ndim))
    given = given.astype(scores.dtype)
    elements = optax.losses.hinge_loss(counted.safe(scores), jnp.where(given == 1, given, -1))
    return counted.mean(jnp.where(abs(given) == 1, elements, jnp.nan))


@with_parts(_hinge)
def hinge(scores: Array, signs: Array, *, weights: Array | None = None, where: Array | None = None) -> jax.Array:
    """The mean over elements of the hinge loss, ``max(0, 1 - score * sign)``.

    It is the mean of ``optax.losses.hinge_loss`` (Cortes and Vapnik, "Support-Vector Networks", 1995).

    Args:
        scores: Float ``[...]``, positive for the class of sign 1.
        signs: Of the same shape, -1 and 1: of the scores' dtype or integers. In compiled code any other number makes
            the loss NaN.
        weights: ``[...]`` or of leading axes of that, the weight of each element or row.
        where: Bool, of such a shape: which elements count.

    Returns:
        A scalar of the scores' dtype.

    Raises:
        TypeError: If an argument is not an array, the scores are not floating, the signs are bool or have another
            floating dtype, or ``where`` is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, a sign is neither -1 nor 1, a
            weight is negative or not finite, or no element counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> losses.hinge(jnp.array([0.5, -3.0]), jnp.array([1, -1]))
        Array(0.25, dtype=float32)
    """
    return scalar_like(scores, _hinge(scores, signs, weights=weights, where=where))


def _yes_or_no(
    name: str, logits: Any, labels: Any, weights: Any, where: Any
) -> tuple[jax.Array, jax.Array, jax.Array, Weighting]:
    """Logits and labels of a sigmoid, with what does not count replaced, the valid labels, and what counts."""
    logits = floats(name, "logits", logits)
    given = as_array(name, "labels", labels)
    equal_shapes(name, "logits", logits, "labels", given)
    counted = weighting(name, logits, logits.shape, weights, where)
    kept = counted.kept(logits.ndim)
    given, valid = zeros_and_ones_or_floats(name, ("logits", logits), ("labels", given), labels, kept)
    probabilities(name, "labels", labels, kept)
    return counted.safe(logits), counted.safe(given), valid, counted


def _pos_weight(name: str, value: Any, logits: jax.Array) -> jax.Array:
    """The factor of label 1, with as many axes as the logits, or none."""
    array = jnp.asarray(value) if isinstance(value, (int, float)) else as_array(name, "pos_weight", value)
    if array.shape and array.shape != logits.shape[-1:]:
        raise ValueError(
            f"{name} expected pos_weight as a number or {list(logits.shape[-1:])}, one for each place of the last "
            f"axis, received {tree.describe(array)} with logits {tree.describe(logits)}."
        )
    return factors(name, "pos_weight", value, logits)
