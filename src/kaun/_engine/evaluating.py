"""EvaluationLoop: runs the metrics or outputs of many items in one dispatch, as ``StepLoop`` runs steps."""

from __future__ import annotations

import functools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun import tree
from kaun._engine.batching import BlockBuffer, capacity_of, next_limit
from kaun._engine.cache import ProgramCache
from kaun._engine.explicit import explicit_mesh
from kaun._engine.inputs import StepInputs, is_host, joined, pattern_for, refuse_traced, rows_at
from kaun._engine.jaxpr import slow_in_loops
from kaun._engine.options import loop_options
from kaun._engine.program import ROWS, Program, count_on_device
from kaun._engine.results import OpenBlock
from kaun._jax import any_traced, calls_the_host
from kaun._jax_work import multiply_adds_in

__all__ = ["EvaluationLoop", "evaluation_loop"]

_BEGIN = 2  # the items of the first dispatch
_IN_FLIGHT = 2
_BUFFERS = 4
_RESULT_BYTES = 1 << 22  # of one dispatch: a confusion matrix of many classes may be large
_ALONE_IN_FLIGHT = 16  # outputs that run item by item
# What an item and its output have at most where outputs share a dispatch. Of larger ones it takes a small part of the
# time (20 us), and they share the program of a single array.
_SMALL_BYTES = 1 << 16
_SMALL_WORK = 1 << 20  # multiply-adds


