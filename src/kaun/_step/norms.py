"""Norms by layer: of gradient and weights, and how far an update moves the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kaun import tree

__all__ = ["layer_norms"]


def layer_norms(
    before: Any,
    updated: Callable[[], Any],
    checks: jax.Array,
    step: jax.Array,
    kept: jax.Array,
    numbers: Mapping[str, int],
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Return the numbers ``"layer_norms"`` of a step, three scalars for each layer that trains, and ``kept``.

    The layer ``"0"`` has ``grad_norm/0``, ``weight_norm/0`` (of the weights before the update) and ``update_ratio/0``:
    the norm of the update over that of the weights, 0 for a discarded step. With ``accumulate`` the caller makes it nan
    at an item without update.

    The weights are read in the branch of a condition, which XLA compiles apart from the rest: it fuses an update
    together with what else uses it, and the bits of the parameters must not depend on whether a report looks at them.

    Args:
        before: The parameters that train, before the update.
        updated: Returns them after it.
        checks: ``checks_of`` the gradient, whose norms are there already.
        step: The number of steps before this one.
        kept: Whether the step is not discarded.
        numbers: What is asked for: the numbers are computed after each n-th step of the state, with n the value of
            ``"layer_norms"``, and 0 elsewhere. Nothing is computed where that name is missing.

    Returns:
        The numbers by name; and ``kept``, now computed after them.
    """
    every = numbers.get("layer_norms")
    if every is None:
        return {}, kept
    dtype = checks.dtype
    layers = _layers(before)

    def squares(leaves: Sequence[Any]) -> jax.Array:
        summed = [jnp.square(leaf.astype(dtype)).sum() for leaf in leaves]
        return jnp.stack([sum(summed[i] for i in places) for places in layers.values()])

    def norms() -> tuple[jax.Array, jax.Array]:
        old, new = map(jax.tree_util.tree_leaves, (before, updated()))
        moved = [b.astype(dtype) - a.astype(dtype) for a, b in zip(old, new, strict=True)]
        return jnp.sqrt(squares(old)), jnp.sqrt(squares(moved))

    def nothing() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(len(layers), dtype), jnp.zeros(len(layers), dtype)

    # For n = 1 not a constant, for which XLA would replace the condition by its branch.
    weights, moved = lax.cond(step % every == every - 1 if every > 1 else step >= 0, norms, nothing)
    gradient = jnp.sqrt(jnp.stack([sum(checks[i] for i in places) for places in layers.values()]))
    ratio = jnp.where(kept, moved / weights, 0)
    columns = {"grad_norm": gradient, "weight_norm": weights, "update_ratio": ratio}
    named = {f"{name}/{layer}": column[i] for name, column in columns.items() for i, layer in enumerate(layers)}
    # A norm is never below 0. This puts the norms before the update, which may then overwrite what they read: without
    # it XLA copied parameters and optimizer state in each step.
    return named, kept & ~(weights < 0).any()


def _layers(params: Any) -> dict[str, list[int]]:
    """Return by the path of each layer which leaves are its own; an array at the root stands for itself."""
    found: dict[str, list[int]] = {}
    for i, path in enumerate(tree.flatten(params)[0]):
        found.setdefault(path.rpartition(".")[0] or path, []).append(i)
    return found
