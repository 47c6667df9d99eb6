"""A trained model as one compiled program, without the Python code that made it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from kaun import tree
from kaun._engine import check_input
from kaun._messages import add_note
from kaun._step import batch_length
from kaun.context import Context
from kaun.state import TrainState

if TYPE_CHECKING:
    from jax.export import Exported

__all__ = ["export_model"]


def export_model(
    forward: Callable[..., Any], state: TrainState, x: Any, ctx: Context | None, platforms: Sequence[str] | None
) -> Exported:
    """The model in evaluation mode as a program of the input, and of the context as a dict if there is one.

    Args:
        forward: ``forward(carry, key, x, ctx) -> output``.
        state: Its weights become constants of the program, which runs on one device wherever they lie.
        x: An input, as arrays or as their shapes and dtypes.
        ctx: A context, as arrays or as their shapes and dtypes; None for a program without one.
        platforms: Where the program can run, None for the platform of this process.

    Raises:
        TypeError: If x has a leaf that is not an array.
        ValueError: If the model needs a batch of a known length.
    """
    from jax import export  # imported here because it takes time and most programs do not need it

    check_input(x)
    carry, key = jax.tree_util.tree_map(tree.readable, ((state.vars, state.step), state.key))
    length = batch_length(x)
    (batch,) = export.symbolic_shape("batch")

    def shape(a: Any) -> jax.ShapeDtypeStruct:
        dims = np.shape(a)
        grown = dims and dims[0] == length
        dtype = a.dtype if hasattr(a, "dtype") else np.result_type(a)
        if not jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
            dtype = jax.dtypes.canonicalize_dtype(dtype)
        return jax.ShapeDtypeStruct((batch, *dims[1:]) if grown else dims, dtype)

    given = (x,) if ctx is None else (x, {name: ctx[name] for name in ctx})

    def predict(x: Any, named: dict[str, Any] | None = None) -> Any:
        return forward(carry, key, x, Context(**(named or {})))

    shapes = jax.tree_util.tree_map(shape, given)
    try:
        return export.export(jax.jit(predict), platforms=platforms)(*shapes)
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ValueError(
            "export makes a program for batches of any length, but the model uses the length as a number: "
            f"{str(error).splitlines()[0]} Use operations on arrays instead, or a size of -1 in a reshape."
        ) from error
    except (TypeError, ValueError) as error:
        named = ctx or Context()
        rows = [name for name in named if np.shape(named[name])[:1] == (length,)]
        if rows:
            add_note(
                error,
                f"In export: {', '.join(f'ctx[{name!r}]' for name in rows)} of length {length}, as x has, counts as "
                "having a row for each example. If it has not, give export an x of another length.",
            )
        raise
