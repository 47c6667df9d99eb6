"""What the programs of an ensemble compute: those of its trainer under ``jax.vmap``."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import rng, tree
from kaun._engine import CODE, LOST, NOT_FINITE, RUNS, STOPPED, MemberPacking, sums_members
from kaun._kernels import columns_lost, with_summed_products
from kaun._loss import FrozenLoss, array_names, snapshot_loss, trace_function
from kaun._messages import add_note, locate
from kaun._step import Settings, StepOutput, eval_step, train_step
from kaun.averages.weights import without_weights
from kaun.context import Context
from kaun.layers.core import Vars
from kaun.metrics import CountedParts
from kaun.state import Members

__all__ = ["Stop", "checked_stop", "eval_members", "members_axes", "score_members", "train_members"]

Stop = FrozenLoss
"""``stop=``, captured as a loss is; its arrays are constants of the program."""


def train_members(
    settings: Settings,
    stop: Stop | None,
    size: int | None,
    packs: bool,
    carry: tuple[Vars, Members, jax.Array],
    key: jax.Array,
    x: Any,
    ctx: Context,
    loss: Callable[[Any], Any],
    training: bool,
    discard: bool = True,
    wanted: Mapping[str, int] | None = None,
) -> StepOutput:
    """Run one training step of each member, as ``train_step`` with the members along axis 0 of carry, key and results.

    Args:
        settings: The trainer's settings.
        stop: Which losses stop a member, None for none.
        size: The number of members, where each has items of its own, along axis 0; None where all share the items.
        packs: Whether the states of small members may be packed: not where the members lie on several devices.
        carry: Variables, optimizer state, number of steps.
        key: The keys of the members' runs.
        x: The model's input.
        ctx: The context of the layers.
        loss: ``functools.partial(trace_loss, key, arrays)``.
        training: Whether the layers run in training mode.
        discard: Unused: a member that does not run, or whose step is discarded, keeps its state here.
        wanted: As for ``train_step``.
    """
    loss_key, arrays = loss.args  # pyright: ignore[reportFunctionMemberAccess]

    def one(carry: Any, key: jax.Array, x: Any, ctx: Context, arrays: Sequence[Any]) -> tuple[StepOutput, jax.Array]:
        of = functools.partial(loss.func, loss_key, arrays)  # pyright: ignore[reportFunctionMemberAccess]
        return _train_member(settings, stop, carry, key, x, ctx, of, training, wanted or {})

    names = {"x": x, "ctx": ctx, "loss": dict(zip(array_names(loss_key, len(arrays)), arrays, strict=True))}
    axes = functools.partial(members_axes, size, names)
    train, given = jax.vmap(one, (0, 0, axes(x), axes(ctx), axes(arrays))), (carry, key, x, ctx, arrays)
    small = MemberPacking.of(carry) if packs else None  # as the loop packs them
    out, stops = with_summed_products(train, *given) if sums_members(small) else train(*given)
    own = jax.tree_util.tree_leaves((carry[0], carry[1].inner, carry[2]))
    packing = None if small is None else MemberPacking(own)
    return _settled(settings.on_nonfinite, stop is not None, packing, carry, out, stops)


def _train_member(
    settings: Settings, stop: Stop | None, carry: tuple[Vars, Members, jax.Array], key: jax.Array, x: Any,
    ctx: Context, loss: Callable[[Any], Any], training: bool, wanted: Mapping[str, int],
) -> tuple[StepOutput, jax.Array]:  # fmt: skip
    """Run one step of a member as if it ran, and return with it whether its loss stops it."""
    vars, members, step = carry
    mode, before = settings.on_nonfinite, (vars, members.inner, step)
    # A small member leaves discarding to ``_settled``, which a member that does not run needs anyway.
    looks = dataclasses.replace(settings, on_nonfinite="ignore") if _settles(mode, before) else settings
    out = train_step(looks, before, key, x, ctx, loss, training, mode == "skip", wanted)
    if taken := {"losses", CODE} & out.numbers.keys():
        raise TypeError(f"The loss of an ensemble returned {taken.pop()!r}, a name that is kaun's own. Rename it.")
    if parts := [name for name, number in out.numbers.items() if isinstance(number, CountedParts)]:
        raise TypeError(
            f"The loss of an ensemble must return scalars, and {parts[0]!r} are the parts of a metric, whose value "
            "reports would compute for all members together. Return a scalar or a losses.Mean(total, weight), and "
            "compute the metric with many.evaluate."
        )
    return out, jnp.array(False) if stop is None else _stops(stop, key, out.loss)


def _settled(
    mode: str, can_stop: bool, packing: MemberPacking | None, carry: tuple[Vars, Members, jax.Array], out: StepOutput,
    stops: jax.Array,
) -> StepOutput:  # fmt: skip
    """Return a step in which each member that does not run, or whose step is to be discarded, keeps its state.

    Args:
        mode: ``on_nonfinite``.
        can_stop: Whether there is a ``stop``.
        packing: How the state is packed here, None if it is not.
        carry: The carry before the step.
        out: The step of the members, as if all ran.
        stops: Which members its loss stops.
    """
    vars, members, step = carry
    before, after, raises = (vars, members.inner, step), out.carry, mode == "raise"
    no, numbers = jnp.zeros_like(members.stopped), dict(out.numbers)
    nonfinite, stopped = members.nonfinite if raises else no, members.stopped if can_stop else no
    settles = _settles(mode, before, axis=1)
    finite = kept = out.finite if raises or settles else numbers["finite"] > 0 if mode == "skip" else ~no
    if settles:
        spoiled = out.finite & _spoiled(before, after)
        finite = kept = out.finite & ~spoiled
        if not raises:  # an overflow, for which the loss scale was too large, is no update and changes the scale
            numbers["finite"] = jnp.where(spoiled, -1, numbers.get("finite", out.finite.astype(jnp.float32)))
            numbers["grad_norm"] = jnp.where(spoiled, jnp.nan, numbers["grad_norm"])
            finite = numbers["finite"] > 0
    runs = ~(nonfinite | stopped)
    stops = runs & stops & (finite if raises else True)
    code = jnp.where(runs, jnp.where(finite, RUNS, NOT_FINITE), jnp.where(nonfinite, LOST, STOPPED))
    if raises or can_stop or settles:
        changes = runs & ~stops
        vars, opt_state, steps = _select(packing, changes & kept if raises or settles else changes, after, before)
        after = (
            vars,
            opt_state,
            steps if raises else jnp.where(changes, step + 1, step),
        )  # a step that is skipped is counted
    ended = nonfinite | (runs & ~finite) if raises else members.nonfinite
    vars, opt_state, step = after
    after = vars, Members(stopped | stops, ended, opt_state), step
    return out._replace(numbers={**numbers, CODE: code.astype(jnp.float32)}, carry=after)


def _settles(mode: str, before: Any, axis: int = 0) -> bool:
    """Whether what a step makes of a member is looked at by ``_settled``, and not by the step; ``axis`` as 1 of all."""
    numbers = sum(math.prod(leaf.shape[axis:]) for leaf in jax.tree_util.tree_leaves(before))
    return mode != "ignore" and numbers <= MemberPacking.MOST


def _select(packing: MemberPacking | None, kept: jax.Array, after: Any, before: Any) -> Any:
    """Return the state after a step for the members that keep it, and that before it for the others."""
    (new, structure), old = jax.tree_util.tree_flatten(after), jax.tree_util.tree_leaves(before)
    if packing is None:
        of = lambda leaf: kept.reshape(-1, *[1] * (leaf.ndim - 1))
        return structure.unflatten([jnp.where(of(a), a, b) for a, b in zip(new, old, strict=True)])
    pairs = zip(packing.pack(new), packing.pack(old), strict=True)
    return structure.unflatten(packing.unpack([jnp.where(kept, a, b) for a, b in pairs]))


def _spoiled(before: Any, after: Any) -> jax.Array:
    """Return for each member whether a step makes a leaf not finite that was finite before, as ``checks_of`` finds."""
    states = [(vars, without_weights(opt_state)) for vars, opt_state, _ in (before, after)]
    leaves = zip(*map(jax.tree_util.tree_leaves, states), strict=True)
    pairs = [(old, new) for old, new in leaves if old is not new and jnp.issubdtype(old.dtype, jnp.inexact)]
    old, new = (MemberPacking(each).pack(each) for each in zip(*pairs, strict=True))
    return functools.reduce(jnp.logical_or, [columns_lost(*each) for each in zip(old, new, strict=True)])


def checked_stop(stop: Any) -> Stop:
    """Return the argument ``stop``, captured.

    Raises:
        TypeError: If it is not callable.
        CaptureError: As for a loss.
    """
    if not callable(stop):
        raise TypeError(
            f"stop expected a function of a member's loss, received {tree.describe(stop)}. Write "
            "stop=lambda loss: loss < 0.05."
        )
    taken: Any = snapshot_loss(stop)
    return taken.with_arrays([np.asarray(array) for array in taken.arrays])


def _stops(stop: Stop, key: jax.Array, loss: jax.Array) -> jax.Array:
    """Return whether ``stop(loss)``."""

    def check(value: Any) -> jax.Array:
        if np.shape(value) != () or jnp.result_type(value) != jnp.bool_:
            raise TypeError(
                f"stop {locate(stop.function)} must return whether a member stops, a bool scalar, received "
                f"{tree.describe(value)}. Write stop=lambda loss: loss < 0.05."
            )
        return jnp.asarray(value)

    try:
        with rng.scope(key):
            return trace_function(stop.key, stop.arrays, (loss,), check, "stop")
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        add_note(
            error,
            f"In stop {locate(stop.function)}. It is compiled: write stop=lambda loss: loss < 0.05, and for an `and` "
            "of two conditions (loss > 0) & (loss < 0.05).",
        )
        raise


def eval_members(
    settings: Settings, size: int | None, carry: tuple[Vars, jax.Array], key: jax.Array, x: Any, ctx: Context
) -> Any:
    """Return the outputs of the members in evaluation mode, along axis 0."""
    axes = functools.partial(members_axes, size, {"x": x, "ctx": ctx})
    return jax.vmap(functools.partial(eval_step, settings), (0, 0, axes(x), axes(ctx)))(carry, key, x, ctx)


def score_members(
    metrics: Callable[..., Any], size: int | None, key: Any, arrays: Sequence[Any], draw: jax.Array, output: Any, y: Any
) -> Any:
    """Return the parts of the metrics of each member, along axis 0."""
    axes = functools.partial(members_axes, size, {"y": y})
    return jax.vmap(functools.partial(metrics, key), (axes(arrays), 0, 0, axes(y)))(arrays, draw, output, y)


def members_axes(size: int | None, named: Any, value: Any) -> Any:
    """Return for each array of an item the axis of the members: 0, and None for one that all share.

    Where each member has items of its own, a scalar is shared.

    Raises:
        ValueError: If another array has no such axis.
    """

    def axis(leaf: Any) -> int | None:
        if size is None or not np.ndim(leaf):
            return None
        if leaf.shape[0] != size:
            paths = (path for path, each in tree.flatten(named)[0].items() if each is leaf)
            path = next(paths, "an array of a metric")
            raise ValueError(
                f"With per_member=True each array of an item has the members along axis 0: {path} expected {size} "
                f"along it, received {tree.describe(leaf)}. Stack the items of the members, or give a list of "
                f"{size} pipelines; items that all members share need no per_member."
            )
        return 0

    return jax.tree_util.tree_map(axis, value)
