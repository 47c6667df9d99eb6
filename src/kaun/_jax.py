"""The parts of JAX that are not its public API, one function for each, with the reason why it is needed.

Nothing else in kaun uses such a part, so a new JAX release is a matter of this file and of ``tests/test_jax.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
from jax import lax

__all__ = [
    "Convolution", "any_traced", "calls_the_host", "children_of", "constants_in", "convolutions_in", "is_jitted",
    "is_traced", "preemption_service_runs", "primitives_in", "programs_in", "run_program", "threefry_2x32", "trace_of",
]  # fmt: skip


_HOST_CALLS = frozenset(["pure_callback", "io_callback", "debug_callback", "ffi_call"])


def is_traced(value: Any) -> bool:
    """Return whether a value is traced, so that its numbers cannot be read.

    ``jax.core.Tracer`` is the only way to tell: a traced array is a ``jax.Array`` too. JAX documents the class, but not
    the module in which it lies.
    """
    return isinstance(value, jax.core.Tracer)


def any_traced(values: Iterable[Any]) -> bool:
    """Return whether one of some values is traced. In one call: it is asked for each array of each ``step``."""
    traced = jax.core.Tracer
    for value in values:  # noqa: SIM110 - any() would resume a generator for each value
        if isinstance(value, traced):
            return True
    return False


def trace_of(value: Any) -> Any:
    """Return the trace that a value belongs to, None for an array with numbers.

    A random key drawn in one trace must not be used in another. JAX has a check for leaks, but no public way to compare
    the traces of two values.
    """
    return getattr(value, "_trace", None)


def is_jitted(value: Any) -> bool:
    """Return whether a value is what ``jax.jit`` returns, with the function under it as ``__wrapped__``.

    The class is known by its name alone: JAX does not export it.
    """
    return type(value).__name__ == "PjitFunction" and hasattr(value, "__wrapped__")


def children_of(value: Any) -> tuple[Sequence[Any], Any] | None:
    """Return the children of a pytree node and its static part, None for a leaf.

    ``jax.tree_util`` flattens whole trees only, and gives the static part of a node of a registered class no name.
    """
    return jax.tree_util.default_registry.flatten_one_level(value)


def preemption_service_runs() -> bool:
    """Return whether JAX's distributed service waits for SIGTERM, to save at a step that all processes agree on.

    ``jax.distributed`` has no public way to ask. The service replaces the handler of the operating system, which Python
    does not see.
    """
    state = sys.modules.get("jax._src.distributed")
    return getattr(getattr(state, "global_state", None), "preemption_sync_manager", None) is not None


def run_program(closed: Any, arguments: Sequence[Any]) -> list[Any]:
    """Return the results of a closed jaxpr for these arguments.

    A function traced by ``jax.make_jaxpr`` is inspected and then run as it was traced; tracing it again would call the
    user's code twice. ``jax.core.eval_jaxpr`` is not covered by JAX's promise of stability.
    """
    return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *arguments)


def programs_in(closed: Any) -> Iterator[Any]:
    """Yield a traced program (a closed jaxpr, or a jaxpr) and all programs inside it.

    Loops, branches and jitted functions keep their bodies in the parameters of their equations. JAX has no public walk
    over them, and the fields of jaxprs are not public API.
    """
    yield closed
    for equation in getattr(closed, "jaxpr", closed).eqns:
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                    yield from programs_in(part)


def constants_in(closed: Any, *, literals: bool = False) -> Iterator[Any]:
    """Yield the constants of a traced program and of all programs inside it, arrays or not.

    JAX gives the constants of a closed jaxpr; those of programs inside it are fields of jaxprs.

    Args:
        closed: The closed jaxpr.
        literals: Whether to yield the arrays in equations too. Scalars there are part of the jaxpr's text.
    """
    for program in programs_in(closed):
        yield from getattr(program, "consts", ())
        if literals:
            for equation in getattr(program, "jaxpr", program).eqns:
                values = (getattr(each, "val", None) for each in equation.invars)
                yield from (value for value in values if getattr(value, "ndim", 0))


def primitives_in(closed: Any) -> set[str]:
    """Return the names of the operations of a traced program and of all programs inside it.

    The names decide which operations are costly, and which call the host: of these a ``pure_callback`` has no effect by
    which JAX's public API would tell. The names of primitives are not public API.
    """
    return {
        equation.primitive.name
        for program in programs_in(closed)
        for equation in getattr(program, "jaxpr", program).eqns
    }


def calls_the_host(closed: Any) -> bool:
    """Return whether a traced program calls Python or foreign code while it runs, and so can fail by an exception.

    ``jax.debug.print`` is left out: it raises nothing.
    """
    return not _HOST_CALLS.isdisjoint(primitives_in(closed))


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


def convolutions_in(closed: Any) -> Iterator[Convolution]:
    """Yield the convolutions of a traced program and of all programs inside it.

    Whether XLA:CPU runs a convolution slowly inside a loop depends on its layout, which only the equation's parameters
    state.
    """
    for program in programs_in(closed):
        for equation in getattr(program, "jaxpr", program).eqns:
            if equation.primitive is lax.conv_general_dilated_p:
                axes, groups = equation.params["dimension_numbers"], equation.params["batch_group_count"]
                layout = (tuple(axes.lhs_spec), tuple(axes.rhs_spec), tuple(axes.out_spec))
                yield Convolution(layout, groups, equation.invars[1].aval.shape, equation.outvars[0].aval.shape)


def threefry_2x32(key: tuple[jax.Array, jax.Array], counts: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """Return two arrays of uint32: the block cipher behind JAX's random keys, for two counts at each place.

    ``jax.random.bits`` draws 32 bits for each number, even where 8 are asked for. ``jax.extend`` may change without
    notice.

    Args:
        key: The two words of the key, uint32 scalars.
        counts: Two arrays of uint32 of one shape.
    """
    from jax.extend.random import threefry2x32_p  # here and not above: half of the time that importing kaun takes

    return threefry2x32_p.bind(*key, *counts)
