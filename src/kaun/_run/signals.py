"""SIGTERM and SIGINT while a run is going: heard where nothing is half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator, Iterator
from types import FrameType
from typing import Any, TypeVar

__all__ = ["Signals"]

T = TypeVar("T")
_HEARD = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Holds signals back until the code says that it can be interrupted; a second one interrupts at once.

    SIGTERM becomes ``SystemExit(143)``, SIGINT ``KeyboardInterrupt``. Python hears signals in its main thread alone; in
    any other this does nothing. Outside of the ``with`` block the handlers are those from before.

    Arguments:
        wanted: False for one that does nothing.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._before: dict[signal.Signals, Any] = {}
        self._came: int | None = None
        self._raised = False
        self._open = False

    def __enter__(self) -> Signals:
        if self._wanted and threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._handle) for each in _HEARD}
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._restore()
        if self._came is not None and not self._raised and error is None:
            self._raise()  # it came in the last moment, and what was to be finished is

    @contextlib.contextmanager
    def heard(self) -> Generator[None]:
        """A block that may be interrupted anywhere; also by what came before it."""
        self._open = True
        try:
            if self._came is not None and not self._raised:
                self._raise()
            yield
        finally:
            self._open = False

    def heard_in(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; getting each may be interrupted."""
        if not self._before:
            return items
        return self._between(items)

    def _between(self, items: Iterator[T]) -> Iterator[T]:
        while True:
            with self.heard():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._came = self._came is not None, number
        if again:
            self._restore()
        if again or self._open:
            self._raise()

    def _raise(self) -> None:
        self._raised = True
        raise KeyboardInterrupt if self._came == signal.SIGINT else SystemExit(128 + signal.SIGTERM)

    def _restore(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        self._before = {}
