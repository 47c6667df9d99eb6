"""A trained model as one program of XLA's, without the Python that made it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from kaun._step import batch_length
from kaun.context import Context
from kaun.state import TrainState

if TYPE_CHECKING:
    from jax.export import Exported

__all__ = ["export_model"]


def export_model(
    forward: Callable[..., Any], state: TrainState, x: Any, ctx: Context | None, platforms: Sequence[str] | None
) -> Exported:
    """The model in evaluation mode as a program of x, and of the context as a dict where there is one.

    Arguments:
        forward: ``forward(carry, key, x, ctx) -> output``.
        state: its weights become constants of the program.
        x: an input, arrays or their shapes and dtypes; so the context's arrays.
        platforms: where it can run, None for where this process runs.
    """
    from jax import export  # here and not above: it takes time, and most programs do not need it

    carry, key = (state.vars, state.step), state.key
    length = batch_length(x)
    (batch,) = export.symbolic_shape("batch")

    def shape(a: Any) -> jax.ShapeDtypeStruct:
        dims = np.shape(a)
        grown = dims and dims[0] == length
        dtype = jax.dtypes.canonicalize_dtype(a.dtype if hasattr(a, "dtype") else np.result_type(a))
        return jax.ShapeDtypeStruct((batch, *dims[1:]) if grown else dims, dtype)

    given = (x,) if ctx is None else (x, {name: ctx[name] for name in ctx})

    def predict(x: Any, named: dict[str, Any] | None = None) -> Any:
        return forward(carry, key, x, Context(**(named or {})))

    shapes = jax.tree_util.tree_map(shape, given)
    try:
        return export.export(jax.jit(predict), platforms=platforms)(*shapes)
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ValueError(
            "export makes a program for a batch of any length, but the model asks for that length, or fixes it: "
            f"{str(error).splitlines()[0]} Let what depends on the batch be an operation on arrays, or a size of -1 in "
            "a reshape."
        ) from error
