"""Calls of ``step``, ``predict`` and the like: the processes meet once for each program, and see a failure in another.

A program that one process runs and another does not would never end. So processes meet where a program is new, when all
that can fail in one of them alone has been done: tracing and compiling. Later calls cost nothing more. A process in
which a call fails leaves a note with the number of that call, and the others find it where they wait: at a meeting, or
for their devices. A tiny program on one device of a CPU runs inside of the call, which then waits as long as gloo does.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax

from kaun._messages import contextmanager, set_on
from kaun._processes.calls import Call, calls_of, failure_of, note_failure, waits_at
from kaun._processes.channel import Channel
from kaun._processes.failures import crossed, failed_elsewhere
from kaun._processes.service import end_of
from kaun.errors import FailedElsewhere

__all__ = ["failures_told", "mark_told", "meet", "tell_failure", "wait_for_devices", "wait_until_ready"]

_SINGLE = "single"
_TOLD = "kaun_told"
_PATIENCE = 1.0  # seconds after which a process that waits for its devices asks whether another one has failed
_LAG = 0.05  # of the time that it has waited, how much later it may notice that they are ready


def meet(entry: str, processes: Sequence[int], facts: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Come together in a call, and return what each process says, by its number.

    Args:
        entry: What is called: ``"step"``.
        processes: The numbers of the processes that call it; in one alone nothing is done.
        facts: What this process says.

    Raises:
        FailedElsewhere: If that call has failed in another process, or it does not come, or to another call.
    """
    if len(processes) < 2:
        return {}
    call = Call.new(entry, processes, _SINGLE)
    channel, mine = Channel.of(call, f"the first {entry} of this kind"), [entry, str(call), facts]
    told = json.loads(channel.exchange(json.dumps(mine), json.dumps))
    found = {int(process): json.loads(said) for process, said in told.items()}
    for process, (other, where, _) in found.items():
        if other != entry:
            raise crossed(jax.process_index(), str(call), process, where)
    return {process: facts for process, (_, _, facts) in found.items()}


def mark_told(error: BaseException) -> None:
    """Note on an exception that the others know of it."""
    set_on(error, _TOLD, True)


def tell_failure(entry: str, processes: Sequence[int], error: BaseException) -> None:
    """Leave a note for the others that a call has failed in this process, once for an exception."""
    if len(processes) < 2 or isinstance(error, FailedElsewhere) or getattr(error, _TOLD, False):
        return
    mark_told(error)
    with contextlib.suppress(RuntimeError):  # the service is gone, or was never there
        note_failure(Call.new(entry, processes, _SINGLE), f"{type(error).__name__}: {error}"[:2000])


@contextmanager
def failures_told(entry: str, processes: Sequence[int]) -> Generator[None]:
    """A block whose exception is told to the others, as by ``tell_failure``."""
    try:
        yield
    except BaseException as error:
        tell_failure(entry, processes, error)
        raise


def wait_for_devices(entry: str, processes: Sequence[int], arrays: Any) -> None:
    """Wait for what a call gives, unless that call fails in another process.

    Args:
        entry: As for ``meet``.
        processes: As for ``meet``.
        arrays: A pytree of arrays.

    Raises:
        FailedElsewhere: In that case.
    """
    others = [process for process in processes if process != jax.process_index()]

    def check(seconds: float) -> None:
        number = calls_of(processes) + 1
        for process in others:
            why = failure_of(processes, number, process) or end_of(process)
            if why is not None:
                raise failed_elsewhere(process, why)
            there = waits_at(process)  # with a program that is new there, and not here
            if there is not None and there.name == Call(_SINGLE, tuple(processes), number, "").name:
                meet(entry, processes, {})

    wait_until_ready([leaf for leaf in jax.tree_util.tree_leaves(arrays) if isinstance(leaf, jax.Array)], check)


def wait_until_ready(arrays: Sequence[Any], check: Callable[[float], None]) -> None:
    """Wait for arrays on the devices.

    Args:
        arrays: The arrays.
        check: Called once a second with the seconds that it has waited; it raises where it is vain to wait.
    """
    start = asked = time.monotonic()
    for array in arrays:
        while not array.is_ready():
            now = time.monotonic()
            if now - asked > _PATIENCE:
                asked = now
                check(now - start)
            time.sleep(min(max(2e-5, _LAG * (now - start)), 1e-3))
