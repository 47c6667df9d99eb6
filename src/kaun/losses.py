"""Losses: scalar means over the elements or rows of a batch, computed by optax, with shapes and dtypes checked.

Shapes must be equal: nothing broadcasts. Dtypes must be equal: nothing is cast, and the loss has the same dtype.
There are two exceptions, both exact: NumPy arrays are canonicalized as JAX does (float64 becomes float32 without x64),
and labels that are zeros and ones may be bool or integer arrays.

A half-precision model with float32 targets therefore gets an error that offers both conversions. Usually the right one
is ``mse(predictions.astype(jnp.float32), targets)``: the targets stay exact, squares do not overflow float16, and the
reported loss is float32. The gradient reaches the model in the model's dtype.

Class indices, and integer labels that must be 0 or 1, are checked where their values are known: in an eager call, also
under ``jax.grad``. In compiled code they are not known. There the loss is NaN when an index is out of range (an index
is never wrapped or clamped), and the gradient is that of the other rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from kaun import tree

__all__ = ["binary_cross_entropy", "cross_entropy", "cross_entropy_sparse", "huber", "mae", "mse"]

Array = jax.Array | np.ndarray[Any, Any] | np.generic


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
        ValueError: If the shapes differ, there are no elements, or an integer label (of known value) is neither 0 nor
            1.

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
        ValueError: If the shapes differ, there are no elements, or an integer label (of known value) is neither 0 nor
            1.

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


# The checks. kaun.metrics uses those without an underscore.


def as_array(where: str, name: str, value: Any) -> jax.Array:
    """The argument as a JAX array; anything but an array of JAX or NumPy is refused."""
    if isinstance(value, jax.Array):
        return value
    if not tree.is_array(value):
        raise TypeError(
            f"{where} expected an array for {name}, received {type(value).__name__}. Write jnp.asarray({name})."
        )
    # A copy, because on a CPU JAX reads the memory of a NumPy array after this call has returned.
    return jnp.asarray(tree.snapshot(value))


def floats(where: str, name: str, value: Any) -> jax.Array:
    """A model's output as a JAX array, checked: real, floating, not empty."""
    x = as_array(where, name, value)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        fix = f"{name}.real or jnp.abs({name})" if jnp.iscomplexobj(x) else f"{name}.astype(jnp.float32)"
        raise TypeError(f"{where} expected floating {name}, received {tree.describe(x)}. Write {fix}.")
    not_empty(where, name, x)
    return x


def not_empty(where: str, name: str, x: jax.Array) -> None:
    """Refuse an array without elements."""
    if x.size == 0:
        raise ValueError(
            f"{where} expected at least one element, received {name} {tree.describe(x)}: the mean of no "
            "elements is NaN. Leave empty batches out."
        )


def equal_shapes(where: str, left: str, a: jax.Array, right: str, b: jax.Array) -> None:
    """Refuse two arrays of different shapes."""
    if a.shape == b.shape:
        return
    if _equal_but_ones(a.shape, b.shape):
        fix = f"Write {right}.reshape({left}.shape)"
    elif _broadcasts(b.shape, a.shape):
        fix = f"If {right} should be repeated, write jnp.broadcast_to({right}, {left}.shape)"
    else:
        fix = f"Make {right}.shape equal {left}.shape"
    raise ValueError(
        f"{where} expected equal shapes, received {left} {tree.describe(a)} and {right} {tree.describe(b)}: nothing "
        f"broadcasts. {fix}."
    )


def index_shape(where: str, left: str, scores: jax.Array, right: str, indices: jax.Array) -> None:
    """Refuse indices whose shape is not that of the scores without the last axis."""
    if scores.ndim and indices.shape == scores.shape[:-1]:
        return
    if scores.ndim and indices.shape == scores.shape:
        fix = (
            f"If {right} are one-hot, write {right}.argmax(axis=-1). If each element has one yes-or-no score, use "
            "losses.binary_cross_entropy or metrics.binary_accuracy"
        )
    elif scores.ndim and _equal_but_ones(indices.shape, scores.shape[:-1]):
        fix = f"Write {right}.reshape({left}.shape[:-1])"
    else:
        fix = f"Make {right}.shape equal {left}.shape[:-1]"
    raise ValueError(
        f"{where} expected {left} [..., classes] and {right} [...], received {left} {tree.describe(scores)} and "
        f"{right} {tree.describe(indices)}. {fix}."
    )


def class_indices(where: str, name: str, value: Any, classes: int) -> tuple[jax.Array, jax.Array]:
    """Check class indices, where their values are known.

    Returns:
        The indices as int32 with 0 in place of those out of range, and a mask of those in range.

    Raises:
        TypeError: If they are not integers.
        ValueError: If one is out of range and the values are known.
    """
    indices = as_array(where, name, value)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            f"{where} expected integer class indices for {name}, received {tree.describe(indices)}. "
            f"Write {name}.astype(jnp.int32)."
        )
    # The value as it was passed, not as JAX has it: canonicalized to int32, 2**32 + 1 would be the valid index 1.
    host = known(value)
    if host is not None:
        host = host.astype(np.int64) if host.dtype.itemsize < 8 else host
        fix = (
            "To leave rows out, index both arrays with a mask first, or weight the rows of "
            "optax.losses.softmax_cross_entropy_with_integer_labels"
        )
        _none_outside(where, name, host, (host >= 0) & (host < classes), f"0 to {classes - 1}", fix)
    if indices.dtype.itemsize < 4:
        indices = indices.astype(jnp.int32)  # an int8 cannot be compared with 1,000 classes
    valid = (indices >= 0) & (indices < classes)
    return jnp.where(valid, indices, 0).astype(jnp.int32), valid


def zeros_and_ones(where: str, name: str, value: Any) -> tuple[jax.Array, jax.Array]:
    """Check labels of any dtype that must be 0 or 1, where their values are known.

    Returns:
        The labels as bools, and a mask of those that were 0 or 1.

    Raises:
        ValueError: If one is neither and the values are known.
    """
    labels = as_array(where, name, value)
    if labels.dtype == jnp.bool_:
        return labels, jnp.ones_like(labels)
    host = known(value)
    if host is not None:
        hard = jnp.issubdtype(labels.dtype, jnp.integer)
        fix = f"Write {name} > 0 if another number means 1" if hard else f"Write {name} > 0.5 for hard labels"
        _none_outside(where, name, host, (host == 0) | (host == 1), "0 and 1", fix)
    return labels == 1, (labels == 0) | (labels == 1)


def known(value: Any) -> np.ndarray[Any, Any] | None:
    """The values on the host; None if they are not known yet (traced) or lie in other processes."""
    if isinstance(value, Tracer) or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        return None
    return np.asarray(value)


def _none_outside(where: str, name: str, host: Any, inside: Any, allowed: str, fix: str) -> None:
    if inside.all():
        return
    outside = np.argwhere(~inside)
    position = f"[{', '.join(map(str, outside[0]))}]" if host.ndim else ""
    raise ValueError(
        f"{where} expected {name} in {allowed}, received {name}{position} = {host[tuple(outside[0])]} "
        f"({len(outside)} of {host.size} are outside). {fix}."
    )


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
        f"{where} expected equal dtypes, received {a_name} {tree.describe(a)} and {b_name} {tree.describe(b)}: nothing "
        f"is cast. {fix}."
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


def _equal_but_ones(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return [n for n in a if n != 1] == [n for n in b if n != 1]


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False
