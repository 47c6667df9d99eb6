"""One walk over what a callable captures: what it has met and noted. Handlers of the values are in other files."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kaun._loss.code import Chains, CodeInfo
from kaun._loss.key import KeyNode, by_identity
from kaun._loss.warm import Getter, Notes

__all__ = ["Handler", "RefusedError", "Walk"]

_MOST_READS = 500  # from there on code of packages that are not the user's own is taken as it is
Handler = Callable[["Walk", Any, int], KeyNode]


class RefusedError(Exception):
    """A capture that cannot be compiled faithfully: what it is, why, and the fix."""


class Walk:
    """One walk over what a callable captures.

    Args:
        handlers: the handlers of the types of Python and of libraries.
        classify: the handler of a value of any other type.
        home: the top-level package in which the loss was defined.
        names: the attribute names that its code is known to read.

    Attributes:
        arrays: the arrays, in the order in which they are met.
        infos: the code that was met.
        asked: whether anything depended on ``names``.
    """

    def __init__(
        self, handlers: Mapping[type, Handler], classify: Callable[[Any], Handler], home: str, names: frozenset[str]
    ) -> None:
        self.handlers, self.classify, self.home, self.names = handlers, classify, home, names
        self.arrays: list[Any] = []
        self.memo: dict[int, tuple[int, int]] = {}
        self.unlifted: dict[int, tuple[int, int]] = {}  # met where nothing is lifted, and no part of a stand-in
        self.infos: dict[CodeInfo, None] = {}
        self.notes = Notes()
        self.asked = False
        self.strict = True
        self.lifts = True
        self.chains: Chains = {}
        self._alive: list[Any] = []

    def visit(self, value: Any, get: Getter, parent: int, chains: Chains | None = None) -> KeyNode:
        """The node of a value that is read of an earlier one, by a function in C."""
        kind = type(value)
        known = self.handlers.get(kind)
        at = self.notes.read(get, parent, kind if known else None)
        if known is None:
            known = self.classify(value)
            self.weak(self.notes.read(type, at), kind)
        return self.node(known, value, at, chains)

    def node(self, handler: Handler, value: Any, at: int, chains: Chains | None = None) -> KeyNode:
        self.chains = {"": None} if chains is None else chains
        if self.strict:
            return handler(self, value, at)
        if len(self.notes.steps) > _MOST_READS:
            return self.same(value, at)
        mark = self.mark()
        try:
            return handler(self, value, at)
        except (RefusedError, RecursionError):  # in code that is not the user's own
            self.back_to(mark)
            return self.same(value, at)

    def mark(self) -> tuple[Any, ...]:
        """How far the walk has come, for ``back_to``."""
        return len(self.arrays), len(self.memo), len(self.unlifted), self.notes.mark(), self.notes.complete

    def back_to(self, mark: tuple[Any, ...]) -> None:
        """Forget what was met since."""
        count, met, unlifted, noted, self.notes.complete = mark
        del self.arrays[count:]
        while len(self.memo) > met:
            self.memo.popitem()
        while len(self.unlifted) > unlifted:
            self.unlifted.popitem()
        self.notes.back_to(noted)

    def weak(self, at: int, value: Any) -> None:
        """Note that a value has to be this object, without keeping it alive."""
        self.notes.weak.append((at, by_identity(value)))

    def same(self, value: Any, at: int) -> KeyNode:
        """The node of a value that is static by identity."""
        self.weak(at, value)
        return ("same", by_identity(value))

    def met(self, value: Any, at: int) -> KeyNode | None:
        """A reference to a value met before, None for a new one: cycles end, and what is shared stays shared."""
        found = self.memo.get(id(value)) or (None if self.lifts else self.unlifted.get(id(value)))
        if found is not None:
            self.notes.same.append((at, found[1]))
            return ("again", found[0])
        memo = self.memo if self.lifts else self.unlifted
        memo[id(value)] = (len(memo) if self.lifts else -1 - len(memo), at)
        self.notes.memo.append(at)
        self._alive.append(value)  # the memo goes by id
        return None

    def items(self, values: Iterable[Any], at: int) -> KeyNode:
        """The nodes of the items of a sequence, after a check of its length."""
        held = list(values)
        self.notes.read_equal(len, at, len(held))
        return tuple([self.visit(v, operator.itemgetter(i), at) for i, v in enumerate(held)])
