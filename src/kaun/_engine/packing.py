"""Small states as one vector for each dtype: calling a compiled step costs by the array, not by the byte."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from kaun._jax import is_traced
from kaun.sharding import put

__all__ = [
    "MemberPacking",
    "Packing",
    "all_finite",
    "bytes_of",
    "copy",
    "in_place",
    "on_one_device",
    "own_arrays",
    "pack_on_device",
    "packing_of",
    "packing_on_device",
    "put_with",
    "unpack",
]

# Above this the copies into and out of the vector cost more than the calls that they save.
_MOST_BYTES = 1 << 16
_FEWEST = 4
# How often a state is unpacked by the host before a program is compiled for it: that takes XLA:CPU 0.17 s for the 14
# arrays of xor (``bench.first``), and the host 0.1 ms more than the program each time.
_BY_HOST = 8
_SMALL = 1 << 20  # bytes of a state whose memory is not worth saving


class Packing:
    """The places of a state's leaves in vectors, one for each dtype. Packings of equal layouts are equal.

    Attributes:
        layout: For each leaf its dtype, its shape, and where it begins in the vector of that dtype.
        unpacked: How often the host has unpacked such a state.
    """

    __slots__ = ("_hash", "layout", "unpacked")

    def __init__(self, kinds: Sequence[tuple[tuple[int, ...], Any]]) -> None:
        ends: dict[Any, int] = {}
        layout: list[tuple[Any, tuple[int, ...], int]] = []
        for shape, dtype in kinds:
            start = ends.get(dtype, 0)
            layout.append((dtype, shape, start))
            ends[dtype] = start + math.prod(shape)
        self.layout = tuple(layout)
        self.unpacked = 0
        self._hash = hash(self.layout)  # needed at each dispatch

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is Packing and other.layout == self.layout)

    def pack(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the vectors that hold these leaves, of NumPy where all of them are, without compiling anything."""
        numpy = all(isinstance(leaf, np.ndarray) for leaf in leaves)
        parts: dict[Any, list[Any]] = {}
        for leaf, (dtype, _, _) in zip(leaves, self.layout, strict=True):
            parts.setdefault(dtype, []).append(leaf.reshape(-1))
        return [np.concatenate(part) if numpy else jnp.concatenate(part) for part in parts.values()]

    def unpack(self, vectors: Sequence[Any]) -> list[Any]:
        """Return the leaves that these vectors hold."""
        held = {vector.dtype: vector for vector in vectors}
        return [held[d][start : start + math.prod(shape)].reshape(shape) for d, shape, start in self.layout]


