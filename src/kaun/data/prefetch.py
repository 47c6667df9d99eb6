"""Prefetching: a background thread that stays a few items ahead, and items as they were when they were pulled."""

from __future__ import annotations

import atexit
import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from kaun import tree
from kaun._loss import snapshot_loss
from kaun.data.items import Item
from kaun.data.rows import RowsItem

__all__ = ["prefetched", "snapshot_item"]


def snapshot_item(item: Any) -> Any:
    """The item as it is now, for a stage that pulls the next one before this one is used.

    A generator may fill the same buffer again, and all closures that it yields share one cell.
    """
    if Item.is_training_item(item):
        parts = _snapshot(item[0]), snapshot_loss(item[1]), *map(_snapshot, item[2:])
        return list(parts) if isinstance(item, list) else parts
    if isinstance(item, RowsItem):
        return item.with_item(snapshot_item(item.item))  # the rows are kaun's own, and stay as they are
    return _snapshot(item)


def _snapshot(value: Any) -> Any:
    kind = type(value)
    # The common containers directly: faster than a pytree, and keys of any type in their own order.
    if kind is tuple or kind is list:
        return kind([_snapshot(v) for v in value])
    if kind is dict:
        return {k: _snapshot(v) for k, v in value.items()}
    return jax.tree_util.tree_map(tree.snapshot, value)


def prefetched(open: Callable[[], Iterator[Any]], n: int) -> Iterator[Any]:
    """The items of ``open()``, pulled by a thread that stays up to ``n`` items ahead."""
    ready: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    slots, stopped = threading.Semaphore(n), threading.Event()  # a slot is a pull that the thread may still make
    run = contextvars.copy_context().run
    # The thread must not refer to this generator, or dropping it would not end it. Daemon for a source that hangs.
    thread = threading.Thread(target=run, args=(_pull, open, ready, slots, stopped), name="kaun prefetch", daemon=True)

    def end() -> None:
        stopped.set()
        slots.release()
        # Wait, so that this thread has left the loader before its next pass starts; with a limit, because it may hang.
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout=2.0)

    # An iterator may still be referred to when Python exits, and a thread inside JAX would then abort the process.
    atexit.register(end)
    try:
        thread.start()
        while True:
            match ready.get():
                case (item,):
                    slots.release()
                    yield item
                case (_, error):
                    try:
                        raise error
                    finally:
                        del error  # its traceback holds this frame
                case _:
                    return
    finally:
        atexit.unregister(end)
        end()


def _pull(open: Callable[[], Iterator[Any]], ready: Any, slots: threading.Semaphore, stopped: threading.Event) -> None:
    """The thread's side: sends ``(item,)`` for each item, then ``()``, or ``(None, error)``."""
    try:
        slots.acquire()
        if not stopped.is_set():
            for item in open():
                ready.put((snapshot_item(item),))
                slots.acquire()
                if stopped.is_set():
                    return
        ready.put(())
    except BaseException as error:
        ready.put((None, error))
