"""The metrics of one batch, traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from kaun import rng
from kaun._loss import parts, subject, trace_function
from kaun._messages import locate
from kaun.evaluation import totals


def trace_metrics(key: Any, arrays: Sequence[Any], draw: jax.Array, output: Any, targets: Any) -> totals.PackedMetrics:
    """The metrics of a model's output, as parts that add up over batches (``kaun.scoring``), by name.

    Arguments:
        key: a dict of frozen metrics as ``lift.take_apart`` gave it.
        arrays: what they capture, traced.
        draw: the key from which they draw, each the same.
        output: the model's output, any pytree.
        targets: what it is held against, any pytree.

    Raises:
        CaptureError: when one reads an array that it was not given, or writes to something that it captures.
        TypeError, ValueError: when one does not return what adds up.
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
            error.add_note(
                f"In {where}. A compiled metric sees shapes and dtypes, not numbers: write jnp.where(c, a, b) for an "
                "if, and jnp for np. What only NumPy can compute takes the predictions: trainer.predict(state, data)."
            )
            raise
        except Exception as error:
            if where not in str(error):
                error.add_note(f"In {where}.")
            raise
    return totals.PackedMetrics.of(found)
