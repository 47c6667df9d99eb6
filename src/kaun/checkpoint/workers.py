"""Workers: threads that copy and hash bytes, for which Python does not hold its interpreter lock."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Self

__all__ = ["LANES", "Workers"]

Task = tuple[Callable[..., Any], tuple[Any, ...]]

LANES = min(4, os.cpu_count() or 1)  # four copy as fast as memory is, and hash 6 GB a second


class Workers:
    """Threads that do tasks, those of one lane in order. Without lanes each task is done when it is given.

    Args:
        lanes: How many threads.
        waiting: How many tasks of a lane may wait until ``put`` waits, too; 0 for any number.
    """

    def __init__(self, lanes: int, waiting: int = 0) -> None:
        self._failed: BaseException | None = None
        self._queues: list[queue.Queue[Task | None]] = [queue.Queue(waiting) for _ in range(lanes)]
        self._threads: list[threading.Thread] = []
        try:
            for tasks in self._queues:
                thread = threading.Thread(target=self._run, args=(tasks,), name="kaun-bytes", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError:  # the system has no thread left
            self.__exit__()
            raise

    def _run(self, tasks: queue.Queue[Task | None]) -> None:
        while (task := tasks.get()) is not None:
            act, given = task
            try:
                act(*given)
            except BaseException as err:
                self._failed = err
            del act, given, task  # so that its memory is not kept until the next one comes

    def put(self, lane: int, act: Callable[..., Any], *given: Any) -> None:
        """Let a lane call a function with arguments; its number is taken modulo their count."""
        if self._queues:
            self._queues[lane % len(self._queues)].put((act, given))
        else:
            act(*given)

    def stop(self) -> None:
        """Wait until all tasks are done."""
        self.__exit__()
        for thread in self._threads:
            thread.join()

    def finish(self) -> None:
        """Wait until all tasks are done, and raise the exception of one that failed."""
        self.stop()
        if self._failed is not None:
            raise self._failed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for thread, tasks in zip(self._threads, self._queues, strict=False):
            if thread.is_alive():
                tasks.put(None)
