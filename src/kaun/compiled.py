"""Compiled steps: many in one dispatch, each program compiled once and found again in microseconds.

The body of a step is traced once for each (loss code, static values, shapes, dtypes). Every program that runs it, one
step for ``step`` or a block of them for ``fit``, is that body in the same loop. ``Programs`` holds them; ``Loop`` runs
blocks over a state of its own, and knows when a state that a user has seen must be left alone.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from kaun.blocks import Stage
from kaun.body import ROWS, Body, Flight, Program, Ran, no_fault, number
from kaun.call import Call
from kaun.compilations import Compilation, Record
from kaun.context import Context
from kaun.guard import as_before
from kaun.packing import copy, in_place, pack, packing_of, unpack
from kaun.runs import Rows
from kaun.staging import scored, staged

__all__ = ["Compilation", "Loop", "Programs"]

_BEGIN = 2  # the steps of the first ones
_IN_FLIGHT = 2
_LONGEST = 0.1  # seconds that one dispatch should take at most: so long Python cannot hear of Ctrl-C
_STAGES = 4
_SAME: Mapping[int, Rows] = {}


class Programs:
    """The compiled programs of one trainer: a bounded table, least recently used out first.

    Arguments:
        advance: ``advance(carry, key, x, ctx, loss, training, fault) -> (loss, numbers, carry, fault)``, one pure
            training step; numbers by name, scalars but for the squares; the fault as of ``kaun.guard``.
        forward: ``forward(carry, key, x, ctx) -> output``, the model in evaluation mode.
        raises: whether a run ends at a step that goes wrong.
        capacity: how many bodies are kept, each with its programs.
    """

    def __init__(
        self, advance: Callable[..., Any], forward: Callable[..., Any], *, raises: bool = False, capacity: int = 256
    ) -> None:
        self._advance, self._forward, self._raises = advance, forward, raises
        self._capacity = capacity
        self._table: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._record = Record(capacity)

    @property
    def compilations(self) -> deque[Compilation]:
        """What was compiled, the newest last."""
        return self._record.compilations

    def run(self, entry: str, structure: Any, leaves: list[Any], key: jax.Array, call: Call) -> Any:
        """What the model in evaluation mode gives for a call: its output (``"predict"``), metrics (``"evaluate"``)."""
        program = self._found((entry, structure, call.key), lambda: self._forward_of(entry, structure, call))
        return self._run(program, entry, call, False, (leaves, key, call.owned()))

    def step(
        self, structure: Any, leaves: list[Any], key: jax.Array, call: Call, training: bool
    ) -> tuple[jax.Array, list[Any]]:
        """The loss and the leaves after one step; what it was given stays as it is."""
        body = self.body(structure, leaves, key, call, training)
        program = body.program("step", (False,) * len(call.leaves))
        arguments = (leaves, key, body.fault, number(1), call.owned(), [])
        return self._run(program, "step", call, training, arguments, body)

    def body(self, structure: Any, leaves: Sequence[Any], key: jax.Array, call: Call, training: bool) -> Body:
        """The body of a step for a call, traced where there is none: here the user's own code runs."""
        where = ("train", structure, training, call.key)
        return self._found(where, lambda: self._trace(structure, leaves, key, call, training))

    def compile(
        self, program: Program, entry: str, call: Call, training: bool, arguments: Sequence[Any],
        body: Body | None = None,
    ) -> float:  # fmt: skip
        """Compile a program for these arguments and write it down, where that was not done before; the seconds."""
        if not program.fresh:
            return 0.0
        with program.lock:
            if not program.fresh:
                return 0.0
            start = time.perf_counter()
            program.run.lower(*arguments).compile()  # the first run then finds it
            seconds = time.perf_counter() - start
            entry = entry.split()[0]
            known = body is not None and entry in body.compiled
            if body is not None:
                seconds, body.seconds = seconds + body.seconds, 0.0
                body.compiled.add(entry)
            program.fresh = False
        self._record.add(entry, call, program.stacks, training, seconds, known=known)
        return seconds

    def _run(
        self, program: Program, entry: str, call: Call, training: bool, arguments: tuple[Any, ...],
        body: Body | None = None,
    ) -> Any:  # fmt: skip
        if any(isinstance(a, Tracer) for a in (*arguments[0], arguments[1], *call.leaves)):
            return program.plain(*arguments)  # it becomes a part of what the user compiles
        if program.fresh:
            self.compile(program, entry, call, training, arguments, body)
        return program.run(*arguments)

    def _found(self, key: Hashable, make: Callable[[], Any]) -> Any:
        with self._lock:
            found = self._table.get(key)
            if found is not None:
                self._table.move_to_end(key)
                return found
        made = make()  # without the lock: a loss may itself train
        with self._lock:
            found = self._table.setdefault(key, made)
            if len(self._table) > self._capacity:
                self._table.popitem(last=False)
            return found

    def _trace(self, structure: Any, leaves: Sequence[Any], key: jax.Array, call: Call, training: bool) -> Body:
        split, loss_key = call.split, call.loss_key

        def step(leaves: list[Any], key: jax.Array, given: list[Any], fault: jax.Array | None) -> Any:
            carry = jax.tree_util.tree_unflatten(structure, leaves)
            x, arrays, ctx = split(given)
            loss = lambda output: staged(loss_key, arrays, output)
            value, numbers, after, fault = self._advance(carry, key, x, ctx, loss, training, fault)
            return value, numbers, jax.tree_util.tree_leaves(as_before(carry, after)), fault

        start, jitted = time.perf_counter(), jax.jit(step)
        # Where the memory of a state is taken over, the step itself must leave it as it was; see ``Loop._check``.
        fault = no_fault() if self._raises and in_place(leaves) else None
        traced = jitted.trace(list(leaves), key, call.leaves, fault)
        return Body(jitted, traced, call, time.perf_counter() - start, fault, self._raises and fault is None)

    def _forward_of(self, entry: str, structure: Any, call: Call) -> Program:
        split, metrics = call.split, call.loss_key

        def predict(leaves: list[Any], key: jax.Array, given: list[Any]) -> Any:
            x, _, ctx = split(given)
            return self._forward(jax.tree_util.tree_unflatten(structure, leaves), key, x, ctx)

        def evaluate(leaves: list[Any], key: jax.Array, given: list[Any]) -> Any:
            item, arrays, ctx = split(given)
            output = self._forward(jax.tree_util.tree_unflatten(structure, leaves), key, item["x"], ctx)
            return scored(metrics, arrays, key, output, item["y"])

        return Program(predict if entry == "predict" else evaluate)


