"""Losses of vectors that should be near to or far from each other; the shared rules are in the package's docstring."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kaun import tree
from kaun.losses.checks import Array, floats_alike, positive_number
from kaun.losses.mean import Mean, scalar_like, with_parts
from kaun.losses.weighting import weighting

__all__ = ["cosine_distance", "info_nce", "triplet"]


def _cosine_distance(a: Array, b: Array, *, weights: Array | None = None, where: Array | None = None) -> Mean:
    name = "cosine_distance"
    x, y = floats_alike(name, "a", a, "b", b)
    _check_vectors(name, "a", x)
    counted = weighting(name, x, x.shape[:-1], weights, where)
    (x, some), (y, others) = _no_zeros(counted.safe(x)), _no_zeros(counted.safe(y))
    return counted.mean(jnp.where(some & others, optax.losses.cosine_distance(x, y), 1))


@with_parts(_cosine_distance)
def cosine_distance(a: Array, b: Array, *, weights: Array | None = None, where: Array | None = None) -> jax.Array:
    """The mean over rows of one minus the cosine of the angle between two vectors.

    It is the mean of ``optax.losses.cosine_distance``. A vector of zeros has no direction: its distance is 1, with a
    gradient of 0.

    Args:
        a: Float ``[..., features]``.
        b: Of the same shape and dtype.
        weights: ``[...]`` or of leading axes of that, the weight of each row.
        where: Bool, of such a shape: which rows count.

    Returns:
        A scalar of the same dtype.

    Raises:
        TypeError: If an argument is not a floating array, the dtypes differ, or ``where`` is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, a weight is negative or not finite,
            or no row counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> losses.cosine_distance(jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[2.0, 0.0], [0.0, 3.0]]))
        Array(0.5, dtype=float32)
    """
    return scalar_like(a, _cosine_distance(a, b, weights=weights, where=where))


def _info_nce(
    queries: Array,
    keys: Array,
    temperature: float | Array = 0.07,
    *,
    weights: Array | None = None,
    where: Array | None = None,
) -> Mean:
    name = "info_nce"
    x, y = floats_alike(name, "queries", queries, "keys", keys)
    if x.ndim != 2:
        raise ValueError(f"{name} expected queries [batch, features], received {tree.describe(x)}.")
    divisor = positive_number(name, "temperature", temperature, x.dtype, "0.07")
    counted = weighting(name, x, x.shape[:1], weights, where)
    (x, some), (y, others) = _no_zeros(counted.safe(x)), _no_zeros(counted.safe(y))
    x = jnp.where(some[:, None], x / optax.safe_norm(x, 0, axis=-1, keepdims=True), 0)
    y = jnp.where(others[:, None], y / optax.safe_norm(y, 0, axis=-1, keepdims=True), 0)
    scores = x @ y.T / divisor
    if counted.mask is not None:  # a row that does not count is no wrong answer to the others
        diagonal = np.eye(len(scores), dtype=bool)
        scores = jnp.where(counted.mask[None, :] | diagonal, scores, -jnp.inf)
    rows = optax.losses.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(len(scores)))
    return counted.mean(rows)


@with_parts(_info_nce)
def info_nce(
    queries: Array,
    keys: Array,
    temperature: float | Array = 0.07,
    *,
    weights: Array | None = None,
    where: Array | None = None,
) -> jax.Array:
    """The mean over queries of the cross entropy of finding their own key among all keys of the batch.

    The scores are cosines divided by the temperature: vectors are divided by their lengths first (van den Oord et al.,
    "Representation Learning with Contrastive Predictive Coding", 2018; He et al., "Momentum Contrast", 2020). It is one
    way; for both, as in CLIP, write ``(info_nce(a, b) + info_nce(b, a)) / 2``.

    The loss depends on all rows of a batch together, so it is not the mean over smaller batches.

    Args:
        queries: Float ``[batch, features]``.
        keys: Of the same shape and dtype. The key of query ``i`` is row ``i``, the other rows are wrong answers.
        temperature: Positive. Default: 0.07.
        weights: ``[batch]``, the weight of each query. One of weight 0 is left out as by ``where``.
        where: Bool ``[batch]``: which rows count. Another one is neither asked for nor a wrong answer.

    Returns:
        A scalar of the same dtype.

    Raises:
        TypeError: If an argument is not a floating array, the dtypes differ, ``temperature`` is not a number, or
            ``where`` is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, the temperature is not positive, a
            weight is negative or not finite, or no row counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> queries = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> print(f"{losses.info_nce(queries, 3 * queries, temperature=0.5):.4f}")
        0.1269
    """
    return scalar_like(queries, _info_nce(queries, keys, temperature, weights=weights, where=where))


def _triplet(
    anchor: Array,
    positive: Array,
    negative: Array,
    margin: float | Array = 1.0,
    *,
    weights: Array | None = None,
    where: Array | None = None,
) -> Mean:
    name = "triplet"
    x, near = floats_alike(name, "anchor", anchor, "positive", positive)
    far = floats_alike(name, "anchor", anchor, "negative", negative)[1]
    _check_vectors(name, "anchor", x)
    least_gap = positive_number(name, "margin", margin, x.dtype, "1.0")
    counted = weighting(name, x, x.shape[:-1], weights, where)
    x, near, far = counted.safe(x), counted.safe(near), counted.safe(far)
    # Not optax.losses.triplet_margin_loss, in which equal vectors have a distance of 0.001.
    distances = [optax.safe_norm(x - other, 0, axis=-1) for other in (near, far)]
    return counted.mean(jnp.maximum(distances[0] - distances[1] + least_gap, 0))


@with_parts(_triplet)
def triplet(
    anchor: Array,
    positive: Array,
    negative: Array,
    margin: float | Array = 1.0,
    *,
    weights: Array | None = None,
    where: Array | None = None,
) -> jax.Array:
    """The mean over rows of how much nearer the positive should be to the anchor than the negative is.

    A row costs ``max(0, |anchor - positive| - |anchor - negative| + margin)``, with Euclidean distances (Balntas et
    al., "Learning Local Feature Descriptors with Triplets and Shallow Convolutional Neural Networks", 2016).

    Args:
        anchor: Float ``[..., features]``.
        positive: Of the same shape and dtype, what should be near.
        negative: Of the same shape and dtype, what should be far.
        margin: Positive. Default: 1.
        weights: ``[...]`` or of leading axes of that, the weight of each row.
        where: Bool, of such a shape: which rows count.

    Returns:
        A scalar of the same dtype.

    Raises:
        TypeError: If an argument is not a floating array, the dtypes differ, ``margin`` is not a number, or ``where``
            is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, the margin is not positive, a
            weight is negative or not finite, or no row counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> losses.triplet(jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 2.0]]))
        Array(4., dtype=float32)
    """
    return scalar_like(anchor, _triplet(anchor, positive, negative, margin, weights=weights, where=where))


def _check_vectors(name: str, argument: str, x: jax.Array) -> None:
    if x.ndim == 0:
        raise ValueError(f"{name} expected {argument} [..., features], received {tree.describe(x)}.")


def _no_zeros(x: jax.Array) -> tuple[Any, jax.Array]:
    """Vectors with ones in place of those of length 0, and which are not of length 0."""
    some = jnp.square(x).sum(axis=-1) > 0
    return jnp.where(some[..., None], x, 1), some
