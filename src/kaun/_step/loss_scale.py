"""Loss scaling for float16, whose smallest gradients would round to zero (Micikevicius et al., 2018).

The loss is multiplied by a scale ahead of the gradient, and the gradient divided by it afterwards. The scale finds
itself: a step whose gradient overflows halves it and changes nothing else; 2000 good steps in a row double it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kaun._step import nonfinite
from kaun._step.precision import Policy
from kaun.layers.arguments import accumulation_dtype

__all__ = [
    "FIRST",
    "GROWTH",
    "LossScale",
    "add_loss_scale",
    "inner_state",
    "scale_numbers",
    "scaled_value_and_grad",
    "watch_overflow",
]

FIRST, LEAST, MOST = 2.0**15, 1.0, 2.0**24
GROWTH = 2000


class LossScale(NamedTuple):
    """The optimizer's state, with the scale of the loss beside it.

    scale: float32 scalar, a power of two from 1 to 2**24.
    good: int32 scalar, steps since the scale was last changed.
    inner: the optimizer's own state.
    """

    scale: jax.Array
    good: jax.Array
    inner_state: Any


def add_loss_scale(policy: Policy | None, opt_state: Any) -> Any:
    """A fresh optimizer state as a trainer with this precision keeps it."""
    scaled = policy is not None and policy.scaled
    return LossScale(jnp.float32(FIRST), jnp.int32(0), opt_state) if scaled else opt_state


def inner_state(policy: Policy | None, opt_state: Any) -> Any:
    """The optimizer's own state.

    Raises:
        ValueError: when the state has a loss scale and should not, or the other way round.
    """
    scaled = policy is not None and policy.scaled
    if scaled != isinstance(opt_state, LossScale):
        has, wants = ("a", "does not scale") if isinstance(opt_state, LossScale) else ("no", "scales")
        raise ValueError(
            f"The state has {has} loss scale, and this trainer {wants} its loss: it is of a trainer with another "
            "precision. Write state = trainer.make_state(state.vars)."
        )
    return opt_state.inner if scaled else opt_state


def scaled_value_and_grad(opt_state: Any, objective: Callable[[Any], Any], params: Any) -> Any:
    """``jax.value_and_grad`` with auxiliary output, through the scaled loss where there is a scale."""
    if not isinstance(opt_state, LossScale):
        return jax.value_and_grad(objective, has_aux=True)(params)
    scale = opt_state.scale

    def scaled(params: Any) -> Any:
        value, aux = objective(params)
        return value.astype(jnp.float32) * scale, (value, aux)

    (_, (value, aux)), gradient = jax.value_and_grad(scaled, has_aux=True)(params)
    unscaled = lambda g: (g.astype(accumulation_dtype(g.dtype)) / scale.astype(accumulation_dtype(g.dtype))).astype(
        g.dtype
    )
    return (value, aux), jax.tree_util.tree_map(unscaled, gradient)


def watch_overflow(
    opt_state: Any, value: jax.Array, gradient: Any, update: Callable[[], tuple[Any, Any]], vars: Any
) -> tuple[Any, Callable[[], tuple[Any, Any]], Any]:
    """The gradient for ``kaun.guard`` and the update, where an overflow halves the scale and is no fault.

    Arguments:
        update: gives variables and the optimizer's own state after the update.
        vars: the variables before it.

    Gives also whether the gradient overflowed, None where nothing is scaled. Of a loss that is not finite, or a
    gradient that is not at scale 1, the scale is not the reason.
    """
    if not isinstance(opt_state, LossScale):
        return gradient, update, None
    scale, good, before = opt_state
    finite = jnp.isfinite(jnp.sqrt(nonfinite.squares_of(gradient).sum()))
    lost = jnp.isfinite(value) & ~finite & (scale > LEAST)

    def step() -> Any:
        after, state = nonfinite.match_state((vars, before), update())
        full = good + 1 >= GROWTH
        return after, LossScale(
            jnp.where(full, jnp.minimum(scale * 2, MOST), scale), jnp.where(full, 0, good + 1), state
        )  # fmt: skip

    skip = lambda: (vars, LossScale(scale / 2, jnp.zeros_like(good), before))
    zeroed = jax.tree_util.tree_map(lambda g: jnp.where(lost, jnp.zeros_like(g), g), gradient)
    return zeroed, lambda: lax.cond(lost, skip, step), lost


def scale_numbers(numbers: dict[str, jax.Array], lost: Any) -> dict[str, jax.Array]:
    """The numbers of a step as reports get them: one that overflowed is skipped, and has a gradient of norm 0."""
    if lost is None:
        return numbers
    good = numbers["good"] if "good" in numbers else jnp.float32(1)
    return numbers | {"good": jnp.where(lost, 0.0, good)}
