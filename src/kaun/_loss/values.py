"""The handlers of plain values, arrays, containers and functions: each returns a value's node and notes its reads."""

from __future__ import annotations

import array
import collections
import functools
import hashlib
import importlib.util
import operator
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from kaun._loss.code import EMPTY_CELL, CodeInfo, Reads, code_info, function_reads, is_transparent, refuse_assignments
from kaun._loss.origin import is_library, is_library_type
from kaun._loss.walk import ARRAY, EMPTY, ByIdentity, Getter, Handler, KeyNode, RefusedError, Walk

__all__ = ["VALUES", "classify_value", "home_of", "refuse", "static"]


def static(walk: Walk, value: Any, at: int) -> KeyNode:
    """The node of what belongs to a library, and stays as it is for as long as the process."""
    walk.same(value, at)
    return ("static", value)


def _plain(walk: Walk, value: Any, at: int) -> KeyNode:
    walk.equal.append((at, value))
    return ("typed", type(value), value)  # True is not 1


def _float(walk: Walk, value: float, at: int) -> KeyNode:
    walk.read_equal(float.hex, at, value.hex())
    return ("float", value.hex())  # by its bits: -0.0 is not 0.0, and nan equals itself


def _array(walk: Walk, value: Any, at: int) -> KeyNode:
    if not walk.lifts:
        return walk.same(value, at)
    walk.arrays.append(value)
    walk.array_places.append(at)
    return ARRAY


def _numpy(walk: Walk, value: Any, at: int) -> KeyNode:
    masked = isinstance(value, np.ma.MaskedArray)
    if masked or value.dtype.kind not in "biufcV" or value.dtype.fields is not None:
        kind = "a masked array" if masked else f"a NumPy array of dtype {value.dtype}"
        raise RefusedError(
            f"{kind}, which JAX cannot hold. Convert it to numbers before the closure, y = np.asarray(y, np.float32)."
        )
    walk.read_equal(operator.attrgetter("dtype"), at, value.dtype)
    if not walk.lifts:
        content = value.tobytes()
        walk.read_equal(operator.attrgetter("shape"), at, value.shape)
        walk.read_equal(operator.methodcaller("tobytes"), at, content)
        return ("content", value.dtype, value.shape, hashlib.blake2b(content, digest_size=16).hexdigest())
    if type(value) is np.ndarray:
        return _array(walk, value, at)
    # A NumPy scalar, or an array of a class that behaves otherwise.
    return _array(walk, np.array(value), walk.read(np.array, at))


def _tuple(walk: Walk, value: tuple[Any, ...], at: int) -> KeyNode:
    return ("tuple", walk.items(value, at))


def _list(walk: Walk, value: list[Any], at: int) -> KeyNode:
    return walk.met(value, at) or ("list", walk.items(value, at))


def _dict(walk: Walk, value: dict[Any, Any], at: int) -> KeyNode:
    if (again := walk.met(value, at)) is not None:
        return again
    keys = walk.items(tuple(value), walk.read(tuple, at, tuple))
    return ("dict", keys, tuple([walk.visit(v, operator.itemgetter(k), at) for k, v in value.items()]))


def _set(walk: Walk, value: Any, at: int) -> KeyNode:
    again = walk.met(value, at) if type(value) is set else None
    if again is not None:
        return again
    if all(type(v) is str for v in value):
        walk.read_equal(frozenset, at, frozenset(value))
        return ("set", type(value), frozenset([("typed", str, v) for v in value]))
    walk.complete = False  # its items have no order by which they could be read again
    return ("set", type(value), frozenset([walk.visit(v, operator.itemgetter(0), at) for v in value]))


def _deque(walk: Walk, value: collections.deque[Any], at: int) -> KeyNode:
    walk.read_equal(operator.attrgetter("maxlen"), at, value.maxlen)
    return walk.met(value, at) or ("deque", value.maxlen, walk.items(value, at))


def _made_of(make: Callable[..., Any], **getters: Getter) -> Handler:
    """The handler of values that a function makes of a few parts: the parts by name, and how each is read."""
    names = tuple([name.strip("_") for name in getters])

    def handler(walk: Walk, value: Any, at: int) -> KeyNode:
        return ("made", make, names, tuple([walk.visit(get(value), get, at) for get in getters.values()]))

    return handler


def _bound(walk: Walk, value: Any, at: int) -> KeyNode:
    owner = getattr(value, "__self__", None)
    if owner is None or isinstance(owner, types.ModuleType):
        return static(walk, value, at)
    walk.read_equal(operator.attrgetter("__name__"), at, value.__name__)
    return ("bound", value.__name__, walk.visit(owner, operator.attrgetter("__self__"), at))  # [].append, array.sum


