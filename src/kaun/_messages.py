"""Parts of errors and warnings: where a function was written, names from files, warnings, and missing packages."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import os
import re
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import jax

# With the separator: a package named kaun_models beside this one is the user's.
_SKIPPED = tuple(str(Path(file).parent) + os.sep for file in (__file__, jax.__file__))
_CONTEXTS = contextlib.__file__
_CLOSE = 0.8  # of difflib's ratio: "wnats" and "began" are near misses; "wait", "reset" and "snapshot_path" are not


def in_kaun(file: str) -> bool:
    """Whether a file of code, as tracebacks name it, is kaun's own."""
    return file.startswith(_SKIPPED[0])


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that names the line of the user's code which called into kaun, also where JAX traces kaun."""
    warnings.warn(message, category, stacklevel=_user_frame()[0])


def user_line() -> str:
    """The file and line of the user's code which called into kaun: ``train.py:31``."""
    _, frame = _user_frame()
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _user_frame() -> tuple[int, FrameType | None]:
    """The frame that called into kaun, and how many frames it is above the caller of this function."""
    level, frame = 1, sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and (
        frame.f_code.co_filename.startswith(_SKIPPED) or frame.f_code.co_filename == _CONTEXTS
    ):
        level, frame = level + 1, frame.f_back
    return level, frame


def locate(function: Any) -> str:
    """The name of a callable and the file and line where it was written, for error messages."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__wrapped__", function)
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    name = name.rsplit("<locals>.", 1)[-1]
    if code is None:
        return f"`{name}`"
    return f"`{name}` ({Path(code.co_filename).name}:{code.co_firstlineno})"


def optional_package(where: str, module: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        where: The function that needs it, for the message.
        module: The module.
        extra: The extra of kaun that installs it.

    Raises:
        ImportError: If the package is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if error.name != root:
            raise  # the package is there, but something that it needs is not
        raise ImportError(f'{where} needs {root}, which is missing: pip install "kaun[{extra}]"', name=root) from error


def plain(text: object, most: int = 200) -> str:
    """Text from a file, which is not trusted: cut to a length, with characters that a terminal would act on escaped."""
    text = str(text)
    if len(text) > most:
        text = f"{text[: most - most // 3 - 3]}...{text[-(most // 3) :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def quoted(value: object, most: int = 100) -> str:
    """A name or another value from a file as its ``repr``, which escapes what is not printable, cut to a length."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


@functools.lru_cache(maxsize=4096)  # each fit asks for the same names again
def nearest_member(name: str, members: tuple[str, ...]) -> str | None:
    """The member that this name is an inflection or a misspelling of, if any."""
    name = re.sub(r"^on_?", "", name.lower())
    for candidate in members:
        if _stem(name) == _stem(candidate):
            return candidate
    same_letter = [candidate for candidate in members if candidate[0] == name[:1]]  # `send` is not `end`
    return next(iter(difflib.get_close_matches(name, same_letter, n=1, cutoff=_CLOSE)), None)


def _stem(name: str) -> str:
    return re.sub(r"(?<=...)(e|es|s|d|ed|ing)$", "", name)
