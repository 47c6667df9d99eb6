"""The items of a dispatch before it (OpenBlock), while it runs (PendingDispatch), and what it gave (StepResults)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

from kaun import tree
from kaun._engine.batching import BlockBuffer
from kaun._engine.inputs import StepInputs
from kaun._engine.members import CODE, mean_of_members, none_left, of_members
from kaun._engine.numbers import NumberLayout
from kaun._engine.program import Program, TracedStep, count_on_device
from kaun._engine.together import Together

__all__ = ["OpenBlock", "PendingDispatch", "StepResults", "examples_of", "readable", "wait_for"]


T = TypeVar("T")


class OpenBlock(NamedTuple, Generic[T]):
    """Items of one kind that wait to be dispatched together.

    Attributes:
        buffer: Where they are collected.
        traced: The step or the metrics that take them.
        inputs: The first item of that kind.
    """

    buffer: BlockBuffer
    traced: T
    inputs: StepInputs


class StepResults(NamedTuple):
    """Steps that were dispatched together, which may not be done yet.

    Attributes:
        first: The number of the first of them.
        steps: How many they are.
        losses: An array at least as long, of an ensemble [steps, members].
        numbers: The other numbers, arrays with a row for each step.
        layout: Where in these each number is.
        status: Where a run ends at a step that is not finite: 0 if a step was not, else 1 and how many of the next
            updates are proved to be finite; the ``checks`` of the last step that ran (``StepOutput``). None elsewhere.
        examples: The number of examples that each step learns from, an array with one number for each step where some
            rows fill a batch; None if it is unknown.
    """

    first: int
    steps: int
    losses: Any
    numbers: Sequence[jax.Array]
    layout: NumberLayout
    status: jax.Array | None
    examples: int | np.ndarray[Any, Any] | None

    @property
    def failed(self) -> bool:
        """Whether a step is not finite; of an ensemble, whether one has no member left. Waits for the steps."""
        if self.status is not None:
            return bool(np.asarray(self.status)[0] <= 0)
        return self.of_ensemble and self.finite_steps() < self.steps

    @property
    def of_ensemble(self) -> bool:
        """Whether the numbers have an axis of members."""
        return CODE in self.layout.places

    def codes(self) -> np.ndarray[Any, Any]:
        """What each member of an ensemble did in each step, [steps, members] (``kaun._engine.members``)."""
        table, column = self.layout.places[CODE]
        return np.asarray(self.numbers[table])[: self.steps, column]

    def why(self, i: int) -> np.ndarray[Any, Any]:
        """The status after its first number; of an ensemble, the codes of the members in step i."""
        return self.codes()[i] if self.of_ensemble else np.asarray(self.status)[1:]

    def loss(self, i: int) -> Any:
        """The loss of step i of these, which it waits for."""
        # On the device, indexing it would be another dispatch.
        if CODE not in self.layout.places:
            return np.asarray(self.losses)[i]
        return mean_of_members(_widened(self.losses)[i : i + 1], self.codes()[i : i + 1])[0]

    def finite_steps(self) -> int:
        """Wait for the steps, and return how many come before the first whose loss or gradient is not finite.

        Of an ensemble, those before the first after which no member is left.
        """
        if self.of_ensemble:
            nobody = none_left(self.codes())
            return int(np.argmax(nobody)) if nobody.any() else self.steps
        if "grad_norm" not in self.layout.places or (self.status is not None and not self.failed):
            return self.steps
        table, column = self.layout.places["grad_norm"]
        norms = np.asarray(self.numbers[table])[: self.steps, column]
        finite = np.isfinite(_widened(self.losses)[: self.steps]) & np.isfinite(norms)
        return self.steps if finite.all() else int(np.argmin(finite))

    def counts(self, steps: int) -> np.ndarray[Any, Any]:
        """The number of examples of each of the first ``steps`` steps, nan where it is unknown."""
        examples = self.examples[:steps] if isinstance(self.examples, np.ndarray) else self.examples
        return np.full(steps, examples if isinstance(examples, np.ndarray) else examples or np.nan, np.float64)

    def values(self, steps: int) -> dict[str, np.ndarray[Any, Any]]:
        """Wait for the steps, and return loss and scalars of the first ``steps`` of them by name."""
        columns = {"loss": _widened(self.losses)[:steps]} | self.layout.columns(self.numbers, steps)
        return of_members(columns) if self.of_ensemble else columns

    def weights(self, steps: int) -> dict[str, np.ndarray[Any, Any] | None]:
        """Wait for the steps, and return what loss and scalars of the first ``steps`` count by, as ``weighted``."""
        found = self.layout.weighted(self.numbers, steps)
        if not self.of_ensemble:
            return found
        codes = self.codes()[:steps]
        return {name: None if column is None else mean_of_members(column, codes) for name, column in found.items()}


class PendingDispatch(NamedTuple):
    """A dispatch that may not be done yet, with its items, one of which may turn out to be the reason of an error.

    Attributes:
        results: What it gives.
        inputs: An item of the kind of its items.
        traced: The step that it runs.
        program: The program that runs it.
        arguments: What that was called with, where after a step that is not finite the state before it has to be
            computed again; None elsewhere.
        shared: The arrays of its items that have one value for all of them; none where no step ends the run.
        stacked: The other ones, likewise. Their memory is used again once the dispatch is done.
    """

    results: StepResults
    inputs: StepInputs
    traced: TracedStep
    program: Program
    arguments: Sequence[Any] | None
    shared: list[Any]
    stacked: list[Any]

    def item(self, i: int) -> StepInputs:
        """Return its item number ``i``, in memory that stays as it is."""
        rows, given = iter(self.stacked), iter(self.shared)
        leaves = [next(rows)[i] if stacked else next(given) for stacked in self.program.pattern]
        return self.inputs.with_leaves([tree.snapshot(leaf) for leaf in leaves])

    def again(self, steps: int) -> list[Any]:
        """Return the state after the first steps, as the loop has it, by running these once more."""
        assert self.arguments is not None
        held, key, status, _, *items = self.arguments
        if steps == 0:
            return held
        count = count_on_device(steps, self.traced.placing)
        return self.program.jitted(held, key, status, count, *items)[2]


def examples_of(
    traced: TracedStep,
    pattern: Sequence[bool],
    count: int,
    shared: Sequence[Any],
    stacked: Sequence[Any],
) -> int | np.ndarray[Any, Any] | None:
    """How many examples each of ``count`` steps learns from, as ``StepResults`` has it, without rows that fill a batch.

    Args:
        traced: The step.
        pattern: For each array of an item whether it is stacked.
        count: How many steps.
        shared: The arrays that are not.
        stacked: Those that are.
    """
    i = traced.row_mask
    if i is None:
        return traced.examples
    before = sum(pattern[:i])
    rows = np.asarray(stacked[before] if pattern[i] else shared[i - before]).sum(axis=-1)
    rows = rows.max(axis=-1) if traced.row_axis else rows  # of the member with the most
    return rows[:count] if pattern[i] else np.full(count, rows)


def _widened(losses: Any) -> np.ndarray[Any, Any]:
    """Losses on the host in their own dtype, those of half precision as float32, which holds them exactly."""
    losses = np.asarray(losses)
    return losses if losses.dtype == np.float64 else losses.astype(np.float32)


def wait_for(results: StepResults | None, together: Together | None) -> None:
    """Wait for a dispatch."""
    if results is None:
        return
    if together is not None:
        together.wait(results.losses)
    results.losses.block_until_ready()


def readable(arrays: list[Any], together: Together | None = None) -> bool:
    """Wait for arrays, and return whether all have values; a failed program leaves none, nor does donated memory."""
    if together is not None and not together.readable(arrays):
        return False
    try:
        jax.block_until_ready(arrays)
        return not any(isinstance(array, jax.Array) and array.is_deleted() for array in arrays)
    except Exception:
        return False
