"""Compiled steps: many in one dispatch, each program compiled once and found again in microseconds.

The body of a step is traced once for each (loss code, static values, shapes, dtypes). Every program that runs it, one
step for ``step`` or a block of them for ``fit``, is that body in the same loop. ``Programs`` holds them; ``Loop`` runs
blocks over a state of its own, and knows when a state that a user has seen must be left alone.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np

from kaun._engine.batching import BlockBuffer
from kaun._engine.cache import ProgramCache
from kaun._engine.inputs import StepInputs
from kaun._engine.log import Compilation
from kaun._engine.packing import copy, in_place, pack, packing_of, unpack
from kaun._engine.program import ROWS, TracedStep, device_count_of
from kaun._engine.results import PendingDispatch, StepResults
from kaun.context import Context
from kaun.data import RowGather

__all__ = [
    "Compilation",
    "StepLoop",
]

_BEGIN = 2  # the steps of the first ones
_IN_FLIGHT = 2
_LONGEST = 0.1  # seconds that one dispatch should take at most: so long Python cannot hear of Ctrl-C
_STAGES = 4
_SAME: Mapping[int, RowGather] = {}


class StepLoop:
    """A run of steps over a state of its own, some of them waiting to be run in one dispatch.

    Arguments:
        programs: where the compiled steps are.
        carry: the state to start from, a pytree whose last leaf counts the steps; it stays as it is.
        key: the run's key.
        ctx: the Context of every step.
        ran: called after each dispatch.
        compiled: called after each compilation with the seconds it took.
        failed: gives the exception for a step that went wrong (``kaun.guard``), by its number, its loss and the squares
            of its gradient; None where no step can.
        done: how many steps were run before.
        traced: called with each call of a kind that was not there before, and its body.
        compiling: called before each compilation, with the entry that it is for.
    """

    def __init__(
        self,
        programs: ProgramCache,
        carry: Any,
        key: jax.Array,
        ctx: Context | None,
        ran: Callable[[StepResults], None] = lambda ran: None,
        compiled: Callable[[float], None] = lambda seconds: None,
        failed: Callable[[int, float, Any], Exception] | None = None,
        done: int = 0,
        traced: Callable[[StepInputs, TracedStep], None] = lambda call, body: None,
        compiling: Callable[[str], None] = lambda where: None,
    ) -> None:
        self._compiling = compiling
        self._programs, self.key, self._ctx, self._ran, self._compiled = programs, key, ctx, ran, compiled
        self._failed, self._before, self._traced = failed, done, traced
        self._wrong: int | None = None
        leaves, self._def = jax.tree_util.tree_flatten(carry)
        # Shapes and dtypes of the state: the arrays themselves must not be held on to.
        self._kinds = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in leaves]
        self._packing, self._in_place = packing_of(leaves), in_place(leaves)
        # Whether these arrays are in the loop's own form (packed, or memory to be overwritten), the arrays, and the
        # newest dispatch. One tuple, because an interrupt may come between any two assignments.
        self._held: tuple[bool, list[Any], StepResults | None] = (False, leaves, None)
        self._done: deque[Any] = deque(maxlen=1)
        self._stages: OrderedDict[Hashable, tuple[BlockBuffer, TracedStep, StepInputs]] = OrderedDict()
        self._open: tuple[BlockBuffer, TracedStep, StepInputs] | None = None
        # What was dispatched and may not be done, with all that it takes to look at a step that went wrong.
        self._flight: deque[PendingDispatch] = deque()
        self._finished = time.perf_counter()
        self._limit = _BEGIN

    @property
    def room(self) -> int:
        """How many steps one ``push`` may bring."""
        return self._limit

    @property
    def failed(self) -> bool:
        """Whether a step went wrong, and that was told."""
        return self._wrong is not None

    @property
    def done(self) -> int:
        """The number of the last step that was run, before one that went wrong."""
        ran = self._held[2]
        if self._wrong is not None:
            return self._wrong - 1
        return self._before if ran is None else ran.first + ran.steps - 1

    @property
    def loss(self) -> Any:
        """The loss of the last step that was run; waits for it.

        Raises:
            Exception: what ``failed`` gives for the first step that went wrong.
        """
        self.wait()
        ran = self._held[2]
        assert ran is not None
        return np.asarray(ran.losses)[ran.steps - 1]  # indexed on the device it would be a dispatch of its own

    def wait(self) -> None:
        """Wait for the steps that were dispatched, where one of them may have gone wrong.

        Raises:
            Exception: what ``failed`` gives for the first step that did.
        """
        while self._failed is not None and self._flight:
            self._check(self._flight.popleft())

    def failure(self) -> Exception | None:
        """The exception for the first step that went wrong, where one did of which nobody knows yet."""
        try:
            if self._wrong is None:
                self.wait()
        except Exception as error:
            return error
        return None

    def push(
        self,
        x: Any,
        loss: Callable[..., Any],
        ctx: Context | None,
        count: int = 1,
        rows: Mapping[int, RowGather] = _SAME,
    ) -> None:
        """Run one step, or ``count`` of them, now or together with the next ones; see ``flush``.

        Arguments:
            rows: as of a ``Run``, whose first item this is.
        """
        call = self._call(x, loss, ctx)
        if count > 1:
            self.flush()
            return self._push_run(call, count, rows)
        if self._open is None or not self._open[0].takes(call):
            self.flush()
            self._open = self._stage(call)
        stage = self._open[0]
        stage.add(call)
        if stage.count >= min(self._limit, stage.capacity):
            self.flush()
        return None

    def look(self, x: Any, loss: Callable[..., Any], ctx: Context | None) -> None:
        """Trace the step for an item, and do no more."""
        self._stage(self._call(x, loss, ctx))

    def _call(self, x: Any, loss: Callable[..., Any], ctx: Context | None) -> StepInputs:
        return StepInputs(x, loss, self._ctx.merge(ctx) if self._ctx is not None else ctx)

    def flush(self) -> None:
        """Run the steps that wait. Returns when they are dispatched, not when they are done."""
        if self._open is None or not self._open[0].count:
            return
        stage, body, call = self._open
        pattern = body.pattern(stage.varying)
        count = stage.count
        self._dispatch(body, call, pattern, count, *stage.arguments(pattern))

    def carry(self) -> Any:
        """The state after the last step that was pushed."""
        self.flush()
        self._take()
        own, arrays, ran = self._held
        if own and self._packing is not None:
            return jax.tree_util.tree_unflatten(self._def, unpack(self._packing, arrays))
        if self._in_place:
            self._held = (False, arrays, ran)  # the loop goes on with a copy
            if self._wrong is not None:
                arrays = [*arrays[:-1], arrays[-1] - 1]  # a step that went wrong changes nothing but its number
        return jax.tree_util.tree_unflatten(self._def, arrays)

    def _stage(self, call: StepInputs) -> tuple[BlockBuffer, TracedStep, StepInputs]:
        found = self._stages.pop(call.key, None)
        if found is None:
            body = self._programs.body(self._def, self._kinds, self.key, call, True)
            self._traced(call, body)
            found = (BlockBuffer(call, body.capacity), body, call)
        self._stages[call.key] = found
        if len(self._stages) > _STAGES:
            self._stages.popitem(last=False)
        return found

    def _push_run(self, call: StepInputs, count: int, rows: Mapping[int, RowGather]) -> None:
        stage, body, _ = self._open = self._stage(call)
        most = stage.room(rows, call) if rows else ROWS if body.looped else 1
        leaves, once = call.owned(), (False,) * len(call.leaves)
        for start in range(0, count, most):
            n = min(most, count - start)
            if rows:
                stage.fill(call, rows, start, n)
                self.flush()
            else:
                self._dispatch(body, call, once, n, leaves, [])

    def _dispatch(
        self,
        body: TracedStep,
        call: StepInputs,
        pattern: tuple[bool, ...],
        count: int,
        shared: list[Any],
        stacked: list[Any],
    ) -> None:
        entry = "fit in place" if self._in_place else "fit"
        program = body.program(entry, pattern, self._packing)
        own, arrays, ran = self._held
        if not own and self._in_place:
            for i in range(len(arrays)):  # one by one: what nobody else holds is freed before the next is copied
                arrays[i] = copy(arrays[i])
            self._held = (True, arrays, ran)
        elif not own and self._packing is not None:
            self._held = (True, pack(self._packing, arrays), ran)
        fault = body.fault if ran is None else ran.fault
        first = self._before + 1 if ran is None else ran.first + ran.steps
        arguments = (self._held[1], self.key, fault, device_count_of(count), shared, stacked)
        if program.fresh:
            self._compiling(entry.split()[0])
            self._compiled(self._programs.compile(program, entry, call, True, arguments, body))
        # One call into C from donating the old leaves to storing the new ones: a KeyboardInterrupt is raised between
        # two bytecodes, and must not find the state given away and its successor in nobody's hands.
        about = (first, count, body, call)
        self._done.extend(zip(itertools.starmap(program.run, (arguments,)), (about,), strict=False))
        self._take()
        ran = self._held[2]
        assert ran is not None
        self._ran(ran)
        before = None if self._in_place or self._failed is None else arguments[0]
        self._flight.append(PendingDispatch(ran, body, program, pattern, before, shared, stacked))
        self._pace()

    def _take(self) -> None:
        if self._done:
            (losses, numbers, arrays, fault), (first, count, body, call) = self._done[0]
            self._held = (True, arrays, StepResults(first, count, losses, body.names, numbers, fault, call.examples))
            self._done.clear()

    def _check(self, flight: PendingDispatch) -> None:
        """Raise where a step went wrong, with the state as it was before it."""
        ran, body = flight.ran, flight.body
        if self._failed is None or (i := ran.good()) == ran.steps:
            return
        self._wrong = ran.first + i
        if flight.before is not None:
            arguments = (flight.before, self.key, None, device_count_of(i), flight.shared, flight.stacked)
            self._held = (True, flight.program.run(*arguments)[2], ran)
        given, many = iter(flight.shared), iter(flight.stacked)
        item = [next(many)[i] if varies else next(given) for varies in flight.pattern]
        leaves = jax.tree_util.tree_leaves(self.carry())
        squares = body.step(leaves, self.key, item, body.fault)[1]["squares"]
        raise self._failed(self._wrong, float(np.asarray(ran.losses)[i]), np.asarray(squares))

    def _pace(self) -> None:
        """Wait for the last dispatch but two, and let blocks grow until one takes long enough to hide its dispatch."""
        if len(self._flight) <= _IN_FLIGHT:
            return
        flight = self._flight.popleft()
        ran = flight.ran
        ran.losses.block_until_ready()
        self._check(flight)
        count = ran.steps
        now = time.perf_counter()
        elapsed, self._finished = now - self._finished, now
        # The clock decides how many steps share a dispatch, which changes no bit of them.
        if elapsed > _LONGEST:
            self._limit = max(1, self._limit // 4)
        elif elapsed < _LONGEST / 4 and count * 4 >= self._limit:
            self._limit = min(self._limit * 4, ROWS)
