"""StepResults: what a dispatch of steps gave."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np


class StepResults(NamedTuple):
    """Steps that were dispatched together, which may not be done yet.

    Attributes:
        first: The number of the first of them.
        steps: How many they are.
        losses: An array at least as long.
        names: The names of the other numbers.
        numbers: These numbers, a row for each step.
        status: Where a run ends at a step that is not finite: whether all steps so far are finite (1.0 or 0.0), and the
            squares of the gradient of the last step that ran (``train_step``). None elsewhere.
        examples: How many examples each step learns from, None if that is unknown.
    """

    first: int
    steps: int
    losses: Any
    names: tuple[str, ...]
    numbers: jax.Array
    status: jax.Array | None
    examples: int | None

    def finite_steps(self) -> int:
        """Wait for the steps, and return how many come before the first whose loss or gradient is not finite."""
        if "grad_norm" not in self.names:
            return self.steps
        norms = np.asarray(self.numbers)[: self.steps, self.names.index("grad_norm")]
        finite = np.isfinite(np.asarray(self.losses)[: self.steps].astype(np.float32)) & np.isfinite(norms)
        return self.steps if finite.all() else int(np.argmin(finite))

    def values(self, steps: int) -> dict[str, np.ndarray[Any, Any]]:
        """Wait for the steps, and return loss and numbers of the first ``steps`` of them by name."""
        table = np.asarray(self.numbers)[:steps]
        losses = np.asarray(self.losses)[:steps].astype(np.float32)
        return {"loss": losses} | {name: table[:, i] for i, name in enumerate(self.names)}
