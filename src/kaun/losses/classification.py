"""Losses of distributions over classes; the rules that all share are in the docstring of the package."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kaun import tree
from kaun.losses.checks import (
    Array,
    as_array,
    class_indices,
    distributions,
    equal_shapes,
    factors,
    floats,
    floats_alike,
    index_shape,
    known,
    number,
    zeros_and_ones_or_floats,
)
from kaun.losses.mean import Mean, scalar_like, with_parts
from kaun.losses.weighting import weighting

__all__ = ["cross_entropy", "cross_entropy_sparse", "kl_divergence"]


def _cross_entropy(
    logits: Array,
    one_hot: Array,
    *,
    label_smoothing: float | Array = 0.0,
    class_weights: Array | None = None,
    weights: Array | None = None,
    where: Array | None = None,
) -> Mean:
    name = "cross_entropy"
    logits = floats(name, "logits", logits)
    labels = as_array(name, "one_hot", one_hot)
    if logits.ndim == 0 or labels.shape == logits.shape[:-1]:
        raise ValueError(
            f"{name} expected logits [..., classes] and one_hot of the same shape, received logits "
            f"{tree.describe(logits)} and one_hot {tree.describe(labels)}. For class indices write "
            "losses.cross_entropy_sparse(logits, indices)."
        )
    equal_shapes(name, "logits", logits, "one_hot", labels)
    counted = weighting(name, logits, logits.shape[:-1], weights, where)
    kept = counted.kept(logits.ndim)
    labels, valid = zeros_and_ones_or_floats(name, ("logits", logits), ("one_hot", labels), one_hot, kept)
    distributions(name, "one_hot", one_hot, kept)
    logits, labels = counted.safe(logits), counted.safe(labels)
    share, weighted = None, labels
    smoothing = _smoothing(name, label_smoothing, logits.dtype)
    if smoothing is not None:
        weighted = optax.losses.smooth_labels(labels, smoothing)
    if class_weights is not None:
        by_class = _class_weights(name, class_weights, logits)
        weighted, share = weighted * by_class, (labels * by_class).sum(axis=-1)
    rows = optax.losses.safe_softmax_cross_entropy(logits, weighted)
    return counted.mean(jnp.where(valid.all(axis=-1), rows, jnp.nan), share)


@with_parts(_cross_entropy)
def cross_entropy(
    logits: Array,
    one_hot: Array,
    *,
    label_smoothing: float | Array = 0.0,
    class_weights: Array | None = None,
    weights: Array | None = None,
    where: Array | None = None,
) -> jax.Array:
    """The mean over rows of the softmax cross entropy, with a distribution over the classes for each row.

    It is the mean of ``optax.losses.safe_softmax_cross_entropy``.

    Args:
        logits: Float ``[..., classes]``, unnormalized log probabilities. A class may be masked out with ``-inf`` where
            its label is 0, and nothing is smoothed.
        one_hot: Of the logits' shape. In the logits' dtype: any distribution over the classes (smoothed labels, a
            teacher's probabilities). As bool or integers: zeros and ones.
        label_smoothing: From 0 to 1, the part of each label that is spread evenly over all classes (Szegedy et al.,
            "Rethinking the Inception Architecture", 2016). Default: 0.
        class_weights: ``[classes]``, the weight of each class: the row's label is multiplied by them, and the row
            counts by its label's mean of them. With one-hot labels this is ``cross_entropy_sparse``. (PyTorch divides
            by the number of rows where labels are distributions, and by the weights where they are indices.)
        weights: ``[...]`` or of leading axes of that, the weight of each row.
        where: Bool, of such a shape: which rows count.

    Returns:
        A scalar of the logits' dtype.

    Raises:
        TypeError: If an argument is not an array, the logits are not floating, the labels have another floating dtype,
            or ``where`` is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, an integer label is neither 0 nor
            1, a row is negative somewhere or does not sum to 1 (within 0.01), a weight is negative or not finite, the
            smoothing is not from 0 to 1, or no row counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> print(f"{losses.cross_entropy(logits, jnp.array([[1, 0, 0], [0, 1, 0]])):.4f}")
        0.2395
    """
    mean = _cross_entropy(
        logits, one_hot, label_smoothing=label_smoothing, class_weights=class_weights, weights=weights, where=where
    )
    return scalar_like(logits, mean)


def _cross_entropy_sparse(
    logits: Array,
    indices: Array,
    *,
    ignore_index: int | Array | None = None,
    label_smoothing: float | Array = 0.0,
    class_weights: Array | None = None,
    weights: Array | None = None,
    where: Array | None = None,
) -> Mean:
    name = "cross_entropy_sparse"
    logits = floats(name, "logits", logits)
    labels = as_array(name, "indices", indices)
    index_shape(name, "logits", logits, "indices", labels)
    counted = weighting(name, logits, labels.shape, weights, where)
    if ignore_index is not None:
        counted = counted.without(*_ignored(name, ignore_index, labels, indices))
    fix = "To exclude rows, write ignore_index= for one label, or where= with a mask"
    safe, valid = class_indices(name, "indices", indices, logits.shape[-1], counted.kept(labels.ndim), fix)
    logits, share = counted.safe(logits), None
    rows = optax.losses.softmax_cross_entropy_with_integer_labels(logits, safe)
    by_class = None if class_weights is None else _class_weights(name, class_weights, logits)
    if by_class is not None:
        share = by_class.reshape(-1)[safe]
        rows = rows * share
    smoothing = _smoothing(name, label_smoothing, logits.dtype)
    if smoothing is not None:
        even = jnp.ones((), logits.dtype) if by_class is None else by_class
        even = jnp.broadcast_to(even / logits.shape[-1], logits.shape)
        smoothed = optax.losses.safe_softmax_cross_entropy(logits, even)
        rows = (1 - smoothing) * rows + smoothing * smoothed
    return counted.mean(jnp.where(valid, rows, jnp.nan), share)


@with_parts(_cross_entropy_sparse)
def cross_entropy_sparse(
    logits: Array,
    indices: Array,
    *,
    ignore_index: int | Array | None = None,
    label_smoothing: float | Array = 0.0,
    class_weights: Array | None = None,
    weights: Array | None = None,
    where: Array | None = None,
) -> jax.Array:
    """The mean over rows of the softmax cross entropy, with a class index for each row.

    It is the mean of ``optax.losses.softmax_cross_entropy_with_integer_labels``. An index out of range is an error
    where the values are known; in compiled code it makes the loss NaN.

    Args:
        logits: Float ``[..., classes]``, unnormalized log probabilities.
        indices: Integers ``[...]`` of any width, from 0 to classes - 1; any integer where a row does not count.
        ignore_index: Rows with this index do not count. Default: None, no index (-1, -100) means "ignore".
        label_smoothing: From 0 to 1, the part of each label that is spread evenly over all classes (Szegedy et al.,
            "Rethinking the Inception Architecture", 2016). Default: 0.
        class_weights: ``[classes]``, the weight of each class: a row counts by the weight of its class. With smoothing,
            each class's part of the loss is multiplied by its weight, as in PyTorch.
        weights: ``[...]`` or of leading axes of that, the weight of each row.
        where: Bool, of such a shape: which rows count.

    Returns:
        A scalar of the logits' dtype.

    Raises:
        TypeError: If an argument is not an array, the logits are not floating, the indices or ``ignore_index`` are not
            integers, or ``where`` is not bool.
        ValueError: If ``indices.shape != logits.shape[:-1]`` or another shape does not fit, there are no elements, or,
            of known value, an index is out of range, a weight is negative or not finite, the smoothing is not from 0 to
            1, or no row counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> print(f"{losses.cross_entropy_sparse(logits, jnp.array([0, 1])):.4f}")
        0.2395
        >>> print(f"{losses.cross_entropy_sparse(logits, jnp.array([0, -100]), ignore_index=-100):.4f}")
        0.2395
    """
    mean = _cross_entropy_sparse(
        logits, indices, ignore_index=ignore_index, label_smoothing=label_smoothing, class_weights=class_weights,
        weights=weights, where=where,
    )  # fmt: skip
    return scalar_like(logits, mean)


def _kl_divergence(log_probs: Array, probs: Array, *, weights: Array | None = None, where: Array | None = None) -> Mean:
    name = "kl_divergence"
    logs, given = floats_alike(name, "log_probs", log_probs, "probs", probs)
    if logs.ndim == 0:
        raise ValueError(f"{name} expected log_probs [..., classes], received {tree.describe(logs)}.")
    counted = weighting(name, logs, logs.shape[:-1], weights, where)
    kept = counted.kept(logs.ndim)
    distributions(name, "probs", probs, kept)
    if (host := known(log_probs)) is not None:
        with np.errstate(over="ignore"):
            host = np.exp(host.astype(np.float64))
        fix = "Write jax.nn.log_softmax(logits) if they are logits"
        distributions(name, "jnp.exp(log_probs)", host, kept, fix, within=0.1)  # bfloat16 holds -8 to within 0.03
    # 0 * log(0) is 0: a class that the target excludes may have the log probability -inf. 1 * log(1) is 0 too.
    given, excluded = counted.safe(given, 1), counted.safe(given, 1) == 0
    logs, given = jnp.where(excluded, 0, counted.safe(logs)), jnp.where(excluded, 1, given)
    return counted.mean(optax.losses.kl_divergence(logs, given))


@with_parts(_kl_divergence)
def kl_divergence(
    log_probs: Array, probs: Array, *, weights: Array | None = None, where: Array | None = None
) -> jax.Array:
    """The mean over rows of the Kullback-Leibler divergence of predicted distributions from given ones.

    It is the mean of ``optax.losses.kl_divergence``: ``sum(probs * (log(probs) - log_probs))`` over the classes
    (Kullback and Leibler, "On Information and Sufficiency", 1951).

    Args:
        log_probs: Float ``[..., classes]``, log probabilities, ``jax.nn.log_softmax(logits)``. They may be ``-inf``
            where the probability is 0.
        probs: Of the same shape and dtype, distributions over the classes.
        weights: ``[...]`` or of leading axes of that, the weight of each row.
        where: Bool, of such a shape: which rows count.

    Returns:
        A scalar of the same dtype.

    Raises:
        TypeError: If an argument is not a floating array, the dtypes differ, or ``where`` is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, a row of ``probs`` or of
            ``exp(log_probs)`` is not a distribution (within 0.01 and 0.1), a weight is negative or not finite, or no
            row counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> print(f"{losses.kl_divergence(jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[1.0, 0.0]])):.4f}")
        0.6931
    """
    return scalar_like(log_probs, _kl_divergence(log_probs, probs, weights=weights, where=where))


def _smoothing(name: str, value: Any, dtype: Any) -> jax.Array | None:
    """The label smoothing; None where it is known to be 0."""
    smoothing = number(name, "label_smoothing", value, dtype, 0, 1, "from 0 to 1", "0.1")
    return None if known(value) == 0 else smoothing


def _class_weights(name: str, value: Any, logits: jax.Array) -> jax.Array:
    """The weights of the classes, with as many axes as the logits."""
    by_class = as_array(name, "class_weights", value)
    if by_class.shape != logits.shape[-1:]:
        raise ValueError(
            f"{name} expected class_weights [{logits.shape[-1]}], one for each class, received "
            f"{tree.describe(by_class)} with logits {tree.describe(logits)}."
        )
    return factors(name, "class_weights", value, logits)


def _ignored(name: str, value: Any, labels: jax.Array, given: Any) -> tuple[jax.Array, np.ndarray[Any, Any] | None]:
    """Which labels are to be ignored, traced and on the host."""
    array: Any = np.asarray(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not (tree.is_array(array) and array.shape == () and jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name} expected ignore_index to be an integer, received {tree.describe(value)}. Write -100.")
    index, host = known(array), known(given)
    if index is None:
        return labels == array.astype(labels.dtype), None
    limits = np.iinfo(labels.dtype)
    fits = limits.min <= int(index) <= limits.max  # unsigned integers are never -100
    out = labels == np.asarray(index, labels.dtype) if fits else jnp.zeros(labels.shape, bool)
    return out, None if host is None else host == index
