"""Names that a module or an object of kaun does not have, as other libraries have them: what to write."""

from __future__ import annotations

import difflib
import importlib
import inspect
import opcode
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from kaun._calls.renamed import ADVICE, RENAMED
from kaun._messages import frames_hidden, user_frame

__all__ = ["advice", "call_of", "module_names", "no_attribute", "refuse_name", "renamed"]

# What programs call an object of a class.
_CALLED = {"Directory": "runs", "EarlyStopping": "stopper", "Ensemble": "many", "Layer": "model", "TrainState": "state"}


def module_names(module: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a public package: an exception that says what to write for a name."""

    @frames_hidden
    def missing(name: str) -> NoReturn:
        short = module.removeprefix("kaun.")
        error = no_attribute(f"module {module!r}", short, name, sys.modules[module])
        raise error if name.startswith("_") else _of_import(module, name, error)

    return missing


def refuse_name(name: str, names: Sequence[str]) -> NoReturn:
    """Raise the exception for a name that ``kaun`` itself does not have: what to write.

    Args:
        name: The name.
        names: The names that ``kaun`` has.
    """
    text = advice("kaun", name) or _found_anywhere(name, names)
    raise _of_import("kaun", name, AttributeError(f"module 'kaun' has no attribute {name!r}. {text}"))


def _of_import(module: str, name: str, error: AttributeError) -> Exception:
    """The exception for a name that a module does not have: an ImportError where ``from module import name`` asks.

    Python makes an ImportError of an AttributeError there, and leaves its text out.
    """
    frame = user_frame()
    if frame is None or frame.f_code.co_code[frame.f_lasti] != opcode.opmap["IMPORT_FROM"]:
        return error
    _, _, text = str(error).partition(f"has no attribute {name!r}")
    return ImportError(f"cannot import name {name!r} from {module!r}{text}", name=module)


def no_attribute(owner: str, kind: str, name: str, module: Any = None) -> AttributeError:
    """Return the exception for an attribute that something does not have.

    Args:
        owner: What has no such attribute, for the message.
        kind: Its entry in ``ADVICE``.
        name: The attribute.
        module: The module or the class, whose names are searched for a near one.
    """
    head = f"{owner} has no attribute {name!r}"
    if name.startswith("_"):
        return AttributeError(head)
    text = advice(kind, name)
    if not text and inspect.isclass(module):
        near = difflib.get_close_matches(name, [each for each in dir(module) if not each.startswith("_")], n=1)
        text = f"Write {_CALLED.get(kind, kind.lower())}.{near[0]}." if near else ""
    elif not text and module is not None and (found := renamed(kind, name, module)):
        text = f"Write {kind}.{call_of(kind, found, getattr(module, found))}."
    return AttributeError(f"{head}. {text}" if text else head)


def _found_anywhere(name: str, names: Sequence[str]) -> str:
    """Return what to write for a name that ``kaun`` itself does not have, where one of its packages has it.

    Args:
        name: The name.
        names: The names that ``kaun`` has.
    """
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.8):
        return f"Write kaun.{near[0]}."
    for kind in ("layers", "losses", "metrics", "reports"):
        module = importlib.import_module(f"kaun.{kind}")
        if text := advice(kind, name):
            return text
        if found := renamed(kind, name, module):
            return f"Write {kind}.{call_of(kind, found, getattr(module, found))}."
    return f"It has {', '.join(names)}."


def advice(kind: str, name: str) -> str:
    """Return what to write for a name that a kind of object or module does not have, "" if nothing is known."""
    return ADVICE.get(kind, {}).get(name, "")


def renamed(kind: str, name: str, module: Any) -> str | None:
    """Return the name in a module that another library's name stands for, or a near one; None if there is none."""
    names = [each for each in dir(module) if not each.startswith("_") and callable(getattr(module, each))]
    known = {_plain(each): each for each in names}
    plain = _plain(name)
    found = RENAMED.get(kind, {}).get(plain) or known.get(plain)
    if found is None:
        found = known.get(next(iter(difflib.get_close_matches(plain, list(known), n=1, cutoff=0.8)), ""))
    return found


def _plain(name: str) -> str:
    """A name without what libraries write in different ways: MaxPool2D, max_pool2d, MSELoss, mse."""
    plain = name.lower().replace("_", "")
    return plain.removesuffix("loss") or plain


def call_of(kind: str, name: str, function: Any) -> str:
    """A call of a function with the arguments that it needs; of a loss or a metric the function itself."""
    if kind in ("losses", "metrics"):
        return name
    parameters = inspect.signature(function).parameters.values()
    kinds = {inspect.Parameter.KEYWORD_ONLY: "{}=...", inspect.Parameter.VAR_POSITIONAL: "a, b"}
    needed = [kinds.get(p.kind, "{}").format(p.name) for p in parameters if p.default is p.empty]
    return f"{name}({', '.join(needed)})"
