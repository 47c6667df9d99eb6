"""Placing: where the arrays of a compiled step lie, before it is called and inside of it.

A program is compiled for the placements of its arguments, so these never vary: what comes is moved, and what a program
returns is pinned as its last operation. Left alone the compiler chooses, and the state would drift.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from kaun._engine.inputs import StepInputs, is_number
from kaun._jax import any_traced
from kaun._processes import wait_for_devices
from kaun.sharding.core import (
    Sharding,
    item_placement,
    processes_of,
    put,
    refuse_set_mesh,
    spread_rows,
    state_placements,
)
from kaun.sharding.rules import ByMember

__all__ = ["Placing", "place_carry", "placed_inputs", "wait_on_cpu"]


class Placing:
    """The placements of one kind of step or of evaluation.

    Args:
        sharding: Where the arrays of the trainer lie.
        structure: The structure of the carry.
        leaves: Its leaves, or their shapes.
        inputs: The inputs of the step.
    """

    __slots__ = ("_carry", "_everywhere", "_item", "_length", "_members", "_sharding", "_stack")

    def __init__(self, sharding: Sharding, structure: Any, leaves: Sequence[Any], inputs: StepInputs) -> None:
        self._sharding, self._length, self._everywhere = sharding, inputs.examples, sharding.replicated
        # The mesh axis over which the members of an ensemble lie, None where this is the state of one model.
        self._members = sharding.rule.axis if isinstance(sharding.rule, ByMember) else None
        self._carry = state_placements(sharding, structure, leaves)
        # Where each array of an item is put, and whether it has the rows of the batch; numbers have no placement.
        self._item = [
            (None, False) if is_number(leaf) else item_placement(sharding, leaf.shape, self._length)
            for leaf in inputs.leaves
        ]
        self._stack = [where and _behind(where) for where, _ in self._item]

    @classmethod
    def of(cls, sharding: Sharding | None, structure: Any, leaves: Sequence[Any], inputs: StepInputs) -> Placing | None:
        """Return the placements, None without a sharding."""
        return None if sharding is None else cls(sharding, structure, leaves, inputs)

    def put_item(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the arrays of an item on their devices."""
        return _put_all(leaves, [where for where, _ in self._item])

    def put_block(
        self, arguments: tuple[Any, ...], pattern: Sequence[bool], wait: Callable[[], None] = lambda: None, *,
        fresh: bool = True,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Return the arguments of a program that runs the steps of a block, each on its devices.

        Args:
            arguments: The state as the loop has it, the run's key, the status, the number of steps, and the arrays of
                the items that are not stacked and those that are.
            pattern: For each array of an item whether it is stacked.
            wait: Waits for the block before where devices cannot hold two, and raises if another process has ended.
            fresh: Whether the state is not that of the block before, and may still be computed when that is done.
        """
        held, key, status, count, shared, stacked = arguments
        once = [where for (where, _), many in zip(self._item, pattern, strict=True) if not many]
        behind = [where for where, many in zip(self._stack, pattern, strict=True) if many]
        # What the host has is put while the block before runs. To move arrays between devices may take a program.
        shared, stacked = _put_all(shared, once, of_host=True), _put_all(stacked, behind, of_host=True)
        wait_on_cpu(self._sharding, held if fresh else (), wait=wait)
        if status is not None:
            status = self.put_everywhere(status)
        return held, key, status, count, _put_all(shared, once), _put_all(stacked, behind)

    def put_everywhere(self, value: Any) -> Any:
        """Return an array on all devices."""
        return put(value, self._everywhere)

    def count(self, steps: int) -> jax.Array:
        """Return a number of steps on all devices. To put one there costs 0.5 ms on 8 devices, so they are kept."""
        return _kept_count(self._everywhere, steps)

    def pin_item(self, item: Sequence[Any]) -> list[Any]:
        """Return the arrays of an item in a program, their rows spread; those that do not divide are padded by XLA.

        First each is where it was put: in a function that the user compiles nothing else says where, and of rows that
        do not divide the compiler may choose what JAX has no name for.
        """
        pinned = [
            a if w is None else lax.with_sharding_constraint(a, w) for a, (w, _) in zip(item, self._item, strict=True)
        ]
        pairs = zip(pinned, self._item, strict=True)
        return [spread_rows(self._sharding, leaf) if rows else leaf for leaf, (_, rows) in pairs]

    def pin_carry(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the leaves of a state in a program, where they lie."""
        return [lax.with_sharding_constraint(leaf, w) for leaf, w in zip(leaves, self._carry, strict=True)]

    def pin_block(self, losses: Any, tables: list[Any], held: list[Any], status: Any) -> tuple[Any, ...]:
        """Return the results of a program that runs the steps of a block, each where it lies.

        The state is pinned as the last operation: what chooses between an old and a new state comes before. A packed
        one is on one device.
        """
        packed = len(held) != len(self._carry)
        held = self.pin_everywhere(held) if packed else self.pin_carry(held)
        return *self.pin_results((losses, tables), axis=-1), held, self.pin_everywhere(status)

    def pin_everywhere(self, value: Any) -> Any:
        """Return a pytree of arrays in a program, on all devices: what the host reads."""
        return jax.tree_util.tree_map(lambda leaf: lax.with_sharding_constraint(leaf, self._everywhere), value)

    def pin_numbers(self, value: Any, axis: int = 0) -> Any:
        """Return losses and other numbers in a program, on all devices; those of members stay with their member.

        Args:
            value: A pytree of arrays.
            axis: The axis of the members, where there are any.
        """
        if self._members is None:
            return self.pin_everywhere(value)

        def pin(leaf: Any) -> Any:
            spec = PartitionSpec(*[None] * (axis % leaf.ndim), self._members)
            return lax.with_sharding_constraint(leaf, NamedSharding(self._sharding.mesh, spec))

        return jax.tree_util.tree_map(pin, value)

    def pin_results(self, value: Any, axis: int = 0) -> Any:
        """Return the numbers that a program gives to the host: as ``pin_numbers``, where each process can read them."""
        return self.pin_everywhere(value) if self._sharding.mesh.is_multi_process else self.pin_numbers(value, axis)

    def pin_output(self, output: Any) -> Any:
        """Return a model's output in a program: spread where it has the batch's rows, on all devices elsewhere.

        With several processes it is on all devices, because each of them may read it.
        """
        if self._members is not None or self._sharding.mesh.is_multi_process:
            return self.pin_results(output)

        def pin(leaf: Any) -> Any:
            return lax.with_sharding_constraint(leaf, item_placement(self._sharding, leaf.shape, self._length)[0])

        return jax.tree_util.tree_map(pin, output)


def wait_on_cpu(
    sharding: Sharding | None, arrays: Any, entry: str = "", wait: Callable[[], None] = lambda: None
) -> None:
    """Wait for what is still computed for some arrays, where the devices are parts of one CPU.

    There the programs of all devices share the threads of one pool, and one that waits for the others in a collective
    operation keeps its thread. Two programs at a time can wait for each other's threads for ever: three steps that were
    dispatched at once on 8 devices of 2 cores were aborted by XLA after 40 seconds.

    Args:
        sharding: Where they lie.
        arrays: A pytree of arrays.
        entry: The single call that computes them, whose failure in another process ends the wait.
        wait: Waits for what is computed before, in its own way.
    """
    if sharding is not None and sharding.mesh.size > 1 and sharding.mesh.devices.flat[0].platform == "cpu":
        wait()
        if entry and sharding.mesh.is_multi_process:
            wait_for_devices(entry.split()[0], processes_of(sharding, ()), arrays)
        jax.block_until_ready(arrays)


def _put_all(leaves: Sequence[Any], places: Sequence[Any], *, of_host: bool = False) -> list[Any]:
    """Return arrays on devices, those without a placement as they are; with ``of_host`` so are arrays of JAX."""
    pairs = zip(leaves, places, strict=True)
    return [a if w is None or (of_host and isinstance(a, jax.Array)) else put(a, w) for a, w in pairs]


@functools.lru_cache(maxsize=512)
def _kept_count(where: NamedSharding, steps: int) -> jax.Array:
    return put(np.uint32(steps), where)


@functools.lru_cache(maxsize=64)
def _behind(where: NamedSharding) -> NamedSharding:
    """Return the placement of a stack of arrays, each placed so."""
    return NamedSharding(where.mesh, PartitionSpec(None, *where.spec) if any(where.spec) else PartitionSpec())


def place_carry(
    sharding: Sharding | None, structure: Any, leaves: list[Any], key: jax.Array
) -> tuple[list[Any], jax.Array]:
    """Return the leaves of a state and its key where they lie; traced ones, and all without a sharding, as they are."""
    if sharding is None or any_traced((*leaves, key)):
        return leaves, key
    refuse_set_mesh()
    where = state_placements(sharding, structure, leaves)
    return [put(leaf, w) for leaf, w in zip(leaves, where, strict=True)], put(key, sharding.replicated)


def placed_inputs(sharding: Sharding | None, inputs: StepInputs) -> StepInputs:
    """Return inputs with each array on all devices, for operations outside of a compiled step."""
    if sharding is None:
        return inputs
    return inputs.with_leaves([leaf if is_number(leaf) else put(leaf, sharding.replicated) for leaf in inputs.leaves])
