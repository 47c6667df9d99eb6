"""A traced step run one operation at a time, to find where a value that is not finite came from.

Of each array that is not finite an ``Event`` says which operation made it, of which operands that were not finite
either. ``origin_of`` walks these from a result back to the first.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun._jax import Operation, evaluate

__all__ = ["Event", "Origin", "Replay", "origin_of"]

# What computes each element of its result from the elements of its operands at the same place.
_ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos cosh
    digamma div erf erf_inv erfc exp exp2 expm1 floor integer_pow lgamma log log1p logistic max min mul neg nextafter
    pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh
    """.split()
)


@dataclasses.dataclass(frozen=True, eq=False)
class Event:
    """An array that is not finite, of a step that is replayed.

    Attributes:
        number: Its place in the order in which they came.
        nan: Whether it has a nan; else it has an infinity.
        given: What it is, where no operation of the step made it: ``"x"``, and ``""`` for a constant; else None.
        operations: The operation of the step that made it, after the calls around that, the outermost first.
        nan_from_nan: The operands with a nan that are the reason for its nan.
        nan_from_inf: The infinite operands that are the reason for its nan.
        inf_from_inf: The infinite operands that are the reason for its infinities.
        shape: Its shape.
        dtype: Its dtype.
        rows: Where along axis 0 it is not finite.
        place: The index of its first nan, or of its first infinity.
        value: What it has there.
        operands: The operands at that place, where the operation computes each element from those.
        turn: The number of the iteration of the outermost loop in which it was made.
    """

    number: int
    nan: bool
    given: str | None
    operations: tuple[Operation, ...]
    nan_from_nan: tuple[Event, ...]
    nan_from_inf: tuple[Event, ...]
    inf_from_inf: tuple[Event, ...]
    shape: tuple[int, ...]
    dtype: Any
    rows: tuple[int, ...]
    place: tuple[int, ...]
    value: Any
    operands: tuple[Any, ...]
    turn: int | None


class _Value(NamedTuple):
    array: Any
    event: Event | None
    constant: bool = False  # whether it is the same in every step: computed of constants alone


class Origin(NamedTuple):
    """Where a value that is not finite came from.

    Attributes:
        event: The first array that is not finite.
        became_nan: The first nan, where that first array is infinite and another operation made a nan of it.
    """

    event: Event
    became_nan: Event | None


class Replay:
    """Runs traced programs one operation at a time.

    Attributes:
        operations: Each operation that was run, by its key, in the order in which they ran first.
    """

    def __init__(self) -> None:
        self.operations: dict[int, Operation] = {}
        self._numbers = itertools.count()
        self._calls: tuple[Operation, ...] = ()
        self._turn: int | None = None

    def run(self, closed: Any, arguments: Sequence[tuple[str, Any]], groups: Sequence[Sequence[int]]) -> Iterable[Any]:
        """Yield the events of the results of a program, group by group; None for those that are finite.

        Args:
            closed: The program.
            arguments: Names and values of its arguments.
            groups: Numbers of results. What only later groups need runs after the first one was yielded.
        """
        values = [_Value(value, self.given(value, name)) for name, value in arguments]
        for found in evaluate(closed, values, self._constant, self._apply, groups):
            yield [value.event for value in found]

    def given(self, value: Any, name: str) -> Event | None:
        """Return the event of a value that no operation made, None if it is finite."""
        return self._event(value, given=name)

    def _constant(self, value: Any) -> _Value:
        return _Value(value, self._event(value, given=""), True)

    def _program(self, closed: Any, values: Sequence[_Value]) -> list[_Value]:
        (found,) = evaluate(closed, values, self._constant, self._apply)
        return found

    def _apply(self, operation: Operation, values: list[_Value]) -> list[_Value]:
        self.operations.setdefault(operation.key, operation)
        calls, self._calls = self._calls, (*self._calls, operation)
        try:
            if operation.called is not None:
                return self._program(operation.called, values)
            if operation.branches:
                number = int(np.clip(int(values[0].array), 0, len(operation.branches) - 1))
                return self._program(operation.branches[number], values[1:])
            if operation.while_parts is not None:
                return self._while(*operation.while_parts, values)
            if operation.scan_parts is not None:
                return self._scan(*operation.scan_parts, values)
            results = operation.run([value.array for value in values])
            if all(value.constant for value in values):
                return list(map(self._constant, results))
            return [_Value(array, self._event(array, operands=values)) for array in results]
        finally:
            self._calls = calls

    def _while(self, condition: Any, constants: int, body: Any, more: int, values: list[_Value]) -> list[_Value]:
        first, second, carried = values[:constants], values[constants : constants + more], values[constants + more :]
        outermost = self._turn is None
        for turn in itertools.count():
            if not bool(self._program(condition, [*first, *carried])[0].array):
                break
            self._turn = turn if outermost else self._turn
            carried = self._program(body, [*second, *carried])
        self._turn = None if outermost else self._turn
        return carried

    def _scan(
        self, body: Any, constants: int, carries: int, order: Iterable[int], values: list[_Value]
    ) -> list[_Value]:
        fixed, carried, stacks = values[:constants], values[constants:][:carries], values[constants + carries :]
        made: dict[int, list[_Value]] = {}
        outermost = self._turn is None
        for turn in order:
            self._turn = turn if outermost else self._turn
            rows = [self._passed_on(lax.dynamic_index_in_dim(s.array, turn, keepdims=False), [s]) for s in stacks]
            results = self._program(body, [*fixed, *carried, *rows])
            carried, made[turn] = results[:carries], results[carries:]
        self._turn = None if outermost else self._turn
        columns = zip(*[made[turn] for turn in sorted(made)], strict=True)
        return [*carried, *[self._passed_on(jnp.stack([v.array for v in c]), c) for c in columns]]

    def _passed_on(self, array: Any, sources: Sequence[_Value]) -> _Value:
        """Return a slice or a stack of values as a value."""
        return _Value(array, self._event(array, operands=sources, elementwise=False))

    def _event(
        self, array: Any, *, given: str | None = None, operands: Sequence[_Value] = (), elementwise: bool | None = None
    ) -> Event | None:
        dtype = getattr(array, "dtype", None) or jnp.result_type(array)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return None
        host = np.asarray(array)
        finite = np.isfinite(host)
        if finite.all():
            return None
        nan = np.isnan(host)
        wanted = nan if nan.any() else ~finite
        place = tuple(int(i) for i in np.argwhere(wanted)[0])
        name = self._calls[-1].name if self._calls and given is None else ""
        aligned = name in _ELEMENTWISE if elementwise is None else elementwise
        reasons = _reasons(name, nan, ~finite, operands) if aligned else _all_reasons(operands)
        rows = tuple(np.flatnonzero(~finite.all(axis=tuple(range(1, host.ndim)))).tolist()) if host.ndim else ()
        at = tuple(np.broadcast_to(np.asarray(v.array), host.shape)[place] for v in operands) if aligned else ()
        return Event(
            next(self._numbers), bool(nan.any()), given, self._calls if given is None else (), *reasons,
            host.shape, host.dtype, rows, place, host[place], at, self._turn,
        )  # fmt: skip


