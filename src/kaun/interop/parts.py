"""The parts of a model of another library that run: for error messages, which name one, and for ``kaun.summary``.

The libraries have no hook in common for the calls of their modules (NNX and Equinox have none), so parts are found in
Python's frames, by the module that a method belongs to. Nothing is looked at unless there is an error or a summary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Generator, Iterable
from types import CodeType, FrameType
from typing import Any

from kaun._messages import add_note, contextmanager
from kaun.layers.path import Part, WatchPart, here, watching_parts

__all__ = ["by_identity", "naming_parts"]

Path = tuple[Any, ...]
Find = Callable[[Any], Path | None]


def by_identity(modules: Callable[[], Iterable[tuple[Path, Any]]]) -> Find:
    """Return a function from a module to its path, for modules that do not know theirs.

    Args:
        modules: Returns the paths and modules of a model. It is called when the first part is looked for.
    """

    @functools.cache
    def known() -> dict[int, tuple[Path, Any]]:
        return {id(module): (path, module) for path, module in modules()}  # with the modules, so that no id is reused

    return lambda module: known().get(id(module), (None, None))[0]


@contextmanager
def naming_parts(
    name: str,
    base: type,
    find: Find,
    *,
    output: Callable[[Any], Any] = lambda y: y,
    collections: bool = False,
) -> Generator[None, None, None]:
    """Inside this context a model of another library runs; an error gets a note with the path of the innermost part.

    Args:
        name: The name of the layer.
        base: The library's class of modules; its own methods do not count as a part's.
        find: Returns the path of a module in the model, or None for any other value.
        output: Returns the output, from what a part's call returned.
        collections: As for ``Part``.
    """
    watch = watching_parts()

    def part_of(frame: FrameType) -> Part | None:
        code = frame.f_code
        module = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        path = find(module) if isinstance(module, base) and _is_call(code, type(module), base) else None
        return Part(".".join(map(str, path)), type(module).__name__, collections) if path else None

    try:
        with contextlib.nullcontext() if watch is None else _calls_seen(part_of, output, watch):
            yield
    except Exception as err:
        traceback, innermost = err.__traceback__, None
        while traceback is not None:
            innermost = part_of(traceback.tb_frame) or innermost
            traceback = traceback.tb_next
        if innermost is not None and repr(innermost.path) not in str(err):
            add_note(err, f"In the part {innermost.path!r}, a {innermost.kind}, of {here(name)}.")
        raise


def _is_call(code: CodeType, kind: type, base: type) -> bool:
    """Whether code is ``__call__``, or a public method that is not the library's, and no function of a module."""
    name = code.co_name
    if name == "__call__" or name.startswith("_") or hasattr(base, name):
        return name == "__call__"
    return getattr(inspect.unwrap(getattr(kind, name, None)), "__code__", None) is code  # pyright: ignore


@contextmanager
def _calls_seen(
    part_of: Callable[[FrameType], Part | None], output: Callable[[Any], Any], watch: WatchPart
) -> Generator[None, None, None]:
    """Inside this context, ``watch`` is called for each part that runs; a profiler pauses."""
    running: list[tuple[FrameType, str, Callable[[Any], None]]] = []

    def see(frame: FrameType, event: str, result: Any) -> None:
        if event == "call":
            part = part_of(frame)
            # A method that a part calls on itself is not another call of the part.
            if part is not None and not (running and running[-1][1] == part.path):
                running.append((frame, part.path, watch(part)))
        elif event == "return" and running and running[-1][0] is frame:
            running.pop()[2](output(result))

    profiler = sys.getprofile()
    pauses = profiler is not None and hasattr(
        profiler, "disable"
    )  # cProfile until Python 3.11, which is not a function
    if pauses:
        profiler.disable()  # pyright: ignore
    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(None if pauses else profiler)
        if pauses:
            profiler.enable()  # pyright: ignore
