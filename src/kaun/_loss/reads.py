"""What functions, objects, classes and modules give to code that reads them: lists of (name, value), used by all walks.

The walk that captures a loss, the digests of a run, messages and descriptions go by these lists and by no other rules.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import enum
import functools
import types
from collections.abc import Iterable
from typing import Any, Generic, NamedTuple, Protocol

from kaun._loss.code import Chains, CodeInfo, code_info
from kaun._loss.origin import is_library, is_library_type

__all__ = [
    "EMPTY_CELL", "Reads", "attributes_of", "containers_behind", "function_in", "function_reads", "instance_reads",
    "is_namespace", "members_of", "methods_of", "module_reads", "names_in", "reads_all", "reads_by_name", "slots_of",
    "transparent",
]  # fmt: skip

EMPTY_CELL = types.CellType()
"""Stands for the content of a cell that is not filled yet."""

Pairs = list[tuple[str, Any]]

_CONTAINERS = (list, dict, set, frozenset, tuple, str, int, float, bytes)
_NEVER_IMPLICIT_NAMES = """
    __init__ __new__ __post_init__ __repr__ __str__ __del__ __init_subclass__ __class_getitem__ __set_name__
    __reduce__ __reduce_ex__ __getstate__ __setstate__ __getnewargs__ __setattr__ __delattr__ __replace__
    __annotate__ __dir__ __annotate_func__ __subclasshook__ __eq__ __ne__ __hash__ __sizeof__ __format__ __doc__
"""
_NEVER_IMPLICIT = frozenset(_NEVER_IMPLICIT_NAMES.split())
_CONSTRUCTORS = frozenset(["__init__", "__new__", "__post_init__"])
_EMPTY_BASES = (object, abc.ABC, Generic, Protocol, *_CONTAINERS)
_NAMESPACES = frozenset([
    ("types", "SimpleNamespace"), ("argparse", "Namespace"), ("argparse", "_AttributeHolder"),
])  # fmt: skip
_ALL_NAMES = frozenset(["__dict__", "vars"])
# lru_cache and jit: the function in them is compiled with the step, and no traced value comes into their caches.
_TRANSPARENT = frozenset(["PjitFunction", "_lru_cache_wrapper", "_JitWrapper"])


class Reads(NamedTuple):
    """What a function reads outside of itself, by where it finds it: pairs of (name, value) in a fixed order."""

    cells: Pairs
    defaults: Pairs
    keywords: Pairs
    outside: Pairs

    def pairs(self) -> Pairs:
        """All of them, without the cells that are not filled yet."""
        return [pair for part in self for pair in part if pair[1] is not EMPTY_CELL]


def function_reads(function: types.FunctionType) -> Reads:
    """What a function captures: its cells, its defaults, and the globals that it names unless it is a library's."""
    code, info = function.__code__, code_info(function)
    cells = [(n, _content(c)) for n, c in zip(code.co_freevars, function.__closure__ or (), strict=True)]
    defaults = function.__defaults__ or ()
    arguments = code.co_varnames[: code.co_argcount]
    pairs = list(zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True))
    scope: dict[str, Any] = function.__globals__
    outside = [] if info.library else [(n, scope[n]) for n in info.global_names if n in scope]
    return Reads(cells, pairs, list((function.__kwdefaults__ or {}).items()), outside)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return EMPTY_CELL


def instance_reads(value: Any, names: frozenset[str]) -> Pairs:
    """The attributes that an object itself holds, in its ``__dict__`` or slots, and that code with these names reads.

    Of a dataclass all fields count, of a namespace that code reads with ``vars`` all attributes. No code of the object
    runs.
    """
    held: dict[str, Any] = getattr(value, "__dict__", None) or {}
    slots = slots_of(type(value))
    wanted = set(names)
    if dataclasses.is_dataclass(value):
        wanted.update(f.name for f in dataclasses.fields(value))
    if reads_all(type(value), names):
        wanted.update(n for n in held if not (n.startswith("__") and n.endswith("__")))
        wanted.update(slots)
    found = [(n, held[n]) for n in sorted(wanted & held.keys())]
    for name, slot in slots.items():
        if name in wanted and name not in held:
            try:
                found.append((name, slot.__get__(value)))
            except AttributeError:
                continue  # a slot that is not filled
    return found


def reads_all(kind: type, names: frozenset[str]) -> bool:
    """Whether all attributes of an object count: the code reads them as a dict, or a library's base class may."""
    return bool(names & _ALL_NAMES) or any(
        is_library_type(b) and b not in _EMPTY_BASES and not is_namespace(b) for b in kind.__mro__
    )


def is_namespace(kind: type) -> bool:
    """Whether a class of Python's own holds what users put into it, by name."""
    return (kind.__module__, kind.__name__) in _NAMESPACES


def slots_of(kind: type) -> dict[str, types.MemberDescriptorType]:
    """The slots of a class and its bases by name."""
    return {
        name: entry
        for base in reversed(kind.__mro__)
        for name, entry in vars(base).items()
        if isinstance(entry, types.MemberDescriptorType) and name != "__dict__"
    }