class TracedEvaluation:
    """The metrics or outputs of one item as they were traced for inputs of one key, and the programs made of it.

    Args:
        function: ``function(leaves, key, item)``: a pytree of arrays.
        arguments: What it is traced for.
        inputs: The inputs of that item.
        exact: Whether items have the bits that the function has alone, compiled for one item.

    Attributes:
        outline: What the function returns, as shapes and dtypes.
        capacity: How many items one dispatch may hold.
        is_small: Whether dispatches of several items are much faster.
        patterns: The patterns of blocks so far.
    """

    def __init__(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], inputs: StepInputs, *, exact: bool
    ) -> None:
        start, jitted = time.perf_counter(), jax.jit(function)
        traced = jitted.trace(*arguments)
        self.outline: Any = traced.out_info
        arrays = jax.tree_util.tree_leaves(traced.out_info)
        size = sum(a.size * a.dtype.itemsize for a in arrays)
        alone = calls_the_host(traced.jaxpr) or (jax.default_backend() == "cpu" and slow_in_loops(traced.jaxpr))
        self.capacity = 1 if alone else max(1, min(capacity_of(inputs), ROWS, _RESULT_BYTES // max(1, size)))
        self.is_small = self.capacity > 1 and size <= _SMALL_BYTES and multiply_adds_in(traced.jaxpr) <= _SMALL_WORK
        self.patterns: list[tuple[bool, ...]] = []
        # Read and set where programs are compiled and logged, as those of ``TracedStep``.
        self.wanted: Mapping[str, int] = {}
        self.seconds = time.perf_counter() - start
        self._function, self._arrays, self._exact = jitted, arrays, exact
        self._options = loop_options(traced.jaxpr)
        self._programs: dict[tuple[bool, ...], Program] = {}

    def program(self, pattern: tuple[bool, ...]) -> Program:
        """Return the program for blocks stacked by a pattern, which may not be compiled yet."""
        if pattern not in self._programs:
            block = self._straight if self.capacity == 1 else self._looped(pattern)
            stacks = "stacked" if any(pattern) else "passed once"
            self._programs[pattern] = Program(block, pattern, stacks, compiler_options=self._options)
        return self._programs[pattern]

    def _straight(self, leaves: Any, key: Any, count: Any, shared: list[Any], stacked: list[Any]) -> list[Any]:
        return [array[None] for array in jax.tree_util.tree_leaves(self._function(leaves, key, shared))]

    def _looped(self, pattern: tuple[bool, ...]) -> Callable[..., list[Any]]:
        def results(leaves: Any, key: Any, item: list[Any]) -> list[Any]:
            return jax.tree_util.tree_leaves(self._function(leaves, key, item))

        def put(tables: list[Any], rows: list[Any], i: Any) -> list[Any]:
            return [lax.dynamic_update_index_in_dim(*pair, i, 0) for pair in zip(tables, rows, strict=True)]

        def run(leaves: Any, key: Any, count: Any, shared: list[Any], stacked: list[Any]) -> list[Any]:
            def body(i: Any, tables: list[Any]) -> list[Any]:
                return put(tables, results(leaves, key, joined(pattern, shared, rows_at(i, stacked))), i)

            # The loop carries an item and the results of the one before it. Sliced or stored where they are computed,
            # they would be fused with that (XLA:CPU drops a barrier before it fuses), and have other bits.
            def exact_body(i: Any, carried: Any) -> Any:
                tables, item_rows, rows = carried
                tables = put(tables, rows, lax.max(i, np.uint32(1)) - 1)
                return tables, rows_at(i + 1, stacked), results(leaves, key, joined(pattern, shared, item_rows))

            start, zeros = jnp.uint32(0), lambda a, *axes: jnp.zeros((*axes, *a.shape), a.dtype)
            tables = [zeros(a, self.capacity) for a in self._arrays]
            if not self._exact:
                return lax.fori_loop(start, count, body, tables)
            carried = tables, rows_at(start, stacked), list(map(zeros, self._arrays))
            tables, _, rows = lax.fori_loop(start, count, exact_body, carried)
            return put(tables, rows, count - 1)

        return run


class EvaluationLoop:
    """Runs the metrics or outputs of items, several in one dispatch; their results come in order, some dispatches late.

    Outputs have the bits that each item's have alone. Those of one that is not small run item by item, by the program
    of a single array.

    Args:
        programs: The cache of the trainer.
        variables: A pytree of the variables and the step.
        key: The run's key.
        entry: ``"evaluate"`` for metrics, ``"predict"`` for outputs.
        take: Called with the results of a dispatch on the host: what ``programs.run`` gives for an item, with an axis
            of items in front.
        ready: Called with an item on a mesh once its program is compiled, before it runs.
    """

    def __init__(
        self, programs: ProgramCache, variables: Any, key: jax.Array, entry: Literal["evaluate", "predict"],
        take: Callable[[Any], None], ready: Callable[[StepInputs], None] | None = None,
    ) -> None:  # fmt: skip
        leaves, self._structure = jax.tree_util.tree_flatten(variables)
        self._entry, self._exact = entry, entry == "predict"
        if not self._exact:
            refuse_traced([*leaves, key], "evaluate")
        self._programs, self._leaves, self._key, self._take = programs, leaves, key, take
        self._run, self._ready = programs.runner(variables, key, entry), ready
        # What lies on a mesh runs item by item, in the form in which it comes.
        self._alone = programs.sharding is not None or explicit_mesh(leaves) is not None or any_traced([*leaves, key])
        self._dtypes = tuple([leaf.dtype for leaf in leaves])
        self._blocks: OrderedDict[Hashable, OpenBlock[TracedEvaluation] | None] = OrderedDict()
        self._open: OpenBlock[TracedEvaluation] | None = None
        self._in_flight: deque[_Dispatch] = deque()
        self._limit, self._finished = _BEGIN, time.perf_counter()

    def push(self, inputs: StepInputs) -> Any:
        """Take the next item, and run it now or with later ones. Return a pytree with the shapes of its results.

        Raises:
            TypeError: If metrics are of an item that is traced.
        """
        if not inputs.is_usual and not self._exact:
            refuse_traced(inputs.leaves, "evaluate")
        if self._open is None or not self._open.buffer.add(inputs):
            self.flush()
            self._open = None if self._alone or inputs.mesh is not None else self._block(inputs)
            if self._open is None:
                return self._run_alone(inputs)
            self._open.buffer.add(inputs)
        buffer, traced, _ = self._open
        if buffer.count >= min(self._limit, buffer.capacity):
            self.flush()
        return traced.outline

    def flush(self) -> None:
        """Run the items that wait. Returns when they are dispatched, not when they are done."""
        if self._open is None or not self._open.buffer.count:
            return
        buffer, traced, inputs = self._open
        count = buffer.count
        if count == 1 and self._exact and not traced.patterns:
            leaves, _ = buffer.arguments((False,) * len(inputs.leaves))
            self._run_alone(inputs.with_leaves(leaves))
            return
        pattern = pattern_for(traced.patterns, buffer.varying)
        items = buffer.arguments(pattern)
        arguments = (self._leaves, self._key, count_on_device(count), *items)
        arrays = self._programs.call(traced.program(pattern), self._entry, inputs, False, arguments, traced)
        self._dispatched(_Dispatch(arrays, jax.tree_util.tree_structure(traced.outline), count))

    def finish(self) -> None:
        """Run the items that wait, and pass all results on."""
        self.flush()
        while self._in_flight:
            self._read(self._in_flight.popleft())

    def _run_alone(self, inputs: StepInputs) -> Any:
        results = self._run(inputs, self._ready)
        arrays, structure = jax.tree_util.tree_flatten(results)
        self._dispatched(_Dispatch(arrays, structure, None))
        return results

    def _block(self, inputs: StepInputs) -> OpenBlock[TracedEvaluation] | None:
        """Return the open block of a kind of items, None for one of which outputs run item by item."""
        if inputs.key in self._blocks:
            block = self._blocks.pop(inputs.key)
        else:
            block = self._new_block(inputs)
        self._blocks[inputs.key] = block
        if len(self._blocks) > _BUFFERS:
            self._blocks.popitem(last=False)
        return block

    def _new_block(self, inputs: StepInputs) -> OpenBlock[TracedEvaluation] | None:
        if self._exact and not (
            all(map(is_host, inputs.leaves)) and sum(a.nbytes for a in inputs.leaves) <= _SMALL_BYTES
        ):
            return None
        where = (self._entry, "in blocks", self._structure, self._dtypes, inputs.key)
        traced = self._programs.get(where)
        if traced is None:
            function = self._programs.evaluation(self._entry, self._structure, inputs)
            made = TracedEvaluation(function, (self._leaves, self._key, inputs.leaves), inputs, exact=self._exact)
            traced = self._programs.add(where, made)
        if self._exact and not traced.is_small:
            return None
        return OpenBlock(BlockBuffer(inputs, traced.capacity), traced, inputs)

    def _dispatched(self, dispatch: _Dispatch) -> None:
        self._in_flight.append(dispatch)
        most = _ALONE_IN_FLIGHT if self._exact and dispatch.items is None else _IN_FLIGHT
        while len(self._in_flight) > most:
            self._read(self._in_flight.popleft())

    def _read(self, dispatch: _Dispatch) -> None:
        arrays, structure, count = dispatch
        host = [tree.on_host(array)[None] if count is None else np.asarray(array)[:count] for array in arrays]
        now = time.perf_counter()
        elapsed, self._finished = now - self._finished, now
        self._limit = next_limit(self._limit, elapsed, count or 1)
        self._take(jax.tree_util.tree_unflatten(structure, host))


class _Dispatch(NamedTuple):
    """The arrays of a dispatch, their structure, and how many items it had; None where they have no axis of items."""

    arrays: list[Any]
    structure: Any
    items: int | None


def evaluation_loop(
    programs: ProgramCache, variables: Any, key: jax.Array, entry: Literal["evaluate", "predict"]
) -> Callable[..., EvaluationLoop]:
    """Return what makes an ``EvaluationLoop`` of these arguments and the others, as ``ProgramCache.runner`` does."""
    return functools.partial(EvaluationLoop, programs, variables, key, entry)
