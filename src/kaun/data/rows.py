"""What is known of the rows of a batch besides its arrays: which are filled, and their weights.

``pad=True``, ``sample_weights=`` and ``bucket`` make items of this kind. Each stage passes it on or refuses it, and
``with_loss``, ``evaluate`` and ``predict`` read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from kaun.context import Context
from kaun.data.arguments import function_text
from kaun.data.items import Item, labelled, loss_attacher
from kaun.data.pieces import Piece
from kaun.losses import Mean, parts_of, row_arguments

__all__ = [
    "Padding",
    "RowInfo",
    "RowsItem",
    "loses_rows",
    "over_items",
    "own_rows",
    "plain_item",
    "row_loss_attacher",
    "shown_item",
]

Host = np.ndarray[Any, Any]


class Padding(NamedTuple):
    """How much of a pass of batches is filled.

    Attributes:
        rows: The rows of the data.
        filled_rows: The rows that fill batches.
        tokens: With ``bucket`` the sum of the lengths of the rows of the data, otherwise 0.
        filled_tokens: With ``bucket`` the other positions of all batches, otherwise 0.
    """

    rows: int
    filled_rows: int
    tokens: int = 0
    filled_tokens: int = 0


class RowInfo(NamedTuple):
    """What is known of the rows of a batch.

    Attributes:
        mask: Bool [batch], False for rows that fill the batch, which are at its end. None where all are real.
        weights: The weight of each row, float [batch], or None.
        elements: With ``bucket``, if the labels have a value for each position of a row: bool [batch, edge], False
            where the row or the position is filled. Otherwise None.
        ctx: The context of the batch, or None.
        piece: The rows that the item has, after ``local``; None if it has all. The other fields are about all rows.
    """

    mask: Host | None
    weights: Host | None
    elements: Host | None = None
    ctx: Context | None = None
    piece: Piece | None = None

    def counted(self, labels: Any) -> Host | None:
        """Which rows, or which positions of the rows, count for these labels; None if all do.

        Raises:
            ValueError: If the labels had a value for each position, and have another length now.
        """
        if self.elements is None:
            return self.mask
        shapes = [np.shape(leaf) for leaf in jax.tree_util.tree_leaves(labels)]
        if all(len(shape) < 2 for shape in shapes):
            return self.mask
        if any(shape[:2] != self.elements.shape for shape in shapes):
            raise ValueError(
                f"bucket expected labels of shape {list(self.elements.shape)} or of one value for each row, as they "
                f"were when their padding was added, received shapes {', '.join(str(list(s)) for s in shapes)} after "
                "map: it is not known which values are padding. Change the rows before: data.map(f).bucket(...)."
            )
        return self.elements

    @property
    def has_filled(self) -> bool:
        """Whether some rows of the item fill its batch."""
        mask = self._own_mask
        return mask is not None and not mask.all()

    @property
    def _own_mask(self) -> Host | None:
        return self.mask if self.mask is None or self.piece is None else self.mask[self.piece.here]

    def real(self, value: Any) -> Any:
        """A tree of arrays without its filled rows: arrays as long as the batch are cut."""
        mask = self._own_mask
        if mask is None or mask.all():
            return value
        size, n = len(mask), int(mask.sum())
        cut = lambda leaf: leaf[:n] if np.ndim(leaf) and leaf.shape[0] == size else leaf
        return jax.tree_util.tree_map(cut, value)

    def merged(self, ctx: Context | None) -> Context | None:
        """The context of the batch with the names of an item's own."""
        return ctx if self.ctx is None else self.ctx.merge(ctx)


class RowsItem:
    """An item, and what is known of its rows. Only stages see it; users see the item.

    Attributes:
        item: The item.
        rows: What is known.
    """

    __slots__ = ("item", "rows")

    def __init__(self, item: Any, rows: RowInfo) -> None:
        self.item: Any = item
        self.rows: RowInfo = rows

    def with_item(self, item: Any) -> RowsItem:
        """Another item with the same rows."""
        return RowsItem(item, self.rows)


