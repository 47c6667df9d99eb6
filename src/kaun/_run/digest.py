"""Values by their content, in words and digests that are the same in another process: arrays, trees, functions."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import pathlib
import re
import sys
import types
from array import array
from collections import UserList, deque
from collections.abc import Callable, Collection, Iterable, Mapping, MappingView
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._jax import children_of
from kaun._loss import FrozenLoss, attributes_of, code_info, is_library, methods_of, reads_by_name, rebuild_loss
from kaun.data import as_arrays, generator_state, is_generator, is_tensor, known_length, loader_facts

__all__ = ["PYTHON", "Digester", "digest_array", "names_of_object"]

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
"""Bytecode is compared within one version only, which digests of code name."""

_INSIDE_WRAPPERS = ("__wrapped__", "fun", "fwd", "bwd", "jvp")  # jax.custom_jvp, jax.custom_vjp
_MOST_BYTES = 1 << 30
_WINDOWS, _WINDOW_BYTES = 4096, 16 << 10
_CYCLE = ("cycle", "")
_SETTINGS = frozenset(["argparse", "types"])  # modules whose namespaces hold a user's settings
_PRINTED = frozenset(["datetime", "decimal", "fractions", "uuid"])  # modules whose values print all that they are


class Digester:
    """One look at values.

    Args:
        roots: What will be asked about. Of objects that are neither data nor known, those attributes count that the
            code in them names; all that is needed is collected first.
    """

    def __init__(self, *roots: Any) -> None:
        self._names: set[str] = set()
        self._known: dict[int, tuple[Any, tuple[str, str]]] = {}
        self._arrays: dict[int, tuple[Any, str]] = {}
        self._codes: dict[int, tuple[types.CodeType, str]] = {}
        self._open: set[int] = set()
        self._asked = False
        while True:
            before = len(self._names)
            for root in roots:
                self.digest(root)
            if len(self._names) == before or not self._asked:  # what was met on the way may name more
                return
            self._known.clear()

    @property
    def names(self) -> frozenset[str]:
        """The attribute names in the code."""
        self._asked = True
        return frozenset(self._names)

    def describe(self, value: Any) -> str:
        """A value in a line: short numbers as they print, arrays by dtype, shape and content, the rest by digest.

        Where code is part of it, the digest of the code comes last, after the version of Python.
        """
        kind = type(value)
        if value is None or kind in (bool, float) or (kind is int and abs(value) < 1 << 64):
            return repr(value)
        if tree.is_array(value):
            if value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.number) and value.size == 1:
                return f"{tree.describe(value)} {value.item()!r}"
            return f"{tree.describe(value)} sha256:{self.array(value)}"
        if isinstance(value, types.ModuleType) and is_library(value.__name__):
            return f"module {value.__name__}"
        inside, code = self.digest(value)
        name = getattr(value, "__qualname__", None) or kind.__qualname__
        return f"{name} sha256:{inside}{f' {PYTHON}:{code}' if code else ''}"

    def digest(self, value: Any) -> tuple[str, str]:
        """The digests of a value: of its content, and of the code in it ("" where there is none)."""
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        if id(value) in self._open:
            return _CYCLE
        self._open.add(id(value))
        try:
            sums = _Sums(self)
            _put(sums, value)
            found = sums.hex()
        finally:
            self._open.discard(id(value))
        self._known[id(value)] = (value, found)  # kept alive: they go by id
        return found

    def code(self, function: types.FunctionType) -> str:
        """The digest of the code of one function, without what it captures; documentation does not count."""
        code = function.__code__
        known = self._codes.get(id(code))
        if known is None:
            sums = _Sums(self)
            _put_code(sums, code, function.__doc__)
            known = self._codes[id(code)] = (code, sums.hex()[1])
        return known[1]

    def reads(self, function: types.FunctionType) -> list[tuple[str, Any]]:
        """What a function captures, by name. The attribute names in its code count from now on."""
        self._names |= code_info(function).names
        return reads_by_name(function)

    def also(self, kind: type) -> None:
        """Let the attribute names in the methods of a class count."""
        for method in methods_of(kind):
            self._names |= code_info(method).names

    def array(self, value: Any) -> str:
        """The SHA-256 of an array's content, of one of objects that of its items."""
        known = self._arrays.get(id(value))
        if known is None:
            known = self._arrays[id(value)] = (value, self._objects(value) or digest_array(value))
        return known[1]

    def _objects(self, value: Any) -> str:
        if not isinstance(value, np.ndarray) or not (value.dtype.hasobject or value.dtype.kind == "T"):
            return ""
        return self.digest((str(value.dtype), value.shape, cast("Any", value).ravel().tolist()))[0]


