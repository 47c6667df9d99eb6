"""What code reads outside of itself: names, found in its bytecode, and their values in functions, objects and modules.

Of each code object a ``CodeInfo`` is made once. The functions after it return lists of (name, value), without running
code of the user's. The capture of a loss and the digests of a run go by these lists.
"""

from __future__ import annotations

import abc
import dataclasses
import dis
import functools
import itertools
import types
from collections.abc import Iterator, Mapping
from typing import Any, Generic, NamedTuple, Protocol

from kaun._jax import is_jitted
from kaun._loss.origin import is_library, is_library_type, root_package
from kaun._messages import locate
from kaun.errors import CaptureError

__all__ = [
    "ALL_NAMES", "CONSTRUCTORS", "EMPTY_CELL", "PAYLOADS", "Chains", "CodeInfo", "Reads", "attributes_of", "code_info",
    "function_in", "function_reads", "instance_reads", "is_namespace", "is_transparent", "members_of", "methods_of",
    "module_reads", "names_read_of_class", "own_classes", "reads_all", "reads_by_name", "refuse_assignments",
    "slots_of",
]  # fmt: skip

Pairs = list[tuple[str, Any]]
Chains = Mapping[str, Any]
"""Attributes read of a name, each with what is read of it in turn. A "" among them: the value itself is used."""

EMPTY_CELL = types.CellType()
"""Stands for the content of a cell that is not filled yet."""
ALL_NAMES = frozenset(["__dict__", "vars", "dir"])
"""Code that names one of these may read every attribute."""
PAYLOADS: tuple[type, ...] = (list, dict, set, frozenset, tuple, str, int, float, bytes)
"""What a class of the user's may extend, besides classes in Python."""
CONSTRUCTORS = frozenset(["__init__", "__new__", "__post_init__"])
"""What runs where code calls a class."""

_MOST_INFOS = 4096
_LOADS_OUTSIDE = frozenset(["LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"])
_LOADS_GLOBAL = frozenset(["LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"])
_READS_ATTRIBUTE = frozenset(["LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM", "DELETE_ATTR"])
_NO_OPERATION = frozenset(["EXTENDED_ARG", "CACHE", "NOP"])
_BY_SUPER = "super()."
_NEVER_IMPLICIT_NAMES = """
    __init__ __new__ __post_init__ __repr__ __del__ __init_subclass__ __class_getitem__ __set_name__
    __reduce__ __reduce_ex__ __getstate__ __setstate__ __getnewargs__ __setattr__ __delattr__ __replace__
    __annotate__ __dir__ __annotate_func__ __subclasshook__ __eq__ __ne__ __hash__ __sizeof__ __doc__
"""
_NEVER_IMPLICIT = frozenset(_NEVER_IMPLICIT_NAMES.split())
_EMPTY_BASES = (object, abc.ABC, Generic, Protocol, *PAYLOADS)
_NAMESPACES = frozenset([
    ("types", "SimpleNamespace"), ("argparse", "Namespace"), ("argparse", "_AttributeHolder"),
])  # fmt: skip
# lru_cache and jit: the function in them is compiled with the step, and no traced value comes into their caches.
_TRANSPARENT = frozenset(["_lru_cache_wrapper", "_JitWrapper"])


class CodeInfo:
    """A code object and the names through which it reaches outside; equal only to itself.

    Attributes:
        code: The code object.
        stub: A function of that code that captures nothing, to be named in messages.
        root: The top-level package of the module in which the function was defined.
        library: Whether that is a library, whose globals do not change during a run.
        global_names: The globals that it and the functions nested in it read.
        chains: The attributes that are read of each global and each cell, as far as they follow it directly.
        names: Every attribute name and identifier-like string in it. "super().x" for an x that is read by ``super``.
        imports: The modules that it imports: name and level of a relative import.
        assigns: The first ``nonlocal`` or ``global`` variable to which it assigns, with its kind, or None.
        passes_first: Whether its first argument is used otherwise than by reading attributes of it.
    """

    __slots__ = (
        "assigns", "chains", "code", "global_names", "imports", "library", "names", "passes_first", "root", "stub",
    )  # fmt: skip

    def __init__(self, function: types.FunctionType) -> None:
        self.code = function.__code__
        cells = tuple(types.CellType() for _ in self.code.co_freevars)
        self.stub = types.FunctionType(self.code, {}, None, None, cells)
        self.root = root_package(function)
        self.library = is_library(self.root)
        global_names: dict[str, None] = {}
        names: set[str] = set()
        imports: dict[tuple[str, int], None] = {}
        self.chains: dict[str, Any] = {}
        self.assigns: tuple[str, str] | None = None
        self.passes_first = False
        first = self.code.co_varnames[0] if self.code.co_argcount else ""
        for part in _nested(self.code):
            # getattr(config, "alpha") and `case Config(alpha=a)` name their attributes in constants.
            for const in part.co_consts:
                words = const if isinstance(const, tuple) else (const,)
                names.update(word for word in words if isinstance(word, str) and word.isidentifier())
            ops = [op for op in dis.get_instructions(part) if op.opname not in _NO_OPERATION]
            for i, op in enumerate(ops):
                names.update(_named(ops, i))
                self.passes_first = self.passes_first or _passes(ops, i, first)
                if op.opname in _LOADS_GLOBAL:
                    global_names[str(op.argval)] = None
                if op.opname in _LOADS_OUTSIDE:
                    self._follow(ops, i)
                elif op.opname == "IMPORT_NAME":
                    level = ops[i - 2].argval if i >= 2 else 0  # the constant that was loaded before the names
                    imports[str(op.argval), level if isinstance(level, int) else 0] = None
                else:
                    self.assigns = self.assigns or _assigned(op, part, self.code)
        self.global_names, self.names, self.imports = tuple(global_names), frozenset(names), tuple(imports)

    def _follow(self, ops: list[dis.Instruction], start: int) -> None:
        chain = self.chains.setdefault(str(ops[start].argval), {})
        for op in ops[start + 1 :]:
            if op.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            chain = chain.setdefault(str(op.argval), {})
        chain[""] = None


