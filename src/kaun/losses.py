"""Losses: scalar means over all elements or rows of a batch, on optax's losses, with shapes and dtypes checked.

One rule for shapes and one for dtypes. Shapes must be equal: nothing broadcasts. Dtypes must be equal: nothing is cast,
and the loss has that dtype too. Two exceptions, both exact: NumPy arrays are canonicalized as JAX does (float64 becomes
float32 without x64), and labels that are zeros and ones may be bool or integer arrays.

A half-precision model with float32 targets therefore gets an error that offers both ways. Usually wanted is
``mse(predictions.astype(jnp.float32), targets)``: the targets stay exact, squares do not overflow float16, and the loss
that is reported is float32. The gradient still reaches the model in its own dtype.

Class indices, and integer labels that must be 0 or 1, are checked where their values are known: an eager call, also
under ``jax.grad``. In compiled code they are not known; there the loss is NaN when one is out of range (never that of a
wrapped or clamped index), and the gradient is that of the other rows.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kaun import tree
from kaun._jax import is_traced

__all__ = ["binary_cross_entropy", "cross_entropy", "cross_entropy_sparse", "huber", "mae", "mse"]

Array = jax.Array | np.ndarray[Any, Any] | np.generic


def cross_entropy(logits: Array, one_hot: Array) -> jax.Array:
    """The mean over rows of the softmax cross entropy against a distribution per row, a scalar.

    Arguments:
        logits: float [..., classes], unnormalized log probabilities. A class may be masked out with ``-inf`` where its
            label is 0.
        one_hot: of the logits' shape; in their dtype any distribution over the classes (smoothed labels, a teacher's
            probabilities), as bool or integers zeros and ones.

    The result has the logits' dtype. It is ``optax.losses.safe_softmax_cross_entropy`` averaged.

    Raises:
        TypeError: not arrays, logits not floating, labels of another floating dtype.
        ValueError: shapes differ, nothing to average, an integer label (of known value) that is neither 0 nor 1.

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
    """The mean over rows of the softmax cross entropy against a class index per row, a scalar.

    Arguments:
        logits: float [..., classes], unnormalized log probabilities.
        indices: integers [...] of any width, from 0 to classes - 1; no index (-1, -100) stands for "ignore".

    The result has the logits' dtype: ``optax.losses.softmax_cross_entropy_with_integer_labels`` averaged. An index out
    of range is an error where the values are known; in compiled code it makes the loss NaN.

    Raises:
        TypeError: not arrays, logits not floating, indices not integers.
        ValueError: ``indices.shape != logits.shape[:-1]``, nothing to average, an index (of known value) out of range.

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
    """The mean over elements of the sigmoid cross entropy, a scalar.

    Arguments:
        logits: float [...], the log odds of label 1 (no sigmoid applied).
        labels: of the logits' shape; in their dtype probabilities of label 1, as bool or integers zeros and ones.

    The result has the logits' dtype. It is ``optax.losses.sigmoid_binary_cross_entropy`` averaged.

    Raises:
        TypeError: not arrays, logits not floating, labels of another floating dtype.
        ValueError: shapes differ, nothing to average, an integer label (of known value) that is neither 0 nor 1.

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
    """The mean squared error over elements, a scalar.

    Arguments:
        predictions: float [...].
        targets: of the same shape and dtype.

    The result has their dtype. It is ``optax.losses.squared_error`` averaged (no factor 1/2).

    Raises:
        TypeError: not arrays, not floating, dtypes differ.
        ValueError: shapes differ, nothing to average.

    >>> import jax.numpy as jnp
    >>> from kaun import losses
    >>> losses.mse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
    Array(2., dtype=float32)
    """
    return optax.losses.squared_error(*_floats_alike("mse", predictions, targets)).mean()


def mae(predictions: Array, targets: Array) -> jax.Array:
    """The mean absolute error over elements, a scalar; its gradient where the error is 0 is 0.

    Arguments:
        predictions: float [...].
        targets: of the same shape and dtype.

    The result has their dtype.

    Raises:
        TypeError: not arrays, not floating, dtypes differ.
        ValueError: shapes differ, nothing to average.

    >>> import jax.numpy as jnp
    >>> from kaun import losses
    >>> losses.mae(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
    Array(1., dtype=float32)
    """
    predictions, targets = _floats_alike("mae", predictions, targets)
    errors = predictions - targets
    # Not jnp.abs, whose derivative at 0 is 1: it would push what is already right.
    return (errors * jnp.sign(errors)).mean()


def huber(predictions: Array, targets: Array, delta: float | Array = 1.0) -> jax.Array:
    """The mean Huber loss over elements, a scalar: squared near the target, linear beyond ``delta``.

    Arguments:
        predictions: float [...].
        targets: of the same shape and dtype.
        delta: where the one becomes the other, a positive number in the unit of the targets, default 1.

    An error e costs ``e**2 / 2`` up to delta and ``delta * (|e| - delta / 2)`` beyond (Huber, "Robust Estimation of a
    Location Parameter", 1964). The result has the predictions' dtype. It is ``optax.losses.huber_loss`` averaged. A
    delta that is traced cannot be checked; the loss is NaN where it is not positive.

    Raises:
        TypeError: not arrays, not floating, dtypes differ, delta not a number.
        ValueError: shapes differ, nothing to average, delta not positive and finite in that dtype.

    >>> import jax.numpy as jnp
    >>> from kaun import losses
    >>> losses.huber(jnp.array([1.0, 2.0]), jnp.array([1.5, 4.0]))
    Array(0.8125, dtype=float32)
    """
    predictions, targets = _floats_alike("huber", predictions, targets)
    delta = _delta(delta, predictions.dtype)
    loss = optax.losses.huber_loss(predictions, targets, delta=delta).mean()
    return jnp.where(delta > 0, loss, jnp.nan)


