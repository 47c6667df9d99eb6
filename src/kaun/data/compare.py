"""The first items of the processes, compared: those that should be the same, and those that should not."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kaun._messages import warn
from kaun._processes import told_before
from kaun.data.pieces import RowBlocks

__all__ = ["compare_items"]

_numbers: dict[str, Iterator[int]] = {}  # of the pipelines that print alike


def compare_items(name: str, leaves: Sequence[Any], outline: str, blocks: RowBlocks, *, split: bool) -> None:
    """Compare the first item with that of the processes which had theirs earlier.

    Args:
        name: The pipeline as it prints.
        leaves: The arrays of the item.
        outline: The item in a few characters.
        blocks: The blocks of rows of this process.
        split: Whether each process has its own rows.

    Raises:
        ValueError: If items that are the same in all processes differ.
    """
    if jax.process_count() == 1:
        return
    crc = 0
    for leaf in leaves:
        if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
            crc = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), crc)
    number = _numbers.setdefault(name, itertools.count())
    mine = f"{blocks.here} {outline} {crc}" if split else f"{outline} {crc}"
    others = told_before(f"assemble/{zlib.crc32(name.encode())}/{next(number)}", mine)
    for process, other in others.items():
        if not split and other != mine:
            raise ValueError(
                "assemble(s) expected the same items in all processes, because no loader makes them, but the first one "
                f"of process {process} is another one than {outline} of process {jax.process_index()}. Where each "
                "process has rows of its own, write Data.from_iterable(lambda: Data.batches((x, y), batch_size=64))."
                "assemble(s)."
            )
        if split and other != mine and other.partition(")")[2] == mine.partition(")")[2]:
            warn(
                f"assemble(s) makes batches of the rows of each process, and the first ones of process {process} and "
                f"{jax.process_index()} are the same, {outline}: each row would be there twice. Split the loader by "
                "process, so that each reads its own rows; where all processes read all rows, leave assemble(s) out."
            )
