"""Parts of errors and warnings: where a function was written, which frames are shown, names from files, warnings."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

import jax

from kaun._jax import FRAMES_NOTE, hides_frames_of

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

# With the separator: a package named kaun_models beside this one is the user's.
_SKIPPED = tuple(str(Path(file).parent) + os.sep for file in (__file__, jax.__file__))
_CONTEXTS = contextlib.__file__
_CLOSE = 0.8  # of difflib's ratio: "wnats" and "began" are near misses; "wait", "reset" and "snapshot_path" are not


def in_kaun(file: str) -> bool:
    """Whether a file of code, as tracebacks name it, is kaun's own."""
    return file.startswith(_SKIPPED[0])


def hide_frames(error: BaseException) -> None:
    """Remove kaun's own frames, and those that JAX hides, from what is shown of an exception.

    The call of the user is shown, what is the user's of the frames below it, and the message last. It is called where
    an exception leaves kaun, as ``except BaseException as error: hide_frames(error); raise``: a ``try`` costs nothing
    without an exception, and a wrapper around each public function would be one more frame and call for each step.
    Inside another call of kaun's it does nothing; the outermost call does it for all. ``KAUN_TRACEBACK=full`` in the
    environment keeps all frames.

    Args:
        error: The exception, in the frame that is about to raise it again.
    """
    frame = error.__traceback__ and error.__traceback__.tb_frame.f_back
    while frame is not None and not in_kaun(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None and os.environ.get("KAUN_TRACEBACK") != "full":
        _hide(error, functools.cache(_is_hidden), set())


def _is_hidden(file: str) -> bool:
    return in_kaun(file) or file == _CONTEXTS or hides_frames_of(file)


def _hide(error: BaseException, hidden: Callable[[str], bool], seen: set[int]) -> None:
    if id(error) in seen:
        return
    seen.add(id(error))
    traces, trace = list[TracebackType](), error.__traceback__
    while trace is not None:
        traces.append(trace)
        trace = trace.tb_next
    kept = None
    for trace in reversed(traces):
        if not hidden(trace.tb_frame.f_code.co_filename):
            kept = TracebackType(kept, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)
    error.with_traceback(kept)
    if notes := getattr(error, "__notes__", None):  # JAX's own note would hide the message, or what kaun adds to it
        set_on(error, "__notes__", [note for note in notes if FRAMES_NOTE not in note])
    grouped = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for linked in (error.__cause__, error.__context__, *grouped):
        if linked is not None:  # an exception may say that it is false
            _hide(linked, hidden, seen)
    if error.__context__ is not None and error.__context__.__traceback__ is None:
        # It came and was handled inside, and says nothing of the user's code.
        set_on(error, "__suppress_context__", True)


set_on = BaseException.__setattr__
"""``setattr`` of an exception; that of a class which is a frozen dataclass raises another exception."""


def add_note(error: BaseException, text: str) -> None:
    """``error.add_note(text)``, likewise."""
    set_on(error, "__notes__", [*getattr(error, "__notes__", ()), text])


def contextmanager(function: Callable[P, Generator[T]]) -> Callable[P, Block[T]]:
    """``contextlib.contextmanager``, which sets attributes of each exception and so replaces one that refuses them.

    A generator that is decorated raises what was thrown into it, or another exception: none of kaun's swallows one.
    """

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Block[T]:
        return Block(lambda: function(*args, **kwargs))

    return make


class Block(contextlib.ContextDecorator, contextlib.AbstractContextManager[T, None], Generic[T]):
    """A block whose begin and end are those of a generator: see ``contextmanager``."""

    def __init__(self, make: Callable[[], Generator[T]]) -> None:
        self._make, self._generator = make, make()

    def _recreate_cm(self) -> Block[T]:
        return Block(self._make)  # a decorated function may be called again, also by itself

    def __enter__(self) -> T:
        del self._make  # it holds the arguments, of which a state may be all that keeps much memory
        return next(self._generator)

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            next(self._generator, None)
            return
        try:
            self._generator.throw(error)
        except BaseException as raised:
            # Python makes a RuntimeError of a StopIteration that leaves a generator.
            if raised is not error and not (isinstance(error, StopIteration) and raised.__cause__ is error):
                raise
            error.with_traceback(trace)


_LATER = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)


class UserBlock(Block[T]):
    """A block that users open. If it goes away and was never entered, it warns, at the line of the call.

    Args:
        make: As for ``Block``.
        text: Gives the call as users write it.
        caller: The frame of the call.
    """

    _line: tuple[str, int, dict[str, Any]] | None = None

    def __init__(self, make: Callable[[], Generator[T]], text: Callable[[], str], caller: FrameType) -> None:
        super().__init__(make)
        self._text = text
        self._line = caller.f_code.co_filename, caller.f_lineno, caller.f_globals

    def __enter__(self) -> T:
        self._line = None
        with frames_hidden:
            if not hasattr(self, "_make"):
                call = self._text()
                raise RuntimeError(
                    f"{call} was entered before, and a block is entered once. Write `with {call}:` again."
                )
            return super().__enter__()

    def __call__(self, function: F) -> F:
        self._line = None
        if any(test(function) for test in _LATER):
            with frames_hidden:
                call = self._text()
                raise TypeError(
                    f"@{call} decorates {locate(function)}, a generator or a coroutine: its body runs after the call, "
                    f"outside of the block. Write `with {call}:` in it, around what draws, without yield or await."
                )
        return super().__call__(function)

    def __copy__(self) -> UserBlock[T]:
        return self

    def __deepcopy__(self, _: Any) -> UserBlock[T]:
        return self

    def __repr__(self) -> str:
        return f"<{self._text()}, which changes nothing without `with {self._text()}:`>"

    def __del__(self) -> None:
        if self._line is not None and not sys.is_finalizing():
            (file, line, names), call = self._line, self._text()
            text = (
                f"{call} without `with` changes nothing: what is drawn after it is not reproducible. Write\n"
                f"    with {call}:\n        state = trainer.init()"
            )
            registry = names.setdefault("__warningregistry__", {})
            warnings.warn_explicit(text, UserWarning, file, line, names.get("__name__"), registry)


class _FramesHidden(contextlib.ContextDecorator):
    """``hide_frames`` for a block or a function in which two calls more do not count."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            hide_frames(error)


frames_hidden = _FramesHidden()


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that names the line of the user's code which called into kaun, also where JAX traces kaun."""
    warnings.warn(message, category, stacklevel=_user_frame()[0])


def user_line() -> str:
    """The file and line of the user's code which called into kaun: ``train.py:31``."""
    _, frame = _user_frame()
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def user_frame() -> FrameType | None:
    """The frame of the user's code which called into kaun."""
    return _user_frame()[1]


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
        install = f'pip install ".[{extra}]" in a checkout of kaun'
        raise ImportError(f"{where} needs {root}, which is missing: {install}", name=root) from error


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
