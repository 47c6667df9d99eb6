"""StepLoop: owns the state while ``fit`` runs, collects items in blocks, dispatches them, and waits two behind.

A step is traced once for each (loss code, static values, shapes, dtypes). Every program that runs it, one step for
``step`` or a block of them for ``fit``, is that traced step in the same loop.
"""

from __future__ import annotations

import functools
import itertools
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from kaun._engine.batching import BlockBuffer, next_limit
from kaun._engine.cache import ProgramCache
from kaun._engine.devices import item_of, refuse_different_devices
from kaun._engine.explicit import explicit_mesh, explicit_sharding, to_automatic, to_explicit
from kaun._engine.failed import FailedStep, state_before
from kaun._engine.inputs import StepInputs, refuse_traced
from kaun._engine.members import CODE
from kaun._engine.packing import all_finite, in_place, own_arrays, packing_of, put_with, unpack
from kaun._engine.placing import place_carry, placed_inputs
from kaun._engine.program import TracedStep, count_on_device, find_step
from kaun._engine.results import OpenBlock, PendingDispatch, StepResults, examples_of, readable, wait_for
from kaun._engine.together import Together, agreed
from kaun.context import Context
from kaun.data import Chunk, Item, RowGather

__all__ = ["StepLoop"]

_BEGIN = 2  # the steps of the first blocks
_IN_FLIGHT = 2
_BUFFERS = 4
_Block = OpenBlock[TracedStep]


