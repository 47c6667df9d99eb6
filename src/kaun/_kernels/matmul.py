"""A matrix product with a gradient that XLA:CPU runs on its fast kernel."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero

__all__ = ["matmul", "matmul_tangent"]

# Multiply-adds, and rows, below which the transposed copies cost more than the faster kernel saves.
_LARGE = 2**20
_ROWS = 256
# Columns of the input above which its copy costs more: 4096 rows of 512 for 512 outputs take 1.2 times as long with it.
_NARROW = 128


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return ``x @ weight``.

    On a CPU, where the product is large, the gradient with respect to the weight is computed in another layout than
    JAX's own: a step of two such layers around a gelu takes 0.74 of the CPU time (768 rows, 128 to 512 to 128, jax
    0.10.2). It is equal except for rounding. All derivatives work.

    Args:
        x: ``[..., n]``.
        weight: ``[n, m]``.

    Returns:
        ``[..., m]``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun._kernels import matmul
        >>> matmul(jnp.ones((2, 5, 3)), jnp.ones((3, 4))).shape
        (2, 5, 4)
    """
    return _of_matrices(_matmul, x, weight)


def matmul_tangent(x: jax.Array, weight_dot: jax.Array) -> jax.Array:
    """Return ``x @ weight_dot``, as the derivative of ``matmul`` computes it: for rules of other derivatives.

    It is linear in ``weight_dot``, and only the derivative with respect to that runs on the fast kernel.

    Args:
        x: ``[..., n]``.
        weight_dot: ``[n, m]``, the tangent of a weight.

    Returns:
        ``[..., m]``.
    """
    return _of_matrices(_by_tangent, x, weight_dot)


def _of_matrices(product: Callable[..., jax.Array], x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product of all rows of ``x``: a plain one on other devices than a CPU, and where it is small."""
    rows = math.prod(x.shape[:-1])
    if type(rows) is not int:
        return x @ weight  # a batch of any length, for jax.export
    if jax.default_backend() != "cpu" or rows < _ROWS or rows * math.prod(weight.shape) < _LARGE:
        return x @ weight
    return _large(product, x, weight)


@functools.partial(jax.jit, static_argnums=0)  # traced and differentiated once for all products of a shape
def _large(product: Callable[..., jax.Array], x: jax.Array, weight: jax.Array) -> jax.Array:
    return product(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[1])


@jax.custom_jvp
def _matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight


def _derivative(primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]) -> tuple[jax.Array, Any]:
    (x, weight), (x_dot, weight_dot) = primals, tangents
    parts: list[jax.Array] = []
    if not isinstance(x_dot, SymbolicZero):
        parts.append(x_dot @ weight)
    if not isinstance(weight_dot, SymbolicZero):
        parts.append(_by_tangent(x, weight_dot))
    return _matmul(x, weight), functools.reduce(operator.add, parts)


_matmul.defjvp(_derivative, symbolic_zeros=True)


def _by_tangent(x: jax.Array, weight_dot: jax.Array) -> jax.Array:
    # XLA turns a plain product into one of a transposed matrix, for which it has a slower kernel. Here the copy is
    # separate, and that of the narrower matrix: the input, or else the cotangent and the weight's gradient. A copy
    # of the wide cotangent of a gelu, computed while it was written, took a third of nanoGPT's step.
    # Without the copy Eigen multiplies: for 1024 or 2048 rows of 128 and 512 that took 0.86 to 0.91 of the CPU time on
    # one core, but 1.08 to 1.15 on two (jax 0.10.2).
    if weight_dot.shape[0] > weight_dot.shape[1]:
        flipped = lax.dot_general(_transposed(weight_dot), x, (((1,), (1,)), ((), ())))
        return _transposed(flipped)
    if weight_dot.shape[0] > _NARROW:
        return x @ weight_dot
    # The barrier makes the copy one of the stored input. Without it XLA composes the copy with the transpose before it:
    # 0.79 ms instead of 0.27 for the outputs of an LSTM (2048 rows of 128, jax 0.10.2).
    return lax.dot_general(_transposed(lax.optimization_barrier(x)), weight_dot, (((0,), (0,)), ((), ())))


def _transposed(a: jax.Array) -> jax.Array:
    """Return the transpose of a matrix, in steps that XLA does not fold into a product."""
    rows, columns = a.shape
    parts = math.gcd(rows, 8)
    return a.reshape(parts, rows // parts, columns).transpose(2, 0, 1).reshape(columns, rows)
