"""This process, JAX's coordination service, and how long to wait for other processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
from typing import Any

import jax

from kaun._jax import coordination_client

__all__ = ["client_of_all", "end_of", "is_first", "tell_at_exit", "this_process", "timeout_of", "told_before"]

_TIMEOUT = 600.0


def this_process() -> int:
    """The number of this process."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def timeout_of(seconds: float | None = None) -> float:
    """How many seconds to wait for another process: as given, or ``KAUN_TIMEOUT``, or 600.

    Raises:
        ValueError: If ``KAUN_TIMEOUT`` is not a number of seconds.
    """
    if seconds is not None:
        return seconds
    text = os.environ.get("KAUN_TIMEOUT", str(_TIMEOUT))
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ValueError(
            "KAUN_TIMEOUT expected a number of seconds, how long one process waits for the others, received "
            f"{text!r}. Write KAUN_TIMEOUT=600."
        )
    return found


def client_of_all() -> Any:
    """JAX's service, by which the processes reach each other.

    Raises:
        RuntimeError: If it does not run.
    """
    client = coordination_client()
    if client is None:
        raise RuntimeError(
            f"This program has {jax.process_count()} processes, and none of them can be reached, because JAX's "
            "distributed service does not run. Make jax.distributed.initialize() the first line of the script."
        )
    return client


@functools.cache
def tell_at_exit() -> None:
    """Tell the other processes when this one ends, so that they need not wait for it; asked for once.

    Python runs this before JAX's own end, in which the process waits for the others.
    """
    atexit.register(_tell_end)


def _tell_end() -> None:
    error = getattr(sys, "last_value", None)  # that of the traceback which Python has just printed
    why = "it has ended" if error is None else f"it ended with {type(error).__name__}: {error}"
    with contextlib.suppress(RuntimeError):
        client_of_all().key_value_set(f"kaun/ended/{jax.process_index()}", why[:2000], True)


def end_of(process: int) -> str | None:
    """How another process has ended, None where it has not said that it does."""
    try:
        return client_of_all().key_value_try_get(f"kaun/ended/{process}")
    except jax.errors.JaxRuntimeError:
        return None


def told_before(name: str, value: str) -> dict[int, str]:
    """Tell the other processes a value, and return what those told under this name that came earlier; waits for none.

    Of two processes at least the one that comes second learns of the other.
    """
    client, me = coordination_client(), jax.process_index()
    if client is None or jax.process_count() == 1:
        return {}
    place = f"kaun/told/{name}/"
    client.key_value_set(f"{place}{me}", value, True)
    found = {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(place)}
    return {process: text for process, text in found.items() if process != me}
