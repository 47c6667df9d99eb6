"""Compiled steps: one program for each (loss code, static values, shapes, dtypes), found again in microseconds.

``Programs`` holds them. ``Loop`` runs them over a state of its own, updated in place, and knows when a state that a
user has seen must be left alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import lift, rebuild, tree
from kaun.context import Context
from kaun.errors import RecompilationWarning, locate
from kaun.packing import pack, packing_of, unpack
from kaun.staging import scored, staged

__all__ = ["Compilation", "Loop", "Programs"]

_MANY = 8
_LEAF = jax.tree_util.tree_structure(0)
_NO_CONTEXT = jax.tree_util.tree_structure(Context())


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One program that was compiled: where, for which code, why (again), and how long it took.

    Attributes:
        where: ``"step"``, ``"fit"``, ``"predict"`` or ``"evaluate"``.
        code: the loss's (the first metric's) name, file and line; for ``predict`` an empty string.
        why: ``"first"``, or what changed since the same code was compiled before, from what to what.
        seconds: tracing and compiling (the first run included).
    """

    where: str
    code: str
    why: str
    seconds: float


class _Program:
    """A jitted function, whether it has run yet, and what it was made for in words (made only when it is needed)."""

    __slots__ = ("fresh", "lock", "run")

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.fresh = True
        self.lock = threading.RLock()  # a loss may itself train


class Programs:
    """The compiled programs of one trainer: a bounded table, least recently used out first.

    Arguments:
        advance: ``advance(carry, key, x, ctx, loss, training) -> (loss, carry)``, one pure training step.
        forward: ``forward(carry, key, x, ctx) -> output``, the model in evaluation mode.
        capacity: how many programs are kept.
    """

    def __init__(self, advance: Callable[..., Any], forward: Callable[..., Any], capacity: int = 256) -> None:
        self._advance, self._forward = advance, forward
        self._capacity = capacity
        self._table: OrderedDict[Hashable, _Program] = OrderedDict()
        self._lock = threading.Lock()
        self._latest: OrderedDict[Hashable, tuple[dict[str, str], int]] = OrderedDict()
        self.compilations: deque[Compilation] = deque(maxlen=1000)

    def run(self, where: tuple[Any, ...], call: Call, leaves: list[Any], key: jax.Array) -> Any:
        """Run the program for a call once, on arrays that stay as they are."""
        program = self.find(where, call)
        if not program.fresh:
            return program.run(leaves, key, call.xs, call.arrays, call.cs)
        out: list[Any] = []
        run = lambda: out.append(program.run(leaves, key, call.xs, call.arrays, call.cs))
        self.first_run(where, call, program, run)
        return out[0]

    def step(
        self, structure: Any, leaves: list[Any], key: jax.Array, call: Call, training: bool
    ) -> tuple[jax.Array, list[Any]]:
        """The loss and the leaves after one step, in the very form in which a loop runs it."""
        packing = packing_of(leaves)
        where = ("step", structure, training, packing)
        if packing is None:
            return self.run(where, call, leaves, key)
        value, vectors = self.run(where, call, pack(packing, leaves), key)
        return value, unpack(packing, vectors)

    def find(self, where: tuple[Any, ...], call: Call) -> _Program:
        """The program for a call, made (not yet compiled) where there is none."""
        key = (where, call.key)
        with self._lock:
            found = self._table.get(key)
            if found is not None:
                self._table.move_to_end(key)
                return found
            self._table[key] = found = _Program(self._jit(where, call))
            if len(self._table) > self._capacity:
                self._table.popitem(last=False)
            return found

    def _jit(self, where: tuple[Any, ...], call: Call) -> Callable[..., Any]:
        entry, carry_def, training, packing = where
        loss_key, x_def, ctx_def = call.static
        join = jax.tree_util.tree_unflatten

        def step(leaves: list[Any], key: jax.Array, xs: list[Any], arrays: list[Any], cs: list[Any]) -> Any:
            carry, x, ctx = join(carry_def, leaves), join(x_def, xs), join(ctx_def, cs)
            loss = lambda output: staged(loss_key, arrays, output)
            value, after = self._advance(carry, key, x, ctx, loss, training)
            return value, _as_before(carry, after)

        def packed(vectors: list[Any], key: jax.Array, xs: list[Any], arrays: list[Any], cs: list[Any]) -> Any:
            value, leaves = step(packing.unpack(vectors), key, xs, arrays, cs)
            return value, packing.pack(leaves)

        def predict(leaves: list[Any], key: jax.Array, xs: list[Any], arrays: list[Any], cs: list[Any]) -> Any:
            return self._forward(join(carry_def, leaves), key, join(x_def, xs), join(ctx_def, cs))

        def evaluate(leaves: list[Any], key: jax.Array, xs: list[Any], arrays: list[Any], cs: list[Any]) -> Any:
            item = join(x_def, xs)
            output = self._forward(join(carry_def, leaves), key, item["x"], join(ctx_def, cs))
            return scored(loss_key, arrays, key, output, item["y"])

        if entry in ("predict", "evaluate"):
            return jax.jit(predict if entry == "predict" else evaluate)
        return jax.jit(packed if packing else step, donate_argnums=(0,) if entry == "fit" else ())

    def first_run(self, where: tuple[Any, ...], call: Call, program: _Program, run: Callable[[], None]) -> None:
        """Run a program for the first time: it is traced and compiled, timed, and written down with its reason."""
        with program.lock:
            if not program.fresh:
                return run()
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            program.fresh = False
        self._write_down(where, call, seconds)
        return None

    def _write_down(self, where: tuple[Any, ...], call: Call, seconds: float) -> None:
        entry, _, training, _ = where
        now = {**call.words(), "training": str(training)}
        with self._lock:
            before, count = self._latest.pop((entry, call.subject), (None, 0))
            self._latest[(entry, call.subject)] = (now, count + 1)
            if len(self._latest) > self._capacity:
                self._latest.popitem(last=False)
        why = "first" if before is None else _change(before, now)
        self.compilations.append(Compilation(where=entry, code=call.code, why=why, seconds=seconds))
        if count + 1 == _MANY:
            warnings.warn(
                f"{entry} has compiled {_MANY} programs for {call.code or 'one model'}; the last because {why}. Each "
                "costs a compilation. Capture numbers that change as arrays, alpha = jnp.asarray(alpha), keep one "
                "object instead of making equal ones, and give batches few different shapes. trainer.compilations "
                "lists them all.",
                RecompilationWarning,
                stacklevel=5,
            )


