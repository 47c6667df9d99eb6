"""Items of an ensemble whose members each have their own: those of n pipelines, stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._loss import FrozenLoss, captures, snapshot_loss
from kaun.context import Context
from kaun.data import Data, Item, known_length, refuse_lost_rows

__all__ = ["are_pipelines", "check_pipelines", "stack", "stack_losses", "zipped"]


def are_pipelines(entry: str, data: Any, per_member: bool) -> bool:
    """Return whether data are a list of pipelines, one for each member.

    Raises:
        ValueError: If they are, and the members share their items.
    """
    found = isinstance(data, (list, tuple)) and any(isinstance(each, Data) for each in data)
    if found and not per_member:
        raise ValueError(f"{entry} received a list of pipelines, one for each member: write per_member=True.")
    return found


def check_pipelines(entry: str, pipelines: Sequence[Any], size: int) -> Sequence[Data[Any]]:
    """Return n pipelines, one for each member.

    Raises:
        TypeError: If one is not a ``Data``.
        ValueError: If there are not n, or their lengths differ.
    """
    other = [each for each in pipelines if not isinstance(each, Data)]
    if other:
        raise TypeError(
            f"{entry}(per_member=True) expected a list of a Data for each member, received one with "
            f"{tree.describe(other[0])}. Write [Data.from_iterable(a), ...]."
        )
    if len(pipelines) != size:
        raise ValueError(
            f"{entry}(per_member=True) expected a pipeline for each of {size} members, received {len(pipelines)}. Make "
            f"as many members as there are folds: many = kaun.Ensemble(trainer, {len(pipelines)})."
        )
    lengths = [known_length(each) for each in pipelines]
    if len(set(lengths)) > 1 and None not in lengths:
        raise ValueError(
            f"{entry}(per_member=True) expected pipelines of as many items each, received "
            f"{', '.join(map(str, lengths))}. Choose a batch_size that gives each as many, or take as many of each: "
            f"[each.take({min(n for n in lengths if n is not None)}) for each in pipelines]."
        )
    return pipelines


def zipped(entry: str, pipelines: Sequence[Any], size: int) -> Data[Any]:
    """Return the training items of n pipelines as one pipeline, stacked."""
    checked = check_pipelines(entry, pipelines, size)
    for each in checked:
        refuse_lost_rows(each)
    return Data.zip(*checked).map(_stacked)


def _stacked(items: tuple[Any, ...]) -> Any:
    """Return the items ``(x, loss)`` or ``(x, loss, ctx)`` of the members as one."""
    parsed = [Item.parse(item, 1) for item in items]
    x = stack([each[0] for each in parsed], "x")
    loss = stack_losses([each[1] for each in parsed])
    return (x, loss, stack([each[2] or Context() for each in parsed], "ctx"))


def stack_losses(losses: Sequence[Callable[..., Any]]) -> FrozenLoss:
    """Return losses, or metrics, of one kind as one, whose captured arrays have the members along axis 0.

    Raises:
        ValueError: If they differ in more than the values of what they capture.
    """
    frozen: list[Any] = [snapshot_loss(loss) for loss in losses]
    first = frozen[0]
    for i, each in enumerate(frozen):
        if each.key != first.key:
            a, b = (captures(one.key, one.arrays) for one in (first, each))
            differ = [f"{n} is {a.get(n)} and {b.get(n)}" for n in dict.fromkeys([*a, *b]) if a.get(n) != b.get(n)]
            raise ValueError(
                "With per_member=True the losses of the members must be one function, of which only captured arrays "
                f"differ; of member 0 and of member {i}, {'; '.join(differ[:5]) or 'the code differs'}. Capture "
                "numbers that differ as arrays, alpha = jnp.asarray(alpha)."
            )
    return first.with_arrays(stack([each.arrays for each in frozen], "captured by the loss"))


def stack(values: Sequence[Any], what: str) -> Any:
    """Return trees of arrays as one, with the members along a new axis 0.

    Args:
        values: The tree of each member.
        what: What they are, for messages.

    Raises:
        ValueError: If they differ in structure, shapes or dtypes.
    """
    first = values[0]
    for i, each in enumerate(values):
        structures = [jax.tree_util.tree_structure(one) for one in (first, each)]
        if structures[0] == structures[1] and _kinds(first) == _kinds(each):
            continue
        lines = tree.difference(first, each)[:5] or [f"{structures[0]} and {structures[1]}"]
        raise ValueError(
            f"With per_member=True the members' items must agree in shape; {what} of member 0 (expected) and of member "
            f"{i} (found) differ:\n  " + "\n  ".join(lines) + "\nWrite pad=True, Data.folds(arrays, k, batch_size, "
            "pad=True) or Data.batches(arrays, batch_size, pad=True), which fills a last batch that is shorter."
        )
    return jax.tree_util.tree_map(_stack, *values)


def _kinds(value: Any) -> list[Any]:
    return [(np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in jax.tree_util.tree_leaves(value)]


def _stack(*leaves: Any) -> Any:
    return (jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np).stack(leaves)
