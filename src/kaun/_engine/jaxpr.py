"""What is read off a traced program (a jaxpr): whether it is slow in a loop, recurrent, heavy or tiny; its digest."""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun._jax import constants_in, primitives_in, without_placements
from kaun._jax_work import Convolution, arrays_in, convolutions_in, multiply_adds_in, products_in_scans

__all__ = ["digest_program", "is_heavy", "is_recurrent", "is_tiny", "slow_in_loops"]

# Multiply-adds of a whole program that cost, on the slow path, no more than the dispatch that a loop saves.
_NEGLIGIBLE = 2**16
# Multiply-adds of a step that hide what a dispatch costs (0.1 ms): XLA:CPU makes 1e11 in a second on two cores.
_HEAVY = 2**33
# Multiply-adds of a product that Eigen makes on two cores: of half as many, on one.
_SHARED = 2**21
# Elements of an array of which XLA:CPU's older kernels take no longer than its newer ones.
_TINY = 256
# Operations that the two compute in another way.
_OTHERWISE = frozenset(["cbrt", "tan"])
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def slow_in_loops(jaxpr: Any) -> bool:
    """Return whether a program has convolutions that XLA:CPU runs on its slow path inside a loop, and not outside.

    Only the layouts decide, also those in inner programs. A canonical layout is fast, with any stride, dilation and
    number of groups; any other is slow, unless all of them together have at most 65,536 multiply-adds.

    Args:
        jaxpr: What ``jax.make_jaxpr`` returns.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from kaun._engine.jaxpr import slow_in_loops
        >>> x, weight = jnp.ones((8, 16, 16, 4)), jnp.ones((3, 3, 4, 8))
        >>> def convolved(x, weight):
        ...     layout = ("NHWC", "HWIO", "NHWC")
        ...     return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=layout)
        >>> def summed(x, weight):
        ...     return convolved(x, weight).sum()
        >>> slow_in_loops(jax.make_jaxpr(convolved)(x, weight))
        False
        >>> slow_in_loops(jax.make_jaxpr(jax.grad(summed, argnums=1))(x, weight))
        True
    """
    return sum(map(_slow_work, convolutions_in(jaxpr))) > _NEGLIGIBLE


def _slow_work(conv: Convolution) -> int:
    """Return the multiply-adds of a convolution in another layout than the canonical one, 0 for the canonical one."""
    last = len(conv.output) - 1
    images, kernel = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
    if conv.layout == (images, kernel, images) and conv.batch_groups == 1:
        return 0
    return conv.multiply_adds


def is_heavy(jaxpr: Any) -> bool:
    """Return whether a step takes so long that steps gain nothing from sharing a dispatch, by its products alone.

    Alone, a step needs one program, and not another one for stacked items; Python handles Ctrl-C after each step.
    """
    return multiply_adds_in(jaxpr) >= _HEAVY


def is_recurrent(jaxpr: Any) -> bool:
    """Return whether a step has loops with products that must wait for each other and are large enough for two cores.

    The layers of ``repeat`` are a loop, too, but have products with batch axes or of transposed matrices.
    """
    products = list(products_in_scans(jaxpr))
    return all(each.plain for each in products) and any(each.multiply_adds >= _SHARED for each in products)


def is_tiny(jaxpr: Any) -> bool:
    """Return whether a program has only arrays of at most 256 elements, floating ones in float32.

    XLA:CPU's older kernels then are as fast and as exact as its newer ones.
    """
    small = all(math.prod(a.shape) <= _TINY and _is_plain(a.dtype) for a in arrays_in(jaxpr))
    return small and _OTHERWISE.isdisjoint(primitives_in(jaxpr))


def _is_plain(dtype: Any) -> bool:
    return dtype == jnp.float32 or not jnp.issubdtype(dtype, jnp.inexact)


def digest_program(closed: Any) -> str:
    """Return the SHA-256 of a traced program, a closed jaxpr: of its text, and of the bytes of all its constants.

    Where arrays lie is left out, so that a run that was begun on some devices is resumed on others.
    """
    digest = hashlib.sha256(_ADDRESS.sub("", str(without_placements(closed).jaxpr)).encode())
    for constant in constants_in(closed, literals=True):
        if not hasattr(constant, "dtype"):
            continue
        if jnp.issubdtype(constant.dtype, jax.dtypes.prng_key):
            constant = jax.random.key_data(constant)
        array = np.asarray(constant)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