class Loop:
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
    """

    def __init__(
        self,
        programs: Programs,
        carry: Any,
        key: jax.Array,
        ctx: Context | None,
        ran: Callable[[Ran], None] = lambda ran: None,
        compiled: Callable[[float], None] = lambda seconds: None,
        failed: Callable[[int, float, Any], Exception] | None = None,
        done: int = 0,
        traced: Callable[[Call, Body], None] = lambda call, body: None,
    ) -> None:
        self._programs, self.key, self._ctx, self._ran, self._compiled = programs, key, ctx, ran, compiled
        self._failed, self._before, self._traced = failed, done, traced
        self._wrong: int | None = None
        leaves, self._def = jax.tree_util.tree_flatten(carry)
        # Shapes and dtypes of the state: the arrays themselves must not be held on to.
        self._kinds = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in leaves]
        self._packing, self._in_place = packing_of(leaves), in_place(leaves)
        # Whether these arrays are in the loop's own form (packed, or memory to be overwritten), the arrays, and the
        # newest dispatch. One tuple, because an interrupt may come between any two assignments.
        self._held: tuple[bool, list[Any], Ran | None] = (False, leaves, None)
        self._done: deque[Any] = deque(maxlen=1)
        self._stages: OrderedDict[Hashable, tuple[Stage, Body, Call]] = OrderedDict()
        self._open: tuple[Stage, Body, Call] | None = None
        # What was dispatched and may not be done, with all that it takes to look at a step that went wrong.
        self._flight: deque[Flight] = deque()
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
        rows: Mapping[int, Rows] = _SAME,
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

    def _call(self, x: Any, loss: Callable[..., Any], ctx: Context | None) -> Call:
        return Call(x, loss, self._ctx.merge(ctx) if self._ctx is not None else ctx)

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

    def _stage(self, call: Call) -> tuple[Stage, Body, Call]:
        found = self._stages.pop(call.key, None)
        if found is None:
            body = self._programs.body(self._def, self._kinds, self.key, call, True)
            self._traced(call, body)
            found = (Stage(call, body.capacity), body, call)
        self._stages[call.key] = found
        if len(self._stages) > _STAGES:
            self._stages.popitem(last=False)
        return found

    def _push_run(self, call: Call, count: int, rows: Mapping[int, Rows]) -> None:
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
        self, body: Body, call: Call, pattern: tuple[bool, ...], count: int, shared: list[Any], stacked: list[Any]
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
        arguments = (self._held[1], self.key, fault, number(count), shared, stacked)
        if program.fresh:
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
        self._flight.append(Flight(ran, body, program, pattern, before, shared, stacked))
        self._pace()

    def _take(self) -> None:
        if self._done:
            (losses, numbers, arrays, fault), (first, count, body, call) = self._done[0]
            self._held = (True, arrays, Ran(first, count, losses, body.names, numbers, fault, call.examples))
            self._done.clear()

    def _check(self, flight: Flight) -> None:
        """Raise where a step went wrong, with the state as it was before it."""
        ran, body = flight.ran, flight.body
        if self._failed is None or (i := ran.good()) == ran.steps:
            return
        self._wrong = ran.first + i
        if flight.before is not None:
            arguments = (flight.before, self.key, None, number(i), flight.shared, flight.stacked)
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
