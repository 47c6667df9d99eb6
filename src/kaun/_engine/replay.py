"""A traced step run one operation at a time, to find where a value that is not finite came from.

An ``Event`` says of an array that is not finite which operation made it, and which of the operands were not finite
either. ``origin_of`` walks the events from a result back to the first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun import tree
from kaun._jax import Operation, evaluate

__all__ = ["Event", "Origin", "Replay", "origin_of"]

_CONSTANT = "a constant"
# What computes each element of its result from the elements of its operands at the same place.
_ELEMENTWISE_NAMES = """
    abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos cosh
    digamma div erf erf_inv erfc exp exp2 expm1 floor integer_pow lgamma log log1p logistic max min mul neg nextafter
    pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())


class Reasons(NamedTuple):
    """The operands of an operation whose result is not finite.

    Attributes:
        nan_from_nan: Those with a nan, where the result has one.
        nan_from_inf: Those that are infinite where the result is nan.
        inf_from_inf: Those that are infinite where the result is.
    """

    nan_from_nan: tuple[Event, ...]
    nan_from_inf: tuple[Event, ...]
    inf_from_inf: tuple[Event, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Event:
    """An array that is not finite, of a step that is replayed.

    Attributes:
        number: Its place in the order in which they came.
        nan: Whether it has a nan; else it has an infinity.
        given: What it is, where no operation of the step made it: ``"x"``, ``"a constant"``; else None.
        operations: The operation of the step that made it, after the calls around that, the outermost first.
        reasons: The operands that are not finite either.
        shape: Its shape.
        dtype: Its dtype.
        rows: Where along axis 0 it is not finite although its operands are; where there is no such place, all rows that
            are not finite.
        place: The index of the first nan in those rows, or of the first infinity.
        value: What it has there.
        operands: The operands at that place, where the operation computes each element from those.
        turn: The number of the iteration of the outermost loop in which it was made.
    """

    number: int
    nan: bool
    given: str | None
    operations: tuple[Operation, ...]
    reasons: Reasons
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
        became_nan: The first nan, where that first array is infinite and an operation made a nan of it.
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
        return _Value(value, self._event(value, given=_CONSTANT), True)

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
            constant = all(value.constant for value in values)
            if constant and any(v.event is not None and v.event.given == _CONSTANT for v in values):
                return list(map(self._constant, results))  # jnp.nan of another shape or dtype
            return [_Value(array, self._event(array, operands=values), constant) for array in results]
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
        """Return the event of an array, None if it is finite."""
        dtype = getattr(array, "dtype", None) or jnp.result_type(array)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return None
        host = tree.on_host(array)
        finite = np.isfinite(host)
        if finite.all():
            return None
        nan = np.isnan(host)
        name = self._calls[-1].name if self._calls and given is None else ""
        aligned = name in _ELEMENTWISE if elementwise is None else elementwise
        reasons = _reasons(name, nan, ~finite, operands) if aligned else _all_reasons(operands)
        here = _made_here(nan, ~finite, operands) if aligned else ~finite
        rows = tuple(np.flatnonzero(here.any(axis=tuple(range(1, host.ndim)))).tolist()) if host.ndim else ()
        wanted = here & nan if (here & nan).any() else here
        place = tuple(int(i) for i in np.unravel_index(np.argmax(wanted), wanted.shape))
        at = tuple(np.broadcast_to(tree.on_host(v.array), host.shape)[place] for v in operands) if aligned else ()
        calls = self._calls if given is None else ()
        return Event(
            next(self._numbers), bool(nan.any()), given, calls, reasons, host.shape, host.dtype, rows, place,
            host[place], at, self._turn,
        )  # fmt: skip


def _made_here(nan: Any, bad: Any, operands: Sequence[_Value]) -> Any:
    """Return where a result is nan and no operand is, or infinite and all are finite; if nowhere, where it is bad."""
    some = lambda test: functools.reduce(np.logical_or, [test(tree.on_host(value.array)) for value in operands])
    here = (nan & ~some(np.isnan)) | (bad & ~nan & ~some(lambda a: ~np.isfinite(a)))
    return here if here.any() else bad


def _all_reasons(operands: Sequence[_Value]) -> Reasons:
    """Return the operands that are not finite, wherever that is."""
    pairs = [(value.event, tree.on_host(value.array)) for value in operands if value.event is not None]
    infinite = tuple(event for event, array in pairs if np.isinf(array).any())
    return Reasons(tuple(event for event, _ in pairs if event.nan), infinite, infinite)


def _reasons(name: str, nan: Any, bad: Any, operands: Sequence[_Value]) -> Reasons:
    """Return the operands that are not finite at the places where the result is not."""
    found: tuple[list[Event], list[Event], list[Event]] = ([], [], [])
    for i, (array, event, _) in enumerate(operands):
        if event is None:
            continue
        host = tree.on_host(array)
        # In a select only the selected case is a reason.
        taken = tree.on_host(operands[0].array) == i - 1 if name == "select_n" else np.True_
        kinds = ((nan, np.isnan(host)), (nan, np.isinf(host)), (bad & ~nan, np.isinf(host)))
        for events, (result, operand) in zip(found, kinds, strict=True):
            if (result & operand & taken).any():
                events.append(event)
    return Reasons(*map(tuple, found))


def origin_of(event: Event) -> Origin:
    """Return where an array that is not finite came from: the first array of those that led to it.

    An infinity is a reason where an operation made a nan of it; a constant one, as in a mask, never is.
    """
    made = _ends(event, lambda e: e.reasons.nan_from_nan) if event.nan else []
    if not made:
        return Origin(_first(_ends(event, lambda e: e.reasons.inf_from_inf)), None)
    first = _first(made)
    infinite = [end for e in first.reasons.nan_from_inf for end in _ends(e, lambda e: e.reasons.inf_from_inf)]
    infinite = [end for end in infinite if end[0].given != _CONSTANT]
    infinite = [end for end in infinite if end[0].given is None] or infinite
    return Origin(_first(infinite), first) if infinite else Origin(first, None)


def _first(ends: Sequence[tuple[Event, Event | None]]) -> Event:
    """Return the earliest end; for a constant the result of the operation that took it."""
    event, led_to = min(ends, key=lambda end: end[0].number)
    return led_to if event.given == _CONSTANT and led_to is not None else event


def _ends(event: Event, reasons: Callable[[Event], Sequence[Event]]) -> list[tuple[Event, Event | None]]:
    """Return the events without reasons from which an event comes, each with one that it led to."""
    found: list[tuple[Event, Event | None]] = []
    seen = {id(event)}
    left: list[tuple[Event, Event | None]] = [(event, None)]
    while left:
        now, led_to = left.pop()
        earlier = reasons(now)
        if not earlier:
            found.append((now, led_to))
        for each in earlier:
            if id(each) not in seen:
                seen.add(id(each))
                left.append((each, now))
    return found
