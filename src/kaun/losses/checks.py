"""Checks of the arrays that losses and metrics receive: kinds, shapes, dtypes, and values where they are known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._jax import is_traced

__all__ = [
    "Array", "as_array", "class_indices", "distributions", "equal_but_ones", "equal_dtypes", "equal_shapes", "factors",
    "floats", "floats_alike", "index_shape", "inside", "known", "not_empty", "not_negative", "number",
    "positive_number", "probabilities", "trailing", "zeros_and_ones", "zeros_and_ones_or_floats",
]  # fmt: skip

Array = jax.Array | np.ndarray[Any, Any] | np.generic
Kept = np.ndarray[Any, Any] | None
"""Which values count, on the host, in a shape that broadcasts to theirs; None if it is not known."""
ALL = np.asarray(True)


def as_array(where: str, name: str, value: Any) -> jax.Array:
    """The argument as a JAX array; anything but an array of JAX or NumPy is refused."""
    if isinstance(value, jax.Array):
        return value
    if not tree.is_array(value):
        made = f"[{name}[i] for i in range(len({name}))]" if isinstance(value, dict) else name
        raise TypeError(
            f"{where} expected an array for {name}, received {type(value).__name__}. Write jnp.asarray({made})."
        )
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{where} expected {name} without a mask, received a masked {tree.describe(value)}: masked elements would "
            f"count. Leave them out: keep = ~np.ma.getmaskarray({name}), then index both arrays with keep."
        )
    if value.dtype.kind in "OSU":
        raise TypeError(
            f"{where} expected numbers for {name}, received {tree.describe(value)}. For class indices of other values "
            f"write classes, {name} = np.unique({name}, return_inverse=True)."
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
            "elements is NaN. Skip empty batches."
        )


def equal_shapes(where: str, left: str, a: jax.Array, right: str, b: jax.Array) -> None:
    """Refuse two arrays of different shapes."""
    if a.shape == b.shape:
        return
    if equal_but_ones(a.shape, b.shape):
        fix = f"Write {right}.reshape({left}.shape)"
    elif _broadcasts(b.shape, a.shape):
        fix = f"If {right} should be repeated, write jnp.broadcast_to({right}, {left}.shape)"
    else:
        fix = f"Make {right}.shape equal {left}.shape"
    raise ValueError(
        f"{where} expected equal shapes, received {left} {tree.describe(a)} and {right} {tree.describe(b)}: they "
        f"are not broadcast. {fix}."
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
    elif scores.ndim and equal_but_ones(indices.shape, scores.shape[:-1]):
        fix = f"Write {right}.reshape({left}.shape[:-1])"
    else:
        fix = f"Make {right}.shape equal {left}.shape[:-1]"
    raise ValueError(
        f"{where} expected {left} [..., classes] and {right} [...], received {left} {tree.describe(scores)} and "
        f"{right} {tree.describe(indices)}. {fix}."
    )


def class_indices(
    where: str, name: str, value: Any, classes: int, kept: Kept = ALL, fix: str = ""
) -> tuple[jax.Array, jax.Array]:
    """Check class indices, where their values are known.

    Args:
        where: The function, for messages.
        name: The argument, for messages.
        value: The indices.
        classes: How many classes there are.
        kept: Which of the indices count; None if it is not known. Default: all.
        fix: What to write where one is out of range.

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
        fix = fix or "To exclude rows, index both arrays with a mask first"
        inside(where, name, host, (host >= 0) & (host < classes), f"0 to {classes - 1}", fix, kept)
    if indices.dtype.itemsize < 4:
        indices = indices.astype(jnp.int32)  # an int8 cannot be compared with 1,000 classes
    valid = (indices >= 0) & (indices < classes)
    return jnp.where(valid, indices, 0).astype(jnp.int32), valid


def zeros_and_ones(where: str, name: str, value: Any, kept: Kept = ALL) -> tuple[jax.Array, jax.Array]:
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
        inside(where, name, host, (host == 0) | (host == 1), "0 and 1", fix, kept)
    return labels == 1, (labels == 0) | (labels == 1)


def zeros_and_ones_or_floats(
    where: str, left: tuple[str, jax.Array], right: tuple[str, jax.Array], given: Any, kept: Kept
) -> tuple[jax.Array, jax.Array]:
    """The labels in the logits' dtype (bools and integers as 0 and 1), and a mask of those that are valid."""
    labels = right[1]
    if labels.dtype == jnp.bool_ or jnp.issubdtype(labels.dtype, jnp.integer):
        ones, valid = zeros_and_ones(where, right[0], given, kept)
        return ones.astype(left[1].dtype), valid
    equal_dtypes(where, left, right)
    return labels, jnp.ones(labels.shape, bool)


def probabilities(where: str, name: str, value: Any, kept: Kept = ALL) -> None:
    """Refuse numbers outside of 0 to 1, where they are known."""
    host = known(value)
    if host is not None:
        fix = f"Write {name} / {name}.max() for grey values, or {name} > 0 if another number means 1"
        inside(where, name, host, (host >= 0) & (host <= 1), "0 to 1", fix, kept)


