"""Numbers that go wrong: whether a step's loss and gradient are finite, and what becomes of the step where not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from kaun import tree
from kaun.errors import NonFiniteLoss

__all__ = ["MODES", "as_before", "failure", "guarded", "no_fault", "norm_of"]

T = TypeVar("T")

MODES = ("raise", "skip", "ignore")
NAMED = 10  # parameters, in the error


def norm_of(gradient: Any) -> jax.Array:
    """The square root of the sum of squares of a tree's numbers, float32 (float64 where one is)."""
    squares = [_square(leaf) for leaf in jax.tree_util.tree_leaves(gradient)]
    widest = jnp.result_type(jnp.float32, *[s.dtype for s in squares])
    return jnp.sqrt(sum((s.astype(widest) for s in squares), jnp.zeros((), widest)))


@functools.cache
def no_fault() -> jax.Array:
    """The fault where nothing has gone wrong.

    An int32 vector: 0, or 1 and the number of parameters whose gradient was not finite; and the positions of the first
    of these, -1 where there are no more.
    """
    with jax.ensure_compile_time_eval():  # a step may be part of a function that the user compiles
        return jnp.zeros(1 + NAMED, jnp.int32)


def guarded(
    mode: str, value: jax.Array, gradient: Any, update: Callable[[], T], before: T, fault: jax.Array
) -> tuple[T, dict[str, jax.Array], jax.Array]:
    """The state after a step, which stays as it was where the step's loss or gradient is not finite.

    Arguments:
        mode: ``"raise"``: nor does any later step change it; ``"skip"``: that step alone; ``"ignore"``: update anyway.
        value: the loss.
        update: gives the state after the update.
        before: the state before it.
        fault: as ``no_fault`` or an earlier call gave it.

    Gives that state; ``grad_norm`` and, unless ignored, ``good`` (1 where the step was an update); and the fault.
    """
    norm = norm_of(gradient)
    numbers = {"grad_norm": norm.astype(jnp.float32)}
    if mode == "ignore":
        return update(), numbers, fault
    leaves = jax.tree_util.tree_leaves(gradient)
    # The norm of finite numbers may overflow: only then is each of them looked at.
    finite = lax.cond(jnp.isfinite(norm), lambda: jnp.array(True), lambda: jnp.stack(_finite(leaves)).all())
    good = jnp.isfinite(value) & finite
    if mode == "raise":
        good = good & (fault[0] == 0)

    def keep() -> tuple[T, jax.Array]:
        if mode == "skip":
            return before, fault
        wrong = ~jnp.stack(_finite(leaves))
        first = jnp.flatnonzero(wrong, size=NAMED, fill_value=-1)
        found = jnp.concatenate([1 + jnp.count_nonzero(wrong, keepdims=True), first]).astype(jnp.int32)
        return before, jnp.where(fault[0] == 0, found, fault)

    after, fault = lax.cond(good, lambda: (as_before(before, update()), fault), keep)
    return after, {**numbers, "good": good.astype(jnp.float32)}, fault


def as_before(before: T, after: T) -> T:
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


def _square(leaf: Any) -> jax.Array:
    flat = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)).reshape(-1)
    return jnp.vdot(flat, flat)


def _finite(leaves: Sequence[Any]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def failure(params: Any, step: int, loss: float, fault: Any) -> NonFiniteLoss:
    """The exception for a step that went wrong.

    Arguments:
        params: the structure of the tree whose gradient it was.
        fault: as ``guarded`` gave it, on the host.
    """
    paths = list(tree.flatten(params.unflatten(range(params.num_leaves)))[0])
    named = tuple(paths[i] for i in fault[1:] if i >= 0)
    count = int(fault[0]) - 1
    more = f" and {count - len(named)} more" if count > len(named) else ""
    listed = ", ".join(map(repr, named)) + more
    where = f"not finite is the gradient of {listed} ({count} of {len(paths)})" if count else "all gradients are finite"
    text = (
        f"The loss is {loss:g} at step {step}, {where}. The state before that step is this exception's kaun_state. "
        "Try a smaller learning rate, or optax.chain(optax.clip_by_global_norm(1.0), optimizer); look at that item's "
        "input and labels; find the operation:\n    with jax.debug_nans(True): "
        "trainer.step(err.kaun_state, x, loss=loss)\n"
        'To leave such steps out write Trainer(..., on_nonfinite="skip").'
    )
    return NonFiniteLoss(text, step, loss, named)
