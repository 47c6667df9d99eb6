"""The walk over what a callable captures, what it gives (a key and arrays), and the warm form, which needs no walk.

A walk visits each value once. The handler of its type (in ``values`` and ``objects``) returns the value's node of the
key, and notes each read: from which earlier value, by which function, and of which type the result has to be.

Of another callable of the same code, ``Warm`` makes the same reads and compares all that is static. Where nothing
differs, the key is the same and the arrays are known. All reads are functions in C, so that this takes 2 microseconds.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import threading
import types
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

from kaun._loss.code import Chains, CodeInfo
from kaun._loss.origin import is_library_type

__all__ = ["ARRAY", "EMPTY", "ByIdentity", "Handler", "KeyNode", "LossKey", "RefusedError", "Walk", "Warm", "loss_key"]

KeyNode = tuple[Any, ...]
"""A part of a key. Its first element says of which kind it is, and so how ``rebuild`` makes it again."""
Getter = Callable[[Any], Any]
Handler = Callable[["Walk", Any, int], KeyNode]

ARRAY: KeyNode = ("array",)
EMPTY: KeyNode = ("empty",)
_MOST_READS = 500  # from there on code of packages that are not the user's own is taken as it is
_UNLIKE = (AttributeError, LookupError, TypeError, ValueError)


class ByIdentity:
    """An object as a static value: not kept alive, and equal to no other object, also when it is gone.

    An object that cannot be referred to weakly is kept alive, so that its id is not used again.
    """

    __slots__ = ("_id", "get", "text")

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        self.text = f"class {value.__qualname__}" if isinstance(value, type) else ""
        self.text = self.text or f"{type(value).__name__} object at {id(value):#x}"
        self.get: Callable[[], Any]
        try:
            self.get = weakref.ref(value)
        except TypeError:
            self.get = itertools.repeat(value).__next__  # no function in Python, which would be slower

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, ByIdentity) and self.get() is not None and self.get() is other.get()


class LossKey:
    """The static part of a callable. There is one for each, so that keys compare and hash by identity.

    Attributes:
        node: The tree of tuples, of which the callable is made again.
        names: Every attribute name in the code.
    """

    __slots__ = ("__weakref__", "_identical", "names", "node")

    def __init__(self, node: KeyNode, names: frozenset[str]) -> None:
        self.node: KeyNode = node
        self.names: frozenset[str] = names
        self._identical: list[ByIdentity] | None = None

    def objects(self) -> list[Any]:
        """The objects that are static by identity and still there."""
        if self._identical is None:  # looked for once: it is asked for each loss that is kept
            self._identical = list(_identical(self.node))
        return [value for token in self._identical if (value := token.get()) is not None]


def _identical(node: Any) -> Iterator[ByIdentity]:
    if isinstance(node, (tuple, frozenset)):
        for part in node:
            yield from _identical(part)
    elif isinstance(node, ByIdentity):
        yield node
    elif isinstance(node, LossKey):
        yield from _identical(node.node)


_lock = threading.RLock()
_keys: weakref.WeakValueDictionary[Any, LossKey] = weakref.WeakValueDictionary()


def loss_key(node: KeyNode, names: frozenset[str]) -> LossKey:
    """The key of a tree of tuples: the same one for equal trees, for as long as anybody holds it."""
    with _lock:
        found = _keys.get((node, names))
        if found is None:
            found = _keys[(node, names)] = LossKey(node, names)
        return found


class RefusedError(Exception):
    """A capture that cannot be compiled faithfully: what it is, why, and the fix."""


class Walk:
    """One walk over what a callable captures. Values are numbered as they are read; 0 is the callable itself.

    Args:
        handlers: The handlers of the types of Python and of libraries.
        classify: The handler of a value of any other type.
        home: The top-level package in which the loss was defined.
        names: The attribute names that its code is known to read.

    Attributes:
        arrays: The arrays, in the order in which they are met.
        infos: The code that was met.
        chains: What is read of the value at hand, where the code says it.
        lifts: Whether arrays become arguments; if not, they are compared by content.
        own: Whether the code at hand is the user's own.
        strict: Whether what cannot be followed is refused. Else it is static by identity.
        culprit: The variable that holds what was refused: the outermost, of the innermost function that reads it.
        reader: That function, None for the loss itself.
        complete: Whether the reads and checks say all that the walk depended on, so that there is a warm form.
    """

    def __init__(
        self, handlers: Mapping[type, Handler], classify: Callable[[Any], Handler], home: str, names: frozenset[str]
    ) -> None:
        self.handlers, self.classify, self.home, self.names = handlers, classify, home, names
        self.arrays: list[Any] = []
        self.infos: dict[CodeInfo, None] = {}
        self.chains: Chains = {}
        self.lifts = self.own = self.strict = self.complete = True
        self.culprit = ""
        self.reader: types.FunctionType | None = None
        self.steps: list[tuple[Getter, int, type | None]] = []
        self.equal: list[tuple[int, Any]] = []
        self.identical: list[tuple[int, ByIdentity]] = []
        self.again: list[tuple[int, int]] = []
        self.distinct: list[int] = []
        self.array_places: list[int] = []
        self._memos: tuple[dict[int, tuple[int, int]], ...] = ({}, {})  # of what is not lifted, and of what is
        self._alive: list[Any] = []

    def read(self, get: Getter, parent: int, kind: type | None = None) -> int:
        """Note a value that is read from an earlier one, and its type where that is known; its number."""
        self.steps.append((get, parent, kind))
        return len(self.steps)

    def read_equal(self, get: Getter, parent: int, value: Any) -> None:
        """Note a value that has to be of the same type and equal."""
        self.equal.append((self.read(get, parent, type(value)), value))

    def read_present(self, scope: int, names: frozenset[str], present: Iterable[str]) -> None:
        """Note that a namespace holds, of these names, just those that are present."""
        keys = self.read(operator.methodcaller("keys"), scope)
        self.read_equal(operator.methodcaller("__and__", names), keys, set(present))

    def same(self, value: Any, at: int) -> KeyNode:
        """The node of a value that is static by identity."""
        token = ByIdentity(value)
        self.identical.append((at, token))
        return ("same", token)

    def visit(self, value: Any, get: Getter, parent: int, chains: Chains | None = None) -> KeyNode:
        """The node of a value that is read from an earlier one, by a function in C."""
        kind = type(value)
        known = self.handlers.get(kind)
        of_library = known is None and is_library_type(kind)
        at = self.read(get, parent, kind if known or of_library else None)
        if known is None:
            known = self.classify(value)
            if not of_library:  # a class of the user's is not kept alive
                self.same(kind, self.read(type, at))
        return self.node(known, value, at, chains)

    def node(self, handler: Handler, value: Any, at: int, chains: Chains | None = None) -> KeyNode:
        self.chains = {"": None} if chains is None else chains
        if self.strict:
            return handler(self, value, at)
        if not self.own and len(self.steps) > _MOST_READS:
            return self.same(value, at)
        mark = self.mark()
        try:
            return handler(self, value, at)
        except (RefusedError, RecursionError):
            self.back_to(mark)
            return self.same(value, at)

    def named(self, name: str, value: Any, get: Getter, parent: int, chains: Chains | None = None) -> KeyNode:
        """The node of a variable of a function. Its name is remembered where it is refused."""
        try:
            return self.visit(value, get, parent, chains)
        except (RefusedError, RecursionError):
            if self.culprit and self.reader is None and isinstance(value, types.FunctionType):
                self.reader = value
            self.culprit = self.culprit if self.reader else name
            raise

    def items(self, values: Iterable[Any], at: int) -> KeyNode:
        """The nodes of the items of a sequence, after a check of its length."""
        held = list(values)
        self.read_equal(len, at, len(held))
        return tuple([self.visit(v, operator.itemgetter(i), at) for i, v in enumerate(held)])

    def met(self, value: Any, at: int) -> KeyNode | None:
        """A reference to a value met before, None for a new one: cycles end, and what is shared stays shared."""
        memo, other = self._memos[self.lifts], self._memos[not self.lifts]
        found = memo.get(id(value))
        if found is not None:
            self.again.append((at, found[1]))
            return ("again", found[0])
        memo[id(value)] = (len(memo), at)
        if id(value) in other:
            self.again.append((at, other[id(value)][1]))
        else:
            self.distinct.append(at)
        self._alive.append(value)  # the memo goes by id
        return None

    @contextlib.contextmanager
    def mode(self, **changed: bool) -> Generator[None]:
        """Walk with other values of ``own``, ``strict`` or ``lifts`` for a while."""
        before = {name: getattr(self, name) for name in changed}
        vars(self).update(changed)
        try:
            yield
        finally:
            vars(self).update(before)

    def _grown(self) -> tuple[Any, ...]:
        noted = self.steps, self.equal, self.identical, self.again, self.distinct, self.array_places
        return self.arrays, *noted, *self._memos

    def mark(self) -> tuple[list[int], bool]:
        """How far the walk has come, for ``back_to``."""
        return [len(grown) for grown in self._grown()], self.complete

    def back_to(self, mark: tuple[list[int], bool]) -> None:
        """Forget what was met and noted since."""
        counts, self.complete = mark
        self.culprit, self.reader = "", None
        for grown, count in zip(self._grown(), counts, strict=True):
            while len(grown) > count:
                grown.popitem() if isinstance(grown, dict) else grown.pop()


class Warm:
    """The capture of callables of one form.

    Args:
        walk: The walk that found it.
        key: The key that such callables have.
    """

    __slots__ = ("_again", "_arrays", "_distinct", "_equal", "_pick_equal", "_steps", "key")

    def __init__(self, walk: Walk, key: LossKey) -> None:
        self.key = key
        references = {at: token.get for at, token in walk.identical}
        # A check of an object's class comes before what is read from it: a read may run code of another class.
        self._steps = tuple([(*step, references.get(at)) for at, step in enumerate(walk.steps, start=1)])
        equal = [value for _, value in walk.equal]
        self._equal: Any = tuple(equal) if len(equal) > 1 else equal
        self._pick_equal = _picker([at for at, _ in walk.equal])
        self._again = tuple(walk.again)
        self._arrays = _picker(walk.array_places)
        self._distinct = _picker(walk.distinct) if len(walk.distinct) > 1 else None

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
        for at, before in self._again:
            if values[at] is not values[before]:
                return None
        if self._distinct is not None:
            distinct = self._distinct(values)
            if len(set(map(id, distinct))) != len(distinct):
                return None
        return list(self._arrays(values))


def _picker(places: list[int]) -> Callable[[list[Any]], Any]:
    """A function that picks several values of a list: as a tuple, a single one or none as a list."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return operator.itemgetter(slice(places[0], places[0] + 1) if places else slice(0, 0))
