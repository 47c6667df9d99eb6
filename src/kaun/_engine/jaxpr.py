"""Walks over traced programs (jaxprs): convolutions that are slow in loops, constants, and a digest."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun._jax import programs_in

# Multiply-adds of a whole program that cost, on the slow path, no more than the dispatch that a loop saves.
_NEGLIGIBLE = 2**16


def slow_in_loops(jaxpr: Any) -> bool:
    """Whether a program has convolutions that XLA:CPU would run on its slow path inside a loop, and not outside.

    It looks at the layouts alone, in inner programs too. What is canonical is fast, with any stride, dilation and
    number of groups; the rest is slow, unless all of it together is too small to matter (65,536 multiply-adds).

    Arguments:
        jaxpr: what ``jax.make_jaxpr`` returns.

    >>> import jax, jax.numpy as jnp
    >>> from kaun._engine.jaxpr import slow_in_loops
    >>> x, weight = jnp.ones((8, 16, 16, 4)), jnp.ones((3, 3, 4, 8))
    >>> def convolved(x, weight):
    ...     return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    >>> def summed(x, weight):
    ...     return convolved(x, weight).sum()
    >>> slow_in_loops(jax.make_jaxpr(convolved)(x, weight))
    False
    >>> slow_in_loops(jax.make_jaxpr(jax.grad(summed, argnums=1))(x, weight))
    True
    """
    return sum(map(_slow_work, _equations(jaxpr))) > _NEGLIGIBLE


def _slow_work(equation: Any) -> int:
    """The multiply-adds of a convolution in another layout than the canonical one, 0 for anything else."""
    if equation.primitive is not lax.conv_general_dilated_p:
        return 0
    dimensions, last = equation.params["dimension_numbers"], len(equation.outvars[0].aval.shape) - 1
    images, kernel = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
    canonical = (dimensions.lhs_spec, dimensions.rhs_spec, dimensions.out_spec) == (images, kernel, images)
    if canonical and equation.params["batch_group_count"] == 1:
        return 0
    shape = equation.invars[1].aval.shape
    return math.prod(equation.outvars[0].aval.shape) * math.prod(shape) // max(shape[dimensions.rhs_spec[0]], 1)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program and of the programs in their parameters (the bodies of calls, loops, branches)."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            inner = cast("Sequence[Any]", value) if isinstance(value, (tuple, list)) else (value,)
            for program in inner:
                if hasattr(program, "eqns") or hasattr(program, "jaxpr"):
                    yield from _equations(program)


def digest_program(closed: Any) -> str:
    """The SHA-256 of a traced program, a closed jaxpr: its text, and the bytes of all its constants."""
    digest = hashlib.sha256(_ADDRESS.sub("", str(closed.jaxpr)).encode())
    for constant in _constants(closed):
        if jnp.issubdtype(constant.dtype, jax.dtypes.prng_key):
            constant = jax.random.key_data(constant)
        array = np.asarray(constant)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _constants(closed: Any) -> Iterator[Any]:
    """The arrays of a program that its text does not spell out, of all programs inside it too."""
    for program in programs_in(closed):
        yield from (c for c in getattr(program, "consts", ()) if hasattr(c, "dtype"))
        for equation in getattr(program, "jaxpr", program).eqns:
            values = (getattr(each, "val", None) for each in equation.invars)
            yield from (value for value in values if getattr(value, "ndim", 0))
