"""The statistics of ``batch_norm`` that belong to averaged weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kaun import rng, tree
from kaun._calls import public
from kaun._messages import set_on
from kaun.averages.weights import is_average
from kaun.context import Context
from kaun.errors import NonFiniteLoss

__all__ = ["update_statistics"]

S = TypeVar("S")

_NAMED = 5  # leaves, in a message


class _Trainer(Protocol):
    """What ``update_statistics`` uses of a ``Trainer``, which is above this module."""

    @property
    def fit(self) -> Callable[..., Any]: ...
    @property
    def make_state(self) -> Callable[..., Any]: ...


@public
def update_statistics(trainer: _Trainer, state: S, data: Iterable[Any], *, ctx: Context | None = None) -> S:
    """Return a state whose ``.averaged`` has the statistics of ``batch_norm`` that its weights give on this data.

    Without it ``.averaged`` has the layers' state of the weights that train, whose running statistics belong to other
    weights. One pass over the data runs the model in training mode with the averaged weights. A running mean or
    variance is then the mean over all batches, each weighted by its number of rows, without momentum and without the
    earlier statistics. A layer that is not ``batch_norm`` updates its state as in training, starting from the live one.
    Layers that are frozen as a whole keep their state.

    Weights, optimizer state, ``step``, ``key`` and the live layers' state stay as they are, and so does the result of
    ``predict(state, x)``. The next update of the weights discards the statistics: ``.averaged`` has the live ones
    again. Given an averaged state (``state.averaged``, or a ``stopper.best`` of such states), whose ``.averaged`` is
    that state itself, its own layers' state becomes the new statistics.

    Args:
        trainer: The trainer of the state.
        state: A state of a trainer with ``average=``.
        data: The training data: a ``Data`` or any iterable of ``(x, loss)``, ``(x, y)`` or these with a Context. Only x
            and the Context are used.
        ctx: A Context for the layers, at each batch.

    Raises:
        TypeError: If the trainer or an item is of the wrong kind.
        ValueError: If the state has no average, or there are no items.
        NonFiniteLoss: If a statistic would not be finite. ``kaun_state`` is the given state.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, averages, layers, losses
        >>> model = layers.sequential([layers.linear(1, 2), layers.batch_norm(2), layers.linear(2, 1)])
        >>> trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.1), average=averages.ema(0.9))
        >>> x = jnp.arange(8.0)[:, None]
        >>> train = Data.batches((x, 2 * x), batch_size=4).with_loss(losses.mse)
        >>> state = trainer.fit(trainer.init(), train.epochs(5))
        >>> state = averages.update_statistics(trainer, state, train)
        >>> trainer.predict(state.averaged, x).shape
        (8, 1)
    """
    if not (dataclasses.is_dataclass(trainer) and hasattr(trainer, "make_state")):
        raise TypeError(
            f"update_statistics expected a Trainer first, received {tree.describe(trainer)}. Write "
            "averages.update_statistics(trainer, state, train)."
        )
    averaged: Any = cast("Any", state).averaged
    still = _without_updates(trainer)
    with rng.scope(0):  # its key is not used
        begin = still.make_state(averaged.vars)
    try:
        after = still.fit(begin.replace(step=averaged.step, key=averaged.key), _statistics_items(data), ctx=ctx)
    except NonFiniteLoss as error:
        own = _nonfinite(error)
        set_on(own, "kaun_state", state)
        raise own from error.__cause__
    except BaseException as error:
        set_on(error, "kaun_state", state)
        raise

    def update(node: Any) -> Any:
        return node._replace(statistics=after.vars.state, statistics_at=node.updates) if is_average(node) else node

    opt_state = jax.tree_util.tree_map(update, averaged.opt_state, is_leaf=is_average)
    given = cast("Any", state)
    if given.is_averaged:
        given = given.with_averaged(averaged.vars.replace(state=after.vars.state))
    return given.replace(opt_state=opt_state)


def _without_updates(trainer: Any) -> Any:
    """Return the same trainer with an optimizer that changes nothing; it is kept, with its compiled programs."""
    held = vars(trainer)
    if "_without_updates" not in held:
        changes: dict[str, Any] = {"accumulate": 1, "average": None, "microbatches": 1, "penalty": None}
        changes |= {"on_nonfinite": "raise", "optimizer": optax.set_to_zero()}
        held["_without_updates"] = dataclasses.replace(trainer, **changes)
    return held["_without_updates"]


def _nonfinite(error: NonFiniteLoss) -> NonFiniteLoss:
    """Return the exception for a pass that is not finite; that of its fit is about another trainer and its loss."""
    more = f" and {len(error.leaves) - _NAMED} more" if len(error.leaves) > _NAMED else ""
    named = ", ".join(map(repr, error.leaves[:_NAMED])) + more
    text = (
        f"update_statistics: item {error.step} of the data makes {named} not finite, in "
        "a pass with the averaged weights in training mode. The given state is this exception's kaun_state. Look for "
        "values in the x of that item that are not finite or too large for the layer's dtype:\n"
        "    print(trainer.predict(state.averaged, x))"
    )
    return NonFiniteLoss(text, error.step, error.loss, error.parameters, error.leaves)


def _statistics_items(data: Iterable[Any]) -> Generator[Any]:
    before, number, fix = 0, 0, "Give it the pipeline with its loss, data.with_loss(losses.mse)"
    rows_of = getattr(data, "_real_rows", None)  # of a Data, which this package cannot import
    for number, item in enumerate(data if rows_of is None else rows_of("update_statistics", fix), start=1):
        if not (isinstance(item, (tuple, list)) and len(cast("Any", item)) in (2, 3)):
            raise TypeError(
                "update_statistics expected items (x, loss), (x, y), or these with a Context; item "
                f"{number} is {tree.describe(item)}. Pass the data of fit."
            )
        x, _, *own = cast("Any", item)
        context = own[0] if own and own[0] is not None else Context()
        mask = context.get("row_mask")
        shapes = [np.shape(a) for a in jax.tree_util.tree_leaves(x)]
        rows = next((shape[0] for shape in shapes if shape), 1) if mask is None else int(tree.on_host(mask).sum())
        yield x, _no_loss, context.set("statistics_rows", np.array([before, rows], np.int32))
        before += rows
    if not number:
        raise ValueError(
            "update_statistics received no items: the data is empty. An iterator or generator is empty when it is "
            "iterated a second time: pass a list, a kaun.Data, or a new iterator."
        )


def _no_loss(output: Any) -> jax.Array:
    return jnp.zeros((), jnp.float32)
