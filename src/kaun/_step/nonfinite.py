"""Steps that are not finite: the values of ``on_nonfinite``, what is checked, and the exception."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun import tree
from kaun.errors import NonFiniteLoss

__all__ = ["MODES", "both_finite", "check_mode", "match_state", "nonfinite_error", "squares_of"]

T = TypeVar("T")

MODES = ("raise", "skip", "ignore")
NAMED = 5  # parameters, in the message


def check_mode(mode: Any) -> None:
    """Check the argument ``on_nonfinite``.

    Raises:
        ValueError: If it is not one of the modes.
    """
    if mode not in MODES:
        raise ValueError(f"Trainer(on_nonfinite=...) expected {', '.join(map(repr, MODES))}, received {mode!r}.")


def squares_of(gradient: Any, loss_dtype: Any) -> jax.Array:
    """Return the sum of squares of each leaf of a gradient, a vector of float32 (float64 where a leaf or the loss is).

    The square root of its sum is the gradient's norm. A gradient counts as finite if its norm is: in float32 that is
    below 1.8e19.
    """
    leaves = jax.tree_util.tree_leaves(gradient)
    widest = jnp.float64 if jnp.float64 in (loss_dtype, *[leaf.dtype for leaf in leaves]) else jnp.float32
    # A sum over all axes and not a dot of vectors, which would first transpose a transposed product.
    return jnp.stack([jnp.sum(jnp.square(leaf.astype(widest))) for leaf in leaves])


def both_finite(value: jax.Array, norm: jax.Array) -> jax.Array:
    """Return whether a loss and the norm of its gradient are finite.

    By their sum, which costs a tiny step one operation less. A norm is at most the square root of the largest number,
    so added to a loss near that number it changes the sum by less than rounding does.
    """
    wide = max(value.dtype, norm.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    return jnp.isfinite(value.astype(wide) + norm.astype(wide))


def match_state(before: T, after: T) -> T:
    """Return the state after a step with the structure, shapes and dtypes of the state before it.

    Raises:
        TypeError: If they differ in more than weak types.
    """
    changed = tree.difference(before, after)
    if changed or jax.tree_util.tree_structure(before) != jax.tree_util.tree_structure(after):
        listed = "\n  ".join(changed[:10]) or f"{jax.tree_util.tree_structure(after)}"
        raise TypeError(
            "A step must return a state with the structure, shapes and dtypes of the state it was given, but the "
            f"model's or the optimizer's state changed (expected is before, found after the step):\n  {listed}\n"
            "Keep the dtype in apply or update with new.astype(old.dtype)."
        )
    strong = lambda new, old: lax.convert_element_type(new, old.dtype) if tree.is_weak(new) else new
    return jax.tree_util.tree_map(strong, after, before)


def nonfinite_error(
    params: Any, step: int, loss: float, squares: Any, refused: ValueError | None = None
) -> NonFiniteLoss:
    """Return the exception for a step that is not finite.

    Args:
        params: The structure of the parameters that train.
        step: The number of the step in its fit.
        loss: Its loss.
        squares: As ``squares_of`` returned them for its gradient.
        refused: What ``refused_values`` returned for it.
    """
    paths = list(tree.flatten(params.unflatten(range(params.num_leaves)))[0])
    nonfinite = tuple(path for path, square in zip(paths, squares, strict=True) if not np.isfinite(square))
    more = f" and {len(nonfinite) - NAMED} more" if len(nonfinite) > NAMED else ""
    listed = ", ".join(map(repr, nonfinite[:NAMED])) + more
    counted = f"{len(nonfinite)} of {len(paths)} parameters"
    where = f"the gradient is not finite for {listed} ({counted})" if nonfinite else "the gradient is finite"
    advice = (
        "Try a smaller learning rate, or optax.chain(optax.clip_by_global_norm(1.0), optimizer); look at that item's "
        "input and labels."
    )
    if refused is not None:
        advice = f"Run outside of the compiled step, it is refused: {refused}"
    text = (
        f"The loss is {loss:g} at step {step}; {where}. The state before that step is this exception's kaun_state. "
        f"{advice} For the operation, its line, its layer and the rows of the batch, write\n"
        "    print(kaun.explain(trainer, err))\n"
        'To discard such steps and continue, write Trainer(..., on_nonfinite="skip").'
    )
    return NonFiniteLoss(text, step, loss, nonfinite)
