"""What ``local`` and ``assemble`` do: each process reads rows of its own, and global arrays are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kaun import tree
from kaun.data.collate import outline_of, stack_all
from kaun.data.compare import compare_items
from kaun.data.items import Item
from kaun.data.naming import noting_where
from kaun.data.nodes import GetItem, Node, StageSpec, every_stage, index_node, map_node
from kaun.data.pieces import Piece, RowBlocks, blocks_of
from kaun.data.prefetch import snapshot_item
from kaun.data.rows import RowInfo, RowsItem
from kaun.sharding import Sharding

__all__ = ["assemble_node", "checked_sharding", "local_node", "stacked_rows"]

_BATCHING = frozenset(["Data.batches", "Data.folds", "Data.batch", "Data.map_batch", "Data.bucket"])
_PASSES_ON = frozenset(
    f"Data.{name}" for name in ("epochs", "epoch", "skip", "take", "shuffle", "sample", "prefetch", "concat", "mix")
)
_NOT_NUMBERS = "OSUMmT"  # kinds of NumPy dtypes


def checked_sharding(where: str, value: Any) -> Sharding:
    """A sharding of which this process has a part.

    Raises:
        TypeError: If it is not a ``Sharding``.
        ValueError: If none of its devices belongs to this process.
    """
    if not isinstance(value, Sharding):
        raise TypeError(
            f"{where} expected a kaun.sharding.Sharding, that of the trainer, received {tree.describe(value)}. Write "
            f"s = kaun.sharding.data_parallel(), Trainer(..., sharding=s) and data.{where}."
        )
    if not value.mesh.local_devices:
        raise ValueError(
            f"{where} expected a mesh with devices of each process, and process {jax.process_index()} of "
            f"{jax.process_count()} has none of its {value.mesh.size}. Make the mesh of all devices, "
            "kaun.sharding.mesh(data=-1)."
        )
    return value


# local


def local_node(node: Node, stages: Sequence[StageSpec], pipeline: str, sharding: Sharding) -> Node:
    """The batches of a pipeline with the rows of this process alone.

    Raises:
        TypeError: If the pipeline is not made of batches whose rows are read by index.
    """
    if node.narrow is None:
        raise TypeError(
            "local(s) leaves rows out before they are read, so it expected batches whose rows have an index, received "
            f"{pipeline}. {_fix(stages, node)}"
        )
    return node.narrow(blocks_of(sharding, sharding.mesh.local_devices))


def _fix(stages: Sequence[StageSpec], node: Node) -> str:
    """What to write where ``local`` cannot be."""
    if "local" in node.rows:
        return "It has .local(s) already: leave the second one out."
    if any("source" in stage.given for stage in every_stage(stages)):
        return (
            "A loader is not read by index. Where it is already split by process, so that each process reads its own "
            "rows, write .assemble(s) alone; else leave both out."
        )
    at = max((i for i, stage in enumerate(stages) if stage.name in _BATCHING), default=None)
    if at is None:
        combined = any(stage.sources for stage in stages)
        return "Make each source of batches." if combined else "Make batches first: data.batch(64).local(s)."
    later = next((stage for stage in stages[at + 1 :] if stage.name not in _PASSES_ON), None)
    if later is not None:
        return f"Write .local(s) before {later.text.partition('(')[0]}."
    if stages[at].name == "Data.map_batch":
        return "A function of a whole batch needs all of its rows. Write .batch(n).local(s).map(f)."
    if stages[at].name == "Data.bucket":
        return (
            "Which rows are in a batch is known only if bucket gets the lengths of all rows, and no shuffle comes "
            "before it. Write bucket(lengths, edges, batch_size).shuffle().local(s)."
        )
    return "A filter or prefetch before batch(n) takes the index away: choose the rows first, x[keep]."


def stacked_rows(node: Node, base: Node, size: int, stage: str) -> Node:
    """The stage ``node`` of stacked groups of ``size`` items of ``base``, with ``narrow`` where these have an index."""
    if base.by_index is None or node.length is None:
        return node
    total, length, stack = base.length or 0, node.length, noting_where(stack_all, stage)

    def narrow(blocks: RowBlocks) -> Node:
        def by_index(epoch: int | None) -> GetItem:
            assert base.by_index is not None
            get = base.by_index(epoch)

            def group(i: int) -> RowsItem:
                at = slice(i * size, min(i * size + size, total))
                piece = blocks.piece(at.stop - at.start)
                rows = np.arange(total)[piece.of(at)].tolist()
                return RowsItem(stack(i, [snapshot_item(get(j)) for j in rows]), RowInfo(None, None, piece=piece))

            return group

        return index_node(length, by_index)._replace(rows=frozenset({"local"}))

    return node._replace(narrow=narrow)


# assemble


def assemble_node(base: Node, stages: Sequence[StageSpec], stage: str, sharding: Sharding) -> Node:
    """The items as global arrays.

    Args:
        base: The stage before.
        stages: The pipeline.
        stage: The stage as the pipeline prints it, for messages.
        sharding: Where rows lie.
    """
    split = any("source" in each.given for each in every_stage(stages))
    assembler = _Assembler(sharding, split=split, name="".join(each.text for each in stages))
    node = map_node(base, assembler, stage, takes_rows=True)
    return node._replace(rows=base.rows - {"local"})


class _Assembler:
    """Makes global arrays of an item.

    Args:
        sharding: Where rows lie.
        split: Whether items without ``local`` are those of a loader, of which each process has its own rows.
        name: The pipeline as it prints, the same in all processes.
    """

    def __init__(self, sharding: Sharding, *, split: bool, name: str) -> None:
        self._sharding, self._split, self._name = sharding, split, name
        self._compared = False
        self._blocks = blocks_of(sharding, sharding.mesh.local_devices)

    def __call__(self, item: Any) -> Any:
        """The item with its arrays on the devices of all processes."""
        rows = item.rows if isinstance(item, RowsItem) else RowInfo(None, None)
        value = item.item if isinstance(item, RowsItem) else item
        if Item.is_training_item(value):
            raise TypeError(
                "assemble(s) expected items without a loss, because a loss holds arrays of its own: received "
                f"{outline_of(value)}. Write .assemble(s).with_loss(f)."
            )
        leaves, structure = jax.tree_util.tree_flatten(value)
        piece = self._piece_of(leaves, value) if rows.piece is None else self._checked(rows.piece, leaves, value)
        if not self._compared:
            self._compared, split = True, self._split and rows.piece is None
            of_rows, others = (
                [leaf for leaf in leaves if _has_rows(leaf, piece) == is_one] for is_one in (True, False)
            )
            compare_items(self._name, of_rows, others, outline_of(value), piece.blocks.here, split=split)
        made = structure.unflatten([self._placed(leaf, piece) for leaf in leaves])
        rows = rows._replace(piece=None)
        return made if rows.mask is None and rows.weights is None else RowsItem(made, rows)

    def _checked(self, piece: Piece, leaves: Sequence[Any], value: Any) -> Piece:
        """The rows of an item after ``local``."""
        if piece.blocks != self._blocks:
            raise ValueError(
                "assemble(s) expected the sharding of local(s), whose rows lie elsewhere. Give both the same s."
            )
        if not any(_has_rows(leaf, piece) for leaf in leaves):
            raise ValueError(
                f"assemble(s) expected arrays with one row for each of the {piece.rows} of {piece.total} rows that "
                f"this process has, received {outline_of(value)}. A map between local(s) and assemble(s) must keep "
                "the rows; one that changes their number goes after assemble(s)."
            )
        return piece

    def _piece_of(self, leaves: Sequence[Any], value: Any) -> Piece:
        """The rows of an item of a pipeline without ``local``."""
        rows = next((len(leaf) for leaf in leaves if np.ndim(leaf)), None)
        if rows is None:
            raise ValueError(f"assemble(s) expected items with an array of rows, received {outline_of(value)}.")
        if not self._split:
            return self._blocks.whole.piece(rows)
        total = self._blocks.total(rows)
        if total is None:
            here = len(self._blocks.here)
            raise ValueError(
                f"assemble(s) expected batches of this process whose rows its {here} blocks of devices divide, "
                f"received {rows} rows in {outline_of(value)}. Give the loader a batch size that {here} divides, and "
                "drop_last=True."
            )
        return self._blocks.piece(total)

    def _placed(self, leaf: Any, piece: Piece) -> Any:
        """A leaf on the devices: rows of this process as a part of a global array, any other array everywhere."""
        if not _is_placeable(leaf):
            return leaf
        is_rows = _has_rows(leaf, piece)
        spread = is_rows and not piece.total % self._blocks.parts
        where = self._sharding.spread if spread else self._sharding.replicated
        if isinstance(leaf, jax.Array) and self._sharding.replicated.is_fully_addressable:
            return jax.device_put(leaf, where)
        shape = (piece.total, *leaf.shape[1:]) if is_rows else leaf.shape
        # Not device_put, which compares a NumPy array over all processes: a wait for the slowest in each step.
        return jax.make_array_from_callback(
            shape, where, lambda index: _read(leaf, index or (), piece if spread else None)
        )


def _has_rows(leaf: Any, piece: Piece) -> bool:
    """Whether axis 0 of a leaf is as long as the rows that this process has."""
    return np.shape(leaf)[:1] == (piece.rows,)


def _is_placeable(leaf: Any) -> bool:
    """Whether a leaf is an array of numbers that is not on devices of other processes already."""
    if isinstance(leaf, jax.Array):
        return leaf.is_fully_addressable
    is_plain = isinstance(leaf, (np.ndarray, np.generic)) and not isinstance(leaf, np.ma.MaskedArray)
    return is_plain and leaf.dtype.kind not in _NOT_NUMBERS


def _read(leaf: Any, index: tuple[slice, ...], piece: Piece | None) -> Any:
    """The rows of a global array at an index, of a leaf that has those of a piece, or, where it is None, all."""
    found = leaf if piece is None else leaf[piece.positions(index[0])]
    if isinstance(found, jax.Array):
        return found
    with np.errstate(over="ignore"):  # float64 beyond float32 is inf, as jnp.asarray makes it
        # A copy, because a loader may write to its buffer again while the devices still read it.
        return np.array(found, jax.dtypes.canonicalize_dtype(found.dtype))
