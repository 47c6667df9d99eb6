"""Parts: a state on the devices of several processes, each of which writes its shards; any topology reads them.

An array of a part is a shard, and its name says where it begins: ``vars.params.0.weight@0,256``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kaun._kernels import aligned_empty
from kaun._messages import quoted
from kaun.checkpoint import encoding
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.hashed import Damaged, reading
from kaun.checkpoint.manifest import Manifest, part_names
from kaun.checkpoint.safetensors_header import CODES, Place, Short, read_places
from kaun.tree import is_key

__all__ = ["Parts", "Shard", "Share", "leaves_of", "shards_of"]

_NAME = re.compile(r"(.*)@((?:[0-9]{1,15}(?:,[0-9]{1,15})*)?)", re.DOTALL | re.ASCII)


@dataclass(frozen=True)
class Share:
    """What one process writes.

    Attributes:
        index: The number of the process.
        count: How many there are.
        devices: The devices whose shards it writes; None: all that it has.
    """

    index: int
    count: int
    devices: frozenset[Any] | None = None

    @property
    def file(self) -> str:
        """The name of the part."""
        return part_names(self.count)[self.index]


class Shard(NamedTuple):
    """A part of an array.

    Attributes:
        file: The file that holds it.
        offset: Where its bytes begin in the file.
        start: Where it begins in the array, one number for each axis.
        shape: Its shape.
    """

    file: str
    offset: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


def shards_of(leaves: Mapping[str, Any], share: Share) -> dict[str, Any]:
    """The shards that a process writes, by their names in the file: of each it has replica 0.

    What lies in each process by itself (NumPy arrays, numbers) is taken from process 0.
    """
    found: dict[str, Any] = {}
    for name, leaf in leaves.items():
        shape, _, _ = _outline(name, leaf)
        if isinstance(leaf, jax.Array) and (jax.process_count() == 1 or not leaf.is_fully_addressable):
            for shard in leaf.addressable_shards:
                if shard.replica_id == 0 and (share.devices is None or shard.device in share.devices):
                    start = encoding.starts_of(shard.index[: leaf.ndim], len(shape))
                    found[_shard_name(name, start)] = shard.data
        elif share.index == 0:
            found[_shard_name(name, (0,) * len(shape))] = leaf
    return found


def _shard_name(name: str, start: Iterable[int]) -> str:
    return f"{name}@{','.join(map(str, start))}"


def _outline(name: str, leaf: Any) -> tuple[tuple[int, ...], np.dtype[Any], str | None]:
    """Shape, dtype and kind of a leaf as a file holds it."""
    if is_key(leaf):
        words = jax.eval_shape(jax.random.key_data, leaf)
        return words.shape, words.dtype, f"key {jax.random.key_impl(leaf)}"
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype, None
    array, kind = encoding.encode(name, leaf)
    return array.shape, array.dtype, kind


def leaves_of(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Dtype, shape and kind of each leaf, as the manifest says them."""
    found: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        shape, dtype, kind = _outline(name, leaf)
        found[name] = {"dtype": CODES[dtype], "shape": list(shape)} | ({"kind": kind} if kind else {})
    return found


