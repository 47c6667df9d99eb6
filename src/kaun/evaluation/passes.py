"""Passes over data with a trained model: metrics of all batches together, and their outputs stacked."""

from __future__ import annotations

import contextlib
import functools
import types
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._engine import EvaluationLoop, StepInputs, refuse_traced
from kaun._loss import FrozenLoss, is_library, snapshot_loss
from kaun._messages import add_note, contextmanager
from kaun.context import Context
from kaun.data import Data, LabelledItem, RowInfo, RowsItem, empty_data, known_length, open_items, with_rows
from kaun.errors import CaptureError
from kaun.evaluation.outputs import Outputs, padded_size
from kaun.evaluation.rows import RowMetrics
from kaun.evaluation.together import Pass, in_step
from kaun.evaluation.totals import MemberTotals, Metric, MetricTotals, check_metrics, with_counts
from kaun.metrics import run_ahead
from kaun.sharding import Sharding

__all__ = ["evaluate", "evaluate_members", "predict", "predict_members"]


def evaluate(
    loop: Callable[..., EvaluationLoop],
    data: Any,
    metrics: Any,
    ctx: Context | None,
    sharding: Sharding | None = None,
) -> dict[str, float]:
    """The metrics over all items of ``data``, by name; see ``Trainer.evaluate``.

    Args:
        loop: Makes the loop that runs the items, of a function that takes its results and ``Pass.ready``.
        data: Items ``(x, y)`` or ``(x, y, Context)``.
        metrics: Functions of predictions and targets, by name.
        ctx: The context of all items; an item's own context overrides its names.
        sharding: Where the arrays of the trainer lie, also in other processes.
    """
    metrics = check_metrics("evaluate", metrics)
    totals, parts = MetricTotals(metrics), _parts_of_items(metrics, ctx)
    with _items_of(data, sharding) as taken:
        number, running = 0, loop(totals.take, taken.ready)
        for number, item in enumerate(taken.items, start=1):
            x, captured, own = parts(item, number)
            running.push(StepInputs(x, FrozenLoss.by_name(captured), own, "item"))
        running.finish()
    if not number:
        raise empty_data("evaluate")
    return totals.results()


def evaluate_members(
    run: Callable[..., Any],
    data: Any,
    metrics: Any,
    ctx: Context | None,
    size: int,
    join: Callable[[Sequence[Any]], Any] | None,
    sharding: Sharding | None,
) -> dict[str, np.ndarray[Any, Any]]:
    """The metrics of each member of an ensemble over all items of ``data``, by name, with the members along axis 0.

    Args:
        run: Runs the compiled program for its inputs, before that calls ``Pass.ready``; what it gives has the members
            along axis 0.
        data: As for ``evaluate``, or with ``join`` a pipeline for each member.
        metrics: As for ``evaluate``.
        ctx: As for ``evaluate``.
        size: The number of members.
        join: Makes one (input, metrics, context) of those of the members; None where they share the items.
        sharding: Where the members lie, also in other processes.
    """
    metrics = check_metrics("evaluate", metrics)
    totals, parts = MemberTotals(metrics, size), _parts_of_items(metrics, ctx)

    def compute(item: Any, number: int, ready: Callable[[StepInputs], None]) -> Any:
        found = parts(item, number) if join is None else join([parts(one, number) for one in item])
        x, captured, own = found
        return run(StepInputs(x, captured, own, "item"), ready)

    with _items_of(data if join is None else _side_by_side(data), sharding) as taken:
        if not run_ahead(taken.items, functools.partial(compute, ready=taken.ready), totals.take):
            raise empty_data("evaluate")
    return totals.results()


def _parts_of_items(
    metrics: Mapping[str, Metric], ctx: Context | None
) -> Callable[[Any, int], tuple[Any, dict[str, Any], Context | None]]:
    """A function of an item and its number that gives input and targets, the captured metrics, and the context."""
    constant = [name for name, metric in metrics.items() if _is_constant(metric)]
    of_rows = functools.cache(lambda: RowMetrics(metrics, constant))
    counting = {name: with_counts(metric) for name, metric in metrics.items()}
    # The metrics are captured again for each item, as a loss is: they may read what changes between two items. A
    # function of kaun's reads nothing that does.
    fixed = _snapshots({name: counting[name] for name in constant})
    changing = {name: metric for name, metric in counting.items() if name not in fixed}

    def parts(item: Any, number: int) -> tuple[Any, dict[str, Any], Context | None]:
        item, rows = _with_rows(item)
        x, y, own = LabelledItem.parse(item, number)
        weighted = None if rows is None else of_rows().of(rows, y)
        if rows is not None:
            own = rows.merged(own)
            x, y, own = (x, y, own) if weighted is not None else rows.real((x, y, own))
        captured = _snapshots(weighted) if weighted else {**fixed, **_snapshots(changing)}
        return {"x": x, "y": y}, captured, ctx.merge(own) if ctx is not None else own

    return parts


@contextmanager
def _items_of(data: Any, sharding: Sharding | None = None) -> Generator[Pass]:
    """The pass over data of ``evaluate``; its items have what is known of their rows."""
    refuse_traced([jnp.zeros(())], "evaluate")
    expected = (
        f"evaluate expected data, a kaun.Data or an iterable of (x, y), received {tree.describe(data)}. "
        "To make them from arrays, write Data.batches((x, y), batch_size=256)."
    )
    with open_items(with_rows(data), expected) as own, in_step(own, data, sharding, "evaluate") as taken:
        yield taken


