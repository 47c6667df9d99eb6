"""The exceptions for what happened in other processes."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from kaun.errors import FailedElsewhere

__all__ = ["came_late", "crossed", "failed_elsewhere", "missing", "unreachable"]


def failed_elsewhere(process: int, what: str) -> FailedElsewhere:
    """The exception for what happened in another process."""
    return FailedElsewhere(
        f"Process {process} failed, so process {jax.process_index()} ends too: {what.rstrip('.')}. The traceback is in "
        f"the output of process {process}.",
        process,
        what,
    )


def crossed(me: int, mine: str, process: int, other: str) -> FailedElsewhere:
    """The exception where two processes wait for each other, each in another call."""
    what = f"process {me} waits in {mine}, and process {process} in {other}, each for the other one"
    return FailedElsewhere(
        f"P{what[1:]}, so neither would go on. All processes have to make the same calls of fit, evaluate "
        "and the like, in the same order. Look for one inside of `if jax.process_index() == 0`, or for a report "
        "that evaluates (reports.validate) in one process alone: it has to be there in all of them.",
        process,
        what,
    )


def missing(missing: Sequence[int], me: int, what: str, timeout: float) -> FailedElsewhere:
    """The exception where processes did not come in time."""
    many, who = len(missing) > 1, ", ".join(map(str, missing))
    return FailedElsewhere(
        f"Process{'es' * many} {who} did not come to {what} within {timeout:g} seconds, where process {me} waits. "
        f"{'Each of them' if many else 'It'} has ended, or hangs, or takes another way through the program: all "
        "processes have to call fit, evaluate and the like in the same order. Its own output says more. If it is only "
        "slow, set the environment variable KAUN_TIMEOUT to more seconds in all processes.",
        missing[0],
        f"did not come to {what} within {timeout:g} seconds",
    )


def came_late(waited: Sequence[int], me: int, what: str, timeout: float) -> FailedElsewhere:
    """The exception in a process that came after the others had waited."""
    return FailedElsewhere(
        f"Process {me} came to {what} after process {waited[0]} had waited for {timeout:g} seconds. If one process is "
        "only slower than another, set the environment variable KAUN_TIMEOUT to more seconds in all processes.",
        waited[0],
        f"waited at {what} for {timeout:g} seconds",
    )


def unreachable(first: int, what: str, error: Exception) -> FailedElsewhere:
    """The exception where JAX's service does not answer."""
    return FailedElsewhere(
        f"Process {first} cannot be reached at {what}; it has probably ended, and its own output says why. "
        f"JAX's distributed service said: {str(error).splitlines()[0]}",
        first,
        "cannot be reached",
    )
