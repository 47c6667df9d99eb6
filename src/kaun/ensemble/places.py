"""Members of an ensemble on many devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kaun.sharding import Sharding, put
from kaun.sharding.rules import ByMember
from kaun.state import TrainState

__all__ = ["check_members", "place_states", "with_member_items"]


def check_members(sharding: Any, trainer: Any, n: int) -> None:
    """Check the argument ``sharding`` of an ensemble.

    Raises:
        TypeError: If it is not made by ``sharding.members``.
        ValueError: If the devices do not divide the members, or the trainer itself has a sharding.
    """
    if trainer.sharding is not None:
        raise ValueError(
            "An Ensemble cannot use Trainer(sharding=...), which spreads one model over devices. Spread the members: "
            f"kaun.Ensemble(trainer, {n}, sharding=sharding.members()), with a trainer without sharding."
        )
    if sharding is None:
        return
    if not isinstance(sharding, Sharding) or not isinstance(sharding.rule, ByMember):
        raise TypeError(
            f"Ensemble(sharding=...) expected what sharding.members() returns, received {sharding!r}. Write "
            f"kaun.Ensemble(trainer, {n}, sharding=sharding.members())."
        )
    count = sharding.mesh.shape[sharding.rule.axis]
    if n % count:
        raise ValueError(
            f"Ensemble(sharding=sharding.members()) expected a multiple of {count} members, one for each device on the "
            f"mesh axis {sharding.rule.axis!r}, received {n}. Write Ensemble(trainer, {-(-n // count) * count}, ...)."
        )


def place_states(sharding: Sharding | None, states: TrainState) -> TrainState:
    """Return states whose members lie on their devices."""
    if sharding is None:
        return states
    placed = jax.tree_util.tree_map(put, states, sharding.of(states))
    return placed.replace(key=put(states.key, sharding.replicated))  # as each step takes it


def with_member_items(sharding: Sharding) -> Sharding:
    """Return a sharding in which axis 0 of the arrays of an item, that of the members, is spread too."""
    assert isinstance(sharding.rule, ByMember)
    return dataclasses.replace(sharding, rows=(sharding.rule.axis,))