def digest_array(array: Any) -> str:
    """The SHA-256 of an array: dtype, shape and bytes in C order.

    Of more than 1 GB the bytes are a fixed sample: 4096 windows of 16 KB, evenly spaced from the first byte to the
    last.
    """
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return hashlib.sha256(f"{array.dtype} {digest_array(jax.random.key_data(array))}".encode()).hexdigest()
    whole = tree.on_host(array)
    found = hashlib.sha256(f"{whole.dtype.name} {whole.dtype.str} {whole.shape}".encode())
    if whole.nbytes <= _MOST_BYTES:
        found.update(_bytes(whole))
        return found.hexdigest()
    size = max(1, _WINDOW_BYTES // whole.dtype.itemsize)
    # .flat, since a reshape of what is not contiguous would copy all of it
    flat: Any = whole.reshape(-1) if whole.flags.c_contiguous else whole.flat
    for k in range(_WINDOWS):
        start = k * (whole.size - size) // (_WINDOWS - 1)
        found.update(_bytes(flat[start : start + size]))
    return found.hexdigest()


def _bytes(array: np.ndarray[Any, Any]) -> Any:
    # Not .tobytes(), which copies, and not a memoryview, which does not know bfloat16.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8) if array.size and array.dtype.itemsize else b""


class _Sums:
    """The digest of one value as it grows. What is in a value adds its own digests, and not its bytes."""

    def __init__(self, look: Digester) -> None:
        self.look = look
        self._content = hashlib.sha256()
        self._code = hashlib.sha256()
        self._has_code = False

    def put(self, *parts: str | bytes) -> None:
        for part in parts:
            encoded = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            self._content.update(len(encoded).to_bytes(8) + encoded)

    def code(self, *parts: str) -> None:
        self._has_code = True
        for part in parts:
            self._code.update(f"{len(part)} {part}".encode("utf-8", "surrogatepass"))

    def inner(self, digests: tuple[str, str]) -> None:
        self.put(digests[0])
        if digests[1]:
            self.code(digests[1])

    def values(self, values: Iterable[Any]) -> None:
        for value in values:
            plain = _PLAIN.get(type(value))
            if plain is None:
                self.inner(self.look.digest(value))
            else:
                self.put(type(value).__name__, plain(value))

    def named(self, pairs: Iterable[tuple[str, Any]]) -> None:
        for name, value in pairs:
            self.put(name)
            self.values([value])

    def hex(self) -> tuple[str, str]:
        return self._content.hexdigest(), self._code.hexdigest() if self._has_code else ""


_PLAIN: dict[type, Callable[[Any], str | bytes]] = {
    **dict.fromkeys((type(None), bool, type(...), type(NotImplemented), range), repr),
    int: hex,
    float: float.hex,
    complex: lambda value: f"{value.real.hex()} {value.imag.hex()}",
    str: lambda value: value,
    bytes: lambda value: value,
}


def _put(sums: _Sums, value: Any) -> None:
    kind = type(value)
    if is_tensor(value):
        value = as_arrays(value)
    if kind in _PLAIN:
        sums.values([value])
    elif tree.is_array(value):
        sums.put("array", sums.look.array(value))
    elif kind in (tuple, list):
        sums.put(kind.__name__)
        sums.values(value)
    elif kind is dict:
        sums.put("dict")
        sums.values(value)
        sums.values(value.values())
    elif kind in (set, frozenset):  # their order is arbitrary; that of strings differs between processes
        sums.put(kind.__name__)
        for digests in sorted(sums.look.digest(v) for v in value):
            sums.inner(digests)
    elif callable(value) or isinstance(value, types.ModuleType):
        _put_callable(sums, value)
    else:
        _put_object(sums, value)


def _put_callable(sums: _Sums, value: Any) -> None:
    match value:
        case types.FunctionType():
            _put_function(sums, value)
        case types.MethodType():
            sums.put("method")
            sums.values([value.__func__, value.__self__])
        case functools.partial():
            sums.put("partial", *value.keywords)
            sums.values([value.func, *value.args, *value.keywords.values()])
        case types.BuiltinFunctionType():
            sums.put("builtin", value.__qualname__)
            sums.values([] if isinstance(value.__self__, types.ModuleType) else [value.__self__])
        case FrozenLoss():
            sums.values([rebuild_loss(value.key, value.arrays)])
        case type() | types.ModuleType():
            name = value.__qualname__ if isinstance(value, type) else ""
            home = value.__module__ if isinstance(value, type) else value.__name__
            sums.put("class" if name else "module", name or home)
            if not is_library(home):
                _put_attributes(sums, value)
        case _ if isinstance(getattr(value, "__wrapped__", None), types.FunctionType):  # jitted, or with a cache
            sums.put("wrapped", type(value).__qualname__)
            sums.values([value.__wrapped__])
        case _:
            _put_object(sums, value)


def _put_function(sums: _Sums, function: types.FunctionType) -> None:
    sums.put("function", function.__qualname__)
    sums.code(sums.look.code(function))
    sums.named(sums.look.reads(function))


def _put_code(sums: _Sums, code: types.CodeType, doc: str | None = None) -> None:
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_freevars, code.co_cellvars)
    sums.code(code.co_code.hex(), code.co_exceptiontable.hex(), repr(counts), repr(names))
    constants = code.co_consts[1:] if doc is not None and code.co_consts[:1] == (doc,) else code.co_consts
    for constant in constants:
        if isinstance(constant, types.CodeType):
            sums.code(constant.co_name)
            _put_code(sums, constant)
        else:
            sums.code(*sums.look.digest(constant))


