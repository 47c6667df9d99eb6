"""A mean with its weight, and losses that give one."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, ParamSpec, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._calls import explained, with_advice

__all__ = ["LossFunction", "Mean", "parts_of", "row_arguments", "scalar_like", "wide", "with_parts"]

P = ParamSpec("P")
Scalar = jax.Array | np.number[Any] | float


@with_advice
@dataclasses.dataclass(frozen=True, eq=False)
class Mean:
    """A weighted mean as its two sums, which a loss may return in place of a scalar.

    A loss that is a scalar counts by the number of examples of its batch; a ``Mean`` counts by its weight. Over several
    batches the mean is the sum of the totals divided by the sum of the weights, however the rows were cut into batches.
    ``losses.mse.parts(predictions, targets)``, and ``parts`` of every other loss, give one.

    With a scalar ``c`` these keep the weight, and change the value as they say: ``mean + c``, ``mean - c``,
    ``mean * c``, ``mean / c``, ``-mean``; so ``loss(output) + penalty`` is a ``Mean`` if ``loss(output)`` is one. Two
    means with two weights are not added: write which weight counts, ``a + b.value``.

    Args:
        total: The weighted sum of the losses, a floating scalar array. Beside a loss, in its dict of scalars, it may be
            any real scalar, for example how many rows are right.
        weight: The sum of the weights, a scalar: an array or a number, not negative. It does not have to be an integer.

    Attributes:
        total: As the argument.
        weight: As the argument.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import losses
        >>> def loss(errors, keep):
        ...     return losses.Mean(jnp.where(keep, errors**2, 0).sum(), keep.sum())
        >>> loss(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])).value
        Array(5., dtype=float32)
    """

    total: Scalar
    weight: Scalar

    @property
    def value(self) -> jax.Array:
        """``total / weight``, in the dtype of a floating total; 0 with a gradient of 0 where the weight is 0.

        Examples:
            >>> import jax.numpy as jnp
            >>> from kaun import losses
            >>> losses.Mean(jnp.float32(0), 0).value
            Array(0., dtype=float32)
        """
        total = jnp.asarray(self.total)
        dtype = wide(total.dtype)
        kind = total.dtype if jnp.issubdtype(total.dtype, jnp.floating) else dtype
        if isinstance(self.weight, (int, float, np.generic)) and self.weight:
            return _quotient(total.astype(dtype), dtype.type(self.weight)).astype(kind)
        weight = jnp.asarray(self.weight).astype(dtype)
        # Twice, because the gradient of total / 0 would be NaN also where the quotient is not used.
        quotient = total.astype(dtype) / jnp.where(weight == 0, 1, weight)
        return jnp.where(weight == 0, 0, quotient).astype(kind)

    def __add__(self, other: Scalar) -> Mean:
        return NotImplemented if not _is_scalar(other) else self._with(lambda t, c, w: t + c * w, other)

    def __sub__(self, other: Scalar) -> Mean:
        return NotImplemented if not _is_scalar(other) else self._with(lambda t, c, w: t - c * w, other)

    def __mul__(self, other: Scalar) -> Mean:
        return NotImplemented if not _is_scalar(other) else self._with(lambda t, c, w: t * c, other)

    def __truediv__(self, other: Scalar) -> Mean:
        return NotImplemented if not _is_scalar(other) else self._with(lambda t, c, w: t / c, other)

    def __neg__(self) -> Mean:
        return Mean(-jnp.asarray(self.total), self.weight)

    def __radd__(self, other: Scalar) -> Mean:
        return self + other

    def __rmul__(self, other: Scalar) -> Mean:
        return self * other

    def __rsub__(self, other: Scalar) -> Mean:
        return -self + other

    def __float__(self) -> float:
        return float(self.value)

    __array_ufunc__: ClassVar[None] = None  # NumPy would take it for an array of one object

    def _with(self, change: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], other: Scalar) -> Mean:
        total = jnp.asarray(self.total)
        own = total.dtype if jnp.issubdtype(total.dtype, jnp.floating) else wide(total.dtype)
        given = jax.dtypes.canonicalize_dtype(getattr(other, "dtype", own))  # a number of Python has none
        dtype = max(own, given, key=lambda d: jnp.issubdtype(d, jnp.floating) * d.itemsize)
        values = [jnp.asarray(each).astype(dtype) for each in (total, other, self.weight)]
        return Mean(change(*values), self.weight)


# XLA divides by a constant as in jnp.mean, by its reciprocal. Jitted, so that an eager call has the same bits.
_quotient = jax.jit(lambda total, weight: total / weight, static_argnums=1)


def wide(dtype: Any) -> np.dtype[Any]:
    """The dtype of sums over a batch: a float16 holds no number above 65504, and a bfloat16 no odd one above 256."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return jax.dtypes.canonicalize_dtype(np.float64)
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)


jax.tree_util.register_dataclass(Mean, data_fields=["total", "weight"], meta_fields=[])


def _is_scalar(other: Any) -> bool:
    if isinstance(other, Mean):
        raise TypeError(
            "Two losses.Mean have two weights, and their sum or product would count by neither. Write which weight "
            "counts: a + b.value has that of a."
        )
    return tree.is_real_scalar(other)


class LossFunction(Protocol[P]):
    """A loss, with the function that gives it as a ``Mean``."""

    __name__: str

    @property
    def parts(self) -> Callable[P, Mean]:
        """The loss as a ``Mean``, of the same arguments."""
        ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> jax.Array:
        """The loss, a scalar."""
        ...


def with_parts(parts: Callable[P, Mean]) -> Callable[[Callable[P, jax.Array]], LossFunction[P]]:
    """Make a function the ``parts`` of the loss that it decorates; both explain wrong calls."""

    def attach(function: Callable[P, jax.Array]) -> LossFunction[P]:
        parts.__qualname__ = f"{function.__qualname__}.parts"  # by which it is pickled, and named in messages
        parts.__doc__ = f"The ``losses.Mean`` of ``losses.{function.__name__}``, of the same arguments."
        name = f"losses.{function.__name__}"
        loss = cast("Any", explained(name, "losses")(function))
        inner = cast("Any", explained(f"{name}.parts", "losses")(parts))
        loss.parts, inner.loss = inner, loss
        return loss

    return attach


def parts_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of this package as the function that gives its ``Mean``, bound as it was by ``functools.partial``.

    Any other function is returned as it is: also one around a loss that ``functools.wraps`` gave the loss's attributes.
    """
    if isinstance(function, functools.partial):
        bound = cast("functools.partial[Any]", function)
        inner = parts_of(bound.func)
        return bound if inner is bound.func else functools.partial(inner, *bound.args, **bound.keywords)
    parts = getattr(function, "parts", None)
    return cast("Callable[..., Any]", parts) if getattr(parts, "loss", None) is function else function


def row_arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Which of ``where`` and ``weights`` a function of outputs and labels takes by name, and no partial has given."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[2:]
    except (TypeError, ValueError):
        return frozenset()
    given: set[str] = set()
    while isinstance(function, functools.partial):
        given |= set(function.keywords)
        function = cast("functools.partial[Any]", function).func
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = {p.name for p in parameters if p.kind in by_name}
    return frozenset({"where", "weights"} & taken - given)


def scalar_like(outputs: Any, mean: Mean) -> jax.Array:
    """The value of a mean in the dtype of a model's outputs."""
    return mean.value.astype(jax.dtypes.canonicalize_dtype(outputs.dtype))
