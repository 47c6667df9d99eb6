"""What one step computes, as pure functions of settings, carry and batch. Read ``train_step`` first.

The carry is the part of a ``TrainState`` that changes: variables, optimizer state and the number of steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kaun import rng, tree
from kaun._loss import TracedLoss
from kaun._step.loss_scale import LossScale, adapt_scale, add_loss_scale, has_overflowed, scale_loss, unscale
from kaun._step.microbatches import run_in_parts
from kaun._step.nonfinite import both_finite, match_state
from kaun._step.norms import layer_norms
from kaun._step.optimizer import apply_update, check_params, init_optimizer
from kaun._step.precision import apply_model, cast_to_compute
from kaun._step.settings import Carry, Settings
from kaun._step.trainable import Partition, trainable_part
from kaun._step.watch import Outcome, Update, checks_of, gradient_finite
from kaun._step.window import Item, add_to_window, add_window, optimizer_state, window_rates
from kaun.averages.weights import add_average, put_average, take_average
from kaun.context import Context
from kaun.layers.core import Vars
from kaun.sharding.core import added_gradient, gathered

__all__ = ["StepOutput", "eval_step", "init_carry", "train_step"]

_NO_NUMBERS: Mapping[str, int] = MappingProxyType({})


def init_carry(settings: Settings, vars: Vars) -> Carry:
    """Return variables, a fresh optimizer state for those that train, and step 0.

    Raises:
        TypeError: If a parameter that trains is not floating, or the optimizer does not fit the parameters.
        ValueError: If the variables belong to another model, or nothing would train.
    """
    vars = jax.tree_util.tree_map(tree.strong, vars)
    settings.spec.check(vars)
    trained = trainable_part(settings.trainable, vars.params) if jax.tree_util.tree_leaves(vars.params) else None
    check_params(vars.params, trained, settings.model.name.splitlines()[0])
    opt_state = add_average(settings.average, init_optimizer(settings.optimizer, trained), trained, vars.state)
    opt_state = add_window(settings, opt_state, trained)
    return vars, add_loss_scale(settings.policy, opt_state), jnp.zeros((), jnp.int32)


class StepOutput(NamedTuple):
    """What ``train_step`` computed.

    Attributes:
        loss: The loss before the update, a floating scalar.
        numbers: Scalars for the reports, by name: ``grad_norm`` (nan where the update is not finite and the gradient
            is), ``learning_rate`` where the optimizer state has one; and ``finite`` under ``on_nonfinite="skip"`` and
            with a loss scale: 1.0 where the step is an update, 0.0 where loss or gradient are not finite, -1.0 where
            the update is not. With them what the loss returned, as ``TracedLoss.numbers`` has it.
        carry: The carry after the step. A discarded step changes the number of steps alone.
        finite: Whether loss, gradient and update are finite, a bool scalar. An overflow for which the loss scale was
            too large counts as finite: it is discarded too, and changes the scale.
        checks: As ``checks_of`` returns them.
        left: How many more updates are proved to be finite (``Update.proof``); None where nothing is proved.
    """

    loss: jax.Array
    numbers: dict[str, jax.Array]
    carry: Carry
    finite: jax.Array
    checks: jax.Array
    left: jax.Array | None = None


def train_step(
    settings: Settings,
    carry: Carry,
    key: jax.Array,
    x: Any,
    ctx: Context,
    loss: Callable[..., TracedLoss],
    training: bool,
    discard: bool = True,
    wanted: Mapping[str, int] = _NO_NUMBERS,
    clean: Any = None,
    left: Any = None,
) -> StepOutput:
    """Run one training step: forward pass, loss, gradient, update.

    Args:
        settings: The trainer's settings.
        carry: Variables, optimizer state, number of steps.
        key: The run's key; the step draws from a function of it and the number of steps.
        x: The model's input.
        ctx: The context of the layers.
        loss: A function of the model's output, as ``trace_loss`` after its first arguments.
        training: Whether the layers run in training mode.
        discard: Whether the step itself discards an update that is not finite. False where its caller does.
        wanted: The numbers that reports ask for, by name, with the n of "at every n-th step".
        clean: Whether all elements of the carry are known to be finite, a bool scalar; None where that is not known.
        left: How many updates are proved to be finite, this one among them, a float scalar; None where each is looked
            at.

    Returns:
        The step's results. A step that is not finite is discarded, unless ``on_nonfinite="ignore"`` or ``discard`` is
        False. With a loss scale the step itself always discards.
    """
    vars, opt_state, step = carry
    average, opt_state = take_average(settings.average, opt_state)
    settings.spec.check(vars)
    step_key = jax.random.fold_in(key, step)
    parts = Partition(settings.trainable, vars, functools.partial(cast_to_compute, settings.policy))
    before = optimizer_state(settings, opt_state)
    scale = opt_state if isinstance(opt_state, LossScale) else None

    def objective(params: Any) -> tuple[jax.Array, Any]:
        used = gathered(settings.sharding, parts.forward(params))
        model = functools.partial(apply_model, settings.policy, settings.model, used, training=training)
        with rng.scope(step_key), parts.frozen_layers():
            about = (x, ctx, vars.state, step_key, settings.sharding)
            output, layer_state = run_in_parts(settings.microbatches, model, *about)
            given = alone = loss(output, needs_gradient=settings.penalty is None)
        if settings.penalty is not None:
            given = settings.penalty.add(alone, parts.whole(params), step_key)
        value = given.value if settings.accumulate == 1 else alone.value
        return value if scale is None else scale_loss(scale, value), (given, alone, parts.kept(layer_state))

    (_, (given, alone, layer_state)), gradient = jax.value_and_grad(objective, has_aux=True)(parts.vars.params)
    gradient = gradient if scale is None else unscale(scale, gradient)
    old = {"params": parts.vars.params, "state": vars.state, "opt_state": before}
    discards = scale is not None or (settings.on_nonfinite != "ignore" and discard)
    if settings.accumulate > 1:
        item = Item.of(alone, x, gradient, layer_state)
        done = add_to_window(settings, parts, old, scale, item, given.value, step_key, discards=discards)
        made = done.new["opt_state"].updates != before.updates
        norms, _ = layer_norms(old["params"], lambda: done.new["params"], done.checks, step, jnp.array(True), wanted)
        norms |= {name: jnp.where(made, n, jnp.nan) for name, n in norms.items() if name.startswith("update_ratio/")}
    else:

        def update(opt_state: Any) -> dict[str, Any]:
            value_fn = lambda params: objective(params)[1][0].value
            trained = parts.vars.params
            params, after = apply_update(settings.optimizer, gradient, opt_state, trained, given.value, value_fn)
            return match_state(old, {"params": params, "state": layer_state, "opt_state": after})

        one = Update(update, old, discards=discards, layer_state=layer_state)
        added = added_gradient(settings.sharding, vars.params, gradient)
        done, norms = _update_now(settings, one, scale, (gradient, added), given.value, step, wanted, clean, left)
    numbers = _numbers(settings, done, given.value)
    numbers |= window_rates(settings.optimizer, before, done.new["opt_state"]) | given.numbers() | norms
    after, finite, checks = done.new["opt_state"], done.finite, done.checks
    if scale is not None and done.overflowed is not None:
        after = adapt_scale(scale, after, done.kept, done.overflowed)
        finite, checks = finite | done.overflowed, jnp.where(done.overflowed, 0, checks)
    after = put_average(settings.average, average, after, done.new["params"])
    vars_after = parts.joined(vars.replace(params=done.new["params"], state=done.new["state"]))
    return StepOutput(given.value, numbers, (vars_after, after, step + 1), finite, checks, done.left)


def _update_now(
    settings: Settings, update: Update, scale: LossScale | None, gradients: Any, value: jax.Array, step: jax.Array,
    wanted: Mapping[str, int], clean: Any, left: Any,
) -> tuple[Outcome, dict[str, jax.Array]]:  # fmt: skip
    """Make the update of one item, unless it is not finite; with it return the numbers of ``layer_norms``."""
    watched, old = settings.on_nonfinite != "ignore", update.before
    gradient, added = gradients
    if left is not None and (proof := update.proof(gradient)) is not None:
        checks, left = update.proved_checks(added, value.dtype, proof, left)
    else:
        left = None
        checks = update.checks(gradient, value.dtype, clean) if watched else checks_of(added, old, old, value.dtype)
    norm = jnp.sqrt(checks.sum())
    finite = both_finite(value, norm)
    overflowed = has_overflowed(scale, value, checks) if scale is not None else None
    kept = finite if watched else jnp.array(True) if overflowed is None else ~overflowed
    norms, kept = layer_norms(old["params"], lambda: update.after()["params"], checks, step, kept, wanted)
    return Outcome(update.made(kept), checks, norm, finite, kept, overflowed, left), norms


def _numbers(settings: Settings, done: Outcome, value: jax.Array) -> dict[str, jax.Array]:
    overflowed = done.overflowed
    numbers = {"grad_norm": done.norm if overflowed is None else jnp.where(overflowed, 0, done.norm)}
    if settings.on_nonfinite == "skip" or done.overflowed is not None:
        by_update = ~done.finite & jnp.isfinite(value) & gradient_finite(done.checks)
        numbers["finite"] = done.finite.astype(jnp.float32) - by_update.astype(jnp.float32)
    return numbers


def eval_step(settings: Settings, carry: tuple[Vars, jax.Array], key: jax.Array, x: Any, ctx: Context) -> Any:
    """Return the model's output in evaluation mode.

    Args:
        settings: The trainer's settings.
        carry: Variables and number of steps.
        key: The run's key.
        x: The model's input.
        ctx: The context of the layers.
    """
    vars, step = carry
    settings.spec.check(vars)
    with rng.scope(jax.random.fold_in(key, step)):
        return apply_model(settings.policy, settings.model, vars, x, ctx, training=False)[0]
