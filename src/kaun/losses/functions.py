"""The losses; the rules for shapes and dtypes are in the docstring of the package."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kaun import tree
from kaun.losses.checks import (
    Array,
    as_array,
    class_indices,
    distributions,
    equal_shapes,
    floats,
    index_shape,
    known,
    probabilities,
    zeros_and_ones,
)

__all__ = ["binary_cross_entropy", "cross_entropy", "cross_entropy_sparse", "huber", "mae", "mse"]


def cross_entropy(logits: Array, one_hot: Array) -> jax.Array:
    """The mean over rows of the softmax cross entropy, with a distribution over the classes for each row.

    It is the mean of ``optax.losses.safe_softmax_cross_entropy``.

    Args:
        logits: Float ``[..., classes]``, unnormalized log probabilities. A class may be masked out with ``-inf`` where
            its label is 0.
        one_hot: Of the logits' shape. In the logits' dtype: any distribution over the classes (smoothed labels, a
            teacher's probabilities). As bool or integers: zeros and ones.

    Returns:
        A scalar of the logits' dtype.

    Raises:
        TypeError: If an argument is not an array, the logits are not floating, or the labels have another floating
            dtype.
        ValueError: If the shapes differ, there are no elements, or, of known value, an integer label is neither 0 nor 1
            or a row is negative somewhere or does not sum to 1 (within 0.01).

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> print(f"{losses.cross_entropy(logits, jnp.array([[1, 0, 0], [0, 1, 0]])):.4f}")
        0.2395
    """
    where = "cross_entropy"
    logits = floats(where, "logits", logits)
    labels = as_array(where, "one_hot", one_hot)
    if logits.ndim == 0 or labels.shape == logits.shape[:-1]:
        raise ValueError(
            f"{where} expected logits [..., classes] and one_hot of the same shape, received logits "
            f"{tree.describe(logits)} and one_hot {tree.describe(labels)}. For class indices write "
            "losses.cross_entropy_sparse(logits, indices)."
        )
    equal_shapes(where, "logits", logits, "one_hot", labels)
    labels, valid = _binary_or_float(where, ("logits", logits), ("one_hot", labels), one_hot)
    distributions(where, "one_hot", one_hot)
    rows = optax.losses.safe_softmax_cross_entropy(logits, labels)
    return jnp.where(valid.all(axis=-1), rows, jnp.nan).mean()


def cross_entropy_sparse(logits: Array, indices: Array) -> jax.Array:
    """The mean over rows of the softmax cross entropy, with a class index for each row.

    It is the mean of ``optax.losses.softmax_cross_entropy_with_integer_labels``. An index out of range is an error
    where the values are known; in compiled code it makes the loss NaN.

    Args:
        logits: Float ``[..., classes]``, unnormalized log probabilities.
        indices: Integers ``[...]`` of any width, from 0 to classes - 1. No index (-1, -100) means "ignore".

    Returns:
        A scalar of the logits' dtype.

    Raises:
        TypeError: If an argument is not an array, the logits are not floating, or the indices are not integers.
        ValueError: If ``indices.shape != logits.shape[:-1]``, there are no elements, or an index (of known value) is
            out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
        >>> print(f"{losses.cross_entropy_sparse(logits, jnp.array([0, 1])):.4f}")
        0.2395
    """
    where = "cross_entropy_sparse"
    logits = floats(where, "logits", logits)
    index_shape(where, "logits", logits, "indices", as_array(where, "indices", indices))
    safe, valid = class_indices(where, "indices", indices, logits.shape[-1])
    rows = optax.losses.softmax_cross_entropy_with_integer_labels(logits, safe)
    return jnp.where(valid, rows, jnp.nan).mean()


def binary_cross_entropy(logits: Array, labels: Array) -> jax.Array:
    """The mean over elements of the sigmoid cross entropy.

    It is the mean of ``optax.losses.sigmoid_binary_cross_entropy``.

    Args:
        logits: Float ``[...]``, the log odds of label 1 (before the sigmoid).
        labels: Of the logits' shape. In the logits' dtype: probabilities of label 1. As bool or integers: zeros and
            ones.

    Returns:
        A scalar of the logits' dtype.

    Raises:
        TypeError: If an argument is not an array, the logits are not floating, or the labels have another floating
            dtype.
        ValueError: If the shapes differ, there are no elements, or, of known value, an integer label is neither 0 nor 1
            or a float one outside of 0 to 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> print(f"{losses.binary_cross_entropy(jnp.array([2.0, -2.0]), jnp.array([True, False])):.4f}")
        0.1269
    """
    where = "binary_cross_entropy"
    logits = floats(where, "logits", logits)
    given = as_array(where, "labels", labels)
    equal_shapes(where, "logits", logits, "labels", given)
    given, valid = _binary_or_float(where, ("logits", logits), ("labels", given), labels)
    probabilities(where, "labels", labels)
    elements = optax.losses.sigmoid_binary_cross_entropy(logits, given)
    return jnp.where(valid, elements, jnp.nan).mean()


def mse(predictions: Array, targets: Array) -> jax.Array:
    """The mean squared error over elements.

    It is the mean of ``optax.losses.squared_error``, without a factor 1/2.

    Args:
        predictions: Float ``[...]``.
        targets: Of the same shape and dtype.

    Returns:
        A scalar of the same dtype.

    Raises:
        TypeError: If an argument is not a floating array, or the dtypes differ.
        ValueError: If the shapes differ, or there are no elements.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> losses.mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
        Array(2., dtype=float32)
    """
    return optax.losses.squared_error(*_floats_alike("mse", predictions, targets)).mean()


def mae(predictions: Array, targets: Array) -> jax.Array:
    """The mean absolute error over elements; its gradient is 0 where the error is 0.

    Args:
        predictions: Float ``[...]``.
        targets: Of the same shape and dtype.

    Returns:
        A scalar of the same dtype.

    Raises:
        TypeError: If an argument is not a floating array, or the dtypes differ.
        ValueError: If the shapes differ, or there are no elements.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> losses.mae(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
        Array(1., dtype=float32)
    """
    predictions, targets = _floats_alike("mae", predictions, targets)
    errors = predictions - targets
    # Not jnp.abs, whose derivative at 0 is 1: it would move predictions that are already right.
    return (errors * jnp.sign(errors)).mean()


def huber(predictions: Array, targets: Array, delta: float | Array = 1.0) -> jax.Array:
    """The mean Huber loss over elements: quadratic near the target, linear beyond ``delta``.

    An error ``e`` costs ``e**2 / 2`` up to ``delta`` and ``delta * (|e| - delta / 2)`` beyond (Huber, "Robust
    Estimation of a Location Parameter", 1964). It is the mean of ``optax.losses.huber_loss``.

    Args:
        predictions: Float ``[...]``.
        targets: Of the same shape and dtype.
        delta: The error at which the loss becomes linear, a positive number in the unit of the targets. Default: 1. A
            traced ``delta`` cannot be checked; the loss is NaN if it is not positive.

    Returns:
        A scalar of the predictions' dtype.

    Raises:
        TypeError: If an argument is not a floating array, the dtypes differ, or ``delta`` is not a number.
        ValueError: If the shapes differ, there are no elements, or ``delta`` is not positive and finite in that dtype.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> losses.huber(jnp.array([1.0, 2.0]), jnp.array([1.5, 4.0]))
        Array(0.8125, dtype=float32)
    """
    predictions, targets = _floats_alike("huber", predictions, targets)
    delta = _delta(delta, predictions.dtype)
    loss = optax.losses.huber_loss(predictions, targets, delta=delta).mean()
    return jnp.where(delta > 0, loss, jnp.nan)


def _floats_alike(where: str, predictions: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
    predictions, targets = floats(where, "predictions", predictions), as_array(where, "targets", targets)
    equal_shapes(where, "predictions", predictions, "targets", targets)
    _equal_dtypes(where, ("predictions", predictions), ("targets", targets))
    return predictions, targets


def _equal_dtypes(where: str, left: tuple[str, jax.Array], right: tuple[str, jax.Array]) -> None:
    (a_name, a), (b_name, b) = left, right
    if a.dtype == b.dtype:
        return
    fix = f"Write {b_name}.astype({a_name}.dtype)"
    if jnp.issubdtype(b.dtype, jnp.floating):
        fix = (
            f"To compute in {b.dtype} write {a_name}.astype(jnp.{b.dtype}), to compute in {a.dtype} write "
            f"{b_name}.astype(jnp.{a.dtype})"
        )
    raise TypeError(
        f"{where} expected equal dtypes, received {a_name} {tree.describe(a)} and {b_name} {tree.describe(b)}: they "
        f"are not converted. {fix}."
    )


def _binary_or_float(
    where: str, left: tuple[str, jax.Array], right: tuple[str, jax.Array], given: Any
) -> tuple[jax.Array, jax.Array]:
    """The labels in the logits' dtype (bools and integers as 0 and 1), and a mask of those that are valid."""
    labels = right[1]
    if labels.dtype == jnp.bool_ or jnp.issubdtype(labels.dtype, jnp.integer):
        ones, valid = zeros_and_ones(where, right[0], given)
        return ones.astype(left[1].dtype), valid
    _equal_dtypes(where, left, right)
    return labels, jnp.ones(labels.shape, bool)


def _delta(value: Any, dtype: Any) -> jax.Array:
    scalar = tree.is_array(value) and value.shape == () and _real(value.dtype)
    if not (scalar or isinstance(value, (int, float))) or isinstance(value, bool):
        raise TypeError(f"huber expected delta to be a real number, received {tree.describe(value)}. Write delta=1.0.")
    host, limits = known(value), jnp.finfo(dtype)
    # In that dtype: 1e-9 is zero in float16, and the loss would be zero too.
    if host is not None and not float(limits.tiny) <= float(host) <= float(limits.max):
        raise ValueError(
            f"huber expected a delta that is positive and finite in {dtype}, received {float(host)}. Write delta=1.0."
        )
    return jnp.asarray(value).astype(dtype)


def _real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
