"""The first items of the processes, compared: those that should be the same, and those that should not."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kaun._messages import warn
from kaun._processes import told_before

__all__ = ["compare_items"]

_numbers: dict[str, Iterator[int]] = {}  # of the pipelines that print alike


def compare_items(
    name: str, rows: Sequence[Any], others: Sequence[Any], outline: str, here: Sequence[int], *, split: bool
) -> None:
    """Compare the first item of a pipeline with those of the processes which had theirs earlier.

    Args:
        name: The pipeline as it prints.
        rows: The arrays with rows of the batch.
        others: Its other arrays.
        outline: The item in a few characters.
        here: The blocks of rows that the item has.
        split: Whether a loader gave it, of which each process should have its own rows.

    Raises:
        ValueError: If arrays that should be the same in two processes differ.
    """
    if jax.process_count() == 1:
        return
    number, me = next(_numbers.setdefault(name, itertools.count())), jax.process_index()
    mine = [list(here), outline, _checksum(rows), _checksum(others)]
    found = told_before(f"assemble/{zlib.crc32(name.encode())}/{number}", json.dumps(mine))
    for process, text in found.items():
        their_blocks, their_outline, their_rows, their_others = json.loads(text)
        same_rows = [their_outline, their_rows] == mine[1:3]
        if their_blocks == mine[0] and not same_rows:
            raise ValueError(
                "assemble(s) expected the same items in all processes whose devices have the same rows, but the first "
                f"one of process {process} is another one than {outline} of process {me}. Where each process has rows "
                "of its own, write Data.from_iterable(lambda: Data.batches((x, y), batch_size=64)).assemble(s)."
            )
        if their_others != mine[3]:
            raise ValueError(
                "assemble(s) expected arrays whose axis 0 is not as long as the rows that a process has to be the same "
                f"in all processes, but those of process {process} differ from those in {outline} of process {me}. To "
                "make several rows of one, return them as several arrays, (x, a, b), or do it after assemble(s)."
            )
        if split and their_blocks != mine[0] and same_rows:
            warn(
                f"assemble(s) makes batches of the rows of each process, and the first ones of process {process} and "
                f"{me} are the same, {outline}: each row would be there twice. Split the loader by process, so that "
                "each reads its own rows; where all processes read all rows, leave assemble(s) out."
            )


def _checksum(leaves: Sequence[Any]) -> int:
    found = 0
    for leaf in leaves:
        if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
            found = zlib.crc32(f"{leaf.dtype} {leaf.shape}".encode(), found)
            found = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), found)
    return found
