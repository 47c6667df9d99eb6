"""The embedding layer."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun._calls import explained
from kaun._jax import is_traced
from kaun.context import Context
from kaun.layers.arguments import call_text, size
from kaun.layers.core import Float, Int, Layer, Vars
from kaun.layers.init import Initializer, init_param
from kaun.layers.inputs import int_input
from kaun.layers.path import here

__all__ = ["embedding"]


@explained("layers.embedding")
def embedding(
    vocab_size: int, embed_dim: int, scale: bool = True, *, weight_init: Initializer | None = None
) -> Layer[Int, Float]:
    """Make the layer that returns a vector for each index: ``weight[x]``, times ``sqrt(embed_dim)`` with ``scale``.

    The input is ``[...]`` of any integer dtype, the output ``[..., embed_dim]`` in the model's dtype. Parameter:
    ``weight`` ``[vocab_size, embed_dim]``.

    An index outside ``[0, vocab_size)``, also a negative one, is an error where the indices are concrete. In compiled
    code their values are not known; there the vector is NaN, which makes the loss NaN. It is never the vector of
    another index.

    Args:
        vocab_size: Number of vectors.
        embed_dim: Size of each vector.
        scale: Whether vectors are multiplied by ``sqrt(embed_dim)`` (Vaswani et al., 2017, 3.4). Default: True.
        weight_init: Initializer of ``weight``, from ``jax.nn.initializers``. Default: normal with the standard
            deviation ``embed_dim ** -0.5`` with ``scale`` and 1 without, so that each number of the output has variance
            1.

    Raises:
        TypeError: If a size is not an int; when applied, if the indices do not have an integer dtype.
        ValueError: If a size is below 1; when applied to concrete indices, if one is outside ``[0, vocab_size)``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.embedding(100, 16)
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.array([[1, 2, 3]]))
        >>> y.shape
        (1, 3, 16)
    """
    vocab, dim = size("embedding", "vocab_size", vocab_size), size("embedding", "embed_dim", embed_dim)
    name = call_text(embedding, vocab_size=vocab, embed_dim=dim, scale=scale)
    drawn_by = weight_init or jax.nn.initializers.normal(dim**-0.5 if scale else 1.0)

    def init(*, dtype: Any) -> Vars:
        params = {"weight": init_param(name, "weight_init", drawn_by, (vocab, dim), dtype)}
        return Vars(params=params, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        indices = int_input(name, x)
        if not is_traced(indices):
            # x and not indices: an int64 of NumPy has been truncated to int32 in the JAX array.
            _must_be_in_range(name, np.asarray(x), vocab)
        # jnp.take and plain indexing would count a negative index from the end.
        rows = jnp.asarray(vars.params["weight"]).at[indices]
        y = rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return y * math.sqrt(dim) if scale else y, vars

    return Layer(init=init, apply=apply, name=name)


def _must_be_in_range(name: str, indices: np.ndarray[Any, Any], vocab: int) -> None:
    outside = np.argwhere((indices < 0) | (indices >= vocab))
    if len(outside):
        position = tuple(int(i) for i in outside[0])
        index = int(indices[position])
        fix = f"Make vocab_size {index + 1} or more" if index >= vocab else f"Use an index below {vocab} for padding"
        raise ValueError(
            f"{here(name)} expected indices in [0, {vocab}), received {index} at position {list(position)}. "
            f"{fix}, or correct the indices."
        )
