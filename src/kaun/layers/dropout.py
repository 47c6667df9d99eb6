"""Dropout of numbers, of channels, and of whole branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kaun import rng, tree
from kaun._calls import explained
from kaun._kernels import bits_for, random_bits
from kaun.context import Context
from kaun.layers.arguments import call_text, fraction
from kaun.layers.core import Float, Layer, Vars
from kaun.layers.inputs import float_input
from kaun.layers.path import here

__all__ = ["drop", "drop_path", "dropout", "spatial_dropout"]


@explained("layers.dropout")
def dropout(rate: float) -> Layer[Float, Float]:
    """Make the layer that sets each number to zero with probability ``rate`` in training (Srivastava et al., 2014).

    The other numbers are divided by ``1 - rate``, so that the expected value does not change. The probability is
    ``rate`` to within 2**-17, and to within 2**-33 below 1/64 and above 63/64. The output has the shape and dtype of
    the input, any floating dtype. The key is ``rng.next_key()``, in a compiled step a function of the run's key and the
    step. In evaluation, and when ``rate`` is 0, the layer is the identity and draws no key.

    Args:
        rate: Probability with which a number is set to zero, in [0, 1).

    Raises:
        TypeError: If ``rate`` is not a number; when applied, if the input is not a floating array.
        ValueError: If ``rate`` is outside [0, 1).

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers, rng
        >>> layer = layers.dropout(0.5)
        >>> with rng.scope(0):
        ...     y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.ones(1000), training=True)
        >>> sorted(set(y.tolist()))
        [0.0, 2.0]
    """
    name = call_text(dropout, rate=rate)
    return _dropping(name, rate, lambda x: x.shape)


@explained("layers.spatial_dropout", "layers.dropout")
def spatial_dropout(rate: float) -> Layer[Float, Float]:
    """Make the layer that sets whole channels to zero with probability ``rate`` in training (Tompson et al., 2015).

    The input is ``[batch, ..., channels]``; a channel of an item is zero at all of its places, or at none: neighbouring
    places of an image are alike, so that single zeros would take little away. Otherwise it is as ``dropout``.

    Args:
        rate: Probability with which a channel of an item is set to zero, in [0, 1).

    Raises:
        TypeError: If ``rate`` is not a number; when applied, if the input is not a floating array.
        ValueError: If ``rate`` is outside [0, 1); when applied, if the input has fewer than three axes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers, rng
        >>> layer = layers.spatial_dropout(0.5)
        >>> with rng.scope(0):
        ...     y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.ones((2, 4, 4, 8)), training=True)
        >>> bool((y == y[:, :1, :1]).all()), sorted(set(y.ravel().tolist()))
        (True, [0.0, 2.0])
    """
    name = call_text(spatial_dropout, rate=rate)

    def shape(x: jax.Array) -> Sequence[int]:
        if x.ndim < 3:
            raise ValueError(
                f"{here(name)} expected [batch, ..., channels] with places in between, received {tree.describe(x)}. "
                "Write layers.dropout for single numbers."
            )
        return (x.shape[0], *(1 for _ in x.shape[1:-1]), x.shape[-1])

    return _dropping(name, rate, shape)


@explained("layers.drop_path", "layers.dropout")
def drop_path(rate: float) -> Layer[Float, Float]:
    """Make the layer that sets whole items to zero with probability ``rate`` in training (Huang et al., 2016).

    At the end of a branch, ``residual(sequential([..., drop_path(0.1)]))``, it removes the branch for these items
    (stochastic depth). The input is ``[batch, ...]``. Otherwise it is as ``dropout``.

    Args:
        rate: Probability with which an item is set to zero, in [0, 1).

    Raises:
        TypeError: If ``rate`` is not a number; when applied, if the input is not a floating array.
        ValueError: If ``rate`` is outside [0, 1); when applied, if the input has no axes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers, rng
        >>> layer = layers.drop_path(0.5)
        >>> with rng.scope(0):
        ...     y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.ones((100, 3)), training=True)
        >>> sorted(set(map(tuple, y.tolist())))
        [(0.0, 0.0, 0.0), (2.0, 2.0, 2.0)]
    """
    name = call_text(drop_path, rate=rate)
    return _dropping(name, rate, lambda x: (x.shape[0], *(1 for _ in x.shape[1:])))


def _dropping(name: str, rate: float, mask_shape: Callable[[jax.Array], Sequence[int]]) -> Layer[Float, Float]:
    rate = fraction(name.split("(", 1)[0], "rate", rate)

    def init(*, dtype: Any) -> Vars:
        return Vars(params={}, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x)
        shape = tuple(mask_shape(x))
        return drop(x, rate, shape) if training else x, vars

    return Layer(init=init, apply=apply, name=name)


def drop(x: jax.Array, rate: float, shape: tuple[int, ...] | None = None) -> jax.Array:
    """Set each number to zero with probability ``rate``, and divide the others by ``1 - rate``.

    The probability is ``rate`` to within 2**-17, and to within 2**-33 below 1/64 and above 63/64. Numbers along an axis
    of length 1 in ``shape``, the shape of the mask, are dropped together.
    """
    if rate == 0:
        return x
    bits = bits_for(rate)
    least = min(round(rate * 2**bits), 2**bits - 1)
    keep = random_bits(rng.next_key(), bits, x.shape if shape is None else shape) >= jnp.asarray(least, f"uint{bits}")
    return jnp.where(keep, x / (1 - rate), 0.0)
