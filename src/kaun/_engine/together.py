"""What loops and single calls ask where the steps of several processes are one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kaun._engine.inputs import StepInputs
from kaun._engine.program import TracedStep, count_on_device
from kaun._processes import meet
from kaun.data import checksums, different_items

__all__ = ["Together", "agreed", "check_same_call"]


class Together(Protocol):
    """What several processes agree on: ``kaun._run.agree.Agreement``."""

    def dispatch(self, first: int, count: int, inputs: StepInputs, values: Callable[[], list[Any]]) -> int:
        """Return how many of ``count`` steps all processes run, beginning with number ``first``."""
        ...

    def dispatched(self) -> None:
        """Raise what ends the fit because of another process."""
        ...

    def wait(self, array: Any) -> None:
        """Wait for an array, unless another process has failed without running its part of it."""
        ...

    def readable(self, arrays: list[Any]) -> bool:
        """Whether arrays have values, or will have them."""
        ...


def agreed(
    together: Together, waiting: tuple[int, int, StepInputs, Any, Any, Any], arguments: tuple[Any, ...],
    traced: TracedStep,
) -> tuple[int, tuple[Any, ...]]:  # fmt: skip
    """Return how many steps of a block all processes run, and the arguments of the program for that many.

    Args:
        together: What the processes agree on.
        waiting: The number of the first step; how many there are; an item of their kind; for each of its arrays whether
            it is stacked; the arrays that are not; those that are.
        arguments: The arguments for all steps that wait, of which the fourth is their number.
        traced: The step.
    """
    first, wanted, inputs, pattern, shared, stacked = waiting

    def values() -> list[Any]:
        rows, given = iter(stacked), iter(shared)
        return [next(rows)[0] if varies else next(given) for varies in pattern]

    count = together.dispatch(first, wanted, inputs, values)
    if not count:
        together.dispatched()
    if count != wanted:
        arguments = (*arguments[:3], count_on_device(count, traced.placing), *arguments[4:])
    return count, arguments


def check_same_call(entry: str, processes: Sequence[int], inputs: StepInputs) -> None:
    """Come together in a call whose program is new, and check that all processes make the same one.

    Args:
        entry: What is called.
        processes: The numbers of the processes.
        inputs: The inputs of the call.

    Raises:
        FailedElsewhere: As ``meet``.
        ValueError: If their inputs differ.
    """
    if len(processes) < 2:
        return
    found = meet(entry, processes, {"items": checksums(inputs.names(), inputs.leaves)})
    if difference := different_items({process: facts["items"] for process, facts in found.items() if facts}):
        raise ValueError(
            f"{entry} expected the same arrays in each process: {difference}. Every process makes the same calls, with "
            "the same seed (rng.scope) and whole batches, of which it takes the rows of its devices. Where each one "
            "holds rows of its own, join them first:\n"
            "    ((x, y),) = Data.from_items([(x, y)]).assemble(trainer.sharding)"
        )
