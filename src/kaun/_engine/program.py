"""One training step as it was traced, and the programs made of it: in a loop over the items of a block."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun._engine.batching import capacity_of
from kaun._engine.inputs import StepInputs
from kaun._engine.jaxpr import slow_in_loops
from kaun._engine.packing import Packing

__all__ = ["ROWS", "Program", "TracedStep", "device_count_of", "no_fault"]

# The most steps of one dispatch. With room for the losses of more, XLA:CPU takes a tiny model for so costly that it
# hands each dispatch to another thread, which costs more than their step.
ROWS = 128
# XLA would move what does not depend on the item ahead of the loop, fuse it otherwise there, and so change the last bit
# by whether items are stacked or not. That must not be seen in the numbers.
_OPTIONS: dict[str, Any] = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


class Program:
    """A function, jitted and plain, and whether it has been compiled."""

    __slots__ = ("fresh", "lock", "plain", "run", "stacks")

    def __init__(self, plain: Callable[..., Any], stacks: str = "", **options: Any) -> None:
        self.plain = plain
        self.run = jax.jit(plain, **options)
        self.stacks = stacks
        self.fresh = True
        self.lock = threading.RLock()  # a loss may itself train


class TracedStep:
    """One training step as it was traced for calls of one key, and the programs made of it.

    Attributes:
        looped: whether it runs in a loop, many steps for one dispatch.
        capacity: how many items one dispatch may hold.
        compiled: the entries for which there is a compiled program.
        seconds: what tracing took; the first program that is compiled takes it over.
        names: of the numbers that a step gives beside its loss, in the order of the columns.
        fault: that of a run in which nothing has gone wrong; None where steps do not look at it.
        selects: whether ``step`` itself must leave the state as it was when the step goes wrong.
        traced: the jaxpr of the step.
    """

    __slots__ = (
        "_lock", "_programs", "capacity", "compiled", "fault", "looped", "loss_dtype", "names", "patterns", "seconds",
        "selects", "step", "traced",
    )  # fmt: skip

    def __init__(
        self, step: Any, traced: Any, call: StepInputs, seconds: float, fault: Any = None, selects: bool = False
    ) -> None:
        self.step, self.fault, self.selects = step, fault, selects
        self.traced = traced.jaxpr
        loss, numbers, _, _ = traced.out_info
        self.loss_dtype = loss.dtype
        self.names = tuple(name for name, number in numbers.items() if number.shape == ())
        self.looped = jax.default_backend() != "cpu" or not slow_in_loops(traced.jaxpr)
        self.capacity = capacity_of(call) if self.looped else 1
        self.seconds = seconds
        self.compiled: set[str] = set()
        self._programs: dict[Hashable, Program] = {}
        self._lock = threading.Lock()
        self.patterns: list[tuple[bool, ...]] = []

    def pattern(self, varying: tuple[bool, ...]) -> tuple[bool, ...]:
        """Which leaves to stack in a block where these vary: as in an earlier block, where that is possible."""
        if self.patterns and self.patterns[-1] == varying:
            return varying
        for known in reversed(self.patterns):
            if all(k or not v for k, v in zip(known, varying, strict=True)):
                return known
        self.patterns.append(varying)
        return varying

    def program(self, entry: str, pattern: tuple[bool, ...], packing: Packing | None = None) -> Program:
        """The program that runs the body over blocks stacked by a pattern, made (not yet compiled) where there is none.

        It takes the state's arrays, the run's key, whether a step has gone wrong before (``kaun.guard``), the number of
        steps, and the leaves that are not stacked and those that are; it gives the losses, an array at least as long
        as the number of steps, the other numbers of each step, a row of float32 for each, the state's arrays, and
        whether a step has gone wrong now.

        Arguments:
            entry: ``"fit"``; ``"fit in place"`` for one that takes its state's memory; ``"step"`` for one that gives
                the loss of the first step alone.
            packing: how the state comes and goes.
        """
        found = self._programs.get((entry, pattern, packing))
        if found is not None:
            return found
        with self._lock:
            found = self._programs.get((entry, pattern, packing))
            if found is None:
                run = _looped(self, pattern, packing) if self.looped else _straight(self, packing)
                run = _one(self, run) if entry == "step" else run
                donated = (0,) if entry == "fit in place" else ()
                stacks = "stacked" if any(pattern) else "passed once"
                found = Program(run, stacks, donate_argnums=donated, compiler_options=_OPTIONS)
                self._programs[entry, pattern, packing] = found
            return found


def _looped(body: TracedStep, pattern: tuple[bool, ...], packing: Packing | None) -> Callable[..., Any]:
    rows = body.capacity if any(pattern) else ROWS

    def run(held: list[Any], key: jax.Array, fault: Any, count: Any, shared: list[Any], stacked: list[Any]) -> Any:
        def one(i: Any, carried: Any) -> Any:
            leaves, fault, losses, rest = carried
            given = iter(shared)
            sliced = (lax.dynamic_index_in_dim(stack, i, keepdims=False) for stack in stacked)
            item = [next(sliced) if many else next(given) for many in pattern]
            loss, numbers, leaves, fault = body.step(leaves, key, item, fault)
            losses = lax.dynamic_update_index_in_dim(losses, loss, i, 0)
            return leaves, fault, losses, lax.dynamic_update_index_in_dim(rest, _row(body, numbers), i, 0)

        leaves = packing.unpack(held) if packing else held
        losses, rest = jnp.zeros(rows, body.loss_dtype), jnp.zeros((rows, len(body.names)), jnp.float32)
        leaves, fault, losses, rest = lax.fori_loop(0, count, one, (leaves, fault, losses, rest))
        return losses, rest, packing.pack(leaves) if packing else leaves, fault

    return run


def _straight(body: TracedStep, packing: Packing | None) -> Callable[..., Any]:
    """One step without a loop, for what XLA runs badly inside of one."""

    def run(held: list[Any], key: jax.Array, fault: Any, count: Any, shared: list[Any], stacked: list[Any]) -> Any:
        leaves = packing.unpack(held) if packing else held
        loss, numbers, leaves, fault = body.step(leaves, key, shared, fault)
        return loss[None], _row(body, numbers)[None], packing.pack(leaves) if packing else leaves, fault

    return run


def _row(body: TracedStep, numbers: dict[str, jax.Array]) -> jax.Array:
    return jnp.stack([numbers[name] for name in body.names])


def _one(body: TracedStep, run: Callable[..., Any]) -> Callable[..., Any]:
    """The first step alone: its loss, and the state after it."""

    def step(held: list[Any], *rest: Any) -> Any:
        losses, numbers, leaves, _ = run(held, *rest)
        if not body.selects:
            return losses[0], leaves
        good = jnp.isfinite(losses[0]) & jnp.isfinite(numbers[0, body.names.index("grad_norm")])
        kept = [jnp.where(good, new, old) for new, old in zip(leaves, held, strict=True)]
        return losses[0], [*kept[:-1], leaves[-1]]  # the last one counts the steps

    return step


@functools.cache
def no_fault() -> jax.Array:
    """False on the device: nothing has gone wrong."""
    with jax.ensure_compile_time_eval():  # a step may be part of a function that the user compiles
        return jnp.asarray(np.zeros((), np.bool_))


@functools.lru_cache(maxsize=2 * ROWS)
def device_count_of(count: int) -> jax.Array:
    """A number of steps on the device."""
    with jax.ensure_compile_time_eval():
        return jnp.asarray(count, jnp.int32)