def over_items(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose last argument is an item, which passes on what is known of the item's rows."""

    def call(*given: Any) -> Any:
        *before, item = given
        return item.with_item(f(*before, item.item)) if isinstance(item, RowsItem) else f(*given)

    return call


def plain_item(item: Any) -> Any:
    """The item as users see it.

    Raises:
        TypeError: If it has a loss, which does not know which rows are filled.
    """
    if not isinstance(item, RowsItem):
        return item
    if Item.is_training_item(item.item):
        raise loses_rows("map(f) to items with a loss", _names(item.rows))
    return item.item


def shown_item(item: Any) -> Any:
    """The item as a loop of the user gets it, which does not know of filled rows: without them.

    An item of ``bucket`` has a context that tells of them, and stays whole.
    """
    whole = plain_item(item)
    return item.rows.real(whole) if isinstance(item, RowsItem) and item.rows.ctx is None else whole


def _names(rows: RowInfo) -> frozenset[str]:
    given = {"where": rows.mask is not None, "weights": rows.weights is not None}
    return frozenset(name for name in given if given[name])


def loses_rows(stage: str, rows: frozenset[str], fix: str = "") -> TypeError:
    """The exception for a stage, a loss or ``fit`` that cannot pass on what is known of the rows.

    Args:
        stage: What the user called.
        rows: ``"where"`` and ``"weights"``, if there are filled rows and weights; ``"local"``, if each process has its
            own rows.
        fix: What to write. By default a loss that takes what is known.
    """
    if "local" in rows:
        return own_rows(stage)
    names = sorted(rows, reverse=True)
    what = {"where": "which rows of a batch are filled", "weights": "the weights of its rows"}
    given = ", ".join(f"{name}={name}" for name in names)
    fix = fix or (
        f"Leave x and y as they are, and write with_loss(losses.mse), or take {'= and '.join(names)}=, def "
        f"loss(output, y, *, {', '.join(names)}): return losses.mse.parts(output, y, {given})"
    )
    lost = " and ".join(what[name] for name in names)
    return TypeError(f"{stage} does not know {lost}, so that the mean would be wrong. {fix}.")


def own_rows(stage: str, fix: str = "") -> TypeError:
    """The exception for what needs whole batches after ``local``."""
    fix = fix or "Write .assemble(s) before it: data.local(s).map(f).assemble(s).with_loss(losses.mse)."
    return TypeError(f"{stage} expected whole batches, and after local(s) each process has rows of its own. {fix}")


def row_loss_attacher(f: Callable[..., Any], rows: frozenset[str]) -> Callable[[Any], Any]:
    """The function that attaches a loss to an item, with what is known of its rows.

    Args:
        f: The loss.
        rows: The names of the arguments that it must take.

    Raises:
        TypeError: If it does not take them.
    """
    attach, function = loss_attacher(f), parts_of(f)
    if "local" in rows:
        raise own_rows("with_loss(f)")
    if rows - row_arguments(function):
        raise loses_rows(f"The loss {function_text('with_loss', f)}", rows)

    def attach_rows(given: Any) -> Any:
        if not isinstance(given, RowsItem):
            return attach(given)
        x, y, *own = labelled(given.item)
        rows = given.rows
        where = rows.counted(y)
        ctx = rows.merged(own[0] if own else None)
        if rows.mask is None:
            return (x, _row_loss(function, y, where, rows.weights), *([ctx] if ctx is not None else []))
        return x, _row_loss(function, y, where, rows.weights), Context(ctx, row_mask=rows.mask)

    return attach_rows


def _row_loss(f: Callable[..., Any], y: Any, where: Host | None, weights: Host | None) -> Callable[[Any], Any]:
    # As items.loss_of: all batches share the code, so that it compiles once.
    given = {name: array for name, array in (("where", where), ("weights", weights)) if array is not None}

    def loss(output: Any) -> Any:
        return _checked_mean(f, f(output, y, **given))

    return loss


def _checked_mean(f: Callable[..., Any], returned: Any) -> Any:
    """What a loss returned, if it has a weight: a scalar would count by all rows, including the filled ones."""
    value = returned[0] if isinstance(returned, tuple) and returned else returned
    if not isinstance(value, Mean):
        raise TypeError(
            f"The loss {function_text('with_loss', f)} of padded or weighted rows must return a losses.Mean, which "
            "has its weight: a scalar counts by the number of rows, filled ones too. Write "
            "return losses.mse.parts(output, y, where=where), or losses.Mean(total, weight)."
        )
    return returned