def _all_reasons(operands: Sequence[_Value]) -> tuple[tuple[Event, ...], ...]:
    events = [value.event for value in operands if value.event is not None]
    infinite = tuple(v.event for v in operands if v.event is not None and np.isinf(np.asarray(v.array)).any())
    return tuple(event for event in events if event.nan), infinite, infinite


def _reasons(name: str, nan: Any, bad: Any, operands: Sequence[_Value]) -> tuple[tuple[Event, ...], ...]:
    """Return the operands that are not finite at the places where the result is not, by kind as in ``Event``."""
    found: tuple[list[Event], list[Event], list[Event]] = ([], [], [])
    for i, (array, event, _) in enumerate(operands):
        if event is None:
            continue
        host = np.asarray(array)
        # Of the cases of a select, the one that was selected.
        taken = np.asarray(operands[0].array) == i - 1 if name == "select_n" else np.True_
        for list_, result, operand in (
            (found[0], nan, np.isnan(host)), (found[1], nan, np.isinf(host)), (found[2], bad & ~nan, np.isinf(host)),
        ):  # fmt: skip
            if (result & operand & taken).any():
                list_.append(event)
    return tuple(map(tuple, found))


def origin_of(event: Event) -> Origin:
    """Return where an array that is not finite came from: the first operation of those that led to it.

    An infinity that the user gave, in a mask or as a constant, is no origin where an operation made a nan of it.
    """
    makers = _ends(event, lambda e: e.nan_from_nan) if event.nan else []
    if not makers:
        return Origin(_made(_ends(event, lambda e: e.inf_from_inf)), None)
    maker = _made(makers)
    infinite = [(e, by) for cause in maker.nan_from_inf for e, by in _ends(cause, lambda e: e.inf_from_inf)]
    infinite = [(e, by) for e, by in infinite if e.given is None]
    return Origin(_made(infinite), maker) if infinite else Origin(maker, None)


def _made(ends: Sequence[tuple[Event, Event | None]]) -> Event:
    """Return the earliest end; for a constant what it was given to."""
    first, by = min(ends, key=lambda end: end[0].number)
    return by if first.given == "" and by is not None else first


def _ends(event: Event, causes: Any) -> list[tuple[Event, Event | None]]:
    """Return the events without causes from which an event comes, each with one that it led to."""
    found: list[tuple[Event, Event | None]] = []
    seen = {id(event)}
    left: list[tuple[Event, Event | None]] = [(event, None)]
    while left:
        now, by = left.pop()
        inner = causes(now)
        if not inner:
            found.append((now, by))
        for cause in inner:
            if id(cause) not in seen:
                seen.add(id(cause))
                left.append((cause, now))
    return found
