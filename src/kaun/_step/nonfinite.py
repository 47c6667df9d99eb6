"""Numbers that go wrong: whether a step's loss and gradient are finite, and what becomes of the step where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun import tree
from kaun.errors import NonFiniteLoss

__all__ = ["MODES", "check_mode", "guard_update", "match_state", "nonfinite_error", "squares_of"]

T = TypeVar("T")

MODES = ("raise", "skip", "ignore")
NAMED = 5  # parameters, in the message


def check_mode(mode: Any) -> None:
    """Refuse what is no mode.

    Raises:
        ValueError: when it is none.
    """
    if mode not in MODES:
        raise ValueError(f"Trainer(on_nonfinite=...) expected {', '.join(map(repr, MODES))}, received {mode!r}.")


def squares_of(gradient: Any) -> jax.Array:
    """For each leaf of a gradient the sum of its numbers' squares, float32 (float64 where one is)."""
    leaves = jax.tree_util.tree_leaves(gradient)
    widest = jnp.float64 if any(leaf.dtype == jnp.float64 for leaf in leaves) else jnp.float32
    # A sum over all axes, and no dot of vectors: that would first bring a transposed product into order.
    return jnp.stack([jnp.sum(jnp.square(leaf.astype(widest))) for leaf in leaves])


def guard_update(
    mode: str, value: jax.Array, gradient: Any, update: Callable[[], T], before: T, fault: jax.Array | None
) -> tuple[T, dict[str, jax.Array], jax.Array | None]:
    """The state after a step, which stays as it was where the step's loss or gradient is not finite.

    A gradient counts as finite when its norm does: in float32 that is when it is below 1.8e19.

    Arguments:
        mode: ``"raise"``: nor does any later step change it; ``"skip"``: that step alone; ``"ignore"``: update anyway.
        value: the loss.
        update: gives the state after the update.
        before: the state before it.
        fault: whether a step before this one went wrong, a bool scalar. None, in mode ``"raise"``, where the state
            before a block of steps is kept, so that the block can be run again up to that step: update anyway.

    Gives that state; by name ``grad_norm``, for ``"skip"`` ``good`` (1 where the step was an update), and ``squares``,
    a vector with a sum for each leaf of the gradient; and whether a step has gone wrong, up to this one.
    """
    squares = squares_of(gradient)
    norm = jnp.sqrt(squares.sum())
    numbers = {"grad_norm": norm.astype(jnp.float32), "squares": squares}
    if mode == "ignore" or (mode == "raise" and fault is None):
        return update(), numbers, fault
    good = jnp.isfinite(value) & jnp.isfinite(norm)
    if fault is not None:
        good = good & ~fault
    else:
        numbers["good"] = good.astype(jnp.float32)
    after = lax.cond(good, lambda: match_state(before, update()), lambda: before)
    return after, numbers, None if fault is None else ~good


def match_state(before: T, after: T) -> T:
    """The state after a step in the structure, shapes and dtypes of the one before it.

    Raises:
        TypeError: where these are others.
    """
    changed = tree.difference(before, after)
    if changed or jax.tree_util.tree_structure(before) != jax.tree_util.tree_structure(after):
        listed = "\n  ".join(changed[:10]) or f"{jax.tree_util.tree_structure(after)}"
        raise TypeError(
            "A step must give back a state of the structure, shapes and dtypes that it was given, but the model's or "
            f"the optimizer's state changed (expected is before, found after the step):\n  {listed}\n"
            "Keep the dtype in apply or update with new.astype(old.dtype)."
        )
    strong = lambda new, old: lax.convert_element_type(new, old.dtype) if new.weak_type else new
    return jax.tree_util.tree_map(strong, after, before)


def nonfinite_error(params: Any, step: int, loss: float, squares: Any) -> NonFiniteLoss:
    """The exception for a step that went wrong.

    Arguments:
        params: the structure of the tree whose gradient it was.
        squares: as ``guarded`` gave them for that step.
    """
    paths = list(tree.flatten(params.unflatten(range(params.num_leaves)))[0])
    wrong = tuple(path for path, square in zip(paths, squares, strict=True) if not np.isfinite(square))
    more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    listed = ", ".join(map(repr, wrong[:NAMED])) + more
    bad = f"not finite is the gradient of {listed} ({len(wrong)} of {len(paths)})"
    where = bad if wrong else "its gradient is finite"
    text = (
        f"The loss is {loss:g} at step {step}, {where}. The state before that step is this exception's kaun_state. "
        "Try a smaller learning rate, or optax.chain(optax.clip_by_global_norm(1.0), optimizer); look at that item's "
        "input and labels; find the operation:\n    with jax.debug_nans(True): "
        "trainer.step(err.kaun_state, x, loss=loss)\n"
        'To leave such steps out write Trainer(..., on_nonfinite="skip").'
    )
    return NonFiniteLoss(text, step, loss, wrong)
