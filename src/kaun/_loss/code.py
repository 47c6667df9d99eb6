"""What a piece of Python code reads and writes outside of itself, found in its bytecode once per code object."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator, Mapping
from typing import Any

from kaun._loss.origin import is_library, root_package
from kaun._messages import locate
from kaun.errors import CaptureError

__all__ = ["Chains", "CodeInfo", "code_info", "refuse_assignments"]

_MOST_INFOS = 4096
_LOADS_OUTSIDE = frozenset(["LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"])
_LOADS_GLOBAL = frozenset(["LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"])
_READS_ATTRIBUTE = frozenset(["LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM", "DELETE_ATTR"])
_NO_OPERATION = frozenset(["EXTENDED_ARG", "CACHE", "NOP"])

Chains = Mapping[str, Any]
"""Attributes read of a name, each with what is read of it in turn. A "" among them: the value itself is used."""


class CodeInfo:
    """A code object and the names through which it reaches outside; equal only to itself.

    Attributes:
        code: the code object.
        stub: a function of that code that captures nothing, to be named in messages.
        root: the top-level package of the module in which the function was defined.
        library: whether that is a library, whose globals do not change during a run.
        global_names: the globals that it and the functions nested in it read.
        chains: the attributes that are read of each global and each cell, as far as they follow it directly.
        names: every attribute name and identifier-like string in it.
        imports: the modules that it imports: name and level of a relative import.
        assigns: the first ``nonlocal`` or ``global`` variable to which it assigns, with its kind, or None.
    """

    __slots__ = ("assigns", "chains", "code", "global_names", "imports", "library", "names", "root", "stub")

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
        for part in _nested(self.code):
            # getattr(config, "alpha") names its attribute in a string constant.
            names.update(c for c in part.co_consts if isinstance(c, str) and c.isidentifier())
            ops = [op for op in dis.get_instructions(part) if op.opname not in _NO_OPERATION]
            for i, op in enumerate(ops):
                if op.opname in _LOADS_GLOBAL:
                    global_names[str(op.argval)] = None
                    names.update({"vars"} & {str(op.argval)})  # vars(config) reads all attributes
                if op.opname in _READS_ATTRIBUTE:
                    names.add(str(op.argval))
                elif op.opname in _LOADS_OUTSIDE:
                    self._follow(ops, i)
                elif op.opname == "IMPORT_NAME":
                    imports[str(op.argval), _level(ops, i)] = None
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


def _level(ops: list[dis.Instruction], at: int) -> int:
    """The level of a relative import: the constant that was loaded before the names."""
    level = ops[at - 2].argval if at >= 2 else 0
    return level if isinstance(level, int) else 0


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
        CaptureError: when it assigns to a ``nonlocal`` or ``global`` variable.
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