def _named(ops: list[dis.Instruction], at: int) -> Iterator[str]:
    """The names that count of an instruction: attributes, and built-in functions that read others."""
    op = ops[at]
    if op.opname in _READS_ATTRIBUTE:
        yield str(op.argval)
        if op.opname == "LOAD_SUPER_ATTR":
            yield f"{_BY_SUPER}{op.argval}"
    elif op.opname in _LOADS_GLOBAL:
        yield from {"vars", "dir", "type"} & {str(op.argval)}
        if op.argval == "super":  # of Python 3.11, which has no LOAD_SUPER_ATTR
            after = itertools.takewhile(lambda o: not o.opname.startswith("STORE_"), ops[at + 1 : at + 8])
            yield _BY_SUPER + next((str(o.argval) for o in after if o.opname in _READS_ATTRIBUTE), "")


def _passes(ops: list[dis.Instruction], at: int, first: str) -> bool:
    """Whether an instruction uses a variable, and not to read an attribute of it."""
    argval: Any = ops[at].argval
    used: tuple[Any, ...] = argval if isinstance(argval, tuple) else (argval,)
    if first not in used:
        return False
    after = ops[at + 1].opname if at + 1 < len(ops) else ""
    return used.index(first) < len(used) - 1 or after not in ("LOAD_ATTR", "LOAD_METHOD")


def _assigned(op: dis.Instruction, part: types.CodeType, code: types.CodeType) -> tuple[str, str] | None:
    if op.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
        return "global", str(op.argval)
    if op.opname in ("STORE_DEREF", "DELETE_DEREF") and op.argval in set(code.co_freevars) & set(part.co_freevars):
        return "nonlocal", str(op.argval)
    return None


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType) and const.co_name != "__annotate__":
            yield from _nested(const)


_infos: dict[int, CodeInfo] = {}


def code_info(function: types.FunctionType) -> CodeInfo:
    """The CodeInfo of a function's code, made once."""
    found = _infos.get(id(function.__code__))
    if found is None:
        found = CodeInfo(function)
        while len(_infos) >= _MOST_INFOS:
            _infos.pop(next(iter(_infos)), None)
        # A CodeInfo holds its code object, so the id stays taken for as long as it is a key here.
        _infos[id(function.__code__)] = found
    return found


def refuse_assignments(function: types.FunctionType) -> None:
    """Refuse code that assigns to a variable outside of itself.

    Raises:
        CaptureError: If it assigns to a ``nonlocal`` or ``global`` variable.
    """
    found = code_info(function).assigns
    if found is not None:
        kind, name = found
        raise CaptureError(
            f"loss {locate(function)} assigns to the {kind} variable `{name}`. A compiled loss runs as Python only "
            "when it is traced, so the assignment would happen once and then never again. Compute the value from the "
            "model's output and keep it outside: read the loss in report(step, loss, state), or call "
            f"trainer.predict(state, x) and update `{name}` there."
        )


# Functions


class Reads(NamedTuple):
    """What a function reads outside of itself, by where it finds it: pairs of (name, value) in a fixed order."""

    cells: Pairs
    defaults: Pairs
    keywords: Pairs
    outside: Pairs


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


def reads_by_name(function: types.FunctionType) -> Pairs:
    """What a function captures, sorted by name; of a user's module just what the function reads of it."""
    chains = code_info(function).chains
    pairs = [pair for part in function_reads(function) for pair in part if pair[1] is not EMPTY_CELL]
    found = [(n, _narrowed(v, chains.get(n, {"": None}))) for n, v in pairs]
    return sorted(found, key=lambda pair: pair[0])  # in which order code reads them depends on the version of Python