def members_of(kind: type, names: frozenset[str], *, makes: bool = False) -> list[tuple[type, str, Any]]:
    """What the classes of a user give to code with these names: (class, name, entry) in the order of lookup.

    Methods that operators call (``__call__``, ``__getitem__``, ``__add__``) count without being named, and where the
    code may make an object of the class (``makes``), its constructors.
    """
    return [
        (base, name, entry)
        for base in kind.__mro__
        if not is_library_type(base)
        for name, entry in sorted(vars(base).items())
        if not isinstance(entry, types.MemberDescriptorType)
        and ((makes and name in _CONSTRUCTORS) or (name not in _NEVER_IMPLICIT and _counts(name, entry, names)))
    ]


def _counts(name: str, entry: Any, names: frozenset[str]) -> bool:
    implicit = name.startswith("__") and name.endswith("__") and isinstance(entry, types.FunctionType)
    return implicit or (name in names and name not in ("__dict__", "__module__"))


def containers_behind(kind: type, names: frozenset[str]) -> list[Any]:
    """The lists, dicts, sets and deques that code of a user's class may write to where they are, not in a copy.

    They are attributes of the class, and what its methods with these names, and functions that those call, capture.
    Code of other packages than that of the class may write.
    """
    own = (kind.__module__.partition(".")[0], "", "__main__")
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] in own and not is_library_type(base)]
    entries = [entry for base in bases for entry in vars(base).items()]
    found = [] if issubclass(kind, enum.Enum) else [e for n, e in entries if not n.startswith("__")]
    called = [function_in(e)[0] for n, e in entries if n in names or n.startswith("__")]
    seen: dict[int, Any] = {}
    while called:
        function = called.pop()
        if isinstance(function, types.FunctionType) and id(function) not in seen and code_info(function).root in own:
            seen[id(function)] = function
            values = [value for _, value in function_reads(function).pairs()]
            found += values
            called += values
    return [value for value in found if isinstance(value, (list, dict, set, collections.deque))]


def transparent(value: Any) -> bool:
    """Whether a value is a decorated function under whose decorator one looks: of ``jax.jit`` or ``lru_cache``."""
    return type(value).__name__ in _TRANSPARENT and hasattr(value, "__wrapped__")


def function_in(entry: Any) -> tuple[Any, str]:
    """The function behind an entry of a class, and the attributes that lead to it; the entry itself and "" without."""
    path: list[str] = []
    while True:
        if isinstance(entry, property):
            name = "fget"
        elif transparent(entry):
            name = "__wrapped__"
        elif isinstance(entry, (staticmethod, classmethod)):
            name = "__func__"
        elif isinstance(entry, (functools.cached_property, functools.partialmethod)):
            name = "func"
        elif isinstance(getattr(entry, "method", None), types.FunctionType) and is_library_type(type(entry)):
            name = "method"  # equinox
        else:
            return entry, ".".join(path)
        entry = getattr(entry, name)
        path.append(name)


def module_reads(module: types.ModuleType, chains: Chains, names: frozenset[str]) -> Pairs:
    """What code reads of a module: the attributes that follow its name; those with these names if it is passed on."""
    held = vars(module)
    wanted = frozenset(chains) - {""}
    if "" in chains:
        wanted |= names
        if wanted & _ALL_NAMES:
            wanted |= {n for n in held if not (n.startswith("__") and n.endswith("__"))}
    return [(n, held[n]) for n in sorted(wanted & held.keys())]


def reads_by_name(function: types.FunctionType) -> Pairs:
    """What a function captures, sorted by name; of a user's module just what the function reads of it."""
    chains = code_info(function).chains
    found = [(n, _narrowed(v, chains.get(n, {"": None}))) for n, v in function_reads(function).pairs()]
    return sorted(found, key=lambda pair: pair[0])  # in which order code reads them depends on the version of Python


def _narrowed(value: Any, chains: Chains) -> Any:
    if not isinstance(value, types.ModuleType) or is_library(value.__name__) or "" in chains:
        return value
    made = types.ModuleType(value.__name__)
    vars(made).update({n: _narrowed(v, chains[n]) for n, v in module_reads(value, chains, frozenset())})
    return made


def attributes_of(value: Any, names: frozenset[str]) -> Pairs:
    """All that code with these names reads of an object, class or module; methods as the functions behind them."""
    if isinstance(value, types.ModuleType):
        return module_reads(value, {"": None}, names)
    found = [] if isinstance(value, type) else instance_reads(value, names)
    kind = value if isinstance(value, type) else type(value)
    seen = {name for name, _ in found}
    for _, name, entry in members_of(kind, names):
        if name not in seen:
            seen.add(name)
            found.append((name, function_in(entry)[0]))
    return found


def methods_of(kind: type) -> list[types.FunctionType]:
    """The functions in the classes of a user that may be called once an object is made."""
    own = [vars(base) for base in kind.__mro__ if not is_library_type(base)]
    found = [function_in(entry)[0] for entries in own for name, entry in entries.items() if name not in _NEVER_IMPLICIT]
    return [f for f in found if isinstance(f, types.FunctionType)]


def names_in(infos: Iterable[CodeInfo]) -> frozenset[str]:
    """Every attribute name in pieces of code."""
    return frozenset[str]().union(*[info.names for info in infos])