class MemberPacking:
    """The places of small members' leaves in matrices [numbers, members], one for each dtype.

    Operations on all numbers of all members are then few, and run along the members. Of 256 members with 17 parameters
    and Adam a step took 35 us, and 42 us with an array for each leaf (one core, JAX 0.10.2).

    Args:
        leaves: The leaves, or their shapes and dtypes, with the members along axis 0.

    Attributes:
        numbers: The numbers of all members together.
    """

    MOST = 256  # numbers of a member

    def __init__(self, leaves: Sequence[Any]) -> None:
        self._kinds = [(leaf.shape, leaf.dtype) for leaf in leaves]
        self.numbers = sum(math.prod(leaf.shape) for leaf in leaves)

    @classmethod
    def of(cls, state: Any) -> MemberPacking | None:
        """Return the packing of the leaves of a state, None if the members are not small."""
        leaves = jax.tree_util.tree_leaves(state)
        packs = not any(jnp.issubdtype(leaf.dtype, jax.dtypes.extended) for leaf in leaves)
        return cls(leaves) if packs and sum(math.prod(leaf.shape[1:]) for leaf in leaves) <= cls.MOST else None

    def pack(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the matrices that hold these leaves."""
        rows: dict[Any, list[Any]] = {}
        for leaf in leaves:
            rows.setdefault(leaf.dtype, []).append(leaf.reshape(leaf.shape[0], -1).T)
        return [jnp.concatenate(each) for each in rows.values()]

    def unpack(self, matrices: Sequence[Any]) -> list[Any]:
        """Return the leaves that these matrices hold."""
        held, starts = {matrix.dtype: matrix for matrix in matrices}, {matrix.dtype: 0 for matrix in matrices}
        found: list[Any] = []
        for shape, dtype in self._kinds:
            start = starts[dtype]
            starts[dtype] = end = start + math.prod(shape[1:])
            found.append(held[dtype][start:end].T.reshape(shape))
        return found


def packing_of(leaves: Sequence[Any]) -> Packing | None:
    """Return how to pack a state, None if it does not pay: few arrays, many bytes, or not all on one device.

    Shapes, dtypes and placements alone decide. A packed step may differ in the last bit from one that is not packed, so
    ``step`` and ``fit`` must pack the same states.
    """
    return packing_on_device(leaves) if on_one_device(leaves) else None


def packing_on_device(leaves: Sequence[Any]) -> Packing | None:
    """Return how to pack a state of which each leaf lies on one device: shapes and dtypes alone decide."""
    arrays = [a if hasattr(a, "dtype") else jnp.asarray(a) for a in leaves]
    return _packing_of_kinds(tuple([(a.shape, a.dtype) for a in arrays]))


def on_one_device(leaves: Sequence[Any]) -> bool:
    """Return whether each leaf of a state lies on one device.

    Where a traced leaf lies is not known, unless the process has one device.
    """
    return _device_count() == 1 or all(map(_is_on_one_device, leaves))


def _is_on_one_device(leaf: Any) -> bool:
    if is_traced(leaf):
        return False
    sharding = getattr(leaf, "sharding", None)
    return sharding is None or type(sharding) is SingleDeviceSharding or sharding.num_devices == 1


_device_count = functools.cache(jax.device_count)  # asked in each step; it cannot change


def pack_on_device(packing: Packing, leaves: Sequence[Any]) -> list[Any]:
    """Return the vectors that hold these leaves, on the device to which the leaves are committed, if they are to one.

    Raises:
        ValueError: If they are committed to several devices.
    """
    vectors = packing.pack([np.asarray(leaf) for leaf in leaves])
    committed = {_device_of(leaf.sharding) for leaf in leaves if getattr(leaf, "committed", False)}
    if len(committed) > 1:
        # JAX would refuse the arrays themselves; their copies in one vector would be moved without a word.
        raise ValueError(
            f"The arrays of the state lie on different devices, {' and '.join(sorted(map(str, committed)))}. Move them "
            "to one, state = jax.device_put(state, jax.devices()[0])."
        )
    where = next((_everywhere(leaf.sharding) for leaf in leaves if getattr(leaf, "committed", False)), None)
    return vectors if where is None else jax.device_put(vectors, where)


def all_finite(vectors: Sequence[Any]) -> bool:
    """Return whether all elements of some vectors are finite. Waits for them."""
    kinds = [np.asarray(vector) for vector in vectors if jnp.issubdtype(vector.dtype, jnp.inexact)]
    return all(bool(np.isfinite(vector).all()) for vector in kinds)


def put_with(value: Any, leaf: Any) -> Any:
    """Return an array where a leaf lies, on all its devices, if it was put there; else as it is. So is None."""
    if value is None or not getattr(leaf, "committed", False):
        return value
    where: Any = _everywhere(leaf.sharding)
    # Onto devices of other processes device_put compares the values over all of them, and one may not come here.
    return jax.device_put(value, where) if where.is_fully_addressable else put(value, where)


def _device_of(sharding: Sharding) -> Any:
    (device,) = sharding.device_set
    return device


def _everywhere(sharding: Sharding) -> Sharding:
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def in_place(leaves: Sequence[Any]) -> bool:
    """Return whether a loop overwrites the memory of its state; a small state is not worth it."""
    return bytes_of(leaves) > _SMALL


def bytes_of(leaves: Sequence[Any]) -> int:
    """Return how many bytes the elements of arrays have."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)


def copy(leaf: Any) -> Any:
    """Return a copy of an array on the same devices."""
    # A copy by the runtime needs no program, of which there would be one for each shape. It is for arrays that may lie
    # anywhere; one that was put somewhere stays there.
    return _copied(leaf) if leaf.committed else jax.device_put(leaf, may_alias=False)


def own_arrays(arrays: list[Any], packing: Packing | None, *, overwrites: bool) -> list[Any]:
    """Return the arrays of a state in memory that a loop may overwrite, or else packed."""
    if not overwrites:
        return arrays if packing is None else pack_on_device(packing, arrays)
    for i in range(len(arrays)):  # one by one: what nothing else refers to is freed before the next is copied
        arrays[i] = copy(arrays[i])
    return arrays


@jax.jit
def _copied(leaf: Any) -> Any:
    return jnp.copy(leaf)


@functools.lru_cache(maxsize=256)
def _packing_of_kinds(kinds: tuple[tuple[tuple[int, ...], Any], ...]) -> Packing | None:
    if len(kinds) < _FEWEST:
        return None
    if any(jnp.issubdtype(dtype, jax.dtypes.extended) for _, dtype in kinds):
        return None
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds)
    return Packing(kinds) if size <= _MOST_BYTES else None


def unpack(packing: Packing, vectors: Sequence[Any]) -> list[Any]:
    """Return ``packing.unpack(vectors)``; the leaves have their own memory, whatever is done to the vectors."""
    if packing.unpacked >= _BY_HOST:
        return _unpacked(packing, vectors)
    packing.unpacked += 1
    leaves = packing.unpack([np.array(vector) for vector in vectors])
    where = vectors[0].sharding if getattr(vectors[0], "committed", False) else None  # as packed, they are of NumPy
    return jax.device_put(leaves, where)


@functools.partial(jax.jit, static_argnums=0)
def _unpacked(packing: Packing, vectors: list[Any]) -> list[Any]:
    return packing.unpack(vectors)