class Call:
    """What one call brings: its arrays, and the static key that decides which program can run it.

    For ``evaluate`` x is a dict of x and y, called an item in messages, and the loss a dict of frozen metrics.
    """

    __slots__ = ("arrays", "cs", "key", "static", "what", "xs")

    def __init__(self, x: Any, loss: Any, ctx: Context | None, what: str = "x") -> None:
        loss_key, self.arrays = lift.take_apart(loss) if loss is not None else (None, [])
        self.what = what
        self.xs, x_def = _leaves(x, what)
        self.cs, ctx_def = _leaves(ctx, "ctx") if ctx is not None else ([], _NO_CONTEXT)
        self.static = (loss_key, x_def, ctx_def)
        self.key = (self.static, tuple([_kind(a) for a in self.xs + self.arrays + self.cs]))

    @property
    def subject(self) -> Any:
        """The user's code that the loss is about."""
        return rebuild.subject(self.static[0]) if self.static[0] is not None else None

    @property
    def code(self) -> str:
        """Its name, file and line."""
        return locate(self.subject) if self.subject is not None else ""

    def words(self) -> dict[str, str]:
        """All that the program depends on, by name."""
        loss_key, x_def, ctx_def = self.static
        join = jax.tree_util.tree_unflatten
        x = tree.flatten(join(x_def, self.xs))[0]
        told = {f"{self.what}.{p}" if p else self.what: _tell(a) for p, a in x.items()}
        told |= {f"ctx[{p!r}]": _tell(a) for p, a in tree.flatten(join(ctx_def, self.cs))[0].items()}
        if loss_key is not None:
            told |= {f"captured {n}": v for n, v in rebuild.captures(loss_key, self.arrays).items()}
        return told


class Loop:
    """A run of steps over a state of its own, updated in place.

    Arguments:
        programs: where the compiled steps are.
        carry: the state to start from, a pytree; it is copied before the first step.
        key: the run's key.
        ctx: the Context of every step.
    """

    def __init__(self, programs: Programs, carry: Any, key: jax.Array, ctx: Context | None) -> None:
        self._programs = programs
        leaves, self._def = jax.tree_util.tree_flatten(carry)
        self._given: list[Any] | None = leaves
        self._packing = packing_of(leaves)
        # Whether these arrays are the loop's own, packed and to be updated in place, or leaves that others have seen;
        # and the arrays. One tuple, because an interrupt may come between any two assignments.
        self._held: tuple[bool, list[Any]] = (False, leaves)
        self._where = ("fit", self._def, True, self._packing)
        self._key, self._ctx = key, ctx
        self._done: deque[tuple[jax.Array, list[Any]]] = deque(maxlen=1)
        self._program: Any = None
        self._key_of_program: Any = None
        self.loss: jax.Array | None = None

    def push(self, x: Any, loss: Callable[..., Any], ctx: Context | None) -> None:
        """Run one step. Returns when it is dispatched, not when it is done."""
        call = Call(x, loss, self._ctx.merge(ctx) if self._ctx is not None else ctx)
        if call.key != self._key_of_program:
            self._program = self._programs.find(self._where, call)
            self._key_of_program = call.key
        program = self._program
        own, arrays = self._held
        if not own:
            self._held = (True, _copy(arrays) if self._packing is None else pack(self._packing, arrays))
        if program.fresh:
            self._programs.first_run(self._where, call, program, lambda: self._trace_and_run(program, call))
        else:
            self._run(program, call)
        self._take()
        self._given = None

    def _run(self, program: _Program, call: Call) -> None:
        # One call into C from donating the old leaves to storing the new ones: a KeyboardInterrupt is raised between
        # two bytecodes, and must not find the state given away and its successor in nobody's hands.
        arguments = (self._held[1], self._key, call.xs, call.arrays, call.cs)
        self._done.extend(itertools.starmap(program.run, (arguments,)))

    def _trace_and_run(self, program: _Program, call: Call) -> None:
        # Not through map: the user's loss runs in here, and a StopIteration of its would end the map in silence.
        self._done.append(program.run(self._held[1], self._key, call.xs, call.arrays, call.cs))

    def _take(self) -> None:
        if self._done:
            self.loss, arrays = self._done[0]
            self._held = (True, arrays)
            self._done.clear()

    def carry(self) -> Any:
        """The state after the last step that was run; the loop goes on with a copy of it."""
        self._take()
        own, arrays = self._held
        if own and self._given is not None:
            arrays = self._given  # interrupted in the first step, on a copy of what was given
        elif own and self._packing is not None:
            arrays = unpack(self._packing, arrays)
        self._held = (False, arrays)
        return jax.tree_util.tree_unflatten(self._def, arrays)