def _transparent(walk: Walk, value: Any, at: int) -> KeyNode:
    # A jitted function would hold its captured arrays as constants; the function under it is compiled with the step.
    inside = value.__wrapped__
    if isinstance(inside, types.FunctionType) and inside.__closure__ is None and code_info(inside).library:
        return walk.same(value, at)
    return walk.visit(inside, operator.attrgetter("__wrapped__"), at)


# Functions

_EXTRAS = operator.attrgetter("__defaults__", "__kwdefaults__", "__dict__")  # most functions have none


def home_of(loss: Any, depth: int = 3) -> str:
    """The top-level package in which a loss was defined, "" for a library's."""
    for _ in range(9):
        inner = getattr(loss, "func", None) or getattr(loss, "__func__", None) or getattr(loss, "__wrapped__", None)
        if inner is None:
            break
        loss = inner
    if isinstance(loss, types.FunctionType):
        info = code_info(loss)
        if not info.library:
            return info.root
        inside = [v for _, v in function_reads(loss).cells if callable(v)]
        return next(filter(None, (home_of(v, depth - 1) for v in inside)), "") if depth else ""
    kind = loss if isinstance(loss, type) else type(loss)
    return "" if is_library_type(kind) else (kind.__module__ or "").partition(".")[0]


def _function(walk: Walk, value: types.FunctionType, at: int) -> KeyNode:
    info = code_info(value)
    if info.library and value.__closure__ is None:
        return static(walk, value, at)
    generated = value.__code__.co_filename.startswith("<@")  # into the user's module, by a decorator like beartype
    own = not info.library and info.root in ("", "__main__", "__mp_main__", walk.home) and not generated
    if not info.library and info.assigns is not None:
        if own and walk.strict:
            refuse_assignments(value)
        return walk.same(value, at)
    if (again := walk.met(value, at)) is not None:
        return again
    walk.infos[info] = None
    with walk.mode(strict=own or (info.library and walk.strict), own=own or (info.library and walk.own)):
        return _function_parts(walk, value, info, at)


def _function_parts(walk: Walk, value: types.FunctionType, info: CodeInfo, at: int) -> KeyNode:
    reads, get, item = function_reads(value), operator.attrgetter, operator.itemgetter
    walk.same(info.code, walk.read(get("__code__"), at))
    closure = walk.read(get("__closure__"), at, type(value.__closure__))
    cells = tuple([(n, _cell(walk, n, v, i, closure, info)) for i, (n, v) in enumerate(reads.cells)])
    plain = value.__defaults__ is None and value.__kwdefaults__ is None and not value.__dict__
    if plain:
        walk.read_equal(_EXTRAS, at, (None, None, {}))
    defaults, keywords = ((), ()) if plain else _defaults(walk, value, reads, at)
    scope = walk.read(get("__globals__"), at, dict)
    if info.library:
        walk.same(value.__globals__, scope)
        return ("function", info, walk.strict, ByIdentity(value.__globals__), cells, defaults, keywords, (), (), ())
    absent = frozenset(info.global_names) - value.__globals__.keys()
    if absent:  # names of built-in functions, unless one is hidden by a global from now on
        keys = walk.read(operator.methodcaller("keys"), scope)
        walk.read_equal(operator.methodcaller("isdisjoint", absent), keys, True)
    outside = tuple([(n, walk.named(n, v, item(n), scope, info.chains.get(n))) for n, v in reads.outside])
    module = str(value.__globals__.get("__name__") or "")
    attributes = () if plain else _function_attributes(walk, value, at)
    imports = _imports(walk, info, value.__globals__) if info.imports else ()
    return (
        "function", info, walk.strict, module, cells, defaults, keywords, outside, attributes, imports
    )  # fmt: skip


def _defaults(walk: Walk, value: types.FunctionType, reads: Reads, at: int) -> tuple[KeyNode, KeyNode]:
    """The nodes of a function's default values, positional and by keyword."""
    get, item = operator.attrgetter, operator.itemgetter
    held = walk.read(get("__defaults__"), at, type(value.__defaults__))
    if value.__defaults__ is not None:
        walk.read_equal(len, held, len(value.__defaults__))
    defaults = tuple([(n, walk.named(n, v, item(i), held)) for i, (n, v) in enumerate(reads.defaults)])
    held = walk.read(get("__kwdefaults__"), at, type(value.__kwdefaults__))
    if value.__kwdefaults__ is not None:
        walk.read_equal(tuple, held, tuple(value.__kwdefaults__))
    return defaults, tuple([(n, walk.named(n, v, item(n), held)) for n, v in reads.keywords])


