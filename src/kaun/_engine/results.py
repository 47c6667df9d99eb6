"""What a dispatch of steps gave, and what it takes to look at one of its steps again."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from kaun._engine.program import Program, TracedStep


class StepResults(NamedTuple):
    """Steps that were dispatched together, which may not be done yet.

    first: the number of the first of them.
    steps: how many they are.
    losses: an array at least as long.
    names: of the other numbers.
    numbers: these, a row for each step.
    fault: whether a step has gone wrong, up to the last of them; None where steps do not look at it.
    examples: how many each of them learns from, None where that cannot be told.
    """

    first: int
    steps: int
    losses: Any
    names: tuple[str, ...]
    numbers: jax.Array
    fault: jax.Array | None
    examples: int | None

    def good(self) -> int:
        """How many of them there are before the first whose loss or gradient is not finite; waits for them."""
        if "grad_norm" not in self.names:
            return self.steps
        norms = np.asarray(self.numbers)[: self.steps, self.names.index("grad_norm")]
        finite = np.isfinite(np.asarray(self.losses)[: self.steps].astype(np.float32)) & np.isfinite(norms)
        return self.steps if finite.all() else int(np.argmin(finite))

    def values(self, steps: int) -> dict[str, np.ndarray[Any, Any]]:
        """Loss and numbers by name, of the first steps; waits for them."""
        table = np.asarray(self.numbers)[:steps]
        losses = np.asarray(self.losses)[:steps].astype(np.float32)
        return {"loss": losses} | {name: table[:, i] for i, name in enumerate(self.names)}


class PendingDispatch(NamedTuple):
    """A dispatch: which leaves of its items differ, the state before it where that is kept, and its items."""

    ran: StepResults
    body: TracedStep
    program: Program
    pattern: tuple[bool, ...]
    before: list[Any] | None
    shared: list[Any]
    stacked: list[Any]
