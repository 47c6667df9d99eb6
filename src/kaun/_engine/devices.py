"""On which devices the arguments of a compiled step lie: for the log of compilations, and for errors and warnings."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from kaun import tree
from kaun._engine.inputs import StepInputs
from kaun._jax import primitives_in
from kaun._messages import warn

__all__ = ["divides", "item_of", "places_of", "refuse_different_devices", "warn_of_copies"]

_LISTED = 3
_CAPTURED = "captured "
_DIVIDES = frozenset(["sharding_constraint", "shard_map"])


def item_of(arguments: Sequence[Any], pattern: Sequence[bool]) -> list[Any]:
    """Return the arrays of the item in a program's arguments, in the order of ``StepInputs.leaves``.

    Args:
        arguments: The arguments; the last is the item, or the last two are its arrays that are passed once and stacked.
        pattern: For each array whether it is stacked, where a block of items is passed.
    """
    if len(arguments) < 5:
        return list(arguments[-1]) if len(arguments) > 2 else []
    once, stacked = map(iter, arguments[-2:])
    return [next(stacked if many else once) for many in pattern]


def places_of(inputs: StepInputs, leaves: Sequence[Any], item: Sequence[Any]) -> dict[str, str]:
    """Return where the state and each array of an item lie, in words."""
    counts = collections.Counter(map(tree.placement, leaves))
    listed = [f"{n} {'arrays' if n > 1 else 'array'} {place}" for place, n in sorted(counts.items())]
    state = ", ".join(listed if len(counts) > 1 else counts)
    return {"the state": state, **dict(zip(_names(inputs), map(tree.placement, item), strict=False))}


def refuse_different_devices(entry: str, inputs: StepInputs, leaves: Sequence[Any], item: Sequence[Any]) -> None:
    """Refuse a state and an item that were put on different devices. JAX does so too, and names ``rest[2]``.

    Raises:
        ValueError: If they were put on different devices.
    """
    placed = [i for i, leaf in enumerate(item) if _devices([leaf])]
    state = _devices(leaves) or _devices([item[i] for i in placed[:1]])
    elsewhere = [i for i in placed if _devices([item[i]]) != state]
    if not elsewhere:
        return
    places, names = places_of(inputs, leaves, item), _names(inputs)
    lying = "; ".join(f"{names[i]} is {places[names[i]]}" for i in elsewhere[:_LISTED])
    more = len(elsewhere) - _LISTED
    lying += f"; {more} more {'arrays are' if more > 1 else 'array is'} elsewhere too" if more > 0 else ""
    name = names[elsewhere[0]].removeprefix(_CAPTURED)
    name = name if name.isidentifier() else "x"
    fix = f"{name} = jax.device_put({name}, state.step.sharding)"
    if len(state) > 1:
        fix = f'{name} = jax.device_put({name}, NamedSharding(mesh, PartitionSpec("data")))'
    elif len(_devices([item[elsewhere[0]]])) > 1:
        fix = "state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))"
    raise ValueError(
        f"{entry.split()[0]} received arrays that were put on different devices: the state is {places['the state']}; "
        f"{lying}. Without sharding= kaun moves nothing. Write Trainer(..., sharding=sharding.data_parallel()), "
        f"which moves what comes to its devices, or put the array there: {fix}."
    ) from None


def divides(jaxpr: Any) -> bool:
    """Return whether a traced program itself divides its work between devices."""
    return not _DIVIDES.isdisjoint(primitives_in(jaxpr))


def warn_of_copies(entry: str, inputs: StepInputs, leaves: Sequence[Any], item: Sequence[Any]) -> bool:
    """Warn where every device does all the work of a program, and return whether it was done.

    That is so where all devices have the whole state, and no array of the item was put on them. An item that the user
    put on all devices is what the user asked for.

    Args:
        entry: ``"step"``, ``"fit"``, ``"predict"`` or ``"evaluate"``.
        inputs: The inputs of a program that does not divide its work itself.
        leaves: The state's arrays.
        item: The item's arrays.
    """
    placed = [leaf.sharding for leaf in leaves if getattr(leaf, "committed", False)]
    devices = max((sharding.num_devices for sharding in placed), default=1)
    if devices == 1 or not item or not all(sharding.is_fully_replicated for sharding in placed) or _devices(item):
        return False
    if not jax.sharding.get_abstract_mesh().empty:  # jax.set_mesh: the user's own code says where arrays lie
        return False
    name = _names(inputs)[0]
    warn(
        f"{entry}: each of {devices} devices has the whole state, and {name} was not put on them, so every device does "
        "all the work. Write Trainer(..., sharding=sharding.data_parallel()), which spreads the rows of a batch over "
        f"the devices. If all of them are to do the same, put {name} on all: jax.device_put(x, state.step.sharding)."
    )
    return True


def _names(inputs: StepInputs) -> list[str]:
    ends = ", captured by the loss"
    return [_CAPTURED + n.removesuffix(ends) if n.endswith(ends) else n for n in inputs.names()]


def _devices(arrays: Iterable[Any]) -> frozenset[Any]:
    """The devices on which arrays were put; none for arrays that may be moved to any."""
    found = (a.sharding.device_set for a in arrays if isinstance(a, jax.Array) and a.committed)
    return frozenset[Any]().union(*found)
