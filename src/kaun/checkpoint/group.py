"""Group: the processes that write and read checkpoints together, all of which succeed or fail together."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from kaun._jax import coordination_client
from kaun._processes import Channel, failed_elsewhere
from kaun.errors import FailedElsewhere

__all__ = ["ALONE", "Group", "group_for", "new_group", "several_processes", "spans_processes"]


class Group:
    """The processes of one program, or one process alone, for which nothing is exchanged.

    Args:
        name: The name of the channel in which they meet; empty for one process alone.
        what: What they meet for, in messages.

    Attributes:
        index: The number of this process.
        count: How many there are.
    """

    def __init__(self, name: str = "", what: str = "") -> None:
        self._channel = Channel(name, what=what) if name else None
        self.index: int = jax.process_index() if name else 0
        self.count: int = jax.process_count() if name else 1

    def gather(self, act: Callable[[], Any]) -> list[Any]:
        """Do something in each process, and return all results, which are JSON values, by process.

        Raises:
            Exception: What it raised here.
            FailedElsewhere: If it raised in another process, or one does not come in time.
        """
        if self._channel is None:
            return [act()]
        failed, value = None, None
        try:
            value = act()
        except Exception as err:
            failed = err
        except BaseException as err:
            self.leave(err)
            raise
        told = json.dumps([_described(failed), value])
        try:
            found = self._channel.exchange(told, lambda values: json.dumps([values[p] for p in sorted(values)]))
        except FailedElsewhere as err:
            raise failed or err from None
        if failed is not None:
            raise failed
        results = [json.loads(text) for text in json.loads(found)]
        for i, (text, _) in enumerate(results):
            if text:
                raise failed_elsewhere(i, text)
        return [value for _, value in results]

    def leave(self, error: BaseException) -> None:
        """Tell the other processes that this one does not come to their next meeting, because of an exception."""
        if self._channel is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone
                self._channel.leave(_described(error))

    def first(self, act: Callable[[], Any]) -> Any:
        """Do something in process 0 alone, and return its result, a JSON value, in all."""
        return self.gather(lambda: act() if self.index == 0 else None)[0]


ALONE = Group()
_opened: Counter[str] = Counter()


def _described(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"


def several_processes() -> bool:
    """Whether the program has several processes; without JAX's distributed service no device is looked for."""
    return coordination_client() is not None and jax.process_count() > 1


def new_group(name: str, what: str) -> Group:
    """All processes of the program, in a channel of their own: the n-th of this name in each of them.

    Args:
        name: The name.
        what: What they meet for, in messages.
    """
    _opened[name] += 1
    return Group(f"checkpoint/{name}/{_opened[name]}", what)


def spans_processes(tree: Any) -> bool:
    """Whether an array of a tree, or of a template, lies on devices of several processes."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    return any(where is not None and not where.is_fully_addressable for where in shardings)


def group_for(path: Path, tree: Any) -> Group:
    """Who reads and writes the checkpoints of a tree, or of a template, in a directory.

    All processes, if an array of it lies on devices of several; else this process alone.
    """
    return new_group(str(path), f"the checkpoints in {str(path)!r}") if spans_processes(tree) else ALONE
