"""Losses of sequences; the rules that all share are in the docstring of the package."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kaun import tree
from kaun.losses.checks import Array, Kept, as_array, class_indices, floats, inside, known, zeros_and_ones
from kaun.losses.mean import Mean, scalar_like, with_parts
from kaun.losses.weighting import weighting

__all__ = ["ctc"]

_LOG_ZERO = -1e30  # optax's -1e5 is what a long sequence may really cost


def _ctc(
    logits: Array,
    logit_paddings: Array,
    labels: Array,
    label_paddings: Array,
    *,
    weights: Array | None = None,
    where: Array | None = None,
) -> Mean:
    name = "ctc"
    scores, given = floats(name, "logits", logits), as_array(name, "labels", labels)
    paddings = [
        as_array(name, argument, value)
        for argument, value in (("logit_paddings", logit_paddings), ("label_paddings", label_paddings))
    ]
    _check_shapes(name, scores, given, *paddings)
    counted = weighting(name, scores, scores.shape[:1], weights, where)
    kept = counted.kept(2)
    frames, valid_frames = zeros_and_ones(name, "logit_paddings", logit_paddings, kept)
    symbols, valid_symbols = zeros_and_ones(name, "label_paddings", label_paddings, kept)
    given, valid = class_indices(name, "labels", labels, scores.shape[-1], kept=None)
    possible = (~frames).sum(axis=1) >= (~symbols).sum(axis=1) + _repeats(given, symbols)
    _check_values(name, labels, label_paddings, scores.shape[-1], kept, known(possible))
    right = (((valid & (given > 0)) | symbols) & valid_symbols).all(axis=1) & valid_frames.all(axis=1)
    right &= (symbols[:, 1:] | ~symbols[:, :-1]).all(axis=1)
    # In half precision its sums would overflow.
    wide = jnp.where(frames[:, :, None], 0, counted.safe(scores)).astype(counted.dtype)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rows = optax.losses.ctc_loss(
            wide, frames.astype(wide.dtype), jnp.where(symbols, 0, given), symbols.astype(wide.dtype),
            log_epsilon=_LOG_ZERO,
        )  # fmt: skip
    return counted.mean(jnp.where(right, jnp.where(possible, rows, jnp.inf), jnp.nan))


@with_parts(_ctc)
def ctc(
    logits: Array,
    logit_paddings: Array,
    labels: Array,
    label_paddings: Array,
    *,
    weights: Array | None = None,
    where: Array | None = None,
) -> jax.Array:
    """The mean over rows of the connectionist temporal classification loss, with class 0 as the blank.

    It is the mean of ``optax.losses.ctc_loss``: minus the log probability that frames give a row's labels, if repeated
    classes and then blanks are removed (Graves et al., "Connectionist Temporal Classification", 2006). A row that has
    fewer frames than its labels need (one for each, and one more between two equal ones) is an error where the values
    are known; in compiled code it makes the loss infinite. PyTorch's ``reduction="mean"`` divides each row by the
    number of its labels; this does not.

    Args:
        logits: Float ``[batch, frames, classes]``, unnormalized log probabilities.
        logit_paddings: ``[batch, frames]`` of any dtype, zeros and ones: 1 for a frame that does not count.
        labels: Integers ``[batch, n]``, from 1 to classes - 1; any integer where padded.
        label_paddings: ``[batch, n]`` of any dtype: in each row zeros, then ones for what is no label.
        weights: ``[batch]``, the weight of each row.
        where: Bool ``[batch]``: which rows count.

    Returns:
        A scalar of the logits' dtype.

    Raises:
        TypeError: If an argument is not an array, the logits are not floating, the labels are not integers, or
            ``where`` is not bool.
        ValueError: If shapes do not fit, there are no elements, or, of known value, a label is out of range, a padding
            is neither 0 nor 1, labels are not padded at the end, a row has too few frames, a weight is negative or not
            finite, or no row counts.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> frames, n = jnp.zeros((1, 3)), jnp.zeros((1, 2))
        >>> print(f"{losses.ctc(jnp.zeros((1, 3, 4)), frames, jnp.array([[1, 2]]), n):.4f}")
        2.5494
    """
    return scalar_like(logits, _ctc(logits, logit_paddings, labels, label_paddings, weights=weights, where=where))


def _check_shapes(name: str, logits: jax.Array, labels: jax.Array, frames: jax.Array, symbols: jax.Array) -> None:
    fits = logits.ndim == 3 and labels.ndim == 2 and len(labels) == len(logits) and labels.shape[1] > 0
    if not (fits and frames.shape == logits.shape[:2] and symbols.shape == labels.shape):
        raise ValueError(
            f"{name} expected logits [batch, frames, classes], logit_paddings [batch, frames], labels [batch, n] and "
            f"label_paddings [batch, n] with n of at least 1, received logits {tree.describe(logits)}, logit_paddings "
            f"{tree.describe(frames)}, labels {tree.describe(labels)} and label_paddings {tree.describe(symbols)}."
        )


def _repeats(labels: jax.Array, paddings: jax.Array) -> jax.Array:
    """How many labels of each row equal the one before them: a blank has to come between."""
    return ((labels[:, 1:] == labels[:, :-1]) & ~paddings[:, 1:]).sum(axis=1)


def _check_values(name: str, labels: Any, paddings: Any, classes: int, kept: Kept, possible: Any) -> None:
    """Refuse labels that are wrong, as far as the values are known."""
    host, padded = known(labels), known(paddings)
    if kept is None or padded is None:
        return
    fix = "Pad the labels of each row at its end, jnp.arange(n) >= lengths[:, None]"
    ordered = np.ones(padded.shape, bool)
    ordered[:, 1:] = padded[:, 1:] >= padded[:, :-1]
    inside(name, "label_paddings", padded, ordered, "an order of zeros, then ones", fix, kept)
    if host is not None:
        right = (host > 0) & (host < classes)
        inside(name, "labels", host, right, f"1 to {classes - 1}", "0 is the blank", kept & (padded == 0))
    if possible is not None and not (fine := possible | ~kept.reshape(-1)).all():
        raise ValueError(
            f"{name} expected at least one frame for each label, and one more between two equal ones; row "
            f"{int(np.argmin(fine))} has too few. Use shorter labels or more frames, or leave the row out with where=."
        )
