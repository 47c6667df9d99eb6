"""A batch in parts, to save memory: forward pass in parts, one loss of all outputs, backward pass in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun import rng, tree
from kaun._calls import shown
from kaun.context import Context
from kaun.sharding.core import Sharding, spread_rows

__all__ = ["batch_length", "check_count", "run_in_parts"]

_PARTS = 2**32 - 1  # folded into the step's key; no scope on that key counts so far


def check_count(name: str, count: Any) -> None:
    """Check the argument ``microbatches`` or ``accumulate``.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is below 1.
    """
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)):
        raise TypeError(f"Trainer({name}=...) expected an int of at least 1, received {shown(count)}. Write {name}=4.")
    if count < 1:
        raise ValueError(f"Trainer({name}=...) expected an int of at least 1, received {count}. Write {name}=4.")


def batch_length(x: Any) -> int | None:
    """Return the length of a batch: that of its first array along axis 0, None if it has no such array."""
    return next((a.shape[0] for a in jax.tree_util.tree_leaves(x) if np.ndim(a)), None)


def run_in_parts(
    count: int, forward: Callable[[Any, Context], tuple[Any, Any]], x: Any, ctx: Context, state: Any, key: jax.Array,
    sharding: Sharding | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Return what ``forward(x, ctx)`` does, output and layer state, computed in parts one after the other.

    Only the parts' inputs and outputs are kept for the gradient: each part runs again in the backward pass. Arrays of x
    and ctx that are as long as the batch are split; each part receives the others whole. Part i of n has the rows
    i, i + n, i + 2 n, ...; the first parts have a row more where n does not divide the batch. A batch of fewer rows
    than ``count`` has a part for each row.

    Args:
        count: The number of parts.
        forward: The forward pass.
        x: The input of the whole batch.
        ctx: The context of the whole batch.
        state: The layers' state before.
        key: The step's key; each part draws from its own key.
        sharding: The devices over which the rows of each part lie, None without one.

    Raises:
        ValueError: If x has no first axis, the outputs cannot be joined, or a layer's state would change.
    """
    length = 0 if count == 1 else _length(x, count)
    if not length:
        return forward(x, ctx)
    parts = min(count, length)
    leaves, structure = jax.tree_util.tree_flatten((x, ctx))
    split = [np.ndim(a) > 0 and a.shape[0] == length for a in leaves]
    key = jax.random.fold_in(key, _PARTS)

    def part(number: jax.Array, given: list[Any]) -> Any:
        cut = iter([spread_rows(sharding, a) for a in given])
        inner = structure.unflatten([next(cut) if one else a for a, one in zip(leaves, split, strict=True)])
        with rng.scope(jax.random.fold_in(key, number)):
            output, after = forward(*inner)
        _must_stay(state, after)
        _must_join(output, given[0].shape[0])
        return output

    def run(first: int, rows: Sequence[jax.Array]) -> Any:
        # Its gradient is a loop too, and the temporaries of a part live for one iteration. Nothing outside the loop
        # could share them, so they need no barrier against that.
        def nth(i: jax.Array) -> Any:
            return part(first + i, [lax.dynamic_index_in_dim(a, i, axis=1, keepdims=False) for a in rows])

        return lax.map(jax.checkpoint(nth, prevent_cse=False), jnp.arange(rows[0].shape[1]))

    groups = zip(*(_cut(a, parts) for a, one in zip(leaves, split, strict=True) if one), strict=True)
    firsts = (length % parts, 0) if length % parts else (0,)
    return jax.tree_util.tree_map(_joined, *map(run, firsts, groups)), state


def _cut(a: jax.Array, parts: int) -> list[jax.Array]:
    """Return the rows [row, part, ...] of all parts; or of the last parts, and of the first, which have a row more."""
    # A batch may be spread over devices in contiguous pieces. A part of contiguous rows would lie on a few of them, and
    # these would do all the work, or the batch would be gathered: 2.21e7 FLOPs a device instead of 9.0e6.
    size, longer = divmod(a.shape[0], parts)
    rows = a[: size * parts].reshape(size, parts, *a.shape[1:])
    return [rows[:, longer:], jnp.concatenate([rows[:, :longer], a[None, size * parts :]])] if longer else [rows]


def _joined(last: jax.Array, first: jax.Array | None = None) -> jax.Array:
    """Return the rows [part, row, ...] of the last parts and the first ones in the order of the batch."""
    size = last.shape[1]
    rows = last if first is None else jnp.concatenate([first[:, :size], last])
    rows = rows.swapaxes(0, 1).reshape(size * rows.shape[0], *rows.shape[2:])
    return rows if first is None else jnp.concatenate([rows, first[:, size]])


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
