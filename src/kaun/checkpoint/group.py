"""Group: the processes that write and read checkpoints together, all of which succeed or fail together."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from kaun._jax import coordination_client
from kaun._processes import Channel, failed_elsewhere
from kaun.errors import FailedElsewhere

__all__ = ["ALONE", "Group", "group_for", "processes_with", "several_processes"]


class Group:
    """The processes of one program, or one process alone, for which nothing is exchanged.

    Args:
        name: What they write or read: they meet in the n-th channel of this name in each of them. Empty for one process
            alone.
        what: What they meet for, in messages.
        processes: Their numbers; None for all processes of the program.

    Attributes:
        index: The number of this process among them. What one process does, the one of number 0 does.
        count: How many there are.
    """

    def __init__(self, name: str = "", what: str = "", processes: Sequence[int] | None = None) -> None:
        self._name, self._channel = name, _next_channel(name, what, processes) if name else None
        members = [0] if self._channel is None else list(self._channel.processes)
        self.index: int = 0 if self._channel is None else members.index(jax.process_index())
        self.count: int = len(members)

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
            found = self._channel.exchange(told, lambda values: json.dumps(sorted(values.items())))
        except FailedElsewhere as err:
            if self._channel.came_late:  # the others have left it, and wait in the next one, or come to it
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    _next_channel(self._name, "", self._channel.processes).leave(str(err))
            raise failed or err from None
        if failed is not None:
            raise failed
        results = {process: json.loads(text) for process, text in json.loads(found)}
        for process, (text, _) in results.items():
            if text:
                raise failed_elsewhere(process, text)
        return [value for _, value in results.values()]

    def leave(self, error: BaseException) -> None:
        """Tell the other processes that this one does not come to their next meeting, because of an exception."""
        if self._channel is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone
                self._channel.leave(_described(error), votes=True)

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


def _next_channel(name: str, what: str, processes: Sequence[int] | None) -> Channel:
    _opened[name] += 1
    return Channel(f"checkpoint/{name}/{_opened[name]}", processes, what)


def processes_with(tree: Any) -> list[int]:
    """The numbers of the processes on whose devices the arrays of a tree, or of a template, lie.

    Empty where all of them lie on devices of this one.
    """
    shardings: set[Any] = {getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)}
    spread = [where for where in shardings if where is not None and not where.is_fully_addressable]
    return sorted({device.process_index for where in spread for device in where.device_set})


def group_for(path: Path, tree: Any) -> Group:
    """Who reads and writes the checkpoints of a tree, or of a template, in a directory.

    The processes on whose devices its arrays lie, if they are several; else this process alone.
    """
    processes = processes_with(tree)
    return Group(str(path), f"the checkpoints in {str(path)!r}", processes) if processes else ALONE
