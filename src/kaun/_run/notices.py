"""Warnings of a fit whose steps learn nothing: discarded one after the other, or gradients that are not applied."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np

from kaun._engine import StepResults
from kaun._messages import warn
from kaun._step import state_nodes
from kaun.state import TrainState

__all__ = ["DiscardedSteps", "warn_of_open_window"]

_MANY = 100
_STUCK = " A schedule that is not finite stays so, because discarded steps do not count for it."
# States that collect gradients, by class: the function that makes them, its number of items, and their counter.
_WINDOWS = {
    "MultiStepsState": ("optax.MultiSteps", "every_k_schedule", "mini_step"),
    "ApplyEvery": ("optax.apply_every", "k", "count"),
}
_LATER = 3  # a loop waits for the dispatch before the last two, so this one is done


class DiscardedSteps:
    """Counts the steps that ``on_nonfinite="skip"`` discards, and warns once of many in a row."""

    def __init__(self) -> None:
        self._waiting: deque[StepResults] = deque()
        self._reasons: list[str] = []  # of the steps discarded since the last update
        self._last = 0  # the number of the last one
        self._updates = self._warned = False

    def ran(self, results: StepResults) -> None:
        """Take the results of a dispatch, and look at an earlier one, which is done."""
        self._waiting.append(results)
        if len(self._waiting) > _LATER:
            self._look(self._waiting.popleft())

    def finish(self, *, last: bool) -> None:
        """Look at all dispatches so far; ``last`` says that the fit ends with them."""
        while self._waiting:
            self._look(self._waiting.popleft())
        if last and self._reasons and not self._updates:
            self._warn()

    def _look(self, results: StepResults) -> None:
        table, column = results.layout.places["finite"]
        finite = np.asarray(results.numbers[table])[: results.steps, column]
        if finite.min() > 0:
            self._reasons, self._updates = [], True
            return
        losses = np.asarray(results.losses)[: results.steps].astype(np.float64)
        for number, (loss, code) in enumerate(zip(losses, finite, strict=True), results.first):
            if code > 0:
                self._reasons, self._updates = [], True
                continue
            self._last = number
            self._reasons.append("update" if code < 0 else "gradient" if np.isfinite(loss) else "loss")
            if len(self._reasons) == _MANY:
                self._warn()

    def _warn(self) -> None:
        if self._warned:
            return
        self._warned = True
        count, reasons = len(self._reasons), Counter(self._reasons)
        first = self._last - count + 1
        steps = f"step {first}" if count == 1 else f"{count} steps in a row, {first} to {self._last}"
        listed = ", ".join(f"the {what} in {n}" for what, n in reasons.most_common())
        stuck = _STUCK if reasons["update"] else ""
        warn(
            f'on_nonfinite="skip" discarded {steps}, so the state was not trained. What is not finite: {listed} of '
            f'them.{stuck} Write Trainer(..., on_nonfinite="raise"): its error says what is not finite, and '
            "what to try."
        )


def warn_of_open_window(state: TrainState) -> None:
    """Warn after a fit whose optimizer holds gradients that no update used."""
    for name, (function, argument, counter) in _WINDOWS.items():
        count = max([int(np.asarray(getattr(node, counter))) for node in state_nodes(state.opt_state, name)], default=0)
        if count:
            items = "item" if count == 1 else f"{count} items"
            warn(
                f"The fit ended inside a window of {function}: the gradients of the last {items} wait in opt_state and "
                "are not applied. A fit that begins with the state returned continues the window. To use all items, "
                f"write Trainer(optimizer=inner, accumulate=k) in place of {function}({argument}=k): it makes "
                "the update of an open window at the end of a fit, and weighs each item by its number of examples."
            )
