"""The dropout layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kaun import rng
from kaun._kernels import bits_for, random_bits
from kaun.context import Context
from kaun.layers.arguments import call_text, fraction
from kaun.layers.core import Float, Layer, Vars
from kaun.layers.inputs import float_input

__all__ = ["drop", "dropout"]


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
    rate = fraction("dropout", "rate", rate)
    name = call_text(dropout, rate=rate)

    def init(*, dtype: Any) -> Vars:
        return Vars(params={}, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x)
        return drop(x, rate) if training else x, vars

    return Layer(init=init, apply=apply, name=name)


def drop(x: jax.Array, rate: float) -> jax.Array:
    """Set each number to zero with probability ``rate``, and divide the others by ``1 - rate``.

    The probability is ``rate`` to within 2**-17, and to within 2**-33 below 1/64 and above 63/64.
    """
    if rate == 0:
        return x
    bits = bits_for(rate)
    least = min(round(rate * 2**bits), 2**bits - 1)
    keep = random_bits(rng.next_key(), bits, x.shape) >= jnp.asarray(least, f"uint{bits}")
    return jnp.where(keep, x / (1 - rate), 0.0)
