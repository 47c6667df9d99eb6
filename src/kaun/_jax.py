"""The parts of JAX that are not its public API, one function for each, with the reason why it is needed.

Nothing else in kaun uses such a part, so a new JAX release is a matter of this file and of ``tests/test_jax.py``.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.core

__all__ = [
    "FRAMES_NOTE", "HOST_CALLS", "Frame", "Operation", "any_traced", "calls_the_host", "children_of",
    "constants_in", "coordination_client", "current_trace", "evaluate", "hides_frames_of",
    "is_jitted", "is_traced", "preemption_service_runs", "primitives_in", "programs_in", "run_program", "signatures_of",
    "threefry_2x32", "trace_of", "type_of", "without_placements",
]  # fmt: skip

HOST_CALLS = frozenset(["pure_callback", "io_callback", "debug_callback", "ffi_call"])  # call Python or foreign code
_CALL_NAMES = "jit pjit closed_call core_call remat2 checkpoint custom_jvp_call custom_vjp_call"
_CALLS = frozenset(_CALL_NAMES.split())
_FOLDER = jax.__file__.removesuffix("__init__.py")
FRAMES_NOTE = "JAX has removed its internal frames"  # in JAX's note to exceptions


def is_traced(value: Any) -> bool:
    """Return whether a value is traced, so that its numbers cannot be read.

    A traced array is a ``jax.Array`` too. JAX documents ``jax.core.Tracer``, but not the module in which it lies.
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


type_of: Callable[[Any], Any] = operator.attrgetter("aval")
"""A function in C from a JAX array to its type, the same object for arrays of one shape, dtype and placement.

``jax.typeof`` returns it too, and takes eight times as long: it is asked for each array of each item.
"""


def current_trace() -> Any:
    """Return the current trace of JAX; each transformation (also vmap and grad) has its own.

    A value that is computed in a transformation and stored instead of returned cannot be used after it. JAX raises only
    when it is used, far from the cause; which transformation is running has no public name.
    """
    return sys.modules["jax._src.core"].trace_ctx.trace


def is_jitted(value: Any) -> bool:
    """Return whether a value is what ``jax.jit`` returns, with the function under it as ``__wrapped__``.

    The class is known by its name alone: JAX does not export it.
    """
    return type(value).__name__ == "PjitFunction" and hasattr(value, "__wrapped__")


signatures_of: Callable[[Any], int] = operator.methodcaller("_cache_size")
"""A function in C that returns for how many kinds and places of arguments a jitted function was called.

Each place is compiled. It is asked after each dispatch.
"""


def children_of(value: Any) -> tuple[Sequence[Any], Any] | None:
    """Return the children of a pytree node and its static part, None for a leaf.

    ``jax.tree_util`` flattens whole trees only, and gives the static part of a node of a registered class no name.
    """
    return jax.tree_util.default_registry.flatten_one_level(value)


def preemption_service_runs() -> bool:
    """Return whether JAX's distributed service handles SIGTERM: Python does not see it, and JAX does not say."""
    return coordination_client("preemption_sync_manager") is not None


def coordination_client(name: str = "client") -> Any:
    """Return the client of JAX's distributed service, with which processes exchange values; None where there is none.

    ``jax.distributed`` has no public access to it, and what ``multihost_utils`` offers runs on the devices.
    """
    return getattr(getattr(sys.modules.get("jax._src.distributed"), "global_state", None), name, None)


def hides_frames_of(file: str) -> bool:
    """Return whether a file is JAX's, or of a library whose frames JAX hides: which these are has no public name."""
    hides = jax.config.values["jax_traceback_filtering"] not in ("off", "remove_frames")
    return hides and (file.startswith(_FOLDER) or not sys.modules["jax._src.traceback_util"].include_filename(file))


def run_program(closed: Any, arguments: Sequence[Any]) -> list[Any]:
    """Return the results of a closed jaxpr for these arguments.

    A function traced by ``jax.make_jaxpr`` is inspected and then run as it was traced; tracing it again would call the
    user's code twice. ``jax.core.eval_jaxpr`` is not covered by JAX's promise of stability.
    """
    return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *arguments)


def programs_in(closed: Any) -> Iterator[Any]:
    """Yield a traced program (a closed jaxpr, or a jaxpr) and all programs inside it, in parameters of its equations.

    JAX has no public walk over them, and the fields of jaxprs are not public API.
    """
    yield closed
    for equation in getattr(closed, "jaxpr", closed).eqns:
        for part in _parts(equation):
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
        for equation in getattr(program, "jaxpr", program).eqns if literals else ():
            values = (getattr(each, "val", None) for each in equation.invars)
            yield from (value for value in values if getattr(value, "ndim", 0))


def _parts(equation: Any) -> Iterator[Any]:
    """Yield the programs among the parameters of an equation."""
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if _is_program(part):
                yield part


