"""What the processes of a group run."""

import time

import jax

from kaun import _processes


def meet(times):
    """The values of all processes, each time."""
    channel = _processes.Channel("meet", what="the meeting")
    return [channel.exchange(f"{jax.process_index()}-{i}") for i in range(times)]


def wait(names, missing=None):
    for name in names:
        if jax.process_index() != missing:
            _processes.barrier(name, timeout=1.0 if missing is not None else None)
    return _processes.is_first()


def seconds_of_a_meeting():
    channel = _processes.Channel("clock")
    channel.exchange()
    start = time.perf_counter()
    for _ in range(100):
        channel.exchange("a")
    return (time.perf_counter() - start) / 100
