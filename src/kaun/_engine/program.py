"""TracedStep: one training step as it was traced, and the programs made of it, each a loop over a block of items."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun._engine.batching import capacity_of
from kaun._engine.inputs import StepInputs, as_arrays, joined, pattern_for, rows_at
from kaun._engine.jaxpr import digest_program, is_heavy, slow_in_loops
from kaun._engine.members import CODE
from kaun._engine.numbers import NumberLayout, unwritten
from kaun._engine.options import step_options
from kaun._engine.packing import MemberPacking, Packing, in_place, packing_on_device
from kaun._engine.placing import Placing
from kaun._engine.probabilities import warn_of_probabilities
from kaun._jax import calls_the_host, signatures_of
from kaun._loss import trace_loss
from kaun._step import match_state

__all__ = [
    "ROWS", "Program", "Traced", "TracedStep", "count_on_device", "find_step", "trace_step",
]  # fmt: skip

# The most steps of one dispatch. With room for the losses of more, XLA:CPU estimates a tiny model to be so costly that
# it runs each dispatch on another thread, which costs more than its steps.
ROWS = 128
_COUNT_BYTES = 1 << 24  # of the counts of a dispatch: metrics may count rows, and a batch may have millions


class Program:
    """A function and its compiled form.

    Attributes:
        function: The function.
        jitted: The same, jitted.
        compiled: Whether it was compiled.
        ready: Whether it was compiled in all processes, so that a single call may run it.
        pattern: For each array of an item whether it is stacked, where a block of items is passed.
        stacks: How the items of a block are passed, in words.
        places: Where state and items lay for which it was compiled, in words by name.
        lock: Held while it is compiled.
    """

    __slots__ = (
        "_signatures", "compiled", "divides", "function", "jitted", "lock", "pattern", "places", "ready", "stacks",
    )  # fmt: skip

    def __init__(
        self, function: Callable[..., Any], pattern: tuple[bool, ...] = (), stacks: str = "", **options: Any
    ) -> None:
        self.function = function
        self.jitted = jax.jit(function, **options)
        self.pattern, self.stacks = pattern, stacks
        self.compiled = self.ready = self.divides = False
        self.places: list[dict[str, str]] = []
        self._signatures = 0
        self.lock = threading.RLock()  # a loss may itself train

    def was_called_anew(self) -> bool:
        """Return whether the last call was with arguments of another kind or place than those before."""
        before, self._signatures = self._signatures, signatures_of(self.jitted)
        return before != self._signatures


class Traced(Protocol):
    """What is traced once and compiled into several programs, as the log of compilations needs it.

    Attributes:
        seconds: How long tracing took, until the first program that is compiled takes it over.
        wanted: The further numbers that reports ask for.
    """

    seconds: float
    wanted: Mapping[str, int]


class TracedStep:
    """One training step as it was traced for inputs of one key, and the programs made of it.

    Args:
        step: The jitted step, ``(leaves, key, item) -> (loss, numbers, leaves, finite, checks, left)``; where one that
            is not finite ends the run, with ``left`` (``train_step``), or ``clean`` if it does not discard.
        traced: What tracing it gave.
        inputs: The inputs for which it was traced.
        on_nonfinite: ``"raise"``, ``"skip"`` or ``"ignore"``.
        discards: Whether the step itself discards an update that is not finite.
        seconds: How long tracing took.

    Attributes:
        step: As the argument.
        jaxpr: The traced program.
        on_nonfinite: As the argument.
        discards: As the argument.
        proves: Whether it counts how many updates are proved to be finite.
        checks: How many checks a step returns (``StepOutput``).
        loss: The shape and dtype of a step's loss: a scalar, or an array [members].
        layout: Where a step's numbers beside its loss are in its results.
        members: Whether it is the step of an ensemble.
        packing: How a loop packs its members, None if they are not small.
        row_axis: The axis of an item's arrays along which its rows lie, 1 where axis 0 has the members of an ensemble.
        examples: How many rows an item has, None if that is unknown.
        row_mask: Which leaf of an item says which rows count, None if all do.
        looped: Whether it runs in a loop.
        can_raise: Whether it calls the host, where an exception ends the whole dispatch. Such a step is dispatched
            alone and keeps the memory of the state before it.
        most: How many steps one dispatch may run.
        rows: For how many steps a dispatch has room, unless its items are stacked.
        capacity: How many items one dispatch may hold.
        status: The status of a run in which all steps are finite (``StepResults``), None if runs do not end at one
            that is not.
        watches: Whether a run ends at a step that is not finite with the state after that step.
        seconds: How long tracing took, until the first program that is compiled takes it over.
        patterns: The patterns of blocks so far.
        placing: Where the arrays lie, None without ``Trainer(sharding=)``.
        wanted: The further numbers that reports ask for, by name, with the n of "at every n-th step".
    """

    __slots__ = (
        "_digest", "_lock", "_programs", "can_raise", "capacity", "checks", "discards", "examples", "jaxpr", "layout",
        "looped", "loss", "members", "most", "on_nonfinite", "packing", "patterns", "placing", "proves", "row_axis",
        "row_mask", "rows", "seconds", "status", "step", "wanted", "watches",
    )  # fmt: skip

    def __init__(
        self, step: Any, traced: Any, inputs: StepInputs, on_nonfinite: str, discards: bool, seconds: float
    ) -> None:
        self.step, self.jaxpr, self.on_nonfinite, self.discards = step, traced.jaxpr, on_nonfinite, discards
        self.loss, numbers, after, _, checks, left = traced.out_info
        self.proves, self.checks = left is not None, checks.shape[0]
        self.layout = NumberLayout(numbers)
        self.members = CODE in self.layout.places
        self.packing = MemberPacking.of(after) if self.members else None
        self.looped = jax.default_backend() != "cpu" or not slow_in_loops(traced.jaxpr)
        self.can_raise = calls_the_host(traced.jaxpr)
        self.rows = min(ROWS, max(1, _COUNT_BYTES // max(1, self.layout.bytes)))
        alone = self.can_raise or not self.looped or (jax.default_backend() == "cpu" and is_heavy(traced.jaxpr))
        self.most = 1 if alone else self.rows
        self.row_mask, self.row_axis, self.examples = inputs.row_mask, 0, inputs.examples
        self.capacity = min(capacity_of(inputs), self.most)
        self.status = _on_device(np.ones(1 + checks.shape[0], checks.dtype)) if on_nonfinite == "raise" else None
        self.watches = self.status is not None and not discards
        self.seconds = seconds
        self.patterns: list[tuple[bool, ...]] = []
        self.wanted: Mapping[str, int] = {}
        self.placing: Placing | None = None
        self._digest = ""
        self._programs: dict[Hashable, Program] = {}
        self._lock = threading.Lock()

    def digest(self) -> str:
        """Return the digest of the traced program (``digest_program``), which is computed once."""
        self._digest = self._digest or digest_program(self.jaxpr)
        return self._digest

    def pattern(self, varying: tuple[bool, ...]) -> tuple[bool, ...]:
        """Return which leaves of a block to stack where these vary."""
        return pattern_for(self.patterns, varying)

    def program(
        self, entry: str, pattern: tuple[bool, ...], packing: Packing | None = None, *, clean: bool = False
    ) -> Program:
        """Return the program that runs the step over blocks stacked by a pattern; it may not be compiled yet.

        It takes the state's arrays, the run's key, the status, the number of steps,
        and the leaves that are not stacked and those that are. It returns the losses, an array at least as long as the
        number of steps; the other numbers of each step, as its layout says; the state's arrays; and the status.

        Args:
            entry: ``"fit"``; ``"fit in place"`` for one that overwrites its state's memory; ``"step"`` for one that
                takes leaves, runs one step, and returns its loss, the leaves after it, and what keeps its bits those of
                ``fit``; ``"step unpacked"`` for one of a state that must not be packed.
            pattern: For each leaf of an item whether it is stacked.
            packing: How the state is packed, None if it is not. For ``"step"`` the program packs it itself.
            clean: Whether all elements of the states that it is given are finite; it then need not look at them.
        """
        key = (entry, pattern, packing, clean and self.watches)
        found = self._programs.get(key)
        if found is not None:
            return found
        with self._lock:
            found = self._programs.get(key)
            if found is None:
                run = _block(self, pattern, packing, stops=self.status is not None, clean=clean)
                run = _one_step(self, pattern, packs=entry == "step") if entry.startswith("step") else run
                donated = (0,) if entry == "fit in place" else ()
                stacks = "stacked" if any(pattern) else "passed once"
                packs = None if self.placing is not None else self.packing
                options = step_options(self.jaxpr, packs, members=self.members)
                found = Program(run, pattern, stacks, donate_argnums=donated, compiler_options=options)
                self._programs[key] = found
            return found


def trace_step(
    train_step: Callable[..., Any],
    on_nonfinite: str,
    discards: bool,
    structure: Any,
    leaves: Sequence[Any],
    key: jax.Array,
    inputs: StepInputs,
    training: bool,
) -> TracedStep:
    """Trace a training step, which runs the user's model and loss.

    Args:
        train_step: ``train_step(carry, key, x, ctx, loss, training, discard)``, as ``kaun._step.train_step`` after
            its settings.
        on_nonfinite: What happens to a step that is not finite.
        discards: Whether the step itself always discards an update that is not finite.
        structure: The structure of the carry.
        leaves: Its leaves, or their shapes and dtypes. The last one counts the steps.
        key: The run's key.
        inputs: The inputs of the step.
        training: Whether the layers run in training mode.
    """
    split, loss_key = inputs.split, inputs.loss_key
    # A condition around the update of a small state would change its last bits against a loop written by hand. There
    # the state before the step is computed again (``PendingDispatch.again``).
    discards = discards or in_place(leaves)

    def step(leaves: list[Any], key: jax.Array, item: list[Any], *known: jax.Array) -> Any:
        carry = jax.tree_util.tree_unflatten(structure, as_arrays(leaves))
        x, arrays, ctx = split(item)
        loss = functools.partial(trace_loss, loss_key, arrays)
        more = {"left" if discards else "clean": known[0]} if known else {}
        out = train_step(carry, key, x, ctx, loss, training, discards, **more)
        after = jax.tree_util.tree_leaves(match_state(carry, out.carry))
        return out.loss, out.numbers, after, out.finite, out.checks, out.left

    start, jitted = time.perf_counter(), jax.jit(step)
    known = [np.float32(0) if discards else np.array(False)] if on_nonfinite == "raise" else []
    traced = jitted.trace(list(leaves), key, inputs.leaves, *known)
    warn_of_probabilities(traced.jaxpr)
    return TracedStep(jitted, traced, inputs, on_nonfinite, discards, time.perf_counter() - start)


def find_step(
    programs: Any, structure: Any, leaves: Any, key: jax.Array, inputs: StepInputs, training: bool,
    wanted: Mapping[str, int] | None = None,
) -> TracedStep:  # fmt: skip
    """Return the traced step for some inputs, of a ``ProgramCache`` or traced: the user's own code runs here."""
    wanted = wanted or {}
    where = ("train", structure, training, inputs.key, jax.sharding.get_abstract_mesh(), *sorted(wanted.items()))
    found = programs.get(where)
    if found is None:
        train_step = functools.partial(programs.train_step, wanted=wanted) if wanted else programs.train_step
        step = train_step, programs.on_nonfinite, programs.discards
        made = trace_step(*step, structure, leaves, key, inputs, training)
        made.wanted, made.row_axis, made.examples = wanted, programs.row_axis, inputs.length(programs.row_axis)
        made.placing = Placing.of(programs.sharding, structure, leaves, inputs)
        found = programs.add(where, made)
    return found


