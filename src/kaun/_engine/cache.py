"""ProgramCache: the compiled programs of one trainer, found again in microseconds."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from kaun._engine.devices import divides, item_of, places_of, refuse_different_devices, warn_of_copies
from kaun._engine.explicit import explicit_mesh, to_automatic, to_explicit
from kaun._engine.inputs import StepInputs
from kaun._engine.log import Compilation, CompilationLog
from kaun._engine.packing import bytes_of
from kaun._engine.placing import Placing, place_carry, wait_on_cpu
from kaun._engine.program import Program, Traced
from kaun._engine.together import check_same_call
from kaun._jax import any_traced
from kaun._kernels import trim_heap
from kaun._messages import hide_frames
from kaun._processes import tell_failure
from kaun.sharding.core import Sharding, processes_of

_LARGE = 1 << 26  # bytes of a state: beside a smaller one, the memory that compiling leaves matters less than its time


class ProgramCache:
    """The programs of one trainer: a bounded table that drops the least recently used.

    Args:
        train_step: ``train_step(carry, key, x, ctx, loss, training) -> StepOutput``, as ``kaun._step.train_step``.
        forward: ``forward(carry, key, x, ctx) -> output``, the model in evaluation mode.
        metrics: ``metrics(loss_key, arrays, key, output, targets) -> parts``, the traced metrics of ``evaluate``.
        on_nonfinite: What happens to a step that is not finite: ``"raise"``, ``"skip"`` or ``"ignore"``.
        scaled: Whether the loss is scaled: a step then discards an overflow itself.
        row_axis: As ``TracedStep.row_axis``.
        sharding: Where the arrays of the trainer lie, None where they are not placed.
        capacity: How many traced steps are kept, each with its programs.

    Attributes:
        train_step: As the argument.
        on_nonfinite: As the argument.
        discards: Whether every step itself discards an update that is not finite.
        row_axis: As the argument.
        sharding: As the argument.
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        forward: Callable[..., Any],
        metrics: Callable[..., Any],
        *,
        on_nonfinite: str = "ignore",
        scaled: bool = False,
        row_axis: int = 0,
        sharding: Sharding | None = None,
        capacity: int = 256,
    ) -> None:
        self.train_step, self.on_nonfinite = train_step, on_nonfinite
        self.sharding = sharding
        self.discards = scaled or on_nonfinite != "raise"
        self.row_axis = row_axis
        self._forward, self._metrics = forward, metrics
        self._capacity = capacity
        self._table: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._log = CompilationLog(capacity)
        self._warned = False

    @property
    def compilations(self) -> deque[Compilation]:
        """What was compiled, the newest last."""
        return self._log.compilations

    def get(self, key: Hashable) -> Any:
        """Return what is kept under a key, None if nothing is."""
        with self._lock:
            found = self._table.get(key)
            if found is not None:
                self._table.move_to_end(key)
            return found

    def add(self, key: Hashable, made: Any) -> Any:
        """Keep a traced step or program under a key, and return what is kept there: another thread may be first."""
        with self._lock:
            found = self._table.setdefault(key, made)
            if len(self._table) > self._capacity:
                self._table.popitem(last=False)
            return found

    def run(
        self, entry: str, structure: Any, leaves: list[Any], key: jax.Array, inputs: StepInputs,
        ready: Callable[[StepInputs], None] | None = None,
    ) -> Any:  # fmt: skip
        """Return the model's output in evaluation mode (``"predict"``), or its metrics (``"evaluate"``).

        With a sharding ``ready`` is called once the program is compiled, before it runs.
        """
        where = (entry, structure, inputs.key)
        leaves, key = place_carry(self.sharding, structure, leaves, key)
        placing = Placing.of(self.sharding, structure, leaves, inputs)
        program = self.get(where) or self.add(where, self._evaluation(entry, structure, inputs, placing))
        mesh, traced = explicit_mesh(leaves) or inputs.mesh, any_traced((*leaves, key, *inputs.leaves))
        if traced or placing is not None or mesh is None:
            item = inputs.owned() if traced or placing is None else placing.put_item(inputs.owned())
            if ready is not None and placing is not None and not traced:
                self.compile(program, entry, inputs, False, (leaves, key, item))
                ready(inputs)
                program.ready = True
            return self.call(program, entry, inputs, False, (leaves, key, item))
        arguments = (to_automatic(leaves), *to_automatic([key]), inputs.owned())
        output, tree = jax.tree_util.tree_flatten(self.call(program, entry, inputs, False, arguments))
        return jax.tree_util.tree_unflatten(tree, to_explicit(output, [None] * len(output), mesh))

    def runner(self, variables: Any, key: jax.Array, entry: str) -> Callable[..., Any]:
        """Return ``run`` of one state. What depends on the state, or on the kind of the inputs, is done once."""
        leaves, structure = jax.tree_util.tree_flatten(variables)
        usual = self.sharding is None and explicit_mesh(leaves) is None and not any_traced((*leaves, key))
        programs: dict[Hashable, Program] = {}

        def run(inputs: StepInputs, ready: Callable[[StepInputs], None] | None = None) -> Any:
            program = programs.get(inputs.key)
            if program is None or inputs.mesh is not None or not inputs.is_usual:
                output = self.run(entry, structure, leaves, key, inputs, ready)
                if usual:
                    programs[inputs.key] = self.get((entry, structure, inputs.key))
                return output
            arguments, start = (leaves, key, inputs.owned()), time.perf_counter()
            try:
                output = program.jitted(*arguments)
            except ValueError:
                refuse_different_devices(entry, inputs, leaves, item_of(arguments, program.pattern))
                raise
            if program.was_called_anew():
                self.log_moved(program, entry, inputs, False, arguments, start)
            return output

        return run

    def compile(
        self, program: Program, entry: str, inputs: StepInputs, training: bool, arguments: Sequence[Any],
        traced: Traced | None = None,
    ) -> float:  # fmt: skip
        """Compile a program for these arguments and log it, unless that was done before; return the seconds."""
        with program.lock:
            if program.compiled:
                return 0.0
            start, entry = time.perf_counter(), entry.split()[0]
            leaves, item = arguments[0], item_of(arguments, program.pattern)
            made = program.jitted.trace(*arguments)
            try:
                made.lower().compile()  # the first run then finds it
            except ValueError:
                refuse_different_devices(entry, inputs, leaves, item)
                raise
            if bytes_of(leaves) >= _LARGE:
                trim_heap()
            seconds = time.perf_counter() - start
            program.places.append(places_of(inputs, leaves, item))
            if traced is not None:
                seconds, traced.seconds = seconds + traced.seconds, 0.0
            program.compiled = True
        wanted = None if traced is None else traced.wanted
        self._log.add(entry, inputs, program.stacks, training, seconds, wanted, places=program.places[0])
        program.divides = divides(made.jaxpr)
        self._warn(program, entry, inputs, leaves, item)
        return seconds

    def call(
        self, program: Program, entry: str, inputs: StepInputs, training: bool, arguments: tuple[Any, ...],
        traced: Traced | None = None,
    ) -> Any:  # fmt: skip
        """Run a program; inside a function that the user compiles it becomes a part of that."""
        leaves, key = arguments[:2]
        if any_traced((*leaves, key, *inputs.leaves)):
            return program.function(*arguments)
        if not program.ready:
            self.compile(program, entry, inputs, training, arguments, traced)
            check_same_call(entry.split()[0], processes_of(self.sharding, leaves), inputs)
            program.ready = True
        start = time.perf_counter()
        try:
            wait_on_cpu(self.sharding, leaves)
            results = program.jitted(*arguments)
            wait_on_cpu(self.sharding, results, entry)
        except ValueError:
            refuse_different_devices(entry, inputs, leaves, item_of(arguments, program.pattern))
            raise
        if program.was_called_anew():
            self.log_moved(program, entry, inputs, training, arguments, start, traced)
        return results

    def failed(self, entry: str, state: Any, error: BaseException) -> None:
        """Hide kaun's frames in an exception that ends a call, and tell it to the other processes of the state."""
        processes = () if any_traced(jax.tree_util.tree_leaves(state)) else processes_of(self.sharding, state)
        tell_failure(entry, processes, error)
        hide_frames(error)

    def log_moved(
        self, program: Program, entry: str, inputs: StepInputs, training: bool, arguments: Sequence[Any], start: float,
        traced: Traced | None = None,
    ) -> float:  # fmt: skip
        """Log that JAX compiled a program again in a call that began at ``start``, and return the seconds since then.

        JAX does so where state or item lie in another place than in any call before; else nothing is logged.
        """
        leaves, item = arguments[0], item_of(arguments, program.pattern)
        places = places_of(inputs, leaves, item)
        if places in program.places:
            return 0.0
        program.places.append(places)
        seconds, wanted = time.perf_counter() - start, None if traced is None else traced.wanted
        self._log.add(entry.split()[0], inputs, program.stacks, training, seconds, wanted, places=places)
        self._warn(program, entry.split()[0], inputs, leaves, item)
        return seconds

    def _warn(self, program: Program, entry: str, inputs: StepInputs, leaves: Sequence[Any], item: list[Any]) -> None:
        if not self._warned and not program.divides:
            self._warned = warn_of_copies(entry, inputs, leaves, item)

    def evaluation(self, entry: str, structure: Any, inputs: StepInputs) -> Callable[..., Any]:
        """Return the function of (leaves, key, item) that ``"predict"`` or ``"evaluate"`` compiles."""
        split, metrics = inputs.split, inputs.loss_key

        def predict(leaves: list[Any], key: jax.Array, given: list[Any]) -> Any:
            x, _, ctx = split(given)
            return self._forward(jax.tree_util.tree_unflatten(structure, leaves), key, x, ctx)

        def evaluate(leaves: list[Any], key: jax.Array, given: list[Any]) -> Any:
            item, arrays, ctx = split(given)
            output = self._forward(jax.tree_util.tree_unflatten(structure, leaves), key, item["x"], ctx)
            return self._metrics(metrics, arrays, key, output, item["y"])

        return predict if entry == "predict" else evaluate

    def _evaluation(self, entry: str, structure: Any, inputs: StepInputs, placing: Placing | None) -> Program:
        run = self.evaluation(entry, structure, inputs)
        if placing is None:
            return Program(run, stacks="one alone")

        def placed(leaves: list[Any], key: jax.Array, given: list[Any]) -> Any:
            output = run(leaves, key, placing.pin_item(given))
            return placing.pin_output(output) if entry == "predict" else placing.pin_results(output)

        return Program(placed)
