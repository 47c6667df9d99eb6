"""A batch in parts, to save memory: forward pass in parts, one loss of all outputs, backward pass in parts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun import rng, tree
from kaun.context import Context

__all__ = ["batch_length", "check_count", "run_in_parts"]

_PARTS = 2**32 - 1  # folded into the step's key; no scope on that key counts so far


def check_count(name: str, count: Any) -> None:
    """Check the argument ``microbatches`` or ``accumulate``.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is below 1.
    """
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
        raise TypeError(f"Trainer({name}=...) expected an int of at least 1, received {count!r}. Write {name}=4.")
    if count < 1:
        raise ValueError(f"Trainer({name}=...) expected an int of at least 1, received {count}. Write {name}=4.")


def batch_length(x: Any) -> int | None:
    """Return the length of a batch: that of its first array along axis 0, None if it has no such array."""
    return next((a.shape[0] for a in jax.tree_util.tree_leaves(x) if np.ndim(a)), None)


def run_in_parts(
    count: int, forward: Callable[[Any, Context], tuple[Any, Any]], x: Any, ctx: Context, state: Any, key: jax.Array
) -> tuple[Any, Any]:
    """Return what ``forward(x, ctx)`` does, output and layer state, computed in parts one after the other.

    Only the parts' inputs and outputs are kept for the gradient: each part runs again in the backward pass. Arrays of x
    and ctx that are as long as the batch are split; each part receives the others whole. The parts have one length;
    where it does not divide the batch, the last one is shorter, and a short batch has fewer parts.

    Args:
        count: The number of parts.
        forward: The forward pass.
        x: The input of the whole batch.
        ctx: The context of the whole batch.
        state: The layers' state before.
        key: The step's key; each part draws from its own key.

    Raises:
        ValueError: If x has no first axis, the outputs cannot be joined, or a layer's state would change.
    """
    length = 0 if count == 1 else _length(x, count)
    if not length:
        return forward(x, ctx)
    size = -(-length // count)
    whole, left = divmod(length, size)
    leaves, structure = jax.tree_util.tree_flatten((x, ctx))
    split = [np.ndim(a) > 0 and a.shape[0] == length for a in leaves]
    rows = [a for a, cut in zip(leaves, split, strict=True) if cut]
    key = jax.random.fold_in(key, _PARTS)

    def part(given: tuple[Any, list[Any]], size: int = size) -> Any:
        number, cut = given[0], iter(given[1])
        inner = structure.unflatten([next(cut) if one else a for a, one in zip(leaves, split, strict=True)])
        with rng.scope(jax.random.fold_in(key, number)):
            output, after = forward(*inner)
        _must_stay(state, after)
        _must_join(output, size)
        return output

    # Its gradient is a loop too, and the temporaries of a part live for one iteration. Nothing outside the loop could
    # share them, so they need no barrier against that.
    equal = [a[: whole * size].reshape(whole, size, *a.shape[1:]) for a in rows]
    joined = lax.map(jax.checkpoint(part, prevent_cse=False), (jnp.arange(whole), equal))
    joined = jax.tree_util.tree_map(lambda a: a.reshape(whole * size, *a.shape[2:]), joined)
    if left:
        last = jax.checkpoint(functools.partial(part, size=left))((whole, [a[whole * size :] for a in rows]))
        joined = jax.tree_util.tree_map(lambda *parts: jnp.concatenate(parts), joined, last)
    return joined, state


def _length(x: Any, count: int) -> int:
    length = batch_length(x)
    if length is None:
        raise ValueError(
            f"Trainer(microbatches={count}) splits x along its first axis, but x has none: "
            f"{', '.join(map(tree.describe, jax.tree_util.tree_leaves(x))) or 'no arrays'}. Leave microbatches out."
        )
    return length


def _must_stay(before: Any, after: Any) -> None:
    old, new = tree.flatten(before)[0], tree.flatten(after)[0]
    moved = [path for path, leaf in new.items() if old.get(path) is not leaf]
    if moved:
        raise ValueError(
            "Trainer(microbatches=...) computes the batch in parts, but the model's state "
            f"{', '.join(map(repr, moved[:5]))} changes in training: statistics of a part are not those of the batch. "
            "Use layers.group_norm or layers.layer_norm instead of layers.batch_norm, freeze that layer with "
            "Trainer(trainable=...), or step with training=False."
        )


def _must_join(output: Any, length: int) -> None:
    for path, leaf in tree.flatten(output)[0].items():
        if not leaf.shape or leaf.shape[0] != length:
            at = f" at {path!r}" if path else ""
            raise ValueError(
                f"Trainer(microbatches=...) joins the outputs of its parts along the first axis, but the output{at} of "
                f"a part of {length} is {tree.describe(leaf)}. Return one row for each of x, and reduce in the loss."
            )
