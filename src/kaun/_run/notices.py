"""Warnings of a fit whose steps learn nothing: discarded one after the other, or gradients that are not applied."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np

from kaun import tree
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
    """Counts the steps that ``on_nonfinite="skip"`` discards, and warns once of many in a row.

    Args:
        accumulate: How many items make an update. The step of an item that joins a window is none.
        updates: With ``accumulate``, the number of updates that the state had before the fit.
    """

    def __init__(self, accumulate: int = 1, updates: int = 0) -> None:
        self._accumulate, self._count = accumulate, updates
        self._waiting: deque[StepResults] = deque()
        self._reasons: list[str] = []  # of the steps discarded since the last update
        self._first = self._last = 0  # the numbers of the first and the last one
        self._since: int | None = None  # the number of the last step with an update
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
        if last and self._accumulate == 1 and self._reasons and not self._updates:
            self._warn()

    def returned(self, before: TrainState, after: TrainState) -> None:
        """Warn if a fit with ``accumulate`` made no update, and no item waits for one.

        Args:
            before: The state after the last step.
            after: The state that the fit returns: flushed, or the same.
        """
        if self._accumulate == 1 or self._updates:
            return
        (window,), (end,) = (state_nodes(state.opt_state, "Window") for state in (before, after))
        refused = int(window.items) > 0
        if int(end.items) or int(end.updates) != self._count:
            return
        if refused or self._reasons:
            self._warn(flush=refused)

    def _look(self, results: StepResults) -> None:
        if self._since is None:
            self._since = results.first - 1
        values = results.values(results.steps)
        finite = values["finite"]
        made = finite > 0
        if self._accumulate > 1:  # also at an item that is left out, if it is the last one of its window
            counts = values["updates"]
            made, self._count = np.diff(counts, prepend=self._count) != 0, int(counts[-1])
        losses = values["loss"]
        looked_at = np.flatnonzero(made | (finite <= 0))
        for i in looked_at[-1:] if made[looked_at].all() else looked_at:
            if made[i]:
                self._reasons, self._updates, self._since = [], True, results.first + int(i)
            else:
                reason = "update" if finite[i] < 0 else "gradient" if np.isfinite(losses[i]) else "loss"
                self._discarded(results.first + int(i), reason)

    def _discarded(self, number: int, reason: str) -> None:
        self._first, self._last = self._first if self._reasons else number, number
        self._reasons.append(reason)
        # Good items of an open window are not lost. After twice its length one has ended without an update.
        if len(self._reasons) >= _MANY and number - (self._since or 0) >= 2 * self._accumulate:
            self._warn()

    def _warn(self, *, flush: bool = False) -> None:
        if self._warned:
            return
        self._warned = True
        count, first = len(self._reasons), self._first
        how = "in a row" if self._last - first + 1 == count else "with no update between them"
        steps = [f"step {first}" if count == 1 else f"{count} steps {how}, {first} to {self._last}"] if count else []
        steps += ["the update of the last window"] if flush else []
        reasons = Counter([*self._reasons, *["update"] * flush])
        listed = ", ".join(f"the {what} in {n}" for what, n in reasons.most_common())
        stuck = _STUCK if reasons["update"] else ""
        warn(
            f'on_nonfinite="skip" discarded {", and ".join(steps)}, so the state was not trained. What is not finite: '
            f'{listed} of them.{stuck} Write Trainer(..., on_nonfinite="raise"): its error says what is not finite, '
            "and what to try."
        )


def warn_of_open_window(state: TrainState) -> None:
    """Warn after a fit whose optimizer holds gradients that no update used."""
    for name, (function, argument, counter) in _WINDOWS.items():
        counts = [getattr(node, counter) for node in state_nodes(state.opt_state, name)]
        count = max([int(np.asarray(tree.readable(each)).max()) for each in counts], default=0)
        if count:
            items = "item" if count == 1 else f"{count} items"
            warn(
                f"The fit ended inside a window of {function}: the gradients of the last {items} wait in opt_state and "
                "are not applied. A fit that begins with the state returned continues the window. To use all items, "
                f"write Trainer(optimizer=inner, accumulate=k) in place of {function}({argument}=k): it makes "
                "the update of an open window at the end of a fit, and weighs each item by its number of examples."
            )
