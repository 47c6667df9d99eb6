"""Passes over data with a trained model: metrics of all batches together, and their outputs stacked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from kaun import tree
from kaun._engine import StepInputs
from kaun._loss import snapshot_loss
from kaun.context import Context
from kaun.data import Data, LabelledItem, RowInfo, RowsItem, empty_data, known_length, open_items, with_rows
from kaun.errors import CaptureError
from kaun.evaluation.rows import RowMetrics
from kaun.evaluation.together import in_step
from kaun.evaluation.totals import Metric, MetricTotals, check_metrics, with_counts
from kaun.metrics import run_ahead
from kaun.sharding import Sharding

__all__ = ["evaluate", "predict"]


def evaluate(
    run: Callable[[StepInputs], Any], data: Any, metrics: Any, ctx: Context | None, sharding: Sharding | None = None
) -> dict[str, float]:
    """The metrics over all items of ``data``, by name; see ``Trainer.evaluate``.

    Args:
        run: Runs the compiled program for its inputs, and does not wait for it.
        data: Items ``(x, y)`` or ``(x, y, Context)``.
        metrics: Functions of predictions and targets, by name.
        ctx: The context of all items; an item's own context overrides its names.
        sharding: Where the arrays of the trainer lie, also in other processes.
    """
    metrics = check_metrics("evaluate", metrics)
    totals, of_rows = MetricTotals(metrics), functools.cache(lambda: RowMetrics(metrics))

    def compute(item: Any, number: int) -> Any:
        item, rows = _with_rows(item)
        x, y, own = LabelledItem.parse(item, number)
        weighted = None if rows is None else of_rows().of(rows, y)
        if rows is not None:
            own = rows.merged(own)
            x, y, own = (x, y, own) if weighted is not None else rows.real((x, y, own))
        # The metrics are captured again for each item, as a loss is: they may read what changes between two items.
        captured = _snapshots(weighted or {name: with_counts(metric) for name, metric in metrics.items()})
        return run(StepInputs({"x": x, "y": y}, captured, ctx.merge(own) if ctx is not None else own, "item"))

    expected = (
        f"evaluate expected data, a kaun.Data or an iterable of (x, y), received {tree.describe(data)}. "
        "To make them from arrays, write Data.batches((x, y), batch_size=256)."
    )
    with open_items(with_rows(data), expected) as own, in_step(own, data, sharding, "evaluate") as items:
        if not run_ahead(items, compute, totals.take):
            raise empty_data("evaluate")
    return totals.results()


def predict(
    run: Callable[[StepInputs], Any], data: Data[Any], ctx: Context | None, sharding: Sharding | None = None
) -> Any:
    """The outputs for all items of ``data``, concatenated along axis 0; see ``Trainer.predict``.

    Args:
        run: Runs the compiled program for its inputs, and does not wait for it.
        data: The model's inputs.
        ctx: The context of all items.
        sharding: Where the arrays of the trainer lie, also in other processes: each of them gets all outputs.
    """
    outputs = _Outputs(known_length(data))

    def compute(item: Any, number: int) -> Any:
        x, rows = _with_rows(item)
        own = ctx if rows is None or rows.ctx is None else (ctx or Context()).merge(rows.ctx)
        try:
            output = run(StepInputs(x, None, own))
        except (TypeError, ValueError) as error:
            if isinstance(x, tuple):
                error.add_note(
                    "predict expects data whose items are the model's inputs. For pairs (x, y) write "
                    "trainer.predict(state, data.map(lambda b: b[0]))."
                )
            raise
        outputs.check(output, number, rows)
        return jax.tree_util.tree_leaves(output), rows

    own: Any = iter(with_rows(data))
    with contextlib.closing(own), in_step(own, data, sharding, "predict") as items:
        if not run_ahead(items, compute, outputs.take):
            raise empty_data("predict")
    return jax.tree_util.tree_unflatten(outputs.structure, outputs.rows())


def _with_rows(item: Any) -> tuple[Any, RowInfo | None]:
    """An item, and what is known of its rows."""
    return (item.item, item.rows) if isinstance(item, RowsItem) else (item, None)


def _snapshots(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    captured: dict[str, Any] = {}
    for name, metric in metrics.items():
        try:
            captured[name] = snapshot_loss(metric)
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

    def check(self, output: Any, number: int, known: RowInfo | None) -> None:
        """Raise ValueError for an output that cannot follow those before it; only shapes and dtypes are checked."""
        leaves = tree.flatten(output)[0]
        structure = jax.tree_util.tree_structure(output)
        scalar = next((path for path, leaf in leaves.items() if not leaf.shape), None)
        if scalar is not None:
            raise ValueError(
                f"predict concatenates the outputs of a Data along axis 0, but the output{_at(scalar)} of item "
                f"{number} is a scalar. Call predict for each item: [trainer.predict(state, x) for x in data]."
            )
        size = None if known is None or known.mask is None else len(known.mask)
        other = next((path for path, leaf in leaves.items() if size not in (None, leaf.shape[0])), None)
        if other is not None:
            raise ValueError(
                f"predict cuts filled rows off the outputs of a padded Data, but the output{_at(other)} of item "
                f"{number} has {leaves[other].shape[0]} rows for {size} of x: it is not known which are filled. Return "
                "one row for each of x, or leave pad=True out."
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

    def take(self, batches: list[tuple[list[Any], RowInfo | None]]) -> None:
        """Read some outputs from the device, and append them without filled rows."""
        for leaves, known in batches:
            if not self._buffers:
                self._buffers = [np.empty((self._length * a.shape[0], *a.shape[1:]), a.dtype) for a in leaves]
                self._used = [0] * len(leaves)
            leaves = list(map(tree.on_host, leaves))
            for i, new in enumerate(leaves if known is None else known.real(leaves)):
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
