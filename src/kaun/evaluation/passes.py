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
from kaun.evaluation.totals import Metric, MetricTotals, check_metrics, with_counts
from kaun.metrics import run_ahead

__all__ = ["evaluate", "predict"]


def evaluate(run: Callable[[StepInputs], Any], data: Any, metrics: Any, ctx: Context | None) -> dict[str, float]:
    """The metrics over all items of ``data``, by name; see ``Trainer.evaluate``.

    Args:
        run: Runs the compiled program for its inputs, and does not wait for it.
        data: Items ``(x, y)`` or ``(x, y, Context)``.
        metrics: Functions of predictions and targets, by name.
        ctx: The context of all items; an item's own context overrides its names.
    """
    metrics = check_metrics("evaluate", metrics)
    totals = MetricTotals(metrics)

    def compute(item: Any, number: int) -> Any:
        x, y, own = LabelledItem.parse(item, number)
        # The metrics are captured again for each item, as a loss is: they may read what changes between two items.
        captured = _snapshots(metrics)
        return run(StepInputs({"x": x, "y": y}, captured, ctx.merge(own) if ctx is not None else own, "item"))

    expected = (
        f"evaluate expected data, a kaun.Data or an iterable of (x, y), received {tree.describe(data)}. "
        "To make them from arrays, write Data.batches((x, y), batch_size=256)."
    )
    with open_items(data, expected) as items:
        if not run_ahead(items, compute, totals.take):
            raise empty_data("evaluate")
    return totals.results()


def predict(run: Callable[[StepInputs], Any], data: Data[Any], ctx: Context | None) -> Any:
    """The outputs for all items of ``data``, concatenated along axis 0; see ``Trainer.predict``.

    Args:
        run: Runs the compiled program for its inputs, and does not wait for it.
        data: The model's inputs.
        ctx: The context of all items.
    """
    outputs = _Outputs(known_length(data))

    def compute(x: Any, number: int) -> Any:
        try:
            output = run(StepInputs(x, None, ctx))
        except (TypeError, ValueError) as error:
            if isinstance(x, tuple):
                error.add_note(
                    "predict expects data whose items are the model's inputs. For pairs (x, y) write "
                    "trainer.predict(state, data.map(lambda b: b[0]))."
                )
            raise
        outputs.check(output, number)
        return jax.tree_util.tree_leaves(output)

    items: Any = iter(data)
    with contextlib.closing(items):
        if not run_ahead(items, compute, outputs.take):
            raise empty_data("predict")
    return jax.tree_util.tree_unflatten(outputs.structure, outputs.rows())


def _snapshots(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    captured: dict[str, Any] = {}
    for name, metric in metrics.items():
        try:
            captured[name] = snapshot_loss(with_counts(metric))
        except CaptureError as error:
            error.add_note(f"In metric {name!r}, which evaluate compiles as a step compiles its loss.")
            raise
    return captured


class _Outputs:
    """The outputs of a model for all items, concatenated along axis 0 on the host.

    Args:
        length: How many items there are, None if that is unknown.
    """

    def __init__(self, length: int | None) -> None:
        self._length = length or 1
        self.structure: Any = None
        self._first: list[Any] = []
        self._buffers: list[Any] = []
        self._used: list[int] = []

    def check(self, output: Any, number: int) -> None:
        """Raise ValueError for an output that cannot follow those before it; only shapes and dtypes are checked."""
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
        """Read some outputs from the device, and append them."""
        for leaves in batches:
            if not self._buffers:
                self._buffers = [np.empty((self._length * a.shape[0], *a.shape[1:]), a.dtype) for a in leaves]
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
        """The arrays, without the space that was not filled."""
        return [buffer[:used] for buffer, used in zip(self._buffers, self._used, strict=True)]


def _at(path: str) -> str:
    return f" at {path!r}" if path else ""