class Parts:
    """The parts of a checkpoint, from which regions of its leaves are read.

    Args:
        disk: The disk.
        folder: The checkpoint.
        about: Its manifest.

    Attributes:
        leaves: Dtype, shape and kind of the leaves, by name.

    Raises:
        Damaged: If the header of a part is not one, or the shards of a leaf do not make it up.
    """

    def __init__(self, disk: Disk, folder: Path, about: Manifest) -> None:
        leaves = about.leaves or {}
        self._disk, self._folder = disk, folder
        self.leaves: dict[str, Place] = leaves
        self._shards: dict[str, dict[tuple[int, ...], Shard]] = {name: {} for name in leaves}
        self._of, self._read = "", dict[Shard, np.ndarray[Any, Any]]()  # a leaf, and its shards that were read
        for file in about.files:
            with reading(file):
                self._add(file)
        for name, leaf in leaves.items():
            if not _make_up(leaf.shape, self._shards[name]):
                raise Damaged(f"the {len(self._shards[name])} shards of {quoted(name)} in its parts are not all of it")

    def _add(self, file: str) -> None:
        opened, size = self._disk.open(self._folder / file)
        try:
            places = read_places(lambda into: self._take(opened, into), size)
        finally:
            self._disk.close(opened)
        base = size - max((place.stop for place in places), default=0)
        for place in places:
            match = _NAME.fullmatch(place.name)
            leaf = self.leaves.get(match[1]) if match else None
            if match is None or leaf is None:
                raise ValueError(f"{quoted(place.name)} is not a shard of a leaf that the manifest names")
            start = tuple(map(int, match[2].split(","))) if match[2] else ()
            if (place.dtype, place.kind) != (leaf.dtype, leaf.kind) or len(place.shape) != len(leaf.shape):
                raise ValueError(f"{quoted(place.name)} has another dtype, kind or rank than the manifest says")
            if start in self._shards[leaf.name]:
                raise ValueError(f"{quoted(place.name)} is in another part too")
            self._shards[leaf.name][start] = Shard(file, base + place.start, start, place.shape)

    def _take(self, file: int, into: memoryview) -> None:
        if self._disk.read(file, into) < len(into):
            raise Short("it ends early")

    def region(self, name: str, index: tuple[slice, ...]) -> np.ndarray[Any, Any]:
        """The values of a leaf in a region, one slice for each axis of the array as it was stored.

        The shards that were read are kept until another leaf is asked for.
        """
        if name != self._of:
            self._of, self._read = name, {}
        leaf = self.leaves[name]
        low, high = [], []
        for part, size in zip(index, leaf.shape, strict=True):
            start, stop, _ = part.indices(size)
            low, high = [*low, start], [*high, stop]
        shape = tuple(b - a for a, b in zip(low, high, strict=True))
        whole = aligned_empty(shape, leaf.dtype)
        for shard in self._shards[name].values():
            ends = [a + n for a, n in zip(shard.start, shard.shape, strict=True)]
            lows = list(map(max, low, shard.start))
            highs = list(map(min, high, ends))
            if (lows, highs) == (low, high) == (list(shard.start), ends):
                return self._values(shard, leaf)
            if all(a < b for a, b in zip(lows, highs, strict=True)):
                there = tuple(slice(a - at, b - at) for a, b, at in zip(lows, highs, low, strict=True))
                here = tuple(slice(a - at, b - at) for a, b, at in zip(lows, highs, shard.start, strict=True))
                whole[there] = self._values(shard, leaf)[here]
        return whole

    def _values(self, shard: Shard, leaf: Place) -> np.ndarray[Any, Any]:
        if shard not in self._read:
            raw = aligned_empty((math.prod(shard.shape) * leaf.dtype.itemsize,), np.uint8)
            with reading(shard.file):
                file, _ = self._disk.open(self._folder / shard.file)
                try:
                    self._disk.seek(file, shard.offset)
                    self._take(file, raw.data)
                finally:
                    self._disk.close(file)
            self._read[shard] = raw.view(leaf.dtype).reshape(shard.shape)
        return self._read[shard]

    def whole(self, name: str) -> np.ndarray[Any, Any]:
        """All values of a leaf."""
        return self.region(name, tuple(slice(0, n) for n in self.leaves[name].shape))

    def restore(self, name: str, like: Any) -> Any:
        """A leaf of the kind that ``like`` is, on its devices; see ``encoding.assemble``."""
        return encoding.assemble(self.leaves[name], like, lambda index: self.region(name, index))


def _make_up(shape: tuple[int, ...], shards: Mapping[tuple[int, ...], Shard]) -> bool:
    """Whether shards are the cells of a grid that covers an array once, as those of a sharding are."""
    if not shards or any(len(start) != len(shape) for start in shards):
        return False
    axes = [sorted({start[axis] for start in shards}) for axis in range(len(shape))]
    ends = [dict(zip(starts, [*starts[1:], size], strict=True)) for starts, size in zip(axes, shape, strict=True)]
    return (
        len(shards) == math.prod(map(len, axes))
        and all(starts[:1] == [0] for starts in axes)
        and all(
            at + n == end[at]
            for start, shard in shards.items()
            for at, n, end in zip(start, shard.shape, ends, strict=True)
        )
    )
