"""What the programs of an ensemble compute: those of its trainer under ``jax.vmap``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import rng, tree
from kaun._engine import CODE, LOST, NOT_FINITE, RUNS, STOPPED
from kaun._loss import FrozenLoss, array_names, snapshot_loss, trace_function
from kaun._messages import locate
from kaun._step import Settings, StepOutput, eval_step, train_step
from kaun.averages.weights import without_weights
from kaun.context import Context
from kaun.layers.core import Vars
from kaun.metrics import CountedParts
from kaun.state import Members

_SMALL = 256  # numbers in the state of a member, up to which they are looked at together

__all__ = ["Stop", "checked_stop", "eval_members", "members_axes", "score_members", "train_members"]

Stop = FrozenLoss
"""``stop=``, captured as a loss is; its arrays are constants of the program."""


def train_members(
    settings: Settings,
    stop: Stop | None,
    size: int | None,
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

    def one(carry: Any, key: jax.Array, x: Any, ctx: Context, arrays: Sequence[Any]) -> StepOutput:
        of = functools.partial(loss.func, loss_key, arrays)  # pyright: ignore[reportFunctionMemberAccess]
        return _train_member(settings, stop, carry, key, x, ctx, of, training, wanted or {})

    names = {"x": x, "ctx": ctx, "loss": dict(zip(array_names(loss_key, len(arrays)), arrays, strict=True))}
    axes = functools.partial(members_axes, size, names)
    return jax.vmap(one, (0, 0, axes(x), axes(ctx), axes(arrays)))(carry, key, x, ctx, arrays)


def _train_member(
    settings: Settings, stop: Stop | None, carry: tuple[Vars, Members, jax.Array], key: jax.Array, x: Any,
    ctx: Context, loss: Callable[[Any], Any], training: bool, wanted: Mapping[str, int],
) -> StepOutput:  # fmt: skip
    """Run one step of a member, which keeps its state if it does not run, or if the step is to be discarded."""
    vars, members, step = carry
    mode, no, yes = settings.on_nonfinite, jnp.array(False), jnp.array(True)
    before = (vars, members.inner, step)
    # Under "raise" discarding is left to the selection below, which a member that does not run needs anyway.
    joins = mode == "raise" and _is_small(before)
    looks = dataclasses.replace(settings, on_nonfinite="ignore") if joins else settings
    out = train_step(looks, before, key, x, ctx, loss, training, mode == "skip", wanted)
    out = out._replace(finite=out.finite & ~_is_spoiled(before, out.carry)) if joins else out
    if taken := {"losses", CODE} & out.numbers.keys():
        raise TypeError(f"The loss of an ensemble returned {taken.pop()!r}, a name that is kaun's own. Rename it.")
    if parts := [name for name, number in out.numbers.items() if isinstance(number, CountedParts)]:
        raise TypeError(
            f"The loss of an ensemble must return scalars, and {parts[0]!r} are the parts of a metric, whose value "
            "reports would compute for all members together. Return a scalar or a losses.Mean(total, weight), and "
            "compute the metric with many.evaluate."
        )
    nonfinite = members.nonfinite if mode == "raise" else no
    stopped = members.stopped if stop is not None else no
    runs = ~(nonfinite | stopped)
    finite = out.finite if mode == "raise" else out.numbers["finite"] > 0 if mode == "skip" else yes
    stops = no if stop is None else runs & (finite if mode == "raise" else yes) & _stops(stop, key, out.loss)
    code = jnp.where(runs, jnp.where(finite, RUNS, NOT_FINITE), jnp.where(nonfinite, LOST, STOPPED))
    numbers = {**out.numbers, CODE: code.astype(jnp.float32)}
    after = out.carry
    if mode == "raise" or stop is not None:
        kept = runs & ~stops & (finite if mode == "raise" else yes)
        after = jax.tree_util.tree_map(lambda new, old: jnp.where(kept, new, old), after, before)
    ended = nonfinite | (runs & ~finite) if mode == "raise" else members.nonfinite
    vars, opt_state, step = after
    return out._replace(numbers=numbers, carry=(vars, Members(stopped | stops, ended, opt_state), step))


def _is_small(carry: Any) -> bool:
    return sum(leaf.size for leaf in jax.tree_util.tree_leaves(carry)) <= _SMALL


def _is_spoiled(before: Any, after: Any) -> jax.Array:
    """Return whether a step makes a leaf not finite that was finite before, as ``checks_of`` finds it."""
    states = [(vars, without_weights(opt_state)) for vars, opt_state, _ in (before, after)]
    spoiled: dict[tuple[int, ...], jax.Array] = {}
    for old, new in zip(*map(jax.tree_util.tree_leaves, states), strict=True):
        if old is not new and jnp.issubdtype(old.dtype, jnp.inexact):
            bad = jnp.isfinite(old) & ~jnp.isfinite(new)
            spoiled[old.shape] = bad | spoiled[old.shape] if old.shape in spoiled else bad
    # XLA:CPU sums rows of a few numbers one number after another. One product with ones for all members is faster: 256
    # members with 17 parameters took 80 us a step with a sum for each leaf, and 61 us with this.
    flags = jnp.concatenate([jnp.zeros(1, bool), *[bad.reshape(-1) for bad in spoiled.values()]]).astype(jnp.float32)
    return flags @ jnp.ones(flags.shape) > 0


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
        error.add_note(
            f"In stop {locate(stop.function)}. It is compiled: write stop=lambda loss: loss < 0.05, and for an `and` "
            "of two conditions (loss > 0) & (loss < 0.05)."
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