def _put_object(sums: _Sums, value: Any) -> None:
    kind = type(value)
    sums.put("object", kind.__qualname__)
    if isinstance(value, enum.Enum):
        sums.put(value.name)
    elif isinstance(value, (np.dtype, pathlib.PurePath, re.Pattern)):
        sums.put(str(value.pattern if isinstance(value, re.Pattern) else value))
    elif kind.__module__ in _PRINTED:
        sums.put(repr(value))
    elif isinstance(value, slice):
        sums.values([value.start, value.stop, value.step])
    elif is_generator(value):
        sums.values([generator_state(value)])
    elif facts := loader_facts(value):
        sums.values([known_length(value), facts])
    elif isinstance(value, property):
        sums.values([value.fget])
    elif dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        sums.named((name, getattr(value, name)) for name in names)
        _put_attributes(sums, value, names)
    elif (flat := children_of(value)) is not None:
        sums.values([list(flat[0]), flat[1]])
        _put_attributes(sums, value)
    else:
        _put_attributes(sums, value)


def _put_attributes(sums: _Sums, value: Any, but: Collection[str] = ()) -> None:
    """An object of the user's own class or module by the attributes that the code names; any other by its contents."""
    sums.named(pair for pair in names_of_object(sums.look, value) if pair[0] not in but)


def names_of_object(look: Digester, value: Any) -> list[tuple[str, Any]]:
    """What counts of an object: its items, and of the user's own the attributes that the code names."""
    home = getattr(value if isinstance(value, type) else type(value), "__module__", None) or ""
    own = isinstance(value, types.ModuleType) or home in _SETTINGS or not is_library(home)
    # Here an object may be data, and not read by the code at hand: what any of its methods reads counts.
    look.also(value if isinstance(value, type) else type(value))
    return _items_of(value) + (attributes_of(value, look.names) if own else [])


def _items_of(value: Any) -> list[tuple[str, Any]]:
    """What is in a container of a kind without a handler, and the functions in a wrapper around one."""
    if isinstance(value, Mapping):
        held = cast("Mapping[Any, Any]", value)
        return [("keys", list(held)), ("values", list(held.values()))]
    if isinstance(value, (bytearray, memoryview)):
        return [("bytes", bytes(value))]
    if isinstance(value, (list, tuple, set, frozenset, deque, UserList, array, MappingView)):
        return [("items", list(cast("Iterable[Any]", value)))]
    if callable(value) and hasattr(value, "__wrapped__"):
        inside = [(n, getattr(value, n, None)) for n in _INSIDE_WRAPPERS]
        return [(n, f) for n, f in inside if isinstance(f, types.FunctionType)]
    return []
