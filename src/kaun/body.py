"""One training step as it was traced, and the programs made of it: in a loop over the items of a block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kaun.blocks import capacity_of
from kaun.call import Call
from kaun.convolutions import slow_in_loops
from kaun.packing import Packing

__all__ = ["ROWS", "Body", "Program"]

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


class Body:
    """One training step as it was traced for calls of one key, and the programs made of it.

    Attributes:
        looped: whether it runs in a loop, many steps for one dispatch.
        capacity: how many items one dispatch may hold.
        compiled: the entries for which there is a compiled program.
        seconds: what tracing took; the first program that is compiled takes it over.
    """

    __slots__ = ("_lock", "_programs", "capacity", "compiled", "looped", "loss_dtype", "patterns", "seconds", "step")

    def __init__(self, step: Any, traced: Any, call: Call, seconds: float) -> None:
        self.step = step
        self.loss_dtype = traced.out_info[0].dtype
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

        It takes the state's arrays, the run's key, the number of steps, and the leaves that are not stacked and those
        that are; it gives the losses, an array at least as long as the number of steps, and the state's arrays.

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
                run = _first_loss(run) if entry == "step" else run
                donated = (0,) if entry == "fit in place" else ()
                stacks = "stacked" if any(pattern) else "passed once"
                found = Program(run, stacks, donate_argnums=donated, compiler_options=_OPTIONS)
                self._programs[entry, pattern, packing] = found
            return found


def _looped(body: Body, pattern: tuple[bool, ...], packing: Packing | None) -> Callable[..., Any]:
    rows = body.capacity if any(pattern) else ROWS

    def run(held: list[Any], key: jax.Array, count: Any, shared: list[Any], stacked: list[Any]) -> Any:
        def one(i: Any, carried: Any) -> Any:
            leaves, losses = carried
            given = iter(shared)
            sliced = (lax.dynamic_index_in_dim(stack, i, keepdims=False) for stack in stacked)
            item = [next(sliced) if many else next(given) for many in pattern]
            loss, leaves = body.step(leaves, key, item)
            return leaves, lax.dynamic_update_index_in_dim(losses, loss, i, 0)

        leaves = packing.unpack(held) if packing else held
        leaves, losses = lax.fori_loop(0, count, one, (leaves, jnp.zeros(rows, body.loss_dtype)))
        return losses, packing.pack(leaves) if packing else leaves

    return run


def _straight(body: Body, packing: Packing | None) -> Callable[..., Any]:
    """One step without a loop, for what XLA runs badly inside of one."""

    def run(held: list[Any], key: jax.Array, count: Any, shared: list[Any], stacked: list[Any]) -> Any:
        loss, leaves = body.step(packing.unpack(held) if packing else held, key, shared)
        return loss[None], packing.pack(leaves) if packing else leaves

    return run


def _first_loss(run: Callable[..., Any]) -> Callable[..., Any]:
    def step(*arguments: Any) -> Any:
        losses, leaves = run(*arguments)
        return losses[0], leaves

    return step
