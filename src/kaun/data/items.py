"""Items, parsed in one place: ``(x, loss)`` or ``(x, loss, ctx)`` for ``fit``, with labels for ``evaluate``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from kaun import tree
from kaun._calls import foreign_function
from kaun._loss import Loss
from kaun.context import Context
from kaun.data.arguments import function_text
from kaun.data.collate import outline_of
from kaun.data.convert import is_tensor
from kaun.losses import parts_of

__all__ = [
    "Item", "LabelledItem", "check_context", "check_loss", "empty_data", "labelled", "loss_attacher", "loss_text",
    "not_data",
]  # fmt: skip


class Item(NamedTuple):
    """An item of the data of ``fit``.

    Attributes:
        x: The model's input, an array or any pytree of arrays.
        loss: A function of the model's output.
        ctx: The item's own Context, or None.
    """

    x: Any
    loss: Loss
    ctx: Context | None

    @staticmethod
    def is_training_item(item: Any) -> bool:
        """Whether an item has a loss: a tuple or list of two or three, whose second element is callable."""
        return isinstance(item, (tuple, list)) and len(cast("Any", item)) in (2, 3) and callable(cast("Any", item)[1])

    @classmethod
    def parse(cls, item: Any, step: int) -> Item:
        """The parts of an item that ``fit`` takes at ``step``.

        Raises:
            TypeError: If it is not ``(x, loss)`` or ``(x, loss, Context)``.
        """
        # The test of is_training_item once more, because this runs for each step and a call costs 0.1 us.
        if isinstance(item, (tuple, list)) and len(item) in (2, 3) and callable(item[1]):
            ctx = item[2] if len(item) == 3 else None
            if ctx is None or isinstance(ctx, Context):
                return tuple.__new__(cls, (item[0], item[1], ctx))  # cls(...) is a call in Python
        raise TypeError(
            "fit expected items (x, loss) or (x, loss, Context), with loss a function of the model's output; item "
            f"{step} is {_received(item)}. {_fix(item)}."
        )


class LabelledItem(NamedTuple):
    """An item of the data of ``evaluate``.

    Attributes:
        x: The model's input, an array or any pytree of arrays.
        y: The targets, likewise.
        ctx: The item's own Context, or None.
    """

    x: Any
    y: Any
    ctx: Context | None

    @classmethod
    def parse(cls, item: Any, number: int) -> LabelledItem:
        """The parts of an item that ``evaluate`` takes as the ``number``-th.

        Raises:
            TypeError: If it is not ``(x, y)`` or ``(x, y, Context)``.
        """
        if isinstance(item, (tuple, list)) and len(item) in (2, 3) and not callable(item[1]):
            ctx = item[2] if len(item) == 3 else None
            if ctx is None or isinstance(ctx, Context):
                return tuple.__new__(cls, (item[0], item[1], ctx))
        fix = (
            "This item is for fit: pass the pipeline without with_loss, whose items are (x, y)."
            if Item.is_training_item(item)
            else "To make them from arrays, write Data.batches((x, y), batch_size=256)."
        )
        raise TypeError(
            "evaluate expected items (x, y) or (x, y, Context), with targets y; item "
            f"{number} is {_received(item)}. {fix}"
        )


def loss_attacher(f: Callable[..., Any]) -> Callable[[Any], Any]:
    """The function that attaches a loss to an item. For a loss of kaun it attaches the ``parts`` of that loss."""
    return functools.partial(_attach_loss, parts_of(f))


def loss_text(f: Any) -> str:
    """The name, file and line of a loss given to ``with_loss``.

    Raises:
        TypeError: If it is not callable, or belongs to a library that does not compute with JAX.
    """
    if (foreign := foreign_function(f, "losses")) is not None:
        raise TypeError(f"with_loss expected a function (output, y) of JAX arrays, {foreign}")
    return function_text("with_loss", f)


def _attach_loss(f: Callable[[Any, Any], Any], item: Any) -> Any:
    """The item ``(x, y)`` or ``(x, y, ctx)`` with the function ``output -> f(output, y)`` in place of y."""
    x, y, *ctx = labelled(item)
    return x, _loss(f, y), *ctx


def labelled(item: Any) -> tuple[Any, ...]:
    """The parts of an item ``(x, y)`` or ``(x, y, ctx)`` that has no loss yet.

    Raises:
        TypeError: If it is neither, or has its loss already.
    """
    if not (isinstance(item, (tuple, list)) and len(item) in (2, 3)):
        raise TypeError(
            f"with_loss expected items (x, y) or (x, y, Context(...)), received {outline_of(item)}. Convert them "
            'first: data.map(lambda item: (item["x"], item["y"])).with_loss(f).'
        )
    x, y, *ctx = item
    if callable(y):
        raise TypeError(
            f"with_loss expected labels y in items (x, y), received the function {function_text('with_loss', y)}: "
            "these items already have a loss. Remove with_loss."
        )
    if ctx and not isinstance(ctx[0], Mapping):
        raise TypeError(
            f"with_loss expected a Context as third element of an item (x, y, ctx), received {outline_of(ctx[0])}. "
            "Give it a name, data.map(lambda b: (b[0], b[1], Context(weights=b[2]))), or make it part of y."
        )
    return x, y, *ctx


def _loss(f: Callable[[Any, Any], Any], y: Any) -> Callable[[Any], Any]:
    # A plain function with f and y in its cells: all batches share its code, so that it compiles once.
    def loss(output: Any) -> Any:
        return f(output, y)

    return loss


def not_data(data: Any) -> str:
    """The message for what cannot be iterated."""
    return (
        f"fit expected data, a kaun.Data or an iterable of (x, loss), received {type(data).__name__}. "
        "To train on one batch many times, write Data.repeat(1000, (x, loss))."
    )


def empty_data(entry: str) -> ValueError:
    """The exception of ``fit``, ``evaluate`` or ``predict`` for data without items."""
    return ValueError(
        f"{entry} received no items: the data is empty. An iterator or generator is empty when it is iterated a "
        "second time: pass a list, a kaun.Data, or a new iterator."
    )


def check_loss(loss: Any) -> Loss:
    """The loss given to ``step``.

    Raises:
        TypeError: If it is not callable.
    """
    if not callable(loss):
        raise TypeError(
            f"step(loss=...) expected a function of the model's output, received {tree.describe(loss)}. "
            "Write loss=lambda output: losses.mse(output, y)."
        )
    return cast("Loss", loss)


def check_context(ctx: Any) -> Context | None:
    """The context given to a method of a trainer.

    Raises:
        TypeError: If it is neither a Context nor None.
    """
    if ctx is not None and not isinstance(ctx, Context):
        raise TypeError(f"ctx expected a kaun.Context, received {type(ctx).__name__}. Write Context(name=array).")
    return ctx


def _fix(item: Any) -> str:
    """What to write for what is not an item with a loss."""
    if not isinstance(item, (tuple, list)):
        return (
            "For one pair write [(x, loss)]; for arrays x and y write Data.batches((x, y), batch_size=32)"
            ".with_loss(losses.mse)"
        )
    if len(cast("Any", item)) == 3 and Item.is_training_item(item):
        return "Write (x, loss, Context(name=array))"
    return f"To make them from pairs (x, y), write {_with_loss(item)}"


def _with_loss(item: Any) -> str:
    """What makes items with a loss of those of a loader."""
    parts = cast("Any", item) if isinstance(item, (tuple, list)) else [item]
    data = "Data.from_iterable(loader)" if any(map(is_tensor, parts)) else "data"
    return f"{data}.with_loss(losses.mse)"


def _received(item: Any) -> str:
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of ({', '.join(map(tree.describe, cast('Any', item)))})"
    return tree.describe(item)
