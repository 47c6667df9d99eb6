"""Positions of a sequence: rotary embedding, and the layers that add learned or sinusoidal vectors."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._calls import public
from kaun._jax import is_traced
from kaun.context import Context
from kaun.layers.arguments import accumulation_dtype, along_last, call_text, positive, size
from kaun.layers.core import Float, Layer, Vars
from kaun.layers.init import Initializer, init_param
from kaun.layers.inputs import float_input
from kaun.layers.path import here

__all__ = ["positions", "positions_of", "rope", "sinusoidal_positions"]


@public
def rope(
    x: Any,
    theta: float = 10000.0,
    seq_axis: int = -2,
    *,
    positions: Any = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> jax.Array:
    """Rotate each vector by angles that are proportional to its position (RoFormer, Su et al., 2021).

    Element i of the first half of the last axis and element i of the second half form a plane (the convention of LLaMA
    and Hugging Face), which is rotated by ``position * theta ** (-2 i / size)``. The dot product of two rotated vectors
    depends on the difference of their positions only.

    Args:
        x: ``[..., seq, size]`` of any floating dtype.
        theta: The base of the angles, which are computed in float32 (float64 for a float64 ``x``). Default: 10000.
        seq_axis: The axis of positions. Default: the one before the last.
        positions: The position of each vector, integers ``[seq]``, or ``[batch, seq]`` with the batch as the first axis
            of ``x``. Default: 0, 1, 2, ...
        interleaved: Whether elements 2i and 2i + 1 form a plane (the convention of RoFormer and GPT-J). Default: False.
        rotary_dim: How many elements of the last axis are rotated, an even number that takes the place of ``size``
            above; the others stay as they are. Default: all.

    Returns:
        An array of the shape and dtype of ``x``.

    Raises:
        TypeError: If ``x`` is not a floating array, or ``positions`` not an integer one.
        ValueError: If the number of rotated elements is odd or above ``size``, ``seq_axis`` is the last axis or does
            not exist, ``positions`` has another shape, or ``theta`` is not above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layers.rope(jnp.array([[1.0, 0.0], [1.0, 0.0]])).round(3)
        Array([[1.   , 0.   ],
               [0.54 , 0.841]], dtype=float32)
        >>> layers.rope(jnp.array([[1.0, 0.0, 2.0]]), positions=jnp.array([1]), rotary_dim=2).round(3)
        Array([[0.54 , 0.841, 2.   ]], dtype=float32)
    """
    x = float_input("rope", x)
    theta, rotated = positive("rope", "theta", theta), _rotated_size(x, rotary_dim)
    is_int = isinstance(seq_axis, (int, np.integer))  # pyright: ignore[reportUnnecessaryIsInstance]
    axis = seq_axis + x.ndim if is_int and seq_axis < 0 else seq_axis
    if not is_int or not 0 <= axis < x.ndim - 1:
        raise (ValueError if is_int else TypeError)(
            f"{here('rope')} expected seq_axis to name an axis before the last, received seq_axis={seq_axis!r} for "
            f"{tree.describe(x)}. Write seq_axis=-2 for [..., seq, size]."
        )
    dtype, half = accumulation_dtype(x.dtype), rotated // 2
    # Computed with jnp and not with NumPy, whose tables would be constants of every compiled program.
    frequencies = theta ** (-jnp.arange(half, dtype=dtype) / half)
    if positions is None:
        places = jnp.arange(x.shape[axis], dtype=dtype)
    else:
        batch = x.shape[0] if axis else None
        places = _checked(f"{here('rope')} expected positions", positions, batch, x.shape[axis]).astype(dtype)
    angles = places[..., None] * along_last(frequencies, places.ndim + 1)
    own = (axis,) if places.ndim == 1 else (0, axis)
    shape = [x.shape[i] if i in own else 1 for i in range(x.ndim - 1)]
    cos, sin = jnp.cos(angles).reshape(*shape, half), jnp.sin(angles).reshape(*shape, half)
    wide = x.astype(dtype)
    part = wide if rotated == x.shape[-1] else wide[..., :rotated]
    a, b = (part[..., ::2], part[..., 1::2]) if interleaved else jnp.split(part, 2, axis=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = jnp.stack([a, b], axis=-1).reshape(part.shape) if interleaved else jnp.concatenate([a, b], axis=-1)
    if rotated < x.shape[-1]:
        turned = jnp.concatenate([turned, wide[..., rotated:]], axis=-1)
    return turned.astype(x.dtype)


@public
def positions(max_length: int, dim: int, *, weight_init: Initializer | None = None) -> Layer[Float, Float]:
    """Make the layer that adds a learned vector to each position of a sequence.

    Input and output are ``[batch, seq, dim]`` in the model's dtype, with ``seq`` up to ``max_length``. Parameter:
    ``weight`` ``[max_length, dim]``. Positions count from 0; those of ``ctx["positions"]``, integers ``[seq]`` or
    ``[batch, seq]``, are used in their place. A position outside ``[0, max_length)`` is an error where it is concrete;
    in compiled code its vector is NaN.

    Args:
        max_length: Number of vectors.
        dim: Size of each vector.
        weight_init: Initializer of ``weight``, from ``jax.nn.initializers``. Default: ``normal(0.02)``.

    Raises:
        TypeError: If a size is not an int; when applied, if the input has another dtype, or ``ctx["positions"]`` is not
            integer.
        ValueError: If a size is below 1; when applied, if the input or ``ctx["positions"]`` has another shape, the
            sequence is longer than ``max_length``, or a concrete position is outside ``[0, max_length)``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.positions(16, 8)
        >>> layer.apply(layer.init(dtype=jnp.float32), jnp.ones((2, 5, 8)))[0].shape
        (2, 5, 8)
    """
    length, width = size("positions", "max_length", max_length), size("positions", "dim", dim)
    name = call_text(positions, max_length=length, dim=width)
    drawn_by = weight_init or jax.nn.initializers.normal(0.02)

    def init(*, dtype: Any) -> Vars:
        return Vars(
            params={"weight": init_param(name, "weight_init", drawn_by, (length, width), dtype)}, state={}, dtype=dtype
        )

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x, vars.dtype, features=width, ndim=3, layout="batch, seq")
        places, weight = positions_of(name, x, ctx), jnp.asarray(vars.params["weight"])
        if places is not None:
            _must_be_below(name, ctx["positions"], length)
            vectors = weight.at[places].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
            return x + (vectors if places.ndim == 2 else vectors[None]), vars
        if x.shape[1] > length:
            raise ValueError(
                f"{here(name)} has {length} positions, received a sequence of {x.shape[1]}, {tree.describe(x)}. Cut "
                f"the sequence, x[:, :{length}], or make max_length {x.shape[1]} or more."
            )
        return x + weight[None, : x.shape[1]], vars

    return Layer(init=init, apply=apply, name=name)


@public
def sinusoidal_positions(dim: int) -> Layer[Float, Float]:
    """Make the layer that adds sines and cosines of each position to a sequence (Vaswani et al., 2017, 3.5).

    At position p, ``sin(p / 10000 ** (2 i / dim))`` is added to element 2i and the cosine of the same angle to element
    2i + 1. Input and output are ``[batch, seq, dim]`` of any floating dtype; in half precision the sum is computed in
    float32. There are no parameters, and sequences may have any length. Positions count from 0; those of
    ``ctx["positions"]``, integers ``[seq]`` or ``[batch, seq]``, are used in their place.

    Args:
        dim: Size of the last axis, an even number.

    Raises:
        TypeError: If ``dim`` is not an int; when applied, if the input is not a floating array, or ``ctx["positions"]``
            is not integer.
        ValueError: If ``dim`` is odd or below 1; when applied, if the input or ``ctx["positions"]`` has another shape.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layer = layers.sinusoidal_positions(2)
        >>> layer.apply(layer.init(dtype=jnp.float32), jnp.zeros((1, 2, 2)))[0].round(3)
        Array([[[0.   , 1.   ],
                [0.841, 0.54 ]]], dtype=float32)
    """
    width = size("sinusoidal_positions", "dim", dim)
    if width % 2:
        raise ValueError(
            f"sinusoidal_positions(dim={width}) expected an even number, one sine and one cosine for each frequency. "
            f"Write dim={width + 1}, for example."
        )
    name = call_text(sinusoidal_positions, dim=width)

    def init(*, dtype: Any) -> Vars:
        return Vars(params={}, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x, features=width, ndim=3, layout="batch, seq")
        dtype, places = accumulation_dtype(x.dtype), positions_of(name, x, ctx)
        places = jnp.arange(x.shape[1])[None] if places is None else jnp.atleast_2d(places)
        frequencies = jnp.exp(jnp.arange(0, width, 2, dtype=dtype) * (-math.log(10000.0) / width))
        angles = places[..., None].astype(dtype) * along_last(frequencies, 3)
        added = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*angles.shape[:2], width)
        return (x.astype(dtype) + added).astype(x.dtype), vars

    return Layer(init=init, apply=apply, name=name)


def positions_of(name: str, x: jax.Array, ctx: Context) -> jax.Array | None:
    """The positions of ``x [batch, seq, ...]`` that a context has, checked: ``[seq]`` or ``[batch, seq]``, or None."""
    if "positions" not in ctx:
        return None
    return _checked(f"{here(name)} expected ctx['positions']", ctx["positions"], x.shape[0], x.shape[1])


def _checked(expected: str, given: Any, batch: int | None, seq: int) -> jax.Array:
    shapes = f"int[{seq}]" if batch is None else f"int[{seq}] or int[{batch}, {seq}]"
    received = f"{expected} as {shapes}, the position of each vector, received {tree.describe(given)}"
    if not (tree.is_array(given) and jnp.issubdtype(given.dtype, jnp.integer)):
        raise TypeError(f"{received}. Write jnp.arange({seq}), for example.")
    if given.shape != (seq,) and (batch is None or given.shape != (batch, seq)):
        raise ValueError(f"{received}. Write jnp.arange({seq}), for example.")
    return jnp.asarray(given)


def _must_be_below(name: str, places: Any, length: int) -> None:
    if is_traced(places):
        return
    # The given array: an int64 of NumPy has been truncated to int32 in the JAX array.
    values = np.asarray(places)
    outside = values[(values < 0) | (values >= length)]
    if len(outside):
        raise ValueError(
            f"{here(name)} expected ctx['positions'] in [0, {length}), received {int(outside[0])}. Make max_length "
            "larger, or correct the positions."
        )


def _rotated_size(x: jax.Array, rotary_dim: int | None) -> int:
    if rotary_dim is None:
        if x.shape[-1] % 2:
            raise ValueError(
                f"{here('rope')} expected a last axis of even size, received {tree.describe(x)}: it rotates its two "
                "halves. Write rotary_dim= to rotate a part of it."
            )
        return x.shape[-1]
    rotated = size("rope", "rotary_dim", rotary_dim)
    if rotated % 2 or rotated > x.shape[-1]:
        raise ValueError(
            f"{here('rope')} expected rotary_dim to be even and at most the size of the last axis, received "
            f"rotary_dim={rotated} for {tree.describe(x)}. Write rotary_dim={x.shape[-1] // 2 * 2}, for example."
        )
    return rotated
