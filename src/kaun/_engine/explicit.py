"""Arrays on a mesh of explicit axes, the default of ``jax.make_mesh``: steps run on the same mesh with automatic axes.

The type of an array on explicit axes contains its placement, and JAX refuses each operation that leaves the placement
of its result open: a contraction of a sharded axis, a gather. Layers, optimizers and losses are written for automatic
axes. Under ``jax.set_mesh`` nothing is changed: there users write for explicit axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kaun._jax import any_traced, is_traced
from kaun.sharding.core import automatic_mesh

__all__ = ["explicit_mesh", "explicit_sharding", "run_explicit", "to_automatic", "to_explicit"]


def explicit_mesh(arrays: Sequence[Any]) -> Any:
    """Return the mesh of explicit axes on which one of some arrays lies, None without one or under ``jax.set_mesh``.

    In a function that JAX traces it is an abstract mesh.
    """
    try:  # Asked for each array of each step, so the usual case is decided here.
        for array in arrays:
            if type(array.sharding) is NamedSharding:
                break
        else:
            return None
    except AttributeError:  # of a traced array, among others
        pass
    found = (sharding.mesh for sharding in map(explicit_sharding, arrays) if sharding is not None)
    return next(found, None)


def explicit_sharding(array: Any) -> NamedSharding | None:
    """Return the sharding of an array where that is on explicit axes, None elsewhere and under ``jax.set_mesh``."""
    sharding = jax.typeof(array).sharding if is_traced(array) else getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return sharding if jax.sharding.get_abstract_mesh().empty else None


def to_automatic(arrays: Sequence[Any]) -> list[Any]:
    """Return arrays, those on explicit axes on the same mesh with automatic axes; they share their memory."""
    shardings = [None if is_traced(array) else explicit_sharding(array) for array in arrays]
    return [
        array if sharding is None else _put(array, _automatic(sharding))
        for array, sharding in zip(arrays, shardings, strict=True)
    ]


def to_explicit(arrays: Sequence[Any], shardings: Sequence[NamedSharding | None], mesh: Mesh) -> list[Any]:
    """Return arrays that a program computed, placed as those that it was given.

    Args:
        arrays: The arrays.
        shardings: For each array the sharding on explicit axes that it had before, None if it had none.
        mesh: The mesh of explicit axes on which a part of the program's arguments lay.
    """
    return [
        _put(array, sharding) if sharding is not None else _back(array, mesh)
        for array, sharding in zip(arrays, shardings, strict=True)
    ]


def run_explicit(run: Callable[..., Any], carry: Any, key: Any, inputs: Any, mesh: Any) -> tuple[jax.Array, Any]:
    """Return what ``run(carry, key, inputs)`` returns, run on automatic axes.

    Args:
        run: Returns the loss and the carry after a step.
        carry: The carry before it.
        key: The run's key.
        inputs: The ``StepInputs`` of the step.
        mesh: The mesh of explicit axes.

    Returns:
        Loss and carry on explicit axes, each leaf placed as it was before.
    """
    leaves, structure = jax.tree_util.tree_flatten(carry)
    shardings = [explicit_sharding(leaf) for leaf in leaves]

    def run_leaves(leaves: list[Any], key: Any, given: list[Any]) -> tuple[Any, list[Any]]:
        loss, carry = run(jax.tree_util.tree_unflatten(structure, leaves), key, inputs.with_leaves(given))
        return loss, jax.tree_util.tree_leaves(carry)

    if any_traced((*leaves, key, *inputs.leaves)):
        everywhere = NamedSharding(mesh, PartitionSpec())
        placed = (everywhere, [sharding or everywhere for sharding in shardings])
        automatic: Any = jax.sharding.auto_axes(run_leaves, out_sharding=placed)
        loss, leaves = automatic(leaves, key, inputs.leaves)
    else:
        (key,) = to_automatic([key])
        loss, leaves = run_leaves(to_automatic(leaves), key, inputs.leaves)
        loss, *leaves = to_explicit([loss, *leaves], [None, *shardings], mesh)
    return loss, jax.tree_util.tree_unflatten(structure, leaves)


def _back(array: Any, mesh: Mesh) -> Any:
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh != automatic_mesh(mesh):
        return array
    return _put(array, NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind))


def _put(array: Any, sharding: NamedSharding) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding, weak_type=array.weak_type)
    return jax.device_put(array, sharding)


def _automatic(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(automatic_mesh(sharding.mesh), sharding.spec, memory_kind=sharding.memory_kind)
