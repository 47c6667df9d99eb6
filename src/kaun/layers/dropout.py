"""The dropout layer."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from kaun import rng
from kaun.context import Context
from kaun.layers.checks import float_input
from kaun.layers.core import Float, Layer, Vars
from kaun.layers.parts import fraction, spell

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
    name = spell(dropout, rate=rate)

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
    bits = _bits(rate)
    least = min(round(rate * 2**bits), 2**bits - 1)
    keep = _numbers(rng.next_key(), bits, x.shape) >= jnp.asarray(least, f"uint{bits}")
    return jnp.where(keep, x / (1 - rate), 0.0)


def _bits(rate: float) -> int:
    # jax.random.bernoulli draws 64 bits for each number and uses 23. With as few as the rate needs, masks are drawn
    # 3 to 5 times as fast.
    if (rate * 2**8).is_integer():
        return 8
    return 16 if 1 / 64 <= rate <= 63 / 64 else 32


def _numbers(key: jax.Array, bits: int, shape: tuple[int, ...]) -> jax.Array:
    """Uniform integers of 8, 16 or 32 bits, a function of the key and the shape."""
    from jax.extend.random import threefry2x32_p  # here and not above: half of the time that importing kaun takes

    rows, length = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    blocks = (rows, -(-length * bits // 64))
    if str(jax.random.key_impl(key)) == "threefry2x32":
        # A block is numbered by its row and its place in it: so the mask of a batch that is spread over devices is
        # drawn where its rows are, and no number repeats however large the array.
        row, place = (jax.lax.broadcasted_iota(jnp.uint32, blocks, axis) for axis in (0, 1))
        first, second = jax.random.key_data(key)
        words = jnp.stack(threefry2x32_p.bind(first, second, row, place), axis=-1)
    else:
        words = jax.random.bits(key, (*blocks, 2))
    numbers = jax.lax.bitcast_convert_type(words, f"uint{bits}").reshape(rows, blocks[1] * 64 // bits)
    return numbers[:, :length].reshape(shape)