class StepLoop:
    """A run of steps over its own copy of a state; some of them wait to be dispatched together.

    Args:
        programs: The cache of the trainer.
        carry: The state to start from, a pytree whose last leaf counts the steps; it stays as it is.
        key: The run's key.
        ctx: The Context of every step.
        on_dispatch: Called with the ``StepResults`` after each dispatch; or None.
        on_compile: Called after each compilation with the seconds it took.
        error_for: Returns the exception for a step that is not finite, given its number, its loss, its status after the
            first number (``StepResults``), and the step itself; None if such a step does not end the run.
        done: How many steps were run before.
        on_trace: Called with inputs of a new signature and their step, one without ``wanted``; or None.
        on_compiling: Called before each compilation with the entry for which it is.
        wanted: What reports want of each step, as ``train_step`` takes it.
        together: What several processes agree on, None in one.

    Attributes:
        limit: How many steps the next dispatch should have at most.
        own_limit: That by the clock of this process.
        exhausted: Whether there are no more items.
    """

    def __init__(
        self, programs: ProgramCache, carry: Any, key: jax.Array, ctx: Context | None,
        on_dispatch: Callable[[StepResults], None] | None = None,
        on_compile: Callable[[float], None] = lambda seconds: None,
        error_for: Callable[[int, float, Any, FailedStep], Exception] | None = None,
        done: int = 0, on_trace: Callable[[StepInputs, TracedStep], None] | None = None,
        on_compiling: Callable[[str], None] = lambda where: None,
        wanted: Mapping[str, int] | None = None, together: Together | None = None,
    ) -> None:  # fmt: skip
        self._together, self._programs, self._ctx = together, programs, ctx
        self._on_dispatch, self._on_trace, self._wanted = on_dispatch, on_trace, wanted
        self._on_compile, self._on_compiling = on_compile, on_compiling
        self._error_for, self._first_step = error_for, done + 1
        self._failed_step: int | None = None
        self._counts_discarded = 0  # 1 where a discarded step is counted in the arrays all the same
        leaves, self._structure = jax.tree_util.tree_flatten(carry)
        leaves = [a if isinstance(a, jax.Array) else jax.device_put(a) for a in leaves]  # of NumPy by jax.device_get
        given, placed = leaves, programs.sharding is not None
        self._place = functools.partial(place_carry, programs.sharding, self._structure)
        self._mesh: Any = None if placed else explicit_mesh(leaves)  # that of the state or of an item
        self._shardings = [explicit_sharding(a) for a in leaves]
        leaves, (self._key,) = to_automatic(leaves), to_automatic([key])
        leaves, self._key = self._place(leaves, self._key)
        self.key = self._key if placed else key
        self._given = None if self._mesh is None and not placed else [weakref.ref(a) for a in given]
        # Shapes and dtypes of the state: the arrays must not be kept alive.
        self._kinds = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in leaves]
        self._find = functools.partial(find_step, programs, self._structure, self._kinds, self._key)
        self._packing, self._in_place = packing_of(leaves), in_place(leaves)
        self._clean = False  # whether all elements of the state are finite; looked at where it is packed anyway
        # Whether these arrays are in the loop's own form (packed, or memory to be overwritten), the arrays, and the
        # newest dispatch. One tuple, because an interrupt may come between any two assignments.
        self._carry: tuple[bool, list[Any], StepResults | None] = (False, leaves, None)
        self._result: deque[Any] = deque(maxlen=1)
        # To go back to where a dispatch fails: states before the newest dispatches, where these did not overwrite them,
        # and the newest arrays that others may hold.
        self._earlier: deque[tuple[bool, list[Any], StepResults | None]] = deque(maxlen=_IN_FLIGHT + 1)
        self._shared: tuple[list[weakref.ref[Any]], StepResults | None] = ([], None)
        self._prepared: tuple[Any, Any, str, Any] = (None, (), "", None)  # what ran last: the program, its key
        self._one: jax.Array | None = None  # the number 1 on the device, once it has run a step alone
        self._blocks: OrderedDict[Hashable, _Block] = OrderedDict()
        self._open: _Block | None = None
        self._in_flight: deque[PendingDispatch] = deque()
        self._finished = time.perf_counter()
        self.limit = self.own_limit = _BEGIN
        self._room, self.exhausted = 1, False

    @property
    def waiting(self) -> int:
        """How many steps were pushed and not dispatched."""
        return 0 if self._open is None else self._open.buffer.count

    def room(self, left: int) -> int:
        """Return how many of the items that are left the next chunk given to ``push`` may hold."""
        return min(left, self._room)

    @property
    def done(self) -> int:
        """The number of the last step that was run, before one that is not finite."""
        results = self._carry[2]
        if self._failed_step is not None:
            return self._failed_step - 1
        return self._first_step - 1 if results is None else results.first + results.steps - 1

    @property
    def loss(self) -> Any:
        """The loss of the last step that was pushed; runs it, waits for it, and raises as ``wait`` does."""
        self.flush()
        self.wait()
        results = self._take()
        if self._together is not None:
            wait_for(results, self._together)
        return results.loss(results.steps - 1)

    def wait(self) -> None:
        """Wait for the steps that were dispatched, and raise what ``error_for`` returns for one that is not finite."""
        while self._in_flight and (self._error_for is not None or self._together is not None):
            self._check(self._in_flight.popleft())

    def failure(self) -> Exception | None:
        """Return the exception for the first step that is not finite, if there is one and it was not raised yet."""
        try:
            if self._failed_step is None:
                self.wait()
        except Exception as error:
            return error
        return None

    def push(self, chunks: Iterator[Chunk], first: int, room: int) -> int:
        """Take items until there are ``room`` steps or no more items, and run them now or with later ones.

        Returns how many there were; ``first`` is the number of the first step, for messages. Where there is room for
        one step alone, it is run at once if the newest one had an item of its kind.
        """
        count = 0
        self._room = 0 if self.exhausted else room
        for item, n, rows in chunks if self._room else ():
            x, loss, ctx = Item.parse(item, first + count)
            inputs = StepInputs(x, loss, ctx if self._ctx is None else self._ctx.merge(ctx))
            if not inputs.is_usual:
                refuse_traced(inputs.leaves)
            self._mesh = self._mesh or (inputs.mesh if self._programs.sharding is None else None)
            if room == 1 == n and self._runs_alone(inputs, rows):
                return 1
            if self._open is None or n > 1 or rows or not self._open.buffer.add(inputs):
                self.flush()
                block = self._blocks.pop(inputs.key, None)
                block = block or self._new_block(inputs, self._find(inputs, True, self._wanted))
                self._enter(block, inputs, n, rows)
            count += n
            self._room = room - count
            if self._open is not None and self._open.buffer.count >= min(self.limit, self._open.buffer.capacity):
                self.flush()
            if count >= room:
                return count
        self.exhausted = True  # an iterator need not end a second time
        return count

    def _runs_alone(self, inputs: StepInputs, rows: Mapping[int, RowGather]) -> bool:
        """Run an item at once, if the newest items were of its kind and none waits; return whether it was run."""
        if self._open is None or self._together is not None or not self._open.traced.patterns:
            return False
        buffer, traced, first = self._open
        pattern = traced.patterns[-1]
        if (leaves := buffer.alone(inputs, pattern, rows)) is None:
            return False
        own, held, results = self._carry
        same = own and self._prepared[0] is traced and self._prepared[1] == pattern
        if same and results is not None and self._one is not None:
            self._launch(first, 1, (held, self._key, results.status, self._one, *leaves), *leaves)
        else:
            self._dispatch(traced, first, pattern, 1, *leaves)
        return True

    def trace(self, item: Any) -> None:
        """Trace the step for an item, and do not run it."""
        x, loss, ctx = Item.parse(item, 1)
        inputs = StepInputs(x, loss, ctx if self._ctx is None else self._ctx.merge(ctx))
        self._new_block(inputs, self._find(inputs, True))

    def flush(self) -> None:
        """Run the steps that wait. Returns when they are dispatched, not when they are done."""
        if self._open is None or not self._open.buffer.count:
            return
        buffer, traced, inputs = self._open
        pattern = traced.pattern(buffer.varying)
        self._dispatch(traced, inputs, pattern, buffer.count, *buffer.arguments(pattern))

    def carry(self) -> Any:
        """Return the state after the last step that was pushed, or before one that is not finite."""
        self.flush()
        self._take()
        own, arrays, results = self._carry
        if own and self._packing is not None:
            arrays, _ = self._place(unpack(self._packing, arrays), self._key)
        elif self._in_place:
            self._carry = (False, arrays, results)  # the loop continues with a copy
        if self._failed_step is not None:
            arrays = [*arrays[:-1], arrays[-1] - self._counts_discarded]
        if self._mesh is not None:
            arrays = to_explicit(arrays, self._shardings, self._mesh)
            self._given = list(map(weakref.ref, arrays))
        return jax.tree_util.tree_unflatten(self._structure, arrays)

    @property
    def kinds(self) -> Any:
        """The state's shapes and dtypes."""
        return jax.tree_util.tree_unflatten(self._structure, self._kinds)

    def recover(self) -> Literal["newest", "held", "lost"]:
        """Go back to the newest state that can be read, where a dispatch failed.

        Returns ``"newest"`` where that is the state before it, ``"held"`` where it is an earlier one that something
        else refers to, because that one is lost with its memory; ``"lost"`` where none is left.
        """
        self._take()
        if readable(self._carry[1], self._together):
            return "newest"
        self._failed_step = None
        while self._earlier:
            self._carry = self._earlier.pop()
            if readable(self._carry[1], self._together):
                return "newest"
        references, results = self._shared
        arrays = [reference() for reference in references]
        if not arrays or any(array is None for array in arrays) or not readable(arrays, self._together):
            return "lost"
        self._carry = (False, self._place(to_automatic(arrays), self._key)[0], results)
        return "held"

    def _new_block(self, inputs: StepInputs, traced: TracedStep) -> _Block:
        if self._on_trace is not None:  # a run may be resumed with other reports, which want other numbers
            self._on_trace(inputs, self._find(inputs, True) if self._wanted else traced)
        return OpenBlock(BlockBuffer(inputs, traced.capacity, placed=traced.placing is not None), traced, inputs)

    def _enter(self, block: _Block, inputs: StepInputs, count: int, rows: Mapping[int, RowGather]) -> None:
        """Make a block the open one, and put one item or ``count`` of them into it."""
        self._open = self._blocks[inputs.key] = block
        if len(self._blocks) > _BUFFERS:
            self._blocks.popitem(last=False)
        buffer, traced, _ = block
        if count == 1 and not rows:
            buffer.add(inputs)
            return
        most = buffer.room(rows, inputs) if rows else traced.most
        leaves, once = [] if rows else inputs.owned(), (False,) * len(inputs.leaves)
        for start in range(0, count, most):
            n = min(most, count - start)
            if rows:
                buffer.fill(inputs, rows, start, n)
                self.flush()
            else:
                self._dispatch(traced, inputs, once, n, leaves, [])

    def _prepare(self, traced: TracedStep, pattern: tuple[bool, ...]) -> None:
        """Bring the state into the loop's own form, and find the program that takes it."""
        own, arrays, results = self._carry
        overwrites = self._in_place and not traced.can_raise
        if not own and overwrites:
            self._shared = self._given or [weakref.ref(a) for a in arrays], results
        if not own and (overwrites or self._packing is not None):
            self._carry = (True, own_arrays(arrays, self._packing, overwrites=overwrites), results)
            self._clean = self._packing is not None and all_finite(self._carry[1])
        entry = "fit in place" if overwrites else "fit"
        program = traced.program(entry, pattern, self._packing, clean=self._clean)
        self._counts_discarded = int(traced.discards and CODE not in traced.layout.places)
        self._prepared, self._one = (traced, pattern, entry, program), None

    def _dispatch(
        self, traced: TracedStep, inputs: StepInputs, pattern: tuple[bool, ...], count: int, shared: list[Any],
        stacked: list[Any],
    ) -> None:  # fmt: skip
        if fresh := not self._carry[0] or self._prepared[0] is not traced or self._prepared[1] != pattern:
            self._prepare(traced, pattern)
        (_, _, entry, program), (_, held, results) = self._prepared, self._carry
        # Where the first status lay elsewhere than the later ones, the program would be compiled twice.
        status = put_with(traced.status, held[0]) if results is None else results.status
        arguments = (held, self._key, status, count_on_device(count, traced.placing), shared, stacked)
        if traced.placing is not None:
            wait = functools.partial(wait_for, results, self._together)
            arguments = traced.placing.put_block(arguments, pattern, wait, fresh=fresh)
        if not program.compiled:
            self._on_compiling(entry.split()[0])
            self._on_compile(self._programs.compile(program, entry, inputs, True, arguments, traced))
        if self._together is not None:  # after all that can fail in one process alone
            waiting = self.done + 1, count, inputs, pattern, shared, stacked
            count, arguments = agreed(self._together, waiting, arguments, traced)
            if not count:
                return
        self._launch(inputs, count, arguments, shared, stacked)
        if count == 1 and traced.placing is None and jax.sharding.get_abstract_mesh().empty:
            self._one = arguments[3]

    def _launch(
        self, inputs: StepInputs, count: int, arguments: tuple[Any, ...], shared: list[Any], stacked: list[Any]
    ) -> None:
        """Run the prepared program, store what it gives, and wait for the dispatch before the newest two."""
        (traced, pattern, entry, program), before = self._prepared, self._carry
        if not self._in_place:
            self._earlier.append(before)
        first = self._first_step if before[2] is None else before[2].first + before[2].steps
        rows = traced.examples if traced.row_mask is None else examples_of(traced, pattern, count, shared, stacked)
        about = (first, count, traced, rows)
        start = time.perf_counter()
        try:
            if self._in_place:
                # One call into C from donating the old leaves to storing the new ones: a KeyboardInterrupt is raised
                # between two bytecodes, and must not come while the state is given away and the next one not stored.
                self._result.extend(zip(itertools.starmap(program.jitted, (arguments,)), (about,), strict=False))
                results = self._take()
            else:
                results = self._store(program.jitted(*arguments), about)
        except ValueError:
            refuse_different_devices(entry, inputs, arguments[0], item_of(arguments, pattern))
            raise
        if program.was_called_anew():
            self._on_compile(self._programs.log_moved(program, entry, inputs, True, arguments, start, traced))
        if traced.can_raise:
            try:
                results.losses.block_until_ready()
            except Exception:
                self._carry = before
                raise
        if self._on_dispatch is not None:
            self._on_dispatch(results)
        # The items stay until their steps are known to be finite: the exception for one that is not has its item.
        again, items = arguments if traced.watches else None, (shared, stacked) if self._error_for else ([], [])
        self._in_flight.append(tuple.__new__(PendingDispatch, (results, inputs, traced, program, again, *items)))
        if len(self._in_flight) > _IN_FLIGHT:
            self._pace(self._in_flight.popleft())
        if self._together is not None:
            self._together.dispatched()

    def _take(self) -> Any:
        """Store the newest dispatch as the state, and return its results."""
        if self._result:
            self._store(*self._result[0])
            self._result.clear()
        return self._carry[2]

    def _store(self, gave: Any, about: tuple[int, int, TracedStep, Any]) -> StepResults:
        """Store what a program gave as the state, and return its results."""
        (losses, numbers, arrays, status), (first, count, traced, examples) = gave, about
        fields = first, count, losses, numbers, traced.layout, status, examples
        results = tuple.__new__(StepResults, fields)  # StepResults(...) is a call in Python
        self._carry = (True, arrays, results)
        return results

    def _check(self, dispatch: PendingDispatch) -> None:
        """Raise where a step of a dispatch is not finite. The state is then the one before that step."""
        results = dispatch.results
        if self._together is not None:
            wait_for(results, self._together)
        if self._error_for is None or not results.failed:
            return
        i = results.finite_steps()
        self._failed_step, why = results.first + i, results.why(i)
        if dispatch.arguments is not None:
            self._take()
            before, spoiled = state_before(dispatch, i, self._carry[1], self._packing, self._programs.sharding)
            self._carry, why = (True, before, self._carry[2]), np.concatenate([why, spoiled])
        item = placed_inputs(self._programs.sharding, dispatch.item(i))
        failed = FailedStep.of(self.carry(), self._key, item, dispatch.traced.can_raise)
        raise self._error_for(self._failed_step, float(results.loss(i)), why, failed)

    def _pace(self, dispatch: PendingDispatch) -> None:
        """Wait for a dispatch, and let blocks grow until one takes long enough to hide what a dispatch costs."""
        results = dispatch.results
        wait_for(results, self._together)
        self._check(dispatch)
        before, self._finished = self._finished, time.perf_counter()
        self.own_limit = next_limit(self.limit, self._finished - before, results.steps)
        if self._together is None:  # else process 0 decides
            self.limit = self.own_limit