def _block(
    traced: TracedStep, pattern: tuple[bool, ...], packing: Packing | None, *, stops: bool, clean: bool = False
) -> Callable[..., Any]:
    """Return the function that runs the steps of a block.

    Args:
        traced: The step.
        pattern: For each leaf of an item whether it is stacked.
        packing: How the state is packed, None if it is not.
        stops: Whether the run ends at a step that is not finite. Its later blocks run no step.
        clean: Whether all elements of the state are finite.
    """

    def straight(held: list[Any], key: jax.Array, status: Any, count: Any, shared: list[Any], stacked: Any) -> Any:
        # Without a loop, for a step that XLA runs slowly inside one.
        before = packing.unpack(held) if packing else held
        loss, rows, after, last = run(before, key, status, shared)
        if stops:  # after a step that is not finite nothing changes any more
            running = status[0] > 0
            after = _select(running, after, before)
            last = jnp.where(running, last, status)
        return pinned(loss[None], [row[None] for row in rows], after, last)

    def looped(held: list[Any], key: jax.Array, status: Any, count: Any, shared: list[Any], stacked: Any) -> Any:
        def unfinished(carried: Any) -> jax.Array:
            i, _, status, _, _, _ = carried
            return (i < count) & (status[0] > 0) if stops else i < count

        def body(carried: Any) -> Any:
            # Rows are carried: XLA would fuse a slice with what is computed of it, and the last bits would depend on
            # whether items are stacked.
            i, leaves, status, losses, tables, item_rows = carried
            leaves = leaves if members is None else members.unpack(leaves)
            loss, rows, leaves, status = run(leaves, key, status, joined(pattern, shared, item_rows))
            losses = lax.dynamic_update_index_in_dim(losses, loss, i, 0)
            tables = [lax.dynamic_update_index_in_dim(*pair, i, 0) for pair in zip(tables, rows, strict=True)]
            leaves = leaves if members is None else members.pack(leaves)
            return i + 1, leaves, status, losses, tables, rows_at(i + 1, stacked)

        losses = unwritten((length, *traced.loss.shape), traced.loss.dtype)
        tables = traced.layout.empty(length)
        leaves = packing.unpack(held) if packing else held
        members = traced.packing if placing is None else None
        leaves = leaves if members is None else members.pack(leaves)
        start = (jnp.uint32(0), leaves, status, losses, tables, rows_at(0, stacked))
        _, leaves, status, losses, tables, _ = lax.while_loop(unfinished, body, start)
        leaves = leaves if members is None else members.unpack(leaves)
        return pinned(losses, tables, leaves, status)

    def pinned(losses: Any, tables: list[Any], leaves: list[Any], status: Any) -> Any:
        held = packing.pack(leaves) if packing else leaves
        return (losses, tables, held, status) if placing is None else placing.pin_block(losses, tables, held, status)

    placing = traced.placing
    run = functools.partial(_run_step, traced, stops, clean)
    length = traced.capacity if any(pattern) else traced.rows
    return looped if traced.looped else straight