def _cell(walk: Walk, name: str, content: Any, i: int, closure: int, info: CodeInfo) -> KeyNode:
    if content is EMPTY_CELL:
        walk.complete = False
        return EMPTY
    get, cell = operator.attrgetter("cell_contents"), walk.read(operator.itemgetter(i), closure)
    if name == "__class__" and info.chains.get(name) in (None, {"": None}):
        return walk.same(content, walk.read(get, cell))  # for super(); what the class gives is walked with the object
    return walk.named(name, content, get, cell, info.chains.get(name))


def _function_attributes(walk: Walk, value: types.FunctionType, at: int) -> KeyNode:
    if not value.__dict__:
        walk.read_equal(vars, at, {})
        return ()
    scope = walk.read(vars, at, dict)
    present = sorted(walk.names & value.__dict__.keys())
    walk.read_present(scope, walk.names, present)
    held = [(n, value.__dict__[n]) for n in present if n != "__wrapped__"]
    return tuple([(n, walk.visit(v, operator.itemgetter(n), scope)) for n, v in held])


def _imports(walk: Walk, info: CodeInfo, scope: Mapping[str, Any]) -> KeyNode:
    """The modules that a function imports when it runs, as far as they are imported already."""
    found: dict[str, KeyNode] = {}
    for name, level in info.imports:
        full = importlib.util.resolve_name("." * level + name, scope.get("__package__") or "") if level else name
        for part in dict.fromkeys([full.partition(".")[0], full]):
            if part in sys.modules and not is_library(part) and part not in found:
                walk.complete = False
                found[part] = walk.visit(sys.modules[part], operator.itemgetter(0), 0)
    return tuple(found.items())


# What is refused


def refuse(reason: str) -> Handler:
    """A handler that refuses, for a reason."""

    def handler(walk: Walk, value: Any, at: int) -> KeyNode:
        raise RefusedError(f"a {type(value).__name__}, {reason}")

    return handler


_refuse_iterator = refuse(
    "an iterator: a compiled loss would take one value when it is traced and use it forever. Take the value "
    "outside, y = next(it), and capture y, or make it part of the data: data.map(lambda x: (x, loss))."
)
_refuse_random = refuse(
    "a random generator: a compiled loss would draw once when it is traced and use those numbers forever. Draw with "
    "JAX inside the loss, jax.random.normal(kaun.rng.next_key(), shape)."
)

_get = operator.attrgetter
_method = _made_of(types.MethodType, _=_get("__func__"), self=_get("__self__"))
_partial = _made_of(
    lambda f, args, keywords: functools.partial(f, *args, **keywords),
    _=_get("func"), args=_get("args"), keywords=_get("keywords"),
)  # fmt: skip
VALUES: dict[type, Handler] = {
    **dict.fromkeys((bool, int, str, bytes, type(None), type(...), type(NotImplemented), range), _plain),
    float: _float,
    complex: _made_of(complex, real=_get("real"), imag=_get("imag")),
    np.ndarray: _numpy,
    tuple: _tuple,
    list: _list,
    dict: _dict,
    set: _set,
    frozenset: _set,
    collections.deque: _deque,
    slice: _made_of(slice, start=_get("start"), stop=_get("stop"), step=_get("step")),
    bytearray: _made_of(bytearray, _=bytes),
    memoryview: _made_of(memoryview, _=bytes),
    array.array: _made_of(array.array, typecode=_get("typecode"), _=bytes),
    types.MappingProxyType: _made_of(types.MappingProxyType, _=dict),
    type({}.keys()): _made_of(operator.methodcaller("keys"), _=_get("mapping")),
    type({}.values()): _made_of(operator.methodcaller("values"), _=_get("mapping")),
    type({}.items()): _made_of(operator.methodcaller("items"), _=_get("mapping")),
    types.FunctionType: _function,
    types.MethodType: _method,
    types.BuiltinFunctionType: _bound,
    functools.partial: _partial,
    functools.partialmethod: _partial,
}


def classify_value(kind: type, value: Any) -> Handler | None:
    """The handler of an array, a function, or what is refused; None for an object."""
    if isinstance(value, jax.Array):
        return _array
    if issubclass(kind, (np.ndarray, np.generic)):
        return _numpy
    if issubclass(kind, np.dtype):
        return _plain
    if issubclass(kind, (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)):
        return _refuse_random
    if issubclass(kind, Iterator):
        return _refuse_iterator
    if is_transparent(value):
        return _transparent
    if callable(value) and isinstance(getattr(value, "__func__", None), types.FunctionType):
        return _method  # a bound method of a library's own making
    return None
