"""What one step computes, as pure functions of settings, carry and batch. Read ``train_step`` first.

The carry is the part of a ``TrainState`` that changes: variables, optimizer state and the number of steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kaun import rng, tree
from kaun._loss import TracedLoss
from kaun._step.loss_scale import (
    LossScale,
    adapt_scale,
    add_loss_scale,
    has_overflowed,
    inner_state,
    scale_loss,
    unscale,
)
from kaun._step.microbatches import check_microbatches, run_in_parts
from kaun._step.model import VarsSpec, check_model
from kaun._step.nonfinite import both_finite, check_mode, match_state
from kaun._step.norms import layer_norms
from kaun._step.optimizer import Optimizer, apply_update, check_optimizer, check_params, init_optimizer, rates
from kaun._step.precision import Policy, apply_model, cast_to_compute, parse_precision
from kaun._step.trainable import Partition, check_trainable, trainable_part
from kaun._step.watch import Update, checks_of, gradient_finite
from kaun.context import Context
from kaun.layers.core import Layer, Vars

__all__ = ["Settings", "StepOutput", "eval_step", "init_carry", "make_settings", "train_step"]

Carry = tuple[Vars, Any, jax.Array]
_NO_NUMBERS: Mapping[str, int] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of a ``Trainer``, checked, as a step uses them.

    Attributes:
        model: The ``Layer``.
        optimizer: The optimizer.
        on_nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"``.
        trainable: Whether the parameter at a path trains; None if all do.
        policy: The dtypes of ``precision``; None without it.
        microbatches: In how many parts a batch is computed.
        spec: Shapes and dtypes of the model's variables.
    """

    model: Layer[Any, Any]
    optimizer: Optimizer
    on_nonfinite: str
    trainable: Callable[[str], Any] | None
    policy: Policy | None
    microbatches: int
    spec: VarsSpec


def make_settings(
    *, model: Any, optimizer: Any, on_nonfinite: Any, trainable: Any, precision: Any, microbatches: Any
) -> Settings:
    """Check the arguments of a trainer.

    Raises:
        TypeError, ValueError: If an argument is not of the kind that ``Trainer`` expects.
    """
    check_model(model)
    check_optimizer(optimizer)
    check_mode(on_nonfinite)
    check_trainable(trainable)
    check_microbatches(microbatches)
    policy = parse_precision(precision)
    spec = VarsSpec(model, policy)
    return Settings(model, optimizer, on_nonfinite, trainable, policy, microbatches, spec)


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
    opt_state = init_optimizer(settings.optimizer, trained)
    return vars, add_loss_scale(settings.policy, opt_state), jnp.zeros((), jnp.int32)


class StepOutput(NamedTuple):
    """What ``train_step`` computed.

    Attributes:
        loss: The loss before the update, a floating scalar.
        numbers: Scalars for the reports, by name: ``grad_norm`` (nan where the update is not finite and the gradient
            is), ``learning_rate`` where the optimizer state has one, what the loss returned with its value; and
            ``finite`` under ``on_nonfinite="skip"`` and with a loss scale: 1.0 where the step is an update, 0.0 where
            loss or gradient are not finite, -1.0 where the update is not.
        carry: The carry after the step. A discarded step changes the number of steps alone.
        finite: Whether loss, gradient and update are finite, a bool scalar. An overflow for which the loss scale was
            too large counts as finite: it is discarded too, and changes the scale.
        checks: As ``checks_of`` returns them.
    """

    loss: jax.Array
    numbers: dict[str, jax.Array]
    carry: Carry
    finite: jax.Array
    checks: jax.Array


def train_step(
    settings: Settings,
    carry: Carry,
    key: jax.Array,
    x: Any,
    ctx: Context,
    loss: Callable[[Any], TracedLoss],
    training: bool,
    discard: bool = True,
    wanted: Mapping[str, int] = _NO_NUMBERS,
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
        wanted: What reports ask for in their ``numbers``, and at every how many steps.

    Returns:
        The step's results. A step that is not finite is discarded, unless ``on_nonfinite="ignore"`` or ``discard`` is
        False. With a loss scale the step itself always discards.
    """
    vars, opt_state, step = carry
    settings.spec.check(vars)
    step_key = jax.random.fold_in(key, step)
    parts = Partition(settings.trainable, vars, functools.partial(cast_to_compute, settings.policy))
    before = inner_state(settings.policy, opt_state)
    scaled = isinstance(opt_state, LossScale)

    def objective(params: Any) -> tuple[jax.Array, Any]:
        model = functools.partial(
            apply_model, settings.policy, settings.model, parts.forward(params), training=training
        )
        with rng.scope(step_key), parts.frozen_layers():
            output, layer_state = run_in_parts(settings.microbatches, model, x, ctx, vars.state, step_key)
            given = loss(output)
        value = given.value
        return scale_loss(opt_state, value) if scaled else value, (given, parts.kept(layer_state))

    (_, (given, layer_state)), gradient = jax.value_and_grad(objective, has_aux=True)(parts.vars.params)
    value = given.value
    if scaled:
        gradient = unscale(opt_state, gradient)

    def update(opt_state: Any) -> dict[str, Any]:
        value_fn = lambda params: objective(params)[1][0].value
        params, after = apply_update(settings.optimizer, gradient, opt_state, parts.vars.params, value, value_fn)
        return match_state(old, {"params": params, "state": layer_state, "opt_state": after})

    old = {"params": parts.vars.params, "state": vars.state, "opt_state": before}
    watched = settings.on_nonfinite != "ignore"
    made = Update(update, old, discards=scaled or (watched and discard))
    checks = made.checks(gradient, value.dtype) if watched else checks_of(gradient, old, old, value.dtype)
    norm = jnp.sqrt(checks.sum())
    finite = both_finite(value, norm)
    overflowed = has_overflowed(opt_state, value, checks) if scaled else None
    kept = finite if watched else jnp.array(True) if overflowed is None else ~overflowed
    norms, kept = layer_norms(made, checks, step, kept, wanted)
    new = made.made(kept)
    numbers = {"grad_norm": norm}
    if settings.on_nonfinite == "skip" or scaled:
        by_update = ~finite & jnp.isfinite(value) & gradient_finite(checks)
        numbers["finite"] = finite.astype(jnp.float32) - by_update.astype(jnp.float32)
    numbers |= rates(settings.optimizer, before, new["opt_state"]) | given.scalars | norms
    after = new["opt_state"]
    if overflowed is not None:
        after = adapt_scale(opt_state, after, kept, overflowed)
        finite, checks = finite | overflowed, jnp.where(overflowed, 0, checks)
        numbers["grad_norm"] = jnp.where(overflowed, 0, numbers["grad_norm"])
    vars_after = parts.joined(vars.replace(params=new["params"], state=new["state"]))
    return StepOutput(value, numbers, (vars_after, after, step + 1), finite, checks)


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
