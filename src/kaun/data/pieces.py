"""Which rows of a batch a process has: those of the blocks that lie on its devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from kaun.sharding import Sharding

__all__ = ["Piece", "RowBlocks", "blocks_of"]


class Piece(NamedTuple):
    """The rows of one batch that this process has.

    Attributes:
        total: The number of rows of the batch, in all processes.
        here: Their positions in the batch, rising: a slice or int64 [rows].
        blocks: The blocks of rows that this process has.
    """

    total: int
    here: Any
    blocks: RowBlocks

    @property
    def rows(self) -> int:
        """The number of these rows."""
        return self.here.stop - self.here.start if isinstance(self.here, slice) else len(self.here)

    def of(self, index: Any) -> Any:
        """Return the part of an index of the batch, a slice or an array, that finds these rows."""
        if not isinstance(index, slice):
            return index[self.here]
        if isinstance(self.here, slice):
            return slice(index.start + self.here.start, index.start + self.here.stop)
        return index.start + self.here

    def positions(self, rows: slice) -> slice:
        """Return where some consecutive rows of the batch, all of which this process has, are among its rows."""
        start = rows.start or 0
        stop = self.total if rows.stop is None else rows.stop
        first = start - self.here.start if isinstance(self.here, slice) else int(np.searchsorted(self.here, start))
        return slice(first, first + stop - start)


class RowBlocks(NamedTuple):
    """The blocks of rows that one process has. A batch is cut into blocks of equal size, one after the other.

    A batch whose rows are not divided by the number of blocks is not cut: every process has all of its rows.

    Attributes:
        parts: Into how many blocks a batch is cut.
        here: The numbers of the blocks of this process, rising.
    """

    parts: int
    here: tuple[int, ...]

    def piece(self, n: int) -> Piece:
        """Return the rows of this process in a batch of ``n`` rows."""
        return _piece(self, n)

    def total(self, rows: int) -> int | None:
        """Return the number of rows of a batch of which this process has ``rows``, None if there is no such number."""
        if len(self.here) == self.parts:
            return rows
        return None if rows % len(self.here) else rows // len(self.here) * self.parts

    @property
    def whole(self) -> RowBlocks:
        """All blocks."""
        return RowBlocks(self.parts, tuple(range(self.parts)))


@functools.lru_cache(maxsize=1024)
def _piece(blocks: RowBlocks, n: int) -> Piece:
    size, here = n // blocks.parts, blocks.here
    if n % blocks.parts:
        return Piece(n, slice(0, n), blocks)
    if here[-1] - here[0] == len(here) - 1:
        return Piece(n, slice(here[0] * size, (here[-1] + 1) * size), blocks)
    rows = np.concatenate([np.arange(block * size, (block + 1) * size) for block in here])
    rows.flags.writeable = False  # it is kept, and given again
    return Piece(n, rows, blocks)


def blocks_of(sharding: Sharding, devices: Iterable[Any]) -> RowBlocks:
    """Return the blocks of rows that lie on some devices. Blocks go by device: a process may have any of them."""
    count = math.prod(sharding.mesh.shape[axis] for axis in sharding.rows)
    places = sharding.spread.devices_indices_map((count,))
    return RowBlocks(count, tuple(sorted({places[device][0].start or 0 for device in devices if device in places})))