def primitives_in(closed: Any) -> set[str]:
    """Return the names of the operations of a traced program and of all programs inside it, which JAX may change.

    They decide which operations are costly, and which call the host: of these a ``pure_callback`` has no effect by
    which JAX's public API would tell.
    """
    found: set[str] = set()
    seen: set[int] = set()  # a function that is called often is one program
    programs = [closed]
    while programs:
        program = programs.pop()
        program = getattr(program, "jaxpr", program)
        if id(program) not in seen:
            seen.add(id(program))
            found |= {equation.primitive.name for equation in program.eqns}
            programs += itertools.chain.from_iterable(map(_parts, program.eqns))
    return found


def calls_the_host(closed: Any) -> bool:
    """Return whether a traced program calls Python or foreign code while it runs, and so can fail by an exception.

    ``jax.debug.print`` is left out: it raises nothing.
    """
    return not HOST_CALLS.isdisjoint(primitives_in(closed))


_MOVES = frozenset(["sharding_constraint", "reshard"])
_PLACES = (jax.sharding.Sharding, jax.sharding.Mesh, jax.sharding.AbstractMesh, jax.Device)
_OF_CALLS = {"ctx_mesh": jax.sharding.AbstractMesh((), ()), "in_shardings": (), "out_shardings": ()}  # not printed


def without_placements(closed: Any) -> Any:
    """Return a traced program, a closed jaxpr, without what says where arrays lie. It is for its text, not to be run.

    A constraint on a placement moves the names of all that follow. The fields of jaxprs are not public API.
    """
    known: dict[int, Any] = {}  # a jaxpr that is used twice is printed once, as long as it is one object

    def bare(value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(bare, value))
        if not _is_program(value):
            return None if isinstance(value, _PLACES) else value
        if id(value) not in known:
            inner = getattr(value, "jaxpr", value)
            known[id(value)] = _without_moves(inner, bare) if inner is value else value.replace(jaxpr=bare(inner))
        return known[id(value)]

    return bare(closed)


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def _without_moves(jaxpr: Any, bare: Callable[[Any], Any]) -> Any:
    moved, equations = dict[Any, Any](), list[Any]()
    read = lambda atom: atom if _is_literal(atom) else moved.get(atom, atom)
    for equation in jaxpr.eqns:
        operands = list(map(read, equation.invars))
        if equation.primitive.name in _MOVES:
            moved[equation.outvars[0]] = operands[0]
        else:
            params = {name: _OF_CALLS.get(name, bare(value)) for name, value in equation.params.items()}
            equations.append(equation.replace(invars=operands, params=params))
    return jaxpr.replace(eqns=equations, outvars=list(map(read, jaxpr.outvars)))


