"""What users give to ``fit`` and ``step``, looked at and taken apart."""

from __future__ import annotations

from typing import Any, cast

from kaun import tree
from kaun._loss import Loss
from kaun.context import Context

__all__ = ["check_context", "check_loss", "empty_data", "known_length", "not_data", "parse_item"]


def not_data(data: Any) -> str:
    return (
        f"fit expected data, a kaun.Data or an iterable of (x, loss), received {type(data).__name__}. "
        "For one batch over and over write Data.repeat(1000, (x, loss))."
    )


def empty_data() -> ValueError:
    """The exception for data that is empty."""
    return ValueError(
        "fit received no items: the data is empty. An iterator or generator that was used up gives nothing the second "
        "time; pass a list, a kaun.Data, or make a new one."
    )


def parse_item(item: Any, step: int) -> tuple[Any, Loss, Context | None]:
    if isinstance(item, (tuple, list)) and len(item) in (2, 3) and callable(item[1]):
        ctx = item[2] if len(item) == 3 else None
        if ctx is None or isinstance(ctx, Context):
            return item[0], cast("Loss", item[1]), ctx
    if isinstance(item, (tuple, list)):
        received = f"a {type(item).__name__} of ({', '.join(map(tree.describe, item))})"
    else:
        received = tree.describe(item)
    raise TypeError(
        "fit expected items (x, loss) or (x, loss, Context), with loss a function of the model's output; item "
        f"{step} is {received}. From (x, y) pairs make them with data.with_loss(losses.mse)."
    )


def check_loss(loss: Any) -> Loss:
    if not callable(loss):
        raise TypeError(
            f"step(loss=...) expected a function of the model's output, received {tree.describe(loss)}. "
            "Write loss=lambda output: losses.mse(output, y)."
        )
    return cast("Loss", loss)


def check_context(ctx: Any) -> Context | None:
    if ctx is not None and not isinstance(ctx, Context):
        raise TypeError(f"ctx expected a kaun.Context, received {type(ctx).__name__}. Write Context(name=array).")
    return ctx


def known_length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None