def _narrowed(value: Any, chains: Chains) -> Any:
    if not isinstance(value, types.ModuleType) or is_library(value.__name__) or "" in chains:
        return value
    made = types.ModuleType(value.__name__)
    vars(made).update({n: _narrowed(v, chains[n]) for n, v in module_reads(value, chains, frozenset())})
    return made


def is_transparent(value: Any) -> bool:
    """Whether a value is a decorated function under whose decorator one looks: of ``jax.jit`` or ``lru_cache``."""
    return is_jitted(value) or (type(value).__name__ in _TRANSPARENT and hasattr(value, "__wrapped__"))


# Objects, classes and modules


def instance_reads(value: Any, names: frozenset[str]) -> Pairs:
    """The attributes that an object itself holds, in its ``__dict__`` or slots, and that code with these names reads.

    Of a dataclass all fields count, of a namespace that code reads with ``vars`` all attributes. No code of the object
    runs.
    """
    held: dict[str, Any] = getattr(value, "__dict__", None) or {}
    slots = slots_of(type(value))
    wanted = names.union(getattr(type(value), "__match_args__", ()))
    if dataclasses.is_dataclass(value):
        wanted |= {f.name for f in dataclasses.fields(value)}
    if reads_all(type(value), names):
        wanted = wanted.union(_public(held), slots)
    found = [(n, held[n]) for n in sorted(wanted & held.keys())]
    for name, slot in slots.items():
        if name in wanted and name not in held:
            try:
                found.append((name, slot.__get__(value)))
            except AttributeError:
                continue  # a slot that is not filled
    return found


def _public(held: Mapping[str, Any]) -> list[str]:
    return [n for n in held if not (n.startswith("__") and n.endswith("__"))]


def reads_all(kind: type, names: frozenset[str]) -> bool:
    """Whether all attributes of an object count: the code reads them as a dict, or a library's base class may."""
    return bool(names & ALL_NAMES) or any(
        is_library_type(b) and b not in _EMPTY_BASES and not is_namespace(b) for b in kind.__mro__
    )


def is_namespace(kind: type) -> bool:
    """Whether a class of Python's own holds what users put into it, by name."""
    return (kind.__module__, kind.__name__) in _NAMESPACES


def slots_of(kind: type) -> dict[str, types.MemberDescriptorType]:
    """The slots of a class and its bases by name."""
    return {
        name: entry
        for base in reversed(kind.__mro__[:-1])
        for name, entry in vars(base).items()
        if isinstance(entry, types.MemberDescriptorType) and name != "__dict__"
    }


def own_classes(kind: type) -> list[type]:
    """A class and its bases in the order of lookup, without those of libraries."""
    return [base for base in kind.__mro__ if not is_library_type(base)]


def members_of(kind: type, names: frozenset[str]) -> list[tuple[type, str, Any]]:
    """What the classes of a user give to code with these names: (class, name, entry) in the order of lookup.

    Methods that operators call (``__call__``, ``__getitem__``, ``__add__``) count without being named.
    """
    return [
        (base, name, entry)
        for base in own_classes(kind)
        for name, entry in sorted(vars(base).items())
        if not isinstance(entry, types.MemberDescriptorType)
        and ((name in names and name not in ("__dict__", "__module__", "__doc__")) or _is_implicit(name, entry))
    ]


def _is_implicit(name: str, entry: Any) -> bool:
    special = name.startswith("__") and name.endswith("__") and name not in _NEVER_IMPLICIT
    return special and isinstance(entry, types.FunctionType)


def names_read_of_class(kind: type, names: frozenset[str]) -> frozenset[str]:
    """The names that code may read from an object's class, and not from the object.

    By ``super().x``, ``type(obj).x``, ``obj.__class__.x``, or ``cls.x`` in a class method.
    """
    if names & {"type", "__class__", _BY_SUPER}:
        return names
    found = {n.removeprefix(_BY_SUPER) for n in names if n.startswith(_BY_SUPER)}
    for _, _, entry in members_of(kind, names):
        if isinstance(entry, classmethod) and isinstance(function := function_in(entry)[0], types.FunctionType):
            info = code_info(function)
            found |= names if info.passes_first else info.names
    return frozenset(found)


def function_in(entry: Any) -> tuple[Any, str]:
    """The function behind an entry of a class, and the attributes that lead to it; the entry itself and "" without."""
    path: list[str] = []
    while True:
        if isinstance(entry, property):
            name = "fget"
        elif is_transparent(entry):
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
        if wanted & ALL_NAMES:
            wanted = wanted.union(_public(held))
    return [(n, held[n]) for n in sorted(wanted & held.keys())]


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
    entries = [pair for base in own_classes(kind) for pair in vars(base).items()]
    found = [function_in(entry)[0] for name, entry in entries if name not in _NEVER_IMPLICIT]
    return [f for f in found if isinstance(f, types.FunctionType)]
