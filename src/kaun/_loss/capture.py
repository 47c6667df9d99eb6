"""Closures taken apart into a static key and the arrays they capture, and put together again around other arrays.

A loss that is a fresh closure for every batch would be a new function to ``jax.jit``, and compile every time. Here the
code and all that is static becomes a hashable key, which ``rebuild`` turns into a callable again, and the arrays become
arguments: closures with equal keys share one compiled step, each with its own arrays.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import random
import types
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, MappingView
from typing import Any

import jax
import numpy as np

from kaun import tree
from kaun._jax import is_jitted
from kaun._loss import code, origin
from kaun._loss.code import ByIdentity, CodeInfo
from kaun._loss.rebuild import ARRAY, EMPTY, ByContent, KeyNode, Rebuilt
from kaun._messages import locate
from kaun.errors import CaptureError

__all__ = ["capture_loss", "snapshot_loss"]

_MOST_OBJECTS = 1000
_MOST_TYPES = 4096


class FrozenLoss:
    """A callable taken apart already, which keeps the values that its captures had then."""

    __slots__ = ("__weakref__", "arrays", "function", "key")

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.key, arrays = capture_loss(function)
        self.arrays = [tree.snapshot(a) for a in arrays]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Rebuilt(self.key, self.arrays).function(*args, **kwargs)


def snapshot_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss as a callable whose captured values are fixed now, whatever happens to its cells and globals later.

    Generators share one cell among all the closures they yield, so whoever pulls ahead freezes each before the next.

    >>> from kaun._loss import snapshot_loss
    >>> def generator():
    ...     for y in (1, 2):
    ...         yield lambda out: out + y
    >>> g = generator()
    >>> first, second = snapshot_loss(next(g)), snapshot_loss(next(g))
    >>> first(10), second(10)
    (11, 12)
    """
    return loss if type(loss) is FrozenLoss else FrozenLoss(loss)


def capture_loss(loss: Callable[..., Any]) -> tuple[Hashable, list[Any]]:
    """The static key of a callable, and the arrays that it captures in a fixed order: the very arrays, not copies.

    Raises:
        CaptureError: when it captures what a compiled step could not follow (an iterator, a random generator, an array
            of objects), or assigns to a variable outside of itself.
    """
    if isinstance(loss, FrozenLoss):
        return loss.key, loss.arrays
    walk = _Walk(loss)
    try:
        token = walk.token(loss)
        return (token, walk.hidden() if walk.opaque else ()), walk.arrays
    except _RefusedError as refused:
        raise CaptureError(f"loss {locate(loss)} captures {_culprit(loss)}{refused}") from None


def _culprit(loss: Any) -> str:
    """The name of the variable that holds what was refused, where it is one of the closure's own."""
    if not isinstance(loss, types.FunctionType):
        return ""
    names = loss.__code__.co_freevars
    held = [(n, c.cell_contents) for n, c in zip(names, loss.__closure__ or (), strict=True) if not _is_empty(c)]
    arguments = loss.__code__.co_varnames[: loss.__code__.co_argcount]
    held += zip(reversed(arguments), reversed(loss.__defaults__ or ()), strict=False)
    held += [(n, loss.__globals__[n]) for n in code.code_info(loss).global_names if n in loss.__globals__]
    for name, value in held:
        try:
            _Walk(loss).token(value)
        except _RefusedError:
            return f"`{name}`, "
    return ""


class _RefusedError(Exception):
    """A capture that cannot be compiled faithfully: what it is, why, and the fix."""


class _Walk:
    """One pass over what a callable captures. With ``digest`` arrays are read where they are, and not lifted."""

    __slots__ = ("alive", "arrays", "digest", "home", "memo", "opaque", "plans")

    def __init__(self, loss: Any) -> None:
        self.arrays: list[Any] = []
        self.memo: dict[int, int] = {}
        self.opaque: list[Any] = []
        self.plans: list[CodeInfo] = []
        self.alive: list[Any] = []
        self.digest = False
        function = getattr(loss, "__func__", loss)
        root = code.code_info(function).root if type(function) is types.FunctionType else ""
        self.home = "" if origin.is_library(root) else root

    def token(self, value: Any) -> KeyNode:
        return (_HANDLERS.get(type(value)) or _handler(value))(self, value)

    def tokens(self, values: Iterable[Any]) -> KeyNode:
        # Not through token(): this line runs for every captured value of every step.
        handlers = _HANDLERS
        return tuple([(handlers.get(type(v)) or _handler(v))(self, v) for v in values])

    def met(self, value: Any) -> KeyNode | None:
        """A reference to a value met before, None for a new one: cycles end, and what is shared stays shared."""
        count = len(self.memo)
        index = self.memo.setdefault(id(value), count)
        return ("again", index) if index < count else None

    def hidden(self) -> KeyNode:
        """What the code may read of the objects that are static by identity: attributes by value, arrays by content.

        An object can change under its identity, and a compiled loss must not go on with its old values. Only attributes
        whose names occur in the code are looked at.
        """
        self.digest = True
        memo, roots = self.memo, self.opaque
        while True:
            names = self._names()
            self.memo, self.opaque = dict(memo), list(roots)
            found = [self._read(value, names) for value in self._reached()]
            if self._names() == names:  # methods and properties met on the way may read more
                return tuple(found)

    def _names(self) -> frozenset[str]:
        return frozenset[str]().union(*[p.names for p in self.plans])

    def _reached(self) -> Iterator[Any]:
        for count, value in enumerate(self.opaque):  # grows while it runs: objects lead to objects
            if count > _MOST_OBJECTS:
                raise _RefusedError(
                    f"an object through which it can reach more than {_MOST_OBJECTS} others. Capture the arrays "
                    "themselves, y = obj.y, and not the object."
                )
            yield value

    def _read(self, value: Any, names: frozenset[str]) -> KeyNode:
        read = code.attributes_read(value, names)
        self.alive.append(read)  # the memo goes by id
        return (type(value).__name__, tuple([(name, self.token(v)) for name, v in read]))


