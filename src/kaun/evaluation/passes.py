"""Passes over data with a trained model: metrics of all batches together, and their outputs stacked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from kaun import tree
from kaun._engine import StepInputs
from kaun._loss import snapshot_loss
from kaun.context import Context
from kaun.data import Data, LabelledItem, empty_data, known_length, open_items
from kaun.errors import CaptureError
from kaun.evaluation.totals import Metric, Scores, checked, summed
from kaun.metrics import AHEAD, DelayedReader

__all__ = ["evaluate", "predict"]


def evaluate(run: Callable[[StepInputs], Any], data: Any, metrics: Any, ctx: Context | None) -> dict[str, float]:
    """The metrics over all items of ``data``, by name; see ``Trainer.evaluate``.

    Arguments:
        run: runs the compiled program of a call, and does not wait for it.
    """
    metrics = checked("evaluate", metrics)
    scores = Scores(metrics)
    number = 0
    expected = (
        f"evaluate expected data, a kaun.Data or an iterable of (x, y), received {tree.describe(data)}. "
        "From arrays write Data.batches((x, y), batch_size=256)."
    )
    with open_items(data, expected) as items:
        for number, item in enumerate(items, start=1):
            x, y, own = LabelledItem.parse(item, number)
            # Anew for each item, as a loss is: a metric may read what changes between two of them.
            call = StepInputs({"x": x, "y": y}, _frozen(metrics), ctx.merge(own) if ctx is not None else own, "item")
            scores.add(run(call))
    if not number:
        raise empty_data("evaluate")
    return scores.results()


def predict(run: Callable[[StepInputs], Any], data: Data[Any], ctx: Context | None) -> Any:
    """The outputs for all items of ``data``, concatenated along axis 0; see ``Trainer.predict``.

    Arguments:
        run: runs the compiled program of a call, and does not wait for it.
    """
    stack = _Stack(data)
    lagging = DelayedReader(AHEAD, stack.take)
    items: Any = iter(data)
    with contextlib.closing(items):
        for number, x in enumerate(items, start=1):
            try:
                output = run(StepInputs(x, None, ctx))
            except (TypeError, ValueError) as error:
                if isinstance(x, tuple):
                    error.add_note(
                        "The items of data given to predict are the model's inputs. Of pairs (x, y) write "
                        "trainer.predict(state, data.map(lambda b: b[0]))."
                    )
                raise
            stack.check(output, number)
            lagging.push(jax.tree_util.tree_leaves(output))
    if stack.structure is None:
        raise empty_data("predict")
    lagging.flush()
    return jax.tree_util.tree_unflatten(stack.structure, stack.rows())


def _frozen(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    frozen: dict[str, Any] = {}
    for name, metric in metrics.items():
        try:
            frozen[name] = snapshot_loss(summed(metric))
        except CaptureError as error:
            error.add_note(f"In metric {name!r}, which evaluate compiles as a step compiles its loss.")
            raise
    return frozen


class _Stack:
    """Arrays on the host that grow along axis 0: one for each leaf of the model's output."""

    def __init__(self, data: Data[Any]) -> None:
        self._data = data
        self.structure: Any = None
        self._first: list[Any] = []
        self._buffers: list[Any] = []
        self._used: list[int] = []

    def check(self, output: Any, number: int) -> None:
        """An error for an output that cannot follow those before it; looks at shapes only."""
        leaves = tree.flatten(output)[0]
        structure = jax.tree_util.tree_structure(output)
        scalar = next((path for path, leaf in leaves.items() if not leaf.shape), None)
        if scalar is not None:
            raise ValueError(
                f"predict concatenates the outputs of a Data along axis 0, but the output{_at(scalar)} of item "
                f"{number} is a scalar. Call predict for each item: [trainer.predict(state, x) for x in data]."
            )
        rows = [(leaf.shape[1:], leaf.dtype) for leaf in leaves.values()]
        if self.structure is None:
            self.structure, self._first = structure, rows
        if structure != self.structure or rows != self._first:
            raise ValueError(
                "predict concatenates the outputs of a Data along axis 0, but these of item "
                f"{number} differ from those before in more than that axis: "
                + ", ".join(f"{path or 'output'}: {tree.describe(leaf)}" for path, leaf in leaves.items())
                + ". Pad the inputs to one shape, or call predict for each item."
            )

    def take(self, batches: list[list[Any]]) -> None:
        """Append outputs, read from the device."""
        for leaves in batches:
            if not self._buffers:
                count = known_length(self._data) or 1
                self._buffers = [np.empty((count * a.shape[0], *a.shape[1:]), a.dtype) for a in leaves]
                self._used = [0] * len(leaves)
            for i, new in enumerate(map(np.asarray, leaves)):
                start, end = self._used[i], self._used[i] + len(new)
                if end > len(self._buffers[i]):
                    grown = np.empty((max(end, 2 * start), *new.shape[1:]), new.dtype)
                    grown[:start] = self._buffers[i][:start]
                    self._buffers[i] = grown
                self._buffers[i][start:end] = new
                self._used[i] = end

    def rows(self) -> list[Any]:
        """The arrays, without what was not filled."""
        return [buffer[:used] for buffer, used in zip(self._buffers, self._used, strict=True)]


def _at(path: str) -> str:
    return f" at {path!r}" if path else ""
