"""Signals that end a run (SIGTERM, Ctrl-C and others): handled where nothing is half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from types import FrameType
from typing import Any, TypeVar

from jax.experimental import multihost_utils

from kaun._jax import preemption_service_runs
from kaun._messages import contextmanager, set_on

__all__ = ["Signals", "note_interrupt", "preempted"]

T = TypeVar("T")
# SIGHUP comes when a terminal is closed, SIGUSR1 from Slurm (--signal=USR1@60). Windows has neither.
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
_HANDLED = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_FREE = (signal.SIG_DFL, signal.default_int_handler)


_passed_on = threading.Event()  # that JAX's service has passed a SIGTERM on, which it does once


def preempted(turn: int) -> bool:
    """Whether all processes end at this turn, because JAX's service has passed the SIGTERM of one of them on to all.

    Args:
        turn: A number that grows by one from call to call, the same in all processes.
    """
    if _takes_sigterm() and multihost_utils.reached_preemption_sync_point(turn):
        _passed_on.set()
        return True
    return False


def _takes_sigterm() -> bool:
    return preemption_service_runs() and not _passed_on.is_set()


class Signals:
    """Holds signals back until the code says that it can be interrupted; a second one interrupts at once.

    SIGINT becomes ``KeyboardInterrupt``, each other signal n ``SystemExit(128 + n)``. A signal that is ignored, or that
    has a handler of the user or of JAX's distributed service, is left alone; the latter takes the first SIGTERM of a
    program, and its handler does nothing after that. Python handles signals in its main thread
    alone; in any other thread this does nothing. Outside of the ``with`` block the handlers are those from before.

    Args:
        wanted: False for one that does nothing.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._handlers: dict[signal.Signals, Any] = {}  # those from before
        self._received: int | None = None
        self._raised = False
        self._interruptible = False

    def __enter__(self) -> Signals:
        if self._wanted and threading.current_thread() is threading.main_thread():
            theirs = {signal.SIGTERM} if _takes_sigterm() else set[signal.Signals]()
            free = [each for each in _HANDLED if each not in theirs and signal.getsignal(each) in _FREE]
            self._handlers = {each: signal.signal(each, self._handle) for each in free}
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._restore()
        if self._received is not None and not self._raised and error is None:
            self._raise()  # it came after the last block that it may interrupt, and nothing is half done now

    @contextmanager
    def interruptible(self) -> Generator[None]:
        """A block that a signal may interrupt anywhere; one that came before interrupts it at its start."""
        self._interruptible = True
        try:
            if self._received is not None and not self._raised:
                self._raise()
            yield
        finally:
            self._interruptible = False

    @property
    def interruptible_or_none(self) -> Callable[[], contextlib.AbstractContextManager[None]] | None:
        """``interruptible``, or None where no signal is handled."""
        return self.interruptible if self._handlers else None

    def interruptible_items(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; a signal may interrupt getting each."""
        return self._generate(items) if self._handlers else items

    def _generate(self, items: Iterator[T]) -> Iterator[T]:
        while True:
            with self.interruptible():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def _handle(self, number: int, frame: FrameType | None) -> None:
        second, self._received = self._received is not None, number
        if second:
            self._restore()
        if second or self._interruptible:
            self._raise()

    def _raise(self) -> None:
        self._raised = True
        assert self._received is not None
        raise KeyboardInterrupt if self._received == signal.SIGINT else SystemExit(128 + self._received)

    def _restore(self) -> None:
        for each, handler in self._handlers.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}


def note_interrupt(error: BaseException, when: str) -> None:
    """Add to a ``KeyboardInterrupt``, which has no message, a line that says where the state is."""
    if isinstance(error, KeyboardInterrupt):
        # Of nested fits the outermost one's state is on the exception.
        notes = [note for note in getattr(error, "__notes__", ()) if "kaun_state" not in note]
        where = "err.kaun_state, or at the next prompt sys.last_value.kaun_state"
        set_on(error, "__notes__", [*notes, f"The state {when} is this exception's kaun_state: {where}."])
