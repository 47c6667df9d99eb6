"""What a loop asks where the steps of several processes are one: the part of their agreement that it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from kaun._engine.inputs import StepInputs
from kaun._engine.program import TracedStep, count_on_device

__all__ = ["Together", "agreed"]


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
        counted = count_on_device(count)
        counted = counted if traced.placing is None else traced.placing.put_everywhere(counted)
        arguments = (*arguments[:3], counted, *arguments[4:])
    return count, arguments
