"""Random integers of as few bits as they need."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kaun._jax import threefry_2x32


def bits_for(rate: float) -> int:
    """Return how many bits a number needs to be compared with a rate: 8, 16 or 32."""
    # jax.random.bernoulli draws 64 bits for each number and uses 23. With as few as the rate needs, masks are drawn
    # 3 to 5 times as fast.
    if (rate * 2**8).is_integer():
        return 8
    return 16 if 1 / 64 <= rate <= 63 / 64 else 32


def random_bits(key: jax.Array, bits: int, shape: tuple[int, ...]) -> jax.Array:
    """Return uniform integers of 8, 16 or 32 bits, a function of the key and the shape."""
    rows, length = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    blocks = (rows, -(-length * bits // 64))
    if str(jax.random.key_impl(key)) == "threefry2x32":
        # A block is numbered by its row and its place in it: so the mask of a batch that is spread over devices is
        # drawn where its rows are, and no number repeats however large the array.
        row, place = (jax.lax.broadcasted_iota(jnp.uint32, blocks, axis) for axis in (0, 1))
        first, second = jax.random.key_data(key)
        words = jnp.stack(threefry_2x32((first, second), (row, place)), axis=-1)
    else:
        words = jax.random.bits(key, (*blocks, 2))
    numbers = jax.lax.bitcast_convert_type(words, f"uint{bits}").reshape(rows, blocks[1] * 64 // bits)
    return numbers[:, :length].reshape(shape)