def _run_step(
    traced: TracedStep, stops: bool, clean: bool, leaves: list[Any], key: jax.Array, status: Any, item: list[Any]
) -> Any:
    """Return the loss, the rows of other numbers, the leaves and the status after a step."""
    placing = traced.placing
    known = [jnp.array(clean)] if traced.watches else []
    known = [(status[0] - 1).astype(jnp.float32)] if traced.proves else known
    given = leaves, key, placing.pin_item(item) if placing else item, *known
    loss, numbers, after, finite, checks, left = traced.step(*given)
    if placing is not None:
        after = placing.pin_carry(after)
        loss, numbers, finite, checks = placing.pin_numbers((loss, numbers, finite, checks))
    if stops:
        code = finite.astype(status.dtype) if left is None else jnp.where(finite, 1 + left, 0).astype(status.dtype)
        status = jnp.concatenate([code[None], checks])
    return loss, traced.layout.rows(numbers), after, status


def _select(condition: jax.Array, values: list[Any], others: list[Any]) -> list[Any]:
    return [jnp.where(condition, value, other) for value, other in zip(values, others, strict=True)]


def _one_step(traced: TracedStep, pattern: tuple[bool, ...], *, packs: bool) -> Callable[..., Any]:
    """Return the function that runs one step from leaves to leaves, as ``TracedStep.program`` says."""

    def run(leaves: list[Any], key: jax.Array, count: Any, item: list[Any]) -> Any:
        # The same loop as that of ``fit``, so that it has the same bits.
        packing = packing_on_device(leaves) if packs else None
        block = _block(traced, pattern, packing, stops=not traced.discards)
        held = packing.pack(leaves) if packing else leaves
        losses, tables, held, status = block(held, key, traced.status, count, item, [])
        after = packing.unpack(held) if packing else held
        if not traced.discards:
            after = [*_select(status[0] > 0, after[:-1], leaves[:-1]), after[-1]]  # the last one counts the steps
        if traced.placing is not None:
            after = traced.placing.pin_carry(after)
        # XLA would leave out the norm of the gradient where nothing else needs it, and then fuse the update in another
        # way: its bits would not be those of ``fit``.
        return losses[0], after, tables if traced.on_nonfinite == "ignore" else []

    return run


def count_on_device(count: int, placing: Placing | None = None) -> jax.Array:
    """Return a number of steps on the device, unsigned: an index that may be negative costs two operations more."""
    # Under jax.set_mesh an array is placed on that mesh, and must not be kept for later.
    kept = _kept_count if jax.sharding.get_abstract_mesh().empty else _count
    return kept(count) if placing is None else placing.count(count)


def _count(count: int) -> jax.Array:
    return _on_device(np.uint32(count))


_kept_count = functools.lru_cache(maxsize=2 * ROWS)(_count)


def _on_device(value: Any) -> jax.Array:
    """Return a NumPy value on the device, without a program, of which there would be one for each shape."""
    with jax.ensure_compile_time_eval():  # a step may be part of a function that the user compiles
        return jax.device_put(value) if jax.sharding.get_abstract_mesh().empty else jnp.asarray(value)
