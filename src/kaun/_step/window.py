"""``Trainer(accumulate=k)``: k items that make one update, that of one batch of all their rows.

The window keeps the sums of gradients and of weights. The weighted mean of the items' gradients is the gradient of the
one batch, because the loss of that batch is the weighted mean of the items' losses. Read ``add_to_window`` first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kaun import tree
from kaun._loss import TracedLoss
from kaun._step.loss_scale import LossScale, has_overflowed, inner_state
from kaun._step.microbatches import batch_length
from kaun._step.nonfinite import both_finite, match_state
from kaun._step.optimizer import Optimizer, apply_update, rates
from kaun._step.rate import find_rate
from kaun._step.settings import Carry, Settings
from kaun._step.trainable import Partition
from kaun._step.watch import Outcome, Update, checks_of
from kaun.averages.weights import put_average, take_average
from kaun.layers.arguments import accumulation_dtype

__all__ = [
    "Item",
    "Window",
    "add_to_window",
    "add_window",
    "flush_window",
    "is_open",
    "optimizer_state",
    "window_rates",
]


class Window(NamedTuple):
    """The optimizer's state with the items that wait for their update. Checkpoints hold these names.

    Before the first item of a window, the sums are still those of the window before it.

    Attributes:
        position: The number of items of the data since the last window ended, including those that were left out; an
            int32 scalar.
        items: The number of these items that are in the sums, an int32 scalar.
        weight: The sum of their weights, a float32 scalar (float64 where a parameter is).
        loss: The weighted sum of their losses, likewise.
        gradient: The weighted sum of their gradients, in float32 for parameters of half precision.
        updates: The number of updates that the state has had, an int32 scalar.
        inner: The optimizer's own state.
    """

    position: jax.Array
    items: jax.Array
    weight: jax.Array
    loss: jax.Array
    gradient: Any
    updates: jax.Array
    inner: Any

    def __repr__(self) -> str:
        return tree.short_repr(self)


class Item(NamedTuple):
    """One item of a window.

    Attributes:
        loss: Its loss, without a penalty.
        weight: Its weight: that of a ``Mean``, or the number of its examples, 1 where x has no rows.
        gradient: The gradient of that loss.
        layer_state: The layers' state after it.
    """

    loss: jax.Array
    weight: jax.Array
    gradient: Any
    layer_state: Any

    @classmethod
    def of(cls, given: TracedLoss, x: Any, gradient: Any, layer_state: Any) -> Item:
        length = batch_length(x)
        weight = jnp.float32(1 if length is None else length) if given.weight is None else given.weight
        return cls(given.value, weight, gradient, layer_state)


def add_window(settings: Settings, opt_state: Any, trained: Any) -> Any:
    """Return a fresh optimizer state as a trainer with this ``accumulate`` keeps it.

    Raises:
        ValueError: If the optimizer calls ``value_fn``.
    """
    if settings.accumulate == 1:
        return opt_state
    update = functools.partial(apply_update, settings.optimizer, value_fn=_refuse_loss_function)
    jax.eval_shape(lambda p, state: update(p, state, p, optax.tree.sum(p)), trained, opt_state)
    gradient = jax.tree_util.tree_map(lambda p: jnp.zeros_like(p, accumulation_dtype(p.dtype)), trained)
    widest = max((g.dtype for g in jax.tree_util.tree_leaves(gradient)), key=lambda dtype: jnp.finfo(dtype).bits)
    none, zero = jnp.int32(0), jnp.zeros((), widest)
    return Window(none, none, zero, zero, gradient, none, opt_state)


def optimizer_state(settings: Settings, opt_state: Any) -> Any:
    """Return the optimizer's state without its loss scale; with ``accumulate`` that is a ``Window``.

    Raises:
        ValueError: If the state has a loss scale or a window and should not, or should have one and does not.
    """
    inner = inner_state(settings.policy, opt_state)
    if (settings.accumulate > 1) != isinstance(inner, Window):
        has, wants = ("a", "accumulate=1") if isinstance(inner, Window) else ("no", f"accumulate={settings.accumulate}")
        raise ValueError(
            f"The state has {has} window of accumulated gradients, and this trainer has {wants}: the state belongs to "
            "another trainer. Write state = trainer.make_state(state.vars)."
        )
    return inner


def add_to_window(
    settings: Settings, parts: Partition, old: dict[str, Any], scale: LossScale | None, item: Item, value: jax.Array,
    key: jax.Array, *, discards: bool,
) -> Outcome:  # fmt: skip
    """Add an item to the window, and make the update if it is the last one.

    An item whose loss or gradient is not finite, or whose gradient overflows because of its loss scale, is left out of
    the sums, but still counts as one of the k items of the window. An update that is not finite is not made, and its
    window ends. Under ``"raise"`` both discard the whole step, because ``fit`` ends there.

    Args:
        settings: The trainer's settings.
        parts: The variables before the item.
        old: Parameters that train, layers' state and ``Window`` before the item.
        scale: The loss scale before it, None without one.
        item: The item.
        value: Its loss, with the penalty.
        key: The step's key.
        discards: Whether this step discards what is not finite. False where its caller does.

    Returns:
        What is after the step, and whether it is finite.
    """
    window, watched, yes = old["opt_state"], settings.on_nonfinite != "ignore", jnp.array(True)
    rolls_back = discards and settings.on_nonfinite == "raise"
    added = {**old, "state": item.layer_state, "opt_state": _with_item(window, item)}
    checks = checks_of(item.gradient, old, added if watched else old, value.dtype)
    finite = both_finite(value, jnp.sqrt(checks.sum()))
    overflowed = None if scale is None else has_overflowed(scale, value, checks)
    taken = yes if not discards else finite if watched or overflowed is None else ~overflowed
    counts = yes if not rolls_back else taken if overflowed is None else taken | overflowed
    position, items = window.position + 1, window.items + taken.astype(jnp.int32)
    ends = counts & (position >= settings.accumulate)
    updates = ends & (items > 0)
    fill = lambda window: _choose(taken, _with_item(window, item), window)
    params, inner, about = _update_if(settings, parts, updates, old, fill, key, checks, discards=discards)
    made = jnp.isfinite(about.sum())
    if rolls_back:
        taken, counts = taken & made, counts & made
    after = _choose(taken, added["opt_state"], window)._replace(
        position=jnp.where(counts, jnp.where(ends, 0, position), window.position),
        items=jnp.where(counts, jnp.where(ends, 0, items), window.items),
        updates=window.updates + (updates & made).astype(jnp.int32),
        inner=inner,
    )
    new = {"params": params, "state": _choose(taken & made, item.layer_state, old["state"]), "opt_state": after}
    checks = checks + about
    overflowed = None if overflowed is None else overflowed & made
    return Outcome(new, checks, jnp.sqrt(checks.sum()), finite & made, taken & made, overflowed)


def flush_window(settings: Settings, carry: Carry, key: jax.Array) -> tuple[Carry, jax.Array]:
    """Make the update of an open window.

    Args:
        settings: The trainer's settings.
        carry: Variables, optimizer state, number of steps.
        key: The run's key.

    Returns:
        The carry after it, and its checks, as ``checks_of`` with a gradient of 0. An update that is not finite is not
        made, unless ``on_nonfinite="ignore"``: under ``"skip"`` the window then ends, under ``"raise"`` it stays.
    """
    vars, opt_state, step = carry
    average, opt_state = take_average(settings.average, opt_state)
    settings.spec.check(vars)
    parts = Partition(settings.trainable, vars, lambda leaf: leaf)
    window = optimizer_state(settings, opt_state)
    old = {"params": parts.vars.params, "state": vars.state, "opt_state": window}
    nothing = checks_of(_zeros(old["params"]), old, old, window.loss.dtype)
    updates, fill, key = window.items > 0, lambda window: window, jax.random.fold_in(key, step)
    params, inner, about = _update_if(settings, parts, updates, old, fill, key, nothing, discards=True)
    made = jnp.isfinite(about.sum())
    ends = made if settings.on_nonfinite == "raise" else jnp.array(True)
    after = window._replace(
        position=jnp.where(ends, 0, window.position),
        items=jnp.where(ends, 0, window.items),
        updates=window.updates + (updates & made).astype(jnp.int32),
        inner=inner,
    )
    after = opt_state._replace(inner=after) if isinstance(opt_state, LossScale) else after
    after = put_average(settings.average, average, after, params)
    return (parts.joined(parts.vars.replace(params=params)), after, step), about


def is_open(settings: Settings, opt_state: Any) -> Any:
    """Return whether a state has a window that waits for its update, a bool or a traced one.

    Raises:
        ValueError: As ``optimizer_state``.
    """
    window = optimizer_state(settings, opt_state)
    return window.position > 0 if isinstance(window, Window) else False


def window_rates(optimizer: Optimizer, before: Any, after: Any) -> dict[str, jax.Array]:
    """Return ``rates`` of a state, also of one with a window; ``updates`` is then the count of the window.

    The learning rate is nan after an item that makes no update, even where it is the same in each update.
    """
    if not isinstance(after, Window):
        return rates(optimizer, before, after)
    found, rate = rates(optimizer, before.inner, after.inner), find_rate(optimizer)
    if rate is not None and rate.fixed is not None:
        found.setdefault("learning_rate", jnp.float32(rate.fixed))
    if "learning_rate" in found:
        found["learning_rate"] = jnp.where(after.updates != before.updates, found["learning_rate"], jnp.nan)
    return found | {"updates": after.updates}


def _with_item(window: Window, item: Item) -> Window:
    """Return a window with an item in its sums."""
    first = window.items == 0
    weight = item.weight.astype(window.weight.dtype)

    def add(total: jax.Array, one: jax.Array) -> jax.Array:
        return jnp.where(first, 0, total) + weight.astype(total.dtype) * one.astype(total.dtype)

    return window._replace(
        weight=jnp.where(first, 0, window.weight) + weight,
        loss=add(window.loss, item.loss),
        gradient=jax.tree_util.tree_map(add, window.gradient, item.gradient),
    )


def _update_if(
    settings: Settings, parts: Partition, updates: jax.Array, old: dict[str, Any], fill: Callable[[Window], Window],
    key: jax.Array, checks: jax.Array, *, discards: bool,
) -> tuple[Any, Any, jax.Array]:  # fmt: skip
    """Return parameters, optimizer's own state and checks after an update, or unchanged where no update is due.

    The condition does not return the sums of the gradients: XLA would copy them for each item.

    Args:
        settings: The trainer's settings.
        parts: The variables before it.
        updates: Whether to make an update.
        old: Parameters that train, layers' state and ``Window`` before it.
        fill: Returns the window with all its items.
        key: The step's key.
        checks: Checks of the same length.
        discards: Whether an update that is not finite is not made.
    """
    params, watched = old["params"], settings.on_nonfinite != "ignore"

    def function(window: Window) -> dict[str, Any]:
        value, gradient = _mean(settings, parts, fill(window), params, key)
        new, inner = apply_update(settings.optimizer, gradient, window.inner, params, value, _refuse_loss_function)
        return match_state(old, {**old, "params": new, "opt_state": window._replace(inner=inner)})

    def gradient() -> Any:
        # The items' gradients were looked at before. What is finite counts as 0: the norm of a step is its item's.
        if settings.penalty is None:
            return _zeros(params)
        _, whole = _mean(settings, parts, fill(old["opt_state"]), params, key)
        return jax.tree_util.tree_map(lambda g: jnp.where(jnp.isfinite(g), jnp.zeros_like(g), g), whole)

    def make() -> tuple[Any, Any, jax.Array]:
        update = Update(function, old, discards=watched and discards)
        about = update.checks(gradient(), checks.dtype) if watched else nothing
        new = update.made(jnp.isfinite(about.sum()))
        return new["params"], new["opt_state"].inner, about

    nothing = jnp.zeros_like(checks)
    return lax.cond(updates, make, lambda: (params, old["opt_state"].inner, nothing))


def _mean(settings: Settings, parts: Partition, window: Window, params: Any, key: jax.Array) -> tuple[jax.Array, Any]:
    """Return the loss of all items of a window, and its gradient, with the penalty; 0 for a weight of 0."""
    weight = jnp.where(window.weight == 0, 1, window.weight)
    value = window.loss / weight.astype(window.loss.dtype)
    gradient = jax.tree_util.tree_map(lambda total: total / weight.astype(total.dtype), window.gradient)
    if settings.penalty is not None:
        penalty = functools.partial(_penalty, settings, parts, key)
        more, slope = jax.value_and_grad(penalty)(params)
        value = value + more.astype(value.dtype)
        gradient = jax.tree_util.tree_map(lambda g, s: g + s.astype(g.dtype), gradient, slope)
    return value, jax.tree_util.tree_map(lambda g, p: g.astype(p.dtype), gradient, params)


def _penalty(settings: Settings, parts: Partition, key: jax.Array, params: Any) -> jax.Array:
    assert settings.penalty is not None
    return settings.penalty.value(parts.whole(params), key)


def _refuse_loss_function(params: Any) -> Any:
    raise ValueError(
        "Trainer(accumulate=...) cannot be used with an optimizer that calls value_fn, the loss as a function of the "
        "parameters, as line searches do (optax.lbfgs): of the earlier items of a window only the sum of their "
        "gradients is kept. Give it one larger batch in parts, Data.batch(n) and Trainer(microbatches=4), or use an "
        "optimizer that needs gradients only, optax.adam(1e-3)."
    )


def _choose(condition: jax.Array, values: Any, others: Any) -> Any:
    one = lambda a, b: a if a is b else jnp.where(condition, a, b)
    return jax.tree_util.tree_map(one, values, others)


def _zeros(params: Any) -> Any:
    return jax.tree_util.tree_map(jnp.zeros_like, params)
