"""What a piece of user code reads and writes outside of itself, found in its bytecode once per code object."""

from __future__ import annotations

import dis
import functools
import types
from array import array
from collections import UserList, deque
from collections.abc import Iterable, Iterator, Mapping, MappingView
from typing import Any, cast

from kaun._loss.origin import is_own, is_own_module, root_package
from kaun._messages import locate
from kaun.errors import CaptureError

__all__ = ["ByIdentity", "CodeInfo", "attributes_read", "code_info", "names_read", "own_methods"]

_NOT_CALLED_LATER = frozenset(["__init__", "__new__", "__post_init__", "__repr__", "__str__", "__del__"])
_MOST_PLANS = 4096
_READ_ANYTHING = frozenset(["getattr", "vars", "__dict__", "asdict"])
_INSIDE_WRAPPERS = ("__wrapped__", "fun", "fwd", "bwd", "jvp")  # lru_cache, jax.custom_jvp, jax.custom_vjp


class ByIdentity:
    """An object as a static value: equal only to itself, and kept alive so that its id is not used again."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return type(other) is ByIdentity and other.value is self.value


class CodeInfo:
    """A code object and the names through which it reaches outside; equal only to itself.

    Attributes:
        code: the code object.
        stub: a function of that code that captures nothing, to be named in messages.
        root: the top-level package of the module in which the function was defined.
        own: whether that is the user's own code, whose globals may change between two batches.
        scope: the globals of the function it was first met in.
        global_names: the globals that it and the functions nested in it read.
        names: every attribute name and identifier-like string in it, sorted out against objects later.
    """

    __slots__ = ("code", "global_names", "names", "own", "root", "scope", "stub")

    def __init__(self, function: types.FunctionType) -> None:
        self.code = function.__code__
        cells = tuple(types.CellType() for _ in self.code.co_freevars)
        self.stub = types.FunctionType(self.code, {}, None, None, cells)
        self.root = root_package(function)
        self.scope = ByIdentity(function.__globals__)
        self.own = is_own(function)
        self.global_names, self.names = names_read(self.code)
        if self.own:
            _refuse_writes(function)


_OPERATORS = frozenset([
    "__call__", "__getitem__", "__contains__", "__iter__", "__len__", "__bool__", "__float__", "__int__",
    "__index__", "__getattr__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__neg__", "__pos__",
    "__abs__", "__invert__", "__add__", "__sub__", "__mul__", "__matmul__", "__truediv__", "__floordiv__",
    "__mod__", "__pow__", "__and__", "__or__", "__xor__", "__radd__", "__rsub__", "__rmul__", "__rmatmul__",
    "__rtruediv__", "__rpow__",
])  # fmt: skip
_plans: dict[int, CodeInfo] = {}


def code_info(function: types.FunctionType) -> CodeInfo:
    """The Plan of a function's code, made once.

    Raises:
        CaptureError: when the code assigns to a ``nonlocal`` or ``global`` variable.
    """
    found = _plans.get(id(function.__code__))
    if found is None:
        found = CodeInfo(function)
        while len(_plans) >= _MOST_PLANS:
            _plans.pop(next(iter(_plans)), None)
        # A Plan holds its code object, so the id stays taken for as long as it is a key here.
        _plans[id(function.__code__)] = found
    return found


def own_methods(kind: type) -> list[types.FunctionType]:
    """The methods of a class that are the user's own and may be called once an object is made."""
    own = [vars(base) for base in kind.__mro__ if is_own_module(base.__module__)]
    found = [f for members in own for name, f in members.items() if name not in _NOT_CALLED_LATER]
    return [f for f in found if isinstance(f, types.FunctionType)]


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _nested(const)


def names_read(code: types.CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """The globals that code reads, nested functions included, and every attribute name and identifier-like string."""
    global_names: dict[str, None] = {}
    names: set[str] = set()
    for part in _nested(code):
        names.update(part.co_names)
        # getattr(cfg, "alpha") names its attribute in a string constant.
        names.update(c for c in part.co_consts if isinstance(c, str) and c.isidentifier())
        for op in dis.get_instructions(part):
            if op.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                global_names[str(op.argval)] = None
    return tuple(global_names), frozenset(names)


def _refuse_writes(function: types.FunctionType) -> None:
    outer = set(function.__code__.co_freevars)
    for part in _nested(function.__code__):
        for op in dis.get_instructions(part):
            wrote_global = op.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
            wrote_outer = op.opname in ("STORE_DEREF", "DELETE_DEREF") and op.argval in outer & set(part.co_freevars)
            if wrote_global or wrote_outer:
                kind = "global" if wrote_global else "nonlocal"
                raise CaptureError(
                    f"loss {locate(function)} assigns to the {kind} variable `{op.argval}`. A compiled loss runs as "
                    "Python only when it is traced, so the assignment would happen once and then never again. Compute "
                    "the value from the model's output and keep it outside: read the loss in "
                    f"report(step, loss, state), or call trainer.predict(state, x) and update `{op.argval}` there."
                )


def attributes_read(value: Any, names: frozenset[str]) -> list[tuple[str, Any]]:
    """The attributes of an object that code using these names may read: (name, value), methods as functions.

    Nothing of the object's own code is run: properties and methods are returned as the functions behind them.
    """
    found = _contents(value)
    own: dict[str, Any] = getattr(value, "__dict__", None) or {}
    kinds = value.__mro__ if isinstance(value, type) else type(value).__mro__
    wanted = set(names)
    if names & _READ_ANYTHING:
        wanted.update(n for n in own if n.isidentifier())
    # obj(x), obj[i], obj + x: operators call methods that the code does not name
    wanted.update(n for k in kinds if is_own_module(k.__module__) for n in vars(k) if n in _OPERATORS)
    for name in sorted(wanted):
        if name in own:
            found.append((name, own[name]))
            continue
        for kind in kinds:
            if name in vars(kind):
                found += _from_class(value, name, vars(kind)[name], kind)
                break
    return found


def _contents(value: Any) -> list[tuple[str, Any]]:
    """What is in a container of a kind that is not rebuilt, and in a wrapper around a function."""
    if isinstance(value, Mapping):
        return [("keys", list(value)), ("values", list(value.values()))]
    if isinstance(value, (bytearray, memoryview)):
        return [("bytes", bytes(value))]
    if isinstance(value, (list, tuple, set, frozenset, deque, UserList, array, MappingView)):
        return [("items", list(cast("Iterable[Any]", value)))]
    if callable(value) and hasattr(value, "__wrapped__"):
        inside = [(n, getattr(value, n, None)) for n in _INSIDE_WRAPPERS]
        return [(n, f) for n, f in inside if isinstance(f, types.FunctionType)]
    return []


def _from_class(value: Any, name: str, entry: Any, kind: type) -> list[tuple[str, Any]]:
    if isinstance(entry, types.MemberDescriptorType):  # __slots__
        return [(name, getattr(value, name))] if hasattr(value, name) and not isinstance(value, type) else []
    if not is_own_module(kind.__module__):
        return []
    if isinstance(entry, property):
        return [(name, entry.fget)]
    if isinstance(entry, (staticmethod, classmethod, functools.partialmethod)):
        return [(name, getattr(entry, "__func__", None) or getattr(entry, "func", None))]
    return [(name, getattr(entry, "func", entry) if isinstance(entry, functools.cached_property) else entry)]