def predict(
    loop: Callable[..., EvaluationLoop], data: Data[Any], ctx: Context | None, sharding: Sharding | None = None, *,
    of_members: bool = False,
) -> Any:  # fmt: skip
    """The outputs for all items of ``data``, concatenated along axis 0; see ``Trainer.predict``.

    Args:
        loop: Makes the loop that runs the items, of a function that takes its results and ``Pass.ready``.
        data: The model's inputs.
        ctx: The context of all items.
        sharding: Where the arrays of the trainer lie, also in other processes: each of them gets all outputs.
        of_members: Whether outputs have the members of an ensemble along axis 0. That is axis 1 of what is returned.
    """
    outputs, checked, known = Outputs(known_length(data)), (None, None), deque[RowInfo | None]()

    def take(results: Any) -> None:
        arrays = jax.tree_util.tree_leaves(results)
        if of_members:
            arrays = [array.swapaxes(1, 2) for array in arrays]
        outputs.take(arrays, [known.popleft() for _ in range(len(arrays[0]) if arrays else 0)])

    own: Any = iter(with_rows(data))
    with contextlib.closing(own), in_step(own, data, sharding, "predict") as taken:
        number, running = 0, loop(take, taken.ready)
        for number, item in enumerate(taken.items, start=1):
            x, rows = _with_rows(item)
            known.append(rows)
            try:
                inputs = StepInputs(x, None, _context(ctx, rows))
                outline = running.push(inputs)
            except (TypeError, ValueError) as error:
                if isinstance(x, tuple):
                    add_note(
                        error,
                        "predict expects data whose items are the model's inputs. For pairs (x, y) write "
                        "trainer.predict(state, data.map(lambda b: b[0])).",
                    )
                raise
            kind = (inputs.key, padded_size(rows))
            if kind != checked:  # outputs of one program have one form
                outline = jax.tree_util.tree_map(_rows_first, outline) if of_members else outline
                outputs.check(outline, number, rows)
                checked = kind
        running.finish()
    if not number:
        raise empty_data("predict")
    return jax.tree_util.tree_unflatten(outputs.structure, outputs.rows())


def predict_members(
    run: Callable[..., Any], data: Sequence[Data[Any]], ctx: Context | None, join: Callable[..., Any],
    sharding: Sharding | None,
) -> list[Any]:  # fmt: skip
    """The outputs of each member of an ensemble for the items of its own pipeline, as ``predict`` gives them.

    Args:
        run: As for ``evaluate_members``.
        data: The inputs of each member.
        ctx: The context of all items.
        join: Makes one (input, context) of those of the members.
        sharding: As for ``evaluate_members``.
    """
    outputs = [Outputs(known_length(each)) for each in data]

    def compute(items: Sequence[Any], number: int, ready: Any) -> Any:
        pairs = [_with_rows(item) for item in items]
        x, own = join([(x, _context(ctx, rows)) for x, rows in pairs])
        output = run(StepInputs(x, None, own), ready)
        leaves = jax.tree_util.tree_leaves(output)
        own_output = jax.tree_util.tree_map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), output)
        for each, (_, rows) in zip(outputs, pairs, strict=True):
            each.check(own_output, number, rows)
        return leaves, [rows for _, rows in pairs]

    def take(batches: list[Any]) -> None:
        for leaves, known in batches:
            held = [tree.on_host(leaf) for leaf in leaves]
            for i, (each, rows) in enumerate(zip(outputs, known, strict=True)):
                each.take([leaf[i][None] for leaf in held], [rows])

    joined = _side_by_side(data)
    _outputs_of(joined, compute, take, joined, sharding)
    return [jax.tree_util.tree_unflatten(each.structure, each.rows()) for each in outputs]


def _rows_first(output: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an output [members, rows, ...] with the rows in front; of a scalar without members."""
    members, *rest = output.shape
    return jax.ShapeDtypeStruct((*rest[:1], members, *rest[1:]) if rest else (), output.dtype)


def _side_by_side(data: Sequence[Data[Any]]) -> Data[Any]:
    """Tuples of the items of several pipelines, with what is known of their rows."""
    return Data.zip(*[cast("Data[Any]", with_rows(each)) for each in data])


def _outputs_of(
    data: Any, compute: Callable[..., Any], take: Callable[[list[Any]], None], source: Any, sharding: Any
) -> None:
    own: Any = iter(data)
    with contextlib.closing(own), in_step(own, source, sharding, "predict") as taken:
        if not run_ahead(taken.items, functools.partial(compute, ready=taken.ready), take):
            raise empty_data("predict")


def _with_rows(item: Any) -> tuple[Any, RowInfo | None]:
    """An item, and what is known of its rows."""
    return (item.item, item.rows) if isinstance(item, RowsItem) else (item, None)


def _context(ctx: Context | None, rows: RowInfo | None) -> Context | None:
    return ctx if rows is None or rows.ctx is None else (ctx or Context()).merge(rows.ctx)


def _is_constant(metric: Any) -> bool:
    return type(metric) is types.FunctionType and metric.__closure__ is None and is_library(metric.__module__ or "")


def _snapshots(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    captured: dict[str, Any] = {}
    for name, metric in metrics.items():
        try:
            captured[name] = snapshot_loss(metric)
        except CaptureError as error:
            add_note(error, f"In metric {name!r}, which evaluate compiles as a step compiles its loss.")
            raise
    return captured
