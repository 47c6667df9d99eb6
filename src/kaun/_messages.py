"""Parts of errors and warnings: where a function was written, and a warning at the user's line."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from pathlib import Path
from typing import Any

# With the separator: a package named kaun_models beside this one is the user's.
_HERE = str(Path(__file__).parent) + os.sep
_CONTEXTS = contextlib.__file__


def in_kaun(file: str) -> bool:
    """Whether a file of code, as tracebacks name it, is kaun's own."""
    return file.startswith(_HERE)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that names the line of the user's code which called into kaun."""
    level, frame = 1, sys._getframe()  # pyright: ignore[reportPrivateUsage]
    while frame is not None and (in_kaun(frame.f_code.co_filename) or frame.f_code.co_filename == _CONTEXTS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


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
