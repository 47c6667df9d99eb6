"""Workers: threads that read and hash bytes, for which Python does not hold its interpreter lock."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Self

__all__ = ["MOST", "Workers"]

MOST = min(4, os.cpu_count() or 1)  # four copy as fast as memory is


class Workers:
    """Threads that do tasks in any order. Without threads each task is done when it is given.

    Args:
        count: How many threads, at most one for each task.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._failed: BaseException | None = None
        self._tasks: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def _run(self) -> None:
        while (act := self._tasks.get()) is not None:
            self._do(act)
            del act  # so that its memory is not kept until the next one comes

    def _do(self, act: Callable[[], Any]) -> None:
        if self._failed is None:
            try:
                act()
            except BaseException as err:
                self._failed = err

    def put(self, act: Callable[[], Any]) -> None:
        """Let a thread call a function. After one that failed none is called."""
        if not self._count:
            act()
            return
        self._tasks.put(act)
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._run, name="kaun-bytes", daemon=True)
            self._threads.append(thread)  # first, so that it gets its end also where Ctrl-C comes while it starts
            thread.start()

    def stop(self) -> None:
        """Wait until all tasks are done."""
        self.__exit__()
        for thread in self._threads:
            if thread.ident is not None:  # it has begun
                thread.join()

    def finish(self) -> None:
        """Do tasks that no thread has begun, wait for the others, and raise the exception of one that failed."""
        with contextlib.suppress(queue.Empty):
            while (act := self._tasks.get_nowait()) is not None:
                self._do(act)
        self.stop()
        if self._failed is not None:
            raise self._failed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for _ in self._threads:  # also for one that has ended: another one may take its None
            self._tasks.put(None)
