"""Products of the tiny matrices of many models, as sums that run along the models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kaun._jax import Operation, evaluate

__all__ = ["with_summed_products"]

_MOST = 16  # terms of a sum; a product of longer rows is faster on the kernel for matrices
_WRITTEN_OUT = 2  # a sum of so few terms is fused into what takes it, and is cheap to compute again


def with_summed_products(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)``, with each product of tiny matrices as a sum of elementwise products.

    ``jax.vmap`` makes a product of many tiny matrices, for which XLA:CPU has a loop over single numbers: it takes a
    matrix at a time, and needs its operands and its gradients in another order than the elementwise operations around
    it. The elementwise products run along the largest axis, that of the models, in vectors. The results are equal
    except for rounding.

    Args:
        function: A function of arrays.
        *arguments: Pytrees of arrays.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from kaun._kernels import with_summed_products
        >>> many = jax.vmap(lambda x, weight: x @ weight)
        >>> with_summed_products(many, jnp.ones((256, 4, 3)), jnp.ones((256, 3, 2))).shape
        (256, 4, 2)
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    results = _run(closed, jax.tree_util.tree_leaves(arguments))
    return jax.tree_util.tree_structure(shape).unflatten(results)


def _run(closed: Any, values: Sequence[Any]) -> list[Any]:
    (results,) = evaluate(closed, values, lambda constant: constant, _apply)
    return results


def _apply(operation: Operation, values: list[Any]) -> list[Any]:
    if operation.name in ("jit", "pjit"):
        return _run(operation.called, values)
    dimensions = operation.dot_dimensions
    if dimensions is None or operation.form[0][0].dtype != values[0].dtype or not _is_tiny(dimensions, *values):
        return operation.run(values)
    return [_summed(dimensions, *values)]


def _is_tiny(dimensions: Any, a: jax.Array, b: jax.Array) -> bool:
    """Whether a product in float32 or float64 has few terms, and is neither empty nor a scalar."""
    terms = math.prod(a.shape[axis] for axis in dimensions[0][0])
    is_scalar = len(dimensions[0][0]) == a.ndim == b.ndim
    return (
        a.size * b.size > 0
        and terms <= _MOST
        and a.dtype == b.dtype
        and a.dtype in (jnp.float32, jnp.float64)
        and not is_scalar
    )


def _summed(dimensions: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return ``lax.dot_general(a, b, dimensions)`` as a sum of elementwise products."""
    (of_a, of_b), (batch_a, batch_b) = dimensions
    free_a = [axis for axis in range(a.ndim) if axis not in (*of_a, *batch_a)]
    free_b = [axis for axis in range(b.ndim) if axis not in (*of_b, *batch_b)]
    batch = [a.shape[axis] for axis in batch_a]
    rows, columns = [a.shape[axis] for axis in free_a], [b.shape[axis] for axis in free_b]
    # Both as [terms, *batch, *rows, *columns], with the largest of these axes last.
    a = a.transpose(*of_a, *batch_a, *free_a).reshape(-1, *batch, *rows, *[1] * len(columns))
    b = b.transpose(*of_b, *batch_b, *free_b).reshape(-1, *batch, *[1] * len(rows), *columns)
    sizes = [*batch, *rows, *columns]
    largest = sizes.index(max(sizes))
    a, b = (jnp.moveaxis(each, largest + 1, -1) for each in (a, b))
    if len(a) <= _WRITTEN_OUT:
        total = a[0] * b[0] + a[1] * b[1] if len(a) == _WRITTEN_OUT else a[0] * b[0]
    else:
        total = (a * b).sum(axis=0)
    return jnp.moveaxis(total, -1, largest)
