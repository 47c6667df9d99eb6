"""A callable of a form that was captured before, captured again without a walk: a flat list of reads and checks.

A walk notes each value that it reads: from which earlier one, how, and of which type it has to be. Of another callable
of the same code the same reads are made, and all that is static is compared. Where anything differs, the walk is made
again. All reads are functions in C, so that this takes a microsecond.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from kaun._loss.key import LossKey

__all__ = ["Notes", "Warm"]

Getter = Callable[[Any], Any]
_UNLIKE = (AttributeError, LookupError, TypeError, ValueError)


class Notes:
    """The reads of one walk, numbered from 1; 0 is the callable itself.

    Attributes:
        complete: whether the reads and checks say all that the walk depended on.
    """

    __slots__ = ("arrays", "complete", "equal", "identical", "memo", "same", "steps", "weak")

    def __init__(self) -> None:
        self.steps: list[tuple[Getter, int, type | None]] = []
        self.equal: list[tuple[int, Any]] = []
        self.identical: list[tuple[int, Any]] = []
        self.weak: list[tuple[int, Callable[[], Any]]] = []
        self.same: list[tuple[int, int]] = []
        self.arrays: list[int] = []
        self.memo: list[int] = []
        self.complete = True

    def read(self, get: Getter, parent: int, kind: type | None = None) -> int:
        """Note a value that is read of an earlier one; its number."""
        self.steps.append((get, parent, kind))
        return len(self.steps)

    def read_equal(self, get: Getter, parent: int, value: Any) -> int:
        """Note a value that has to be of the same type and equal."""
        at = self.read(get, parent, type(value))
        self.equal.append((at, value))
        return at

    def _lists(self) -> tuple[list[Any], ...]:
        return self.steps, self.equal, self.identical, self.weak, self.same, self.arrays, self.memo

    def mark(self) -> list[int]:
        """How far the notes have come, for ``back_to``."""
        return [len(noted) for noted in self._lists()]

    def back_to(self, mark: list[int]) -> None:
        """Forget what was noted since."""
        for noted, count in zip(self._lists(), mark, strict=True):
            del noted[count:]


class Warm:
    """The capture of callables of one form.

    Args:
        notes: of the walk that found it.
        key: the key that such callables have.
    """

    __slots__ = (
        "_arrays", "_equal", "_identical", "_memo", "_pick_equal", "_pick_identical", "_same", "_steps", "key",
    )  # fmt: skip

    def __init__(self, notes: Notes, key: LossKey) -> None:
        self.key = key
        weak = dict(notes.weak)
        # A check of an object's class comes before what is read of it: a read may run code of another class.
        self._steps = tuple([(*step, weak.get(at)) for at, step in enumerate(notes.steps, start=1)])
        self._equal = _as_picked([value for _, value in notes.equal])
        self._pick_equal = _picker([at for at, _ in notes.equal])
        self._identical = _as_picked([value for _, value in notes.identical])
        self._pick_identical = _picker([at for at, _ in notes.identical])
        self._same = tuple(notes.same)
        self._arrays = _picker(notes.arrays)
        self._memo = _picker(notes.memo) if len(notes.memo) > 1 else None

    def arrays(self, loss: Any) -> list[Any] | None:
        """The arrays that a callable captures if its key is this one, else None."""
        values = [loss]
        add = values.append
        try:
            for get, parent, kind, reference in self._steps:
                value = get(values[parent])
                if type(value) is not kind and kind is not None:
                    return None
                if reference is not None and reference() is not value:
                    return None
                add(value)
        except _UNLIKE:  # a list became shorter, a cell was emptied
            return None
        if self._pick_equal(values) != self._equal:
            return None
        if not all(map(operator.is_, self._pick_identical(values), self._identical)):
            return None
        for at, before in self._same:
            if values[at] is not values[before]:
                return None
        if self._memo is not None and len(set(map(id, self._memo(values)))) != len(self._memo(values)):
            return None
        return list(self._arrays(values))


def _picker(places: list[int]) -> Callable[[list[Any]], Any]:
    """A function that picks several values of a list: as a tuple, a single one or none as a list."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return operator.itemgetter(slice(places[0], places[0] + 1) if places else slice(0, 0))


def _as_picked(values: list[Any]) -> Any:
    return tuple(values) if len(values) > 1 else values
