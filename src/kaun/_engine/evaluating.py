"""EvaluationLoop: runs the metrics of many items in one dispatch, as ``StepLoop`` runs steps."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun._engine.batching import BlockBuffer, capacity_of, next_limit
from kaun._engine.cache import ProgramCache
from kaun._engine.explicit import explicit_mesh
from kaun._engine.inputs import StepInputs, item_at, pattern_for, refuse_traced
from kaun._engine.jaxpr import slow_in_loops
from kaun._engine.options import loop_options
from kaun._engine.program import ROWS, Program, count_on_device
from kaun._engine.results import OpenBlock
from kaun._jax import calls_the_host

__all__ = ["EvaluationLoop", "TracedMetrics"]

_BEGIN = 2  # the items of the first dispatch
_IN_FLIGHT = 2
_BUFFERS = 4
_RESULT_BYTES = 1 << 22  # of one dispatch: a confusion matrix of many classes may be large


class TracedMetrics:
    """The metrics of one item as they were traced for inputs of one key, and the programs made of it.

    Args:
        function: ``function(leaves, key, item)``: a pytree of vectors.
        arguments: What it is traced for.
        inputs: The inputs of that item.

    Attributes:
        structure: The structure of what the function returns.
        capacity: How many items one dispatch may hold.
        patterns: The patterns of blocks so far.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], inputs: StepInputs) -> None:
        start, jitted = time.perf_counter(), jax.jit(function)
        traced = jitted.trace(*arguments)
        vectors, self.structure = jax.tree_util.tree_flatten(traced.out_info)
        size = sum(v.size * v.dtype.itemsize for v in vectors)
        alone = calls_the_host(traced.jaxpr) or (jax.default_backend() == "cpu" and slow_in_loops(traced.jaxpr))
        self.capacity = 1 if alone else max(1, min(capacity_of(inputs), ROWS, _RESULT_BYTES // max(1, size)))
        self.patterns: list[tuple[bool, ...]] = []
        # Read and set where programs are compiled and logged, as those of ``TracedStep``.
        self.entries: set[str] = set()
        self.wanted: Mapping[str, int] = {}
        self.seconds = time.perf_counter() - start
        self._function, self._vectors, self._options = jitted, vectors, loop_options(traced.jaxpr)
        self._programs: dict[tuple[bool, ...], Program] = {}

    def program(self, pattern: tuple[bool, ...]) -> Program:
        """Return the program for blocks stacked by a pattern, which may not be compiled yet."""
        if pattern not in self._programs:
            block = self._straight if self.capacity == 1 else self._looped(pattern)
            stacks = "stacked" if any(pattern) else "passed once"
            self._programs[pattern] = Program(block, pattern, stacks, compiler_options=self._options)
        return self._programs[pattern]

    def _straight(self, leaves: Any, key: Any, count: Any, shared: list[Any], stacked: list[Any]) -> list[Any]:
        return [vector[None] for vector in jax.tree_util.tree_leaves(self._function(leaves, key, shared))]

    def _looped(self, pattern: tuple[bool, ...]) -> Callable[..., list[Any]]:
        def run(leaves: Any, key: Any, count: Any, shared: list[Any], stacked: list[Any]) -> list[Any]:
            def body(i: Any, tables: list[Any]) -> list[Any]:
                item = item_at(i, pattern, shared, stacked)
                rows = jax.tree_util.tree_leaves(self._function(leaves, key, item))
                return [lax.dynamic_update_index_in_dim(*pair, i, 0) for pair in zip(tables, rows, strict=True)]

            tables = [jnp.zeros((self.capacity, *v.shape), v.dtype) for v in self._vectors]
            return lax.fori_loop(jnp.uint32(0), count, body, tables)

        return run


class EvaluationLoop:
    """Runs the metrics of items, several in one dispatch; their results come in order, some dispatches late.

    Args:
        programs: The cache of the trainer.
        variables: A pytree of the variables and the step.
        key: The run's key.
        take: Called with the results of a dispatch on the host: what ``programs.metrics`` gives for an item, with an
            axis of items in front.
        ready: Called with an item on a mesh once its program is compiled, before it runs.
    """

    def __init__(
        self, programs: ProgramCache, variables: Any, key: jax.Array, take: Callable[[Any], None],
        ready: Callable[[StepInputs], None] | None = None,
    ) -> None:  # fmt: skip
        leaves, self._structure = jax.tree_util.tree_flatten(variables)
        refuse_traced([*leaves, key], "evaluate")
        self._programs, self._leaves, self._key, self._take = programs, leaves, key, take
        self._ready = ready
        # What lies on a mesh runs item by item, in the form in which it comes.
        self._alone = programs.sharding is not None or explicit_mesh(leaves) is not None
        self._dtypes = tuple([leaf.dtype for leaf in leaves])
        self._blocks: OrderedDict[Hashable, OpenBlock[TracedMetrics]] = OrderedDict()
        self._open: OpenBlock[TracedMetrics] | None = None
        self._in_flight: deque[_Dispatch] = deque()
        self._limit, self._finished = _BEGIN, time.perf_counter()

    def push(self, inputs: StepInputs) -> None:
        """Take the next item, and run it now or with later ones.

        Raises:
            TypeError: If it is traced.
        """
        refuse_traced(inputs.leaves, "evaluate")
        if self._alone or inputs.mesh is not None:
            self.flush()
            results = self._programs.run("evaluate", self._structure, self._leaves, self._key, inputs, self._ready)
            vectors, structure = jax.tree_util.tree_flatten(results)
            self._dispatched(_Dispatch(vectors, structure, None))
            return
        if self._open is None or not self._open.buffer.add(inputs):
            self.flush()
            self._open = self._block(inputs)
            self._open.buffer.add(inputs)
        if self._open.buffer.count >= min(self._limit, self._open.buffer.capacity):
            self.flush()

    def flush(self) -> None:
        """Run the items that wait. Returns when they are dispatched, not when they are done."""
        if self._open is None or not self._open.buffer.count:
            return
        buffer, traced, inputs = self._open
        count, pattern = buffer.count, pattern_for(traced.patterns, buffer.varying)
        items = buffer.arguments(pattern)
        arguments = (self._leaves, self._key, count_on_device(count), *items)
        vectors = self._programs.call(traced.program(pattern), "evaluate", inputs, False, arguments, traced)
        self._dispatched(_Dispatch(vectors, traced.structure, count))

    def finish(self) -> None:
        """Run the items that wait, and pass all results on."""
        self.flush()
        while self._in_flight:
            self._read(self._in_flight.popleft())

    def _block(self, inputs: StepInputs) -> OpenBlock[TracedMetrics]:
        block = self._blocks.pop(inputs.key, None)
        if block is None:
            where = ("evaluate in blocks", self._structure, self._dtypes, inputs.key)
            traced = self._programs.get(where)
            if traced is None:
                function = self._programs.evaluation("evaluate", self._structure, inputs)
                arguments = (self._leaves, self._key, inputs.leaves)
                traced = self._programs.add(where, TracedMetrics(function, arguments, inputs))
            block = OpenBlock(BlockBuffer(inputs, traced.capacity), traced, inputs)
        self._blocks[inputs.key] = block
        if len(self._blocks) > _BUFFERS:
            self._blocks.popitem(last=False)
        return block

    def _dispatched(self, dispatch: _Dispatch) -> None:
        self._in_flight.append(dispatch)
        if len(self._in_flight) > _IN_FLIGHT:
            self._read(self._in_flight.popleft())

    def _read(self, dispatch: _Dispatch) -> None:
        vectors, structure, count = dispatch
        arrays = [np.asarray(vector)[None] if count is None else np.asarray(vector)[:count] for vector in vectors]
        now = time.perf_counter()
        elapsed, self._finished = now - self._finished, now
        self._limit = next_limit(self._limit, elapsed, count or 1)
        self._take(jax.tree_util.tree_unflatten(structure, arrays))


class _Dispatch(NamedTuple):
    """The vectors of a dispatch, their structure, and how many items it had; None where they have no axis of items."""

    vectors: list[Any]
    structure: Any
    items: int | None