Handler = Callable[[_Walk, Any], KeyNode]


def _static(walk: _Walk, value: Any) -> KeyNode:
    return ("typed", type(value), value)  # True is not 1


def _float(walk: _Walk, value: float) -> KeyNode:
    return ("float", value.hex())  # by its bits: -0.0 is not 0.0, and nan equals itself


def _complex(walk: _Walk, value: complex) -> KeyNode:
    return ("complex", value.real.hex(), value.imag.hex())


def _opaque(walk: _Walk, value: Any) -> KeyNode:
    if walk.met(value) is not None:
        return ("same", ByIdentity(value))
    walk.opaque.append(value)
    _own_methods(walk, type(value))
    return ("object", ByIdentity(value))


def _array(walk: _Walk, value: Any) -> KeyNode:
    if walk.digest:
        return ("same", ByIdentity(value))
    walk.arrays.append(value)
    return ARRAY


def _numpy(walk: _Walk, value: Any) -> KeyNode:
    if value.dtype.kind not in "biufcV" or value.dtype.fields is not None or isinstance(value, np.ma.MaskedArray):
        kind = "a masked array" if isinstance(value, np.ma.MaskedArray) else f"a NumPy array of dtype {value.dtype}"
        raise _RefusedError(
            f"{kind}, which JAX cannot hold. Convert it to numbers before the closure, y = np.asarray(y, np.float32)."
        )
    if walk.digest:
        return ("content", ByContent(value, hashlib.blake2b(value.tobytes(), digest_size=16).digest()))
    walk.arrays.append(value if type(value) is np.ndarray else np.array(value))
    return ARRAY


def _tuple(walk: _Walk, value: tuple[Any, ...]) -> KeyNode:
    return ("tuple", walk.tokens(value))


def _list(walk: _Walk, value: list[Any]) -> KeyNode:
    if (again := walk.met(value)) is not None:
        return again
    return ("list", walk.tokens(value))


def _dict(walk: _Walk, value: dict[Any, Any]) -> KeyNode:
    if (again := walk.met(value)) is not None:
        return again
    return ("dict", walk.tokens(value), walk.tokens(value.values()))


def _set(walk: _Walk, value: Any) -> KeyNode:
    return ("set", type(value), frozenset(walk.tokens(value)))


def _function(walk: _Walk, value: types.FunctionType) -> KeyNode:
    plan = code.code_info(value)
    own = plan.own or (plan.root == walk.home != "")
    closure = value.__closure__
    if closure is None and not own:
        return ("static", value)
    if (again := walk.met(value)) is not None:
        return again
    walk.plans.append(plan)
    cells = _cells(walk, closure) if closure else ()
    defaults = walk.tokens(value.__defaults__) if value.__defaults__ else ()
    keywords = tuple((k, walk.token(v)) for k, v in value.__kwdefaults__.items()) if value.__kwdefaults__ else ()
    outside: KeyNode = ()
    if own:
        names = value.__globals__
        outside = tuple([(n, walk.token(names[n])) for n in plan.global_names if n in names])
    scope = plan.scope if plan.scope.value is value.__globals__ else ByIdentity(value.__globals__)
    return ("function", plan, scope, cells, defaults, keywords, outside)


def _cells(walk: _Walk, closure: tuple[types.CellType, ...]) -> KeyNode:
    try:
        return walk.tokens([cell.cell_contents for cell in closure])
    except ValueError:  # a cell not filled yet
        return tuple([EMPTY if _is_empty(cell) else walk.token(cell.cell_contents) for cell in closure])


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _method(walk: _Walk, value: types.MethodType) -> KeyNode:
    return ("method", walk.token(value.__func__), walk.token(value.__self__))


def _builtin(walk: _Walk, value: Any) -> KeyNode:
    owner = getattr(value, "__self__", None)
    if owner is None or isinstance(owner, types.ModuleType):
        return ("static", value)
    return ("bound", value.__name__, walk.token(owner))  # [].append, array.sum


