"""Small states packed into one vector for each dtype: calling a compiled step costs by the array, not by the byte."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Packing", "copy", "in_place", "pack", "packing_of", "unpack"]

# Above this the copies into and out of the vector cost more than the calls that they save.
_MOST_BYTES = 1 << 16
_FEWEST = 4
_SMALL = 1 << 20  # bytes of a state whose memory is not worth saving


class Packing:
    """How the leaves of a state lie in vectors, one for each dtype. Equal layouts are equal keys.

    Attributes:
        layout: for each leaf its dtype, shape, and where it begins in the vector of that dtype.
    """

    __slots__ = ("_hash", "layout")

    def __init__(self, kinds: Sequence[tuple[tuple[int, ...], Any]]) -> None:
        ends: dict[Any, int] = {}
        layout: list[tuple[Any, tuple[int, ...], int]] = []
        for shape, dtype in kinds:
            start = ends.get(dtype, 0)
            layout.append((dtype, shape, start))
            ends[dtype] = start + math.prod(shape)
        self.layout = tuple(layout)
        self._hash = hash(self.layout)  # asked for at each dispatch

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is Packing and other.layout == self.layout)

    def pack(self, leaves: Sequence[Any]) -> list[Any]:
        """The vectors that hold these leaves."""
        parts: dict[Any, list[Any]] = {}
        for leaf, (dtype, _, _) in zip(leaves, self.layout, strict=True):
            parts.setdefault(dtype, []).append(jnp.reshape(leaf, -1))
        return [jnp.concatenate(vectors) for vectors in parts.values()]

    def unpack(self, vectors: Sequence[Any]) -> list[Any]:
        """The leaves that these vectors hold."""
        held = {vector.dtype: vector for vector in vectors}
        return [held[d][start : start + math.prod(shape)].reshape(shape) for d, shape, start in self.layout]


def packing_of(leaves: Sequence[Any]) -> Packing | None:
    """How to pack a state, None where it does not pay: few arrays, many bytes, or more than one device.

    A rule about shapes and dtypes alone: packed and not packed may differ in the last bit, so ``step`` and ``fit`` must
    come to the same answer for the same state.
    """
    arrays = [a if hasattr(a, "dtype") else jnp.asarray(a) for a in leaves]
    return _by_kinds(tuple([(a.shape, a.dtype) for a in arrays]))


def in_place(leaves: Sequence[Any]) -> bool:
    """Whether a loop takes over the memory of a state: that of a small one is not worth it."""
    return packing_of(leaves) is None and sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves) > _SMALL


def copy(leaf: Any) -> Any:
    """A copy of an array, where it is."""
    # A copy by the runtime needs no program, of which there would be one for each shape. It is for arrays that may lie
    # anywhere; one that was put somewhere stays there.
    return _copied(leaf) if leaf.committed else jax.device_put(leaf, may_alias=False)


@jax.jit
def _copied(leaf: Any) -> Any:
    return jnp.copy(leaf)


@functools.lru_cache(maxsize=256)
def _by_kinds(kinds: tuple[tuple[tuple[int, ...], Any], ...]) -> Packing | None:
    if len(kinds) < _FEWEST or jax.device_count() > 1:
        return None
    if any(jnp.issubdtype(dtype, jax.dtypes.extended) for _, dtype in kinds):
        return None
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds)
    return Packing(kinds) if size <= _MOST_BYTES else None


def pack(packing: Packing, leaves: Sequence[Any]) -> list[Any]:
    """As ``packing.pack``, on the host: it is done once in a fit, and a program would have to be compiled for it."""
    parts: dict[Any, list[Any]] = {}
    for leaf, (dtype, _, _) in zip(leaves, packing.layout, strict=True):
        parts.setdefault(dtype, []).append(np.asarray(leaf).reshape(-1))
    return [np.concatenate(vectors) for vectors in parts.values()]


@functools.partial(jax.jit, static_argnums=0)
def unpack(packing: Packing, vectors: list[Any]) -> list[Any]:
    """``packing.unpack``, compiled: leaves of their own, whatever becomes of the vectors."""
    return packing.unpack(vectors)
