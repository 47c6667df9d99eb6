"""The metrics of one batch, traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from kaun import rng
from kaun._loss import parts, subject, trace_function
from kaun._messages import add_note, locate
from kaun.evaluation import totals


def trace_metrics(key: Any, arrays: Sequence[Any], draw: jax.Array, output: Any, targets: Any) -> totals.PackedMetrics:
    """The metrics of a model's output for one batch, by name, as parts that add up over batches.

    Args:
        key: The static key of a dict of metrics, as ``snapshot_loss`` captured them.
        arrays: The arrays that the metrics capture, traced.
        draw: The random key of each metric's RNG scope.
        output: The model's output, any pytree.
        targets: The targets, any pytree.

    Raises:
        CaptureError: If a metric reads an array that it was not given, or writes to something that it captures.
        TypeError: If a metric returns something else than real scalars, pairs or counts.
        ValueError: If a metric returns a mean, and the number of examples is unknown.
    """
    found: dict[str, Any] = {}
    for name, inner, own in parts(key, arrays):
        metric = f"metric {name!r}"
        where = f"{metric} {locate(subject(inner))}"
        check = lambda value, where=where: totals.part_of(where, value, output, targets)
        try:
            with rng.scope(draw):
                found[name] = trace_function(inner, own, (output, targets), check, metric)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            add_note(
                error,
                f"In {where}. A compiled metric sees shapes and dtypes, not numbers: write jnp.where(c, a, b) for an "
                "if, and jnp for np. What only NumPy can compute takes the predictions: trainer.predict(state, data).",
            )
            raise
        except Exception as error:
            if where not in str(error):
                add_note(error, f"In {where}.")
            raise
    return totals.PackedMetrics.of(found)