# Below, the checks. kaun.metrics shares those without an underscore.


def as_array(where: str, name: str, value: Any) -> jax.Array:
    """A JAX array from one of JAX or NumPy, an error for anything else."""
    if isinstance(value, jax.Array):
        return value
    if not tree.is_array(value):
        raise TypeError(
            f"{where} expected an array for {name}, received {type(value).__name__}. Write jnp.asarray({name})."
        )
    # A snapshot, for on a CPU JAX reads the NumPy memory itself, after this call has returned.
    return jnp.asarray(tree.snapshot(value))


def floats(where: str, name: str, value: Any) -> jax.Array:
    """The array of a model's real outputs, not empty."""
    x = as_array(where, name, value)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        fix = f"{name}.real or jnp.abs({name})" if jnp.iscomplexobj(x) else f"{name}.astype(jnp.float32)"
        raise TypeError(f"{where} expected floating {name}, received {tree.describe(x)}. Write {fix}.")
    not_empty(where, name, x)
    return x


def not_empty(where: str, name: str, x: jax.Array) -> None:
    """An error for an array without elements."""
    if x.size == 0:
        raise ValueError(
            f"{where} expected at least one element, received {name} {tree.describe(x)}: a mean over nothing is NaN. "
            "Leave empty batches out."
        )


def equal_shapes(where: str, left: str, a: jax.Array, right: str, b: jax.Array) -> None:
    """An error for two arrays of different shapes."""
    if a.shape == b.shape:
        return
    if _equal_but_ones(a.shape, b.shape):
        fix = f"Write {right}.reshape({left}.shape)"
    elif _broadcasts(b.shape, a.shape):
        fix = f"If it is meant to be repeated, write jnp.broadcast_to({right}, {left}.shape)"
    else:
        fix = f"Make {right}.shape equal {left}.shape"
    raise ValueError(
        f"{where} expected equal shapes, received {left} {tree.describe(a)} and {right} {tree.describe(b)}: nothing "
        f"broadcasts. {fix}."
    )


def index_shape(where: str, left: str, scores: jax.Array, right: str, indices: jax.Array) -> None:
    """An error when the indices do not have the shape of the scores without their last axis."""
    if scores.ndim and indices.shape == scores.shape[:-1]:
        return
    if scores.ndim and indices.shape == scores.shape:
        fix = (
            f"One-hot {right} become indices with {right}.argmax(axis=-1); for one yes-or-no score per element there "
            "are losses.binary_cross_entropy and metrics.binary_accuracy"
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
    """Class indices as int32 arrays that are safe to use, and where they were in range (0 stands where not).

    Raises:
        TypeError: not integers.
        ValueError: one out of range, where the values are known.
    """
    indices = as_array(where, name, value)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            f"{where} expected integer class indices for {name}, received {tree.describe(indices)}. "
            f"Write {name}.astype(jnp.int32)."
        )
    # The value as it came and not as JAX has it: canonicalized to int32, 2**32 + 1 would be a fine index.
    host = known(value)
    if host is not None:
        host = host.astype(np.int64) if host.dtype.itemsize < 8 else host
        fix = (
            "To leave rows out, index both arrays with a mask first, or weight "
            "optax.losses.softmax_cross_entropy_with_integer_labels yourself"
        )
        _none_outside(where, name, host, (host >= 0) & (host < classes), f"0 to {classes - 1}", fix)
    if indices.dtype.itemsize < 4:
        indices = indices.astype(jnp.int32)  # an int8 cannot even be compared with 1,000 classes
    valid = (indices >= 0) & (indices < classes)
    return jnp.where(valid, indices, 0).astype(jnp.int32), valid


def zeros_and_ones(where: str, name: str, value: Any) -> tuple[jax.Array, jax.Array]:
    """Labels that are 0 or 1, in any dtype, as bools, and where they were either.

    Raises:
        ValueError: one that is neither, where the values are known.
    """
    labels = as_array(where, name, value)
    if labels.dtype == jnp.bool_:
        return labels, jnp.ones_like(labels)
    host = known(value)
    if host is not None:
        hard = jnp.issubdtype(labels.dtype, jnp.integer)
        fix = f"Write {name} > 0 if another number stands for 1" if hard else f"Write {name} > 0.5 for hard labels"
        _none_outside(where, name, host, (host == 0) | (host == 1), "0 and 1", fix)
    return labels == 1, (labels == 0) | (labels == 1)


def known(value: Any) -> np.ndarray[Any, Any] | None:
    """The values on the host; None for those that are not known yet (traced) or not here (in other processes)."""
    if is_traced(value) or (isinstance(value, jax.Array) and not value.is_fully_addressable):
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
    """Labels in the logits' dtype and where they are valid: floats as they are, bools and integers as 0 and 1."""
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
    # In its own dtype: 1e-9 is zero in float16, and the loss with it.
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
