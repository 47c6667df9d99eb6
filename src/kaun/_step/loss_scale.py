"""Loss scaling for float16, whose smallest gradients would round to zero (Micikevicius et al., 2018).

The loss is multiplied by a scale before it is differentiated, and the gradient divided by the scale. The scale adapts:
a step whose gradient overflows halves it and changes nothing else; 2000 steps in a row without an overflow double it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kaun import tree
from kaun._step.precision import Policy
from kaun._step.watch import gradient_finite
from kaun.layers.arguments import accumulation_dtype

__all__ = [
    "FIRST",
    "GROWTH",
    "LossScale",
    "adapt_scale",
    "add_loss_scale",
    "has_overflowed",
    "inner_state",
    "scale_loss",
    "unscale",
]

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

    def __repr__(self) -> str:
        return tree.short_repr(self)


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
            f"The state has {has} loss scale, but this trainer {wants} its loss: the state belongs to a trainer "
            "with another precision. Write state = trainer.make_state(state.vars)."
        )
    return opt_state.inner if scaled else opt_state


def scale_loss(opt_state: LossScale, value: jax.Array) -> jax.Array:
    """Return the loss times the scale, in float32 (float64 where the loss is)."""
    wide = accumulation_dtype(value.dtype)
    return value.astype(wide) * opt_state.scale.astype(wide)


def unscale(opt_state: LossScale, gradient: Any) -> Any:
    """Return the gradient of the loss, given that of the scaled loss."""

    def divide(g: jax.Array) -> jax.Array:
        wide = accumulation_dtype(g.dtype)
        return (g.astype(wide) / opt_state.scale.astype(wide)).astype(g.dtype)

    return jax.tree_util.tree_map(divide, gradient)


def has_overflowed(opt_state: LossScale, value: jax.Array, checks: jax.Array) -> jax.Array:
    """Return whether the scale is the reason for a gradient that is not finite: the loss is, and the scale is above 1.

    Args:
        opt_state: The optimizer's state before the step.
        value: The loss.
        checks: ``checks_of`` its gradient.
    """
    return jnp.isfinite(value) & ~gradient_finite(checks) & (opt_state.scale > LEAST)


def adapt_scale(before: LossScale, inner: Any, updated: jax.Array, overflowed: jax.Array) -> LossScale:
    """Return the optimizer's state after a step: an overflow halves the scale, and many updates in a row double it.

    Args:
        before: The state before the step.
        inner: The optimizer's own state after it.
        updated: Whether the step was an update.
        overflowed: As ``has_overflowed``.
    """
    full = updated & (before.good + 1 >= GROWTH)
    grown = jnp.where(full, jnp.minimum(before.scale * 2, MOST), before.scale)
    good = jnp.where(overflowed | full, 0, before.good + updated.astype(jnp.int32))
    return LossScale(jnp.where(overflowed, before.scale / 2, grown), good, inner)