def _partial(walk: _Walk, value: functools.partial[Any]) -> KeyNode:
    keys = tuple(value.keywords)
    return ("partial", walk.token(value.func), walk.tokens(value.args), keys, walk.tokens(value.keywords.values()))


def _jitted(walk: _Walk, value: Any) -> KeyNode:
    # A jitted function would hold its captured arrays as constants; the function under it is compiled with the step.
    inside = value.__wrapped__
    if isinstance(inside, types.FunctionType) and inside.__closure__ is None and not code.code_info(inside).own:
        return ("static", value)
    return walk.token(inside)


def _frozen(walk: _Walk, value: FrozenLoss) -> KeyNode:
    walk.arrays.extend(value.arrays)
    return ("frozen", value.key, len(value.arrays))


def _dataclass(walk: _Walk, value: Any) -> KeyNode:
    if (again := walk.met(value)) is not None:
        return again
    names = tuple(f.name for f in dataclasses.fields(value) if hasattr(value, f.name))
    _own_methods(walk, type(value))
    return ("dataclass", type(value), names, walk.tokens([getattr(value, n) for n in names]))


def _pytree(walk: _Walk, value: Any) -> KeyNode:
    leaves, treedef = jax.tree_util.tree_flatten(value, is_leaf=lambda v: v is None)
    return ("pytree", treedef, walk.tokens(leaves))


def _own_methods(walk: _Walk, kind: type) -> None:
    """Let the names in the methods of the user's class count as names in the loss."""
    walk.plans += [code.code_info(f) for f in code.own_methods(kind)]


def _class(walk: _Walk, value: type) -> KeyNode:
    return _opaque(walk, value) if origin.is_own_module(value.__module__) else ("same", ByIdentity(value))


def _module(walk: _Walk, value: types.ModuleType) -> KeyNode:
    return _opaque(walk, value) if origin.is_own_module(value.__name__) else ("static", value)


def _refuse(reason: str) -> Handler:
    def handler(walk: _Walk, value: Any) -> KeyNode:
        raise _RefusedError(f"a {type(value).__name__}, {reason}")

    return handler


_refuse_iterator = _refuse(
    "an iterator: a compiled loss would take one value from it when it is traced and use that for ever. Take the value "
    "outside, y = next(it), and capture y, or make it part of the data: data.map(lambda x: (x, loss))."
)
_refuse_random = _refuse(
    "a random generator: a compiled loss would draw once when it is traced and use those numbers for ever. Draw with "
    "JAX inside the loss, jax.random.normal(kaun.rng.next_key(), shape)."
)
_refuse_foreign = _refuse(
    "an array of another library, which a compiled loss would hold as a constant. Convert it before the closure, "
    "y = np.asarray(y)."
)

_HANDLERS: dict[type, Handler] = {
    **dict.fromkeys((bool, int, str, bytes, type(None), type(...), type(NotImplemented), range), _static),
    float: _float,
    complex: _complex,
    np.ndarray: _numpy,
    tuple: _tuple,
    list: _list,
    dict: _dict,
    set: _set,
    frozenset: _set,
    slice: lambda walk, value: ("slice", walk.tokens((value.start, value.stop, value.step))),
    type: _class,
    types.FunctionType: _function,
    types.MethodType: _method,
    types.BuiltinFunctionType: _builtin,
    types.ModuleType: _module,
    functools.partial: _partial,
    FrozenLoss: _frozen,
}


def _handler(value: Any) -> Handler:
    """The handler for a type met for the first time."""
    kind = type(value)
    handler = _classify(kind, value)
    while len(_HANDLERS) >= _MOST_TYPES:
        _HANDLERS.pop(next(reversed(_HANDLERS)), None)
    _HANDLERS[kind] = handler
    return handler


def _classify(kind: type, value: Any) -> Handler:
    if isinstance(value, jax.Array):
        return _array
    if issubclass(kind, (np.ndarray, np.generic)):
        return _numpy
    if issubclass(kind, type):
        return _class
    if issubclass(kind, types.ModuleType):
        return _module
    if issubclass(kind, (enum.Enum, np.dtype)):
        return _static
    if issubclass(kind, (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)):
        return _refuse_random
    if issubclass(kind, Iterator):
        return _refuse_iterator
    if is_jitted(value):
        return _jitted
    if isinstance(value, MappingView):
        return _opaque
    if jax.tree_util.tree_structure(value) != jax.tree_util.tree_structure(0):
        return _pytree
    if dataclasses.is_dataclass(kind):
        return _dataclass
    if hasattr(kind, "__array__") or hasattr(kind, "__jax_array__"):
        return _refuse_foreign
    if isinstance(value, Collection) or (callable(value) and hasattr(value, "__wrapped__")):
        return _opaque
    holds = hasattr(value, "__dict__") or hasattr(kind, "__slots__")
    return (
        _opaque if holds and not origin.is_library(kind.__module__) else lambda walk, value: ("same", ByIdentity(value))
    )