@jax.jit
def _copy(leaves: list[Any]) -> list[Any]:
    return [jnp.copy(a) for a in leaves]


def _as_before(carry: Any, after: Any) -> list[Any]:
    """The leaves after a step, in the structure, shapes and dtypes of those before it."""
    changed = tree.difference(carry, after)
    if changed or jax.tree_util.tree_structure(carry) != jax.tree_util.tree_structure(after):
        listed = "\n  ".join(changed[:10]) or f"{jax.tree_util.tree_structure(after)}"
        raise TypeError(
            "A step must give back a state of the structure, shapes and dtypes that it was given, but the model's or "
            f"the optimizer's state changed (expected is before, found after the step):\n  {listed}\n"
            "Keep the dtype in apply or update with new.astype(old.dtype)."
        )
    pairs = zip(jax.tree_util.tree_leaves(carry), jax.tree_util.tree_leaves(after), strict=True)
    return [jax.lax.convert_element_type(new, old.dtype) if new.weak_type else new for old, new in pairs]


# Types seen to be JAX arrays; the class itself is not public, and isinstance of jax.Array takes 0.3 us.
_array_types: set[type] = set()


def _leaves(value: Any, what: str) -> tuple[list[Any], Any]:
    if type(value) in _array_types:
        return [value], _LEAF
    leaves, treedef = jax.tree_util.tree_flatten(value)
    for i, leaf in enumerate(leaves):
        if not _is_numeric(leaf):
            raise _no_number(value, what)
        if isinstance(leaf, jax.Array):
            _array_types.add(type(leaf))
        # Copied at once: XLA reads NumPy memory after the call has returned, and the user may write to it by then.
        leaves[i] = tree.snapshot(leaf)
    return leaves, treedef


def _is_numeric(leaf: Any) -> bool:
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.dtype.kind not in "OSUMmT" and not isinstance(leaf, np.ma.MaskedArray)
    return isinstance(leaf, (jax.Array, bool, int, float, complex))


def _no_number(value: Any, what: str) -> TypeError:
    path, leaf = next((p, v) for p, v in tree.flatten(value)[0].items() if not _is_numeric(v))
    kind = "a masked array" if isinstance(leaf, np.ma.MaskedArray) else "an array"
    received = f"{kind} of dtype {leaf.dtype}" if tree.is_array(leaf) else type(leaf).__name__
    return TypeError(
        f"{what}{f' at {path!r}' if path else ''} expected a NumPy or JAX array of numbers, received {received}. "
        "Convert it, np.asarray(value, np.float32), or leave it out of the batch."
    )


def _kind(a: Any) -> tuple[Any, ...]:
    if type(a) in _array_types:
        return a.shape, a.dtype, a.weak_type
    if isinstance(a, jax.Array):
        return a.shape, a.dtype, a.weak_type
    return (a.shape, a.dtype) if isinstance(a, (np.ndarray, np.generic)) else (type(a),)


def _tell(a: Any) -> str:
    return tree.describe(a) + (" (weak)" if getattr(a, "weak_type", False) else "")


def _change(before: dict[str, str], now: dict[str, str]) -> str:
    names = [*now, *(n for n in before if n not in now)]
    pairs = [(n, before.get(n, "nothing"), now.get(n, "nothing")) for n in names]
    changes = [f"{n} changed from {a} to {b}" for n, a, b in pairs if a != b]
    return "; ".join(changes[:3]) or "the program made for these arguments had been dropped, or its shardings changed"

