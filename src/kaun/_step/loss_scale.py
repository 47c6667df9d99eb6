"""Loss scaling for float16, whose smallest gradients would round to zero (Micikevicius et al., 2018).

The loss is multiplied by a scale before it is differentiated, and the gradient divided by the scale. The scale adapts:
a step whose gradient overflows halves it and changes nothing else; 2000 steps in a row without an overflow double it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kaun._step import nonfinite
from kaun._step.precision import Policy
from kaun.layers.arguments import accumulation_dtype

__all__ = ["FIRST", "GROWTH", "LossScale", "add_loss_scale", "after_overflow", "inner_state", "scale_loss", "unscale"]

FIRST, LEAST, MOST = 2.0**15, 1.0, 2.0**24
GROWTH = 2000


class LossScale(NamedTuple):
    """The optimizer's state with the scale of the loss. Checkpoints hold these names.

    Attributes:
        scale: A float32 scalar, a power of two from 1 to 2**24.
        good: An int32 scalar, the steps since the scale was last changed.
        inner: The optimizer's own state.
    """

    scale: jax.Array
    good: jax.Array
    inner: Any


def add_loss_scale(policy: Policy | None, opt_state: Any) -> Any:
    """Return a fresh optimizer state as a trainer with this precision keeps it."""
    scaled = policy is not None and policy.scaled
    return LossScale(jnp.float32(FIRST), jnp.int32(0), opt_state) if scaled else opt_state


def inner_state(policy: Policy | None, opt_state: Any) -> Any:
    """Return the optimizer's own state.

    Raises:
        ValueError: If the state has a loss scale and should not, or should have one and does not.
    """
    scaled = policy is not None and policy.scaled
    if scaled != isinstance(opt_state, LossScale):
        has, wants = ("a", "does not scale") if isinstance(opt_state, LossScale) else ("no", "scales")
        raise ValueError(
            f"The state has {has} loss scale, and this trainer {wants} its loss: the state is of a trainer with "
            "another precision. Write state = trainer.make_state(state.vars)."
        )
    return opt_state.inner if scaled else opt_state


def scale_loss(opt_state: LossScale, value: jax.Array) -> jax.Array:
    """Return the loss times the scale, in float32."""
    return value.astype(jnp.float32) * opt_state.scale


def unscale(opt_state: LossScale, gradient: Any) -> Any:
    """Return the gradient of the loss, given that of the scaled loss."""

    def divide(g: jax.Array) -> jax.Array:
        wide = accumulation_dtype(g.dtype)
        return (g.astype(wide) / opt_state.scale.astype(wide)).astype(g.dtype)

    return jax.tree_util.tree_map(divide, gradient)


def after_overflow(
    opt_state: LossScale, value: jax.Array, squares: jax.Array, before: tuple[Any, Any], after: tuple[Any, Any]
) -> tuple[Any, LossScale, jax.Array, jax.Array, dict[str, jax.Array]]:
    """Discard the update where the gradient overflowed, and adapt the scale.

    The scale is the reason for a gradient that is not finite if the loss is finite and the scale is above 1.

    Args:
        opt_state: The optimizer's state before the step.
        value: The loss.
        squares: As ``nonfinite.squares_of`` returned them.
        before: Variables and the optimizer's own state before the update.
        after: The same after it.

    Returns:
        Variables and optimizer state after the step; whether the step is finite, which an overflow is; the squares,
        zero for an overflow; and the numbers ``grad_norm`` and ``finite``, both 0 for an overflow.
    """
    norm = jnp.sqrt(squares.sum())
    overflowed = jnp.isfinite(value) & ~jnp.isfinite(norm) & (opt_state.scale > LEAST)
    after = nonfinite.match_state(before, after)
    vars, inner = jax.tree_util.tree_map(lambda old, new: jnp.where(overflowed, old, new), before, after)
    full = opt_state.good + 1 >= GROWTH
    grown = jnp.where(full, jnp.minimum(opt_state.scale * 2, MOST), opt_state.scale)
    scale = jnp.where(overflowed, opt_state.scale / 2, grown)
    good = jnp.where(overflowed | full, 0, opt_state.good + 1)
    squares = jnp.where(overflowed, 0, squares)
    norm = jnp.where(overflowed, 0, norm).astype(jnp.float32)
    finite = nonfinite.both_finite(value, norm)
    numbers = {"grad_norm": norm, "finite": (finite & ~overflowed).astype(jnp.float32)}
    return vars, LossScale(scale, good, inner), finite, squares, numbers
