"""Arrays, convolutions and products of a traced program, whose equations are not part of JAX's public API."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax import lax

from kaun._jax import primitives_in, programs_in

__all__ = ["Convolution", "Product", "arrays_in", "convolutions_in", "multiply_adds_in", "products_in_scans"]


class Convolution(NamedTuple):
    """A convolution of a traced program.

    Attributes:
        layout: Where input, kernel and output have batch or output features, features, and space, as tuples of axes.
        batch_groups: The number of groups into which the batch is split.
        kernel: The shape of the kernel.
        output: The shape of the output.
    """

    layout: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    batch_groups: int
    kernel: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def multiply_adds(self) -> int:
        """How many multiply-adds it has."""
        return math.prod(self.output) * math.prod(self.kernel) // max(self.kernel[self.layout[1][0]], 1)


class Product(NamedTuple):
    """A matrix product of a traced program.

    Attributes:
        plain: Whether it is ``a @ b`` of two matrices, neither of them transposed.
        multiply_adds: How many multiply-adds it has.
    """

    plain: bool
    multiply_adds: int


def arrays_in(closed: Any) -> Iterator[Any]:
    """Yield shape and dtype of what a traced program and all programs inside it take and compute.

    JAX tells of arguments and results alone; how large an array is that lies between them only the equations state.
    """
    for program in programs_in(closed):
        inner = getattr(program, "jaxpr", program)
        yield from (each.aval for each in (*inner.invars, *inner.constvars))
        yield from (each.aval for equation in inner.eqns for each in equation.outvars)


def convolutions_in(closed: Any) -> Iterator[Convolution]:
    """Yield the convolutions of a traced program and of all programs inside it.

    Whether XLA:CPU runs a convolution slowly inside a loop depends on its layout, which only the equation's parameters
    state.
    """
    if "conv_general_dilated" in primitives_in(closed):
        yield from map(_convolution, _equations(closed, lax.conv_general_dilated_p))


def multiply_adds_in(closed: Any) -> int:
    """Return the multiply-adds of a traced program's convolutions and matrix products; a condition counts all branches.

    XLA counts operations only after lowering, and those of a ``scan`` once.
    """
    total = 0
    for equation in getattr(closed, "jaxpr", closed).eqns:
        if equation.primitive is lax.conv_general_dilated_p:
            total += _convolution(equation).multiply_adds
        elif equation.primitive is lax.dot_general_p:
            total += _product(equation).multiply_adds
        inner = sum(map(multiply_adds_in, _programs_of(equation)))
        total += inner * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def products_in_scans(closed: Any) -> Iterator[Product]:
    """Yield the matrix products that a traced program and all programs inside it make at each step of a ``scan``."""
    for equation in getattr(closed, "jaxpr", closed).eqns:
        for program in _programs_of(equation):
            if equation.primitive.name == "scan":
                yield from map(_product, _equations(program, lax.dot_general_p))
            else:
                yield from products_in_scans(program)


def _equations(closed: Any, primitive: Any) -> Iterator[Any]:
    """Yield the equations of a primitive in a traced program and in all programs inside it."""
    for program in programs_in(closed):
        yield from (each for each in getattr(program, "jaxpr", program).eqns if each.primitive is primitive)


def _product(equation: Any) -> Product:
    (summed, of_right), (batch, _) = equation.params["dimension_numbers"]
    left, right, output = (each.aval.shape for each in (*equation.invars, *equation.outvars))
    plain = len(left) == len(right) == 2 and (summed, of_right, batch) == ((1,), (0,), ())
    return Product(plain, math.prod(output) * math.prod([left[axis] for axis in summed]))


def _programs_of(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(part, "jaxpr", part), "eqns"):
                yield part


def _convolution(equation: Any) -> Convolution:
    axes, groups = equation.params["dimension_numbers"], equation.params["batch_group_count"]
    layout = (tuple(axes.lhs_spec), tuple(axes.rhs_spec), tuple(axes.out_spec))
    return Convolution(layout, groups, equation.invars[1].aval.shape, equation.outvars[0].aval.shape)
