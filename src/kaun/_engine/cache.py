"""The compiled programs of one trainer: traced once, compiled once, found again in microseconds."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax.core import Tracer

from kaun._engine.inputs import StepInputs
from kaun._engine.log import Compilation, CompilationLog
from kaun._engine.packing import in_place
from kaun._engine.program import Program, TracedStep, device_count_of, no_fault
from kaun._loss import trace_loss
from kaun._step import match_state


class ProgramCache:
    """The compiled programs of one trainer: a bounded table, least recently used out first.

    Arguments:
        advance: ``advance(carry, key, x, ctx, loss, training, fault) -> (loss, numbers, carry, fault)``, one pure
            training step; numbers by name, scalars but for the squares; the fault as of ``kaun.guard``.
        forward: ``forward(carry, key, x, ctx) -> output``, the model in evaluation mode.
        metrics: ``metrics(loss_key, arrays, key, output, targets) -> parts``, the traced metrics of ``evaluate``.
        raises: whether a run ends at a step that goes wrong.
        capacity: how many bodies are kept, each with its programs.
    """

    def __init__(
        self,
        advance: Callable[..., Any],
        forward: Callable[..., Any],
        metrics: Callable[..., Any],
        *,
        raises: bool = False,
        capacity: int = 256,
    ) -> None:
        self._advance, self._forward, self._metrics, self._raises = advance, forward, metrics, raises
        self._capacity = capacity
        self._table: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._record = CompilationLog(capacity)

    @property
    def compilations(self) -> deque[Compilation]:
        """What was compiled, the newest last."""
        return self._record.compilations

    def run(self, entry: str, structure: Any, leaves: list[Any], key: jax.Array, call: StepInputs) -> Any:
        """What the model in evaluation mode gives for a call: its output (``"predict"``), metrics (``"evaluate"``)."""
        program = self._found((entry, structure, call.key), lambda: self._forward_of(entry, structure, call))
        return self._run(program, entry, call, False, (leaves, key, call.owned()))

    def step(
        self, structure: Any, leaves: list[Any], key: jax.Array, call: StepInputs, training: bool
    ) -> tuple[jax.Array, list[Any]]:
        """The loss and the leaves after one step; what it was given stays as it is."""
        body = self.body(structure, leaves, key, call, training)
        program = body.program("step", (False,) * len(call.leaves))
        arguments = (leaves, key, body.fault, device_count_of(1), call.owned(), [])
        return self._run(program, "step", call, training, arguments, body)

    def body(
        self, structure: Any, leaves: Sequence[Any], key: jax.Array, call: StepInputs, training: bool
    ) -> TracedStep:
        """The body of a step for a call, traced where there is none: here the user's own code runs."""
        where = ("train", structure, training, call.key)
        return self._found(where, lambda: self._trace(structure, leaves, key, call, training))

    def compile(
        self, program: Program, entry: str, call: StepInputs, training: bool, arguments: Sequence[Any],
        body: TracedStep | None = None,
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
        self, program: Program, entry: str, call: StepInputs, training: bool, arguments: tuple[Any, ...],
        body: TracedStep | None = None,
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

    def _trace(
        self, structure: Any, leaves: Sequence[Any], key: jax.Array, call: StepInputs, training: bool
    ) -> TracedStep:
        split, loss_key = call.split, call.loss_key

        def step(leaves: list[Any], key: jax.Array, given: list[Any], fault: jax.Array | None) -> Any:
            carry = jax.tree_util.tree_unflatten(structure, leaves)
            x, arrays, ctx = split(given)
            loss = lambda output: trace_loss(loss_key, arrays, output)
            value, numbers, after, fault = self._advance(carry, key, x, ctx, loss, training, fault)
            return value, numbers, jax.tree_util.tree_leaves(match_state(carry, after)), fault

        start, jitted = time.perf_counter(), jax.jit(step)
        # Where the memory of a state is taken over, the step itself must leave it as it was; see ``Loop._check``.
        fault = no_fault() if self._raises and in_place(leaves) else None
        traced = jitted.trace(list(leaves), key, call.leaves, fault)
        return TracedStep(jitted, traced, call, time.perf_counter() - start, fault, self._raises and fault is None)

    def _forward_of(self, entry: str, structure: Any, call: StepInputs) -> Program:
        split, metrics = call.split, call.loss_key

        def predict(leaves: list[Any], key: jax.Array, given: list[Any]) -> Any:
            x, _, ctx = split(given)
            return self._forward(jax.tree_util.tree_unflatten(structure, leaves), key, x, ctx)

        def evaluate(leaves: list[Any], key: jax.Array, given: list[Any]) -> Any:
            item, arrays, ctx = split(given)
            output = self._forward(jax.tree_util.tree_unflatten(structure, leaves), key, item["x"], ctx)
            return self._metrics(metrics, arrays, key, output, item["y"])

        return Program(predict if entry == "predict" else evaluate)
