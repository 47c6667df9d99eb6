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
    """The layer that in training zeroes each number with probability ``rate`` (Srivastava et al., 2014).

    What stays is divided by ``1 - rate``, so the expectation stays. The probability is ``rate`` to within 2**-17, to
    within 2**-33 below 1/64 and above 63/64. Input and output have one shape and dtype, any floating one. The key is
    ``rng.next_key()``, in a compiled step a function of the run's key and the step. In evaluation, and when ``rate``
    is 0, it is the identity and draws no key.

    Arguments:
        rate: share of numbers that are zeroed, in [0, 1).

    Raises:
        TypeError: ``rate`` is not a number; applied, not a floating array.
        ValueError: ``rate`` outside of [0, 1).

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
    """``x`` with each number zero with probability ``rate`` and the others divided by ``1 - rate``.

    The probability is that rate to within 2**-17, and to within 2**-33 for rates below 1/64 and above 63/64.
    """
    if rate == 0:
        return x
    bits = bits_for(rate)
    least = min(round(rate * 2**bits), 2**bits - 1)
    keep = random_bits(rng.next_key(), bits, x.shape) >= jnp.asarray(least, f"uint{bits}")
    return jnp.where(keep, x / (1 - rate), 0.0)