def threefry_2x32(key: tuple[jax.Array, jax.Array], counts: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """Return two arrays of uint32: the block cipher behind JAX's keys, of two counts and the key's words, uint32 too.

    ``jax.random.bits`` draws 32 bits for each number, even where 8 are asked for. ``jax.extend`` may change.
    """
    from jax.extend.random import threefry2x32_p  # here and not above: half of the time that importing kaun takes

    return threefry2x32_p.bind(*key, *counts)


class Frame(NamedTuple):
    """A call in Python code that led to an operation; by the place in the bytecode, the calls of one line differ."""

    file: str
    line: int
    offset: int


class Operation:
    """An equation of a traced program, with its place in the user's code. The fields of equations are not public API.

    ``jax.debug_nans`` names one too, but stops at values that never reach the result, and not inside a loop.

    Attributes:
        name: The name of its primitive: ``"log"``.
        results: How many results it has.
    """

    __slots__ = ("_equation", "name", "results")

    def __init__(self, equation: Any) -> None:
        self._equation = equation
        self.name: str = equation.primitive.name
        self.results: int = len(equation.outvars)

    @property
    def key(self) -> int:
        """A number that is the same whenever the equation runs."""
        return id(self._equation)

    @property
    def frames(self) -> list[Frame]:
        """The calls that led to it, the outermost first."""
        trace = self._equation.source_info.traceback
        pairs = () if trace is None else zip(trace.frames, trace.raw_frames()[1], strict=True)
        return [Frame(frame.file_name, frame.line_num, offset) for frame, offset in pairs][::-1]

    @property
    def scopes(self) -> str:
        """The names given by ``jax.named_scope``, and transformations: ``"transpose(jvp(attention))"``."""
        return str(self._equation.source_info.name_stack)

    @property
    def called(self) -> Any:
        """The program of an equation that runs one once, such as a jitted function; else None."""
        parts = self._equation.params
        return parts.get("jaxpr", parts.get("call_jaxpr")) if self.name in _CALLS else None

    @property
    def file(self) -> str:
        """The file of the function that is called, where that is known."""
        info = getattr(getattr(self.called, "jaxpr", self.called), "debug_info", None)
        return str(getattr(info, "func_src_info", "") or "").rpartition(" at ")[2].rpartition(":")[0]

    @property
    def dot_dimensions(self) -> Any:
        """The axes that a product of arrays sums over, and those of batches, as ``lax.dot_general`` takes them."""
        return self._equation.params["dimension_numbers"] if self.name == "dot_general" else None

    @property
    def form(self) -> tuple[list[Any], int, Any]:
        """Shapes and dtypes of its results; the elements of its first operand; the exponent of an ``integer_pow``."""
        equation, first = self._equation, self._equation.invars[:1]
        return [out.aval for out in equation.outvars], sum(a.aval.size for a in first), equation.params.get("y")

    @property
    def branches(self) -> Sequence[Any]:
        """The programs of a condition, whose first operand is the number of the one that runs."""
        return self._equation.params["branches"] if self.name == "cond" else ()

    @property
    def while_parts(self) -> tuple[Any, int, Any, int] | None:
        """Condition and body of a ``while``, each with the number of operands that are its constants; else None."""
        if self.name != "while":
            return None
        params = self._equation.params
        return params["cond_jaxpr"], params["cond_nconsts"], params["body_jaxpr"], params["body_nconsts"]

    @property
    def scan_parts(self) -> tuple[Any, int, int, Iterable[int]] | None:
        """Body, number of constants, number of carried values, and order of the iterations of a ``scan``; else None."""
        if self.name != "scan" or not self._equation.params["length"]:
            return None
        body, length = self._equation.params["jaxpr"], self._equation.params["length"]
        inner = getattr(body, "jaxpr", body)
        # By shapes, because JAX 0.10 and 0.12 have other parameters: a stacked value has one axis more than its slice.
        stacked = lambda pairs: sum(a.aval.ndim > b.aval.ndim for a, b in pairs)
        carried = len(inner.outvars) - stacked(zip(self._equation.outvars, inner.outvars, strict=True))
        given = zip(self._equation.invars, inner.invars, strict=True)
        constants = len(inner.invars) - stacked(given) - carried
        order = range(length)
        return body, constants, carried, reversed(order) if self._equation.params["reverse"] else order

    def run(self, values: Sequence[Any]) -> list[Any]:
        """Return its results for these operands, computed now; traced, they keep its place and names."""
        of, primitive, sources = self._equation, self._equation.primitive, sys.modules["jax._src.source_info_util"]
        names = sources.current_name_stack() + of.source_info.name_stack
        with sources.user_context(of.source_info.traceback, name_stack=names), of.ctx.manager:
            found = primitive.bind(*values, **primitive.get_bind_params(of.params))
        return list(found) if primitive.multiple_results else [found]


def evaluate(
    closed: Any,
    arguments: Sequence[Any],
    constant: Callable[[Any], Any],
    apply: Callable[[Operation, list[Any]], list[Any]],
    groups: Sequence[Sequence[int]] | None = None,
) -> Iterator[list[Any]]:
    """Run a traced program equation by equation, on values of the caller's form, and yield its results.

    ``jax.core.eval_jaxpr`` runs on arrays alone, and has no hook between two equations.

    Args:
        closed: The program, a closed jaxpr or a jaxpr.
        arguments: Its arguments.
        constant: Makes a value of a constant of the program.
        apply: Gives the results of an equation.
        groups: Numbers of results. They are yielded group by group, and only what a group needs runs before it. By
            default one group of all.
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    env = dict(zip(jaxpr.constvars, map(constant, getattr(closed, "consts", ())), strict=True))
    env |= zip(jaxpr.invars, arguments, strict=True)
    read = lambda atom: constant(atom.val) if _is_literal(atom) else env[atom]
    results = [[jaxpr.outvars[i] for i in group] for group in groups or [range(len(jaxpr.outvars))]]
    plan = _in_groups(jaxpr.eqns, results)
    uses = Counter(atom for atoms in results for atom in atoms if not _is_literal(atom))
    uses.update(atom for each in plan for equation in each for atom in equation.invars if not _is_literal(atom))
    for equations, wanted in zip(plan, results, strict=True):
        for equation in equations:
            env |= zip(equation.outvars, apply(Operation(equation), list(map(read, equation.invars))), strict=True)
            read_now = [atom for atom in equation.invars if not _is_literal(atom)]
            uses.subtract(read_now)
            for atom in {*read_now, *equation.outvars}:
                if not uses[atom]:
                    del env[atom]  # frees its memory
        yield list(map(read, wanted))


def _is_literal(atom: Any) -> bool:
    return hasattr(atom, "val")


def _in_groups(equations: Sequence[Any], results: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The equations that each group of results needs, beside those of the groups before it."""
    plan: list[list[Any]] = []
    left = list(equations)
    for wanted in results:
        needed, kept, chosen = {atom for atom in wanted if not _is_literal(atom)}, list[Any](), list[Any]()
        for equation in reversed(left):
            if needed.isdisjoint(equation.outvars):
                kept.append(equation)
            else:
                needed.update(atom for atom in equation.invars if not _is_literal(atom))
                chosen.append(equation)
        left = kept[::-1]
        plan.append(chosen[::-1])
    return plan