def distributions(where: str, name: str, value: Any, kept: Kept = ALL, fix: str = "", within: float = 0.01) -> None:
    """Refuse rows that are not distributions over the last axis, where they are known.

    A sum may differ from 1 by a hundredth, or by ``within``: rounded numbers, and half precision.
    """
    host = known(value)
    if host is None or kept is None:
        return
    first = fix or "For several classes at once in a row use losses.binary_cross_entropy"
    inside(where, name, host, host >= 0, "0 to 1", first, kept)
    sums = host.astype(np.float64).sum(axis=-1)
    fix = fix or f"{first}; leave rows without a class out; or write {name} / {name}.sum(axis=-1, keepdims=True)"
    inside(where, f"{name}.sum(axis=-1)", sums, abs(sums - 1) <= within, "1", fix, kept.reshape(kept.shape[:-1]))


def number(
    where: str, name: str, value: Any, dtype: Any, least: float, most: float, allowed: str, fix: str
) -> jax.Array:
    """A real number of a loss in the dtype of the outputs; one that is traced is NaN where it is out of range.

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it is known, and not from ``least`` to ``most``.
    """
    if not tree.is_real_scalar(value) or isinstance(value, bool) or getattr(value, "dtype", None) == jnp.bool_:
        raise TypeError(
            f"{where} expected {name} to be a real number, received {tree.describe(value)}. Write {name}={fix}."
        )
    host = known(value)
    if host is not None:
        if not least <= float(host) <= most:
            raise ValueError(
                f"{where} expected a {name} that is {allowed}, received {float(host)}. Write {name}={fix}."
            )
        return jnp.asarray(value).astype(dtype)
    given = jnp.asarray(value).astype(dtype)
    return jnp.where((given >= least) & (given <= most), given, jnp.nan)


def positive_number(where: str, name: str, value: Any, dtype: Any, fix: str) -> jax.Array:
    """A number of a loss as ``number``, positive in the dtype of the outputs: 1e-9 is zero in float16."""
    limits = jnp.finfo(dtype)
    allowed = f"positive and finite in {dtype}"
    return number(where, name, value, dtype, float(limits.tiny), float(limits.max), allowed, fix)


def factors(where: str, name: str, value: Any, outputs: jax.Array) -> jax.Array:
    """Factors for the last axis of a model's outputs in their dtype and rank; NaN where one is traced and negative.

    Raises:
        TypeError: If they are not real.
        ValueError: If one is known, and negative or not finite.
    """
    if not tree.is_real(value):
        raise TypeError(f"{where} expected real numbers for {name}, received {tree.describe(value)}.")
    host = known(value)
    if host is not None:
        not_negative(where, name, host, f"Give {name} of at least 0")
    given = jnp.asarray(value).astype(outputs.dtype)
    given = given.reshape((1,) * (outputs.ndim - 1) + given.shape) if given.ndim else given
    return jnp.where(given >= 0, given, jnp.nan)


def floats_alike(where: str, left: str, a: Any, right: str, b: Any) -> tuple[jax.Array, jax.Array]:
    """Two floating arrays of one shape and dtype."""
    x, y = floats(where, left, a), as_array(where, right, b)
    equal_shapes(where, left, x, right, y)
    equal_dtypes(where, (left, x), (right, y))
    return x, y


def equal_dtypes(where: str, left: tuple[str, jax.Array], right: tuple[str, jax.Array]) -> None:
    """Refuse two arrays of different dtypes."""
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


def known(value: Any) -> np.ndarray[Any, Any] | None:
    """The values on the host; None if they are not known yet (traced) or lie in other processes."""
    if is_traced(value) or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        return None
    return np.asarray(value)


def inside(where: str, name: str, host: Any, right: Any, allowed: str, fix: str, kept: Kept = ALL) -> None:
    """Refuse values on the host that are not right and count."""
    _refuse(where, name, host, right, f"in {allowed}", "outside", fix, kept)


def not_negative(where: str, name: str, host: Any, fix: str, kept: Kept = ALL) -> None:
    """Refuse numbers on the host that are negative or not finite, and count."""
    right = (host >= 0) & np.isfinite(host.astype(np.float64))
    _refuse(where, name, host, right, "to be finite and not negative", "not", fix, kept)


def trailing(array: Any, ndim: int) -> Any:
    """An array with axes of length 1 after its own, up to that many."""
    return array.reshape((*array.shape, *[1] * (ndim - array.ndim)))


def _refuse(where: str, name: str, host: Any, right: Any, expected: str, verdict: str, fix: str, kept: Kept) -> None:
    if kept is None or (right := right | ~kept).all():
        return
    wrong = np.argwhere(~right)
    position = f"[{', '.join(map(str, wrong[0]))}]" if host.ndim else ""
    raise ValueError(
        f"{where} expected {name} {expected}, received {name}{position} = {host[tuple(wrong[0])]} "
        f"({len(wrong)} of {host.size} are {verdict}). {fix}."
    )


def equal_but_ones(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes are the same without their axes of length 1."""
    return [n for n in a if n != 1] == [n for n in b if n != 1]


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False
