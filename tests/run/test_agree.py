"""What a process does that waits for the devices of others. tests/scale/processes has fits in two processes."""

import types

import jax
import pytest

from kaun._run import agree
from kaun.errors import FailedElsewhere


class Service:
    """The part of JAX's service that is asked here: which processes have told why they left."""

    def __init__(self):
        self.left = {}

    def key_value_try_get(self, key):
        if key not in self.left:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: Config key {key} not found.")
        return self.left[key]


def test_a_wait_for_devices_ends_where_another_process_has_failed_or_after_the_time(monkeypatch):
    service = Service()
    monkeypatch.setattr("kaun._processes.service.coordination_client", lambda: service)
    monkeypatch.setattr("kaun._processes.single._PATIENCE", 0.001)
    monkeypatch.setenv("KAUN_TIMEOUT", "0.01")
    never = types.SimpleNamespace(is_ready=lambda: False)

    def waits():
        together = agree.Agreement((0, 1))
        together.attach(types.SimpleNamespace(done=8), dict, together._signals, None)
        return together

    together = waits()
    with pytest.raises(FailedElsewhere) as raised:
        together.wait(never)
    assert (raised.value.process, raised.value.what) == (
        1, "the devices did not finish a step within 0.01 seconds, for which they need those of all",
    )  # fmt: skip
    assert together.broken and not together.readable([never])
    with pytest.raises(FailedElsewhere) as again:
        together.wait(never)
    assert again.value is raised.value

    together = waits()
    name = f"kaun/{together._channel._name}/left/1"
    monkeypatch.setenv("KAUN_TIMEOUT", "60")
    service.left[name] = '["OSError: disk full", 4, false, 1]'  # it has not dispatched what this one waits for
    with pytest.raises(FailedElsewhere, match=r"process 0 ends too: OSError: disk full\. The traceback"):
        together.wait(never)

    together = waits()
    name = f"kaun/{together._channel._name}/left/1"
    service.left[name] = '["OSError: disk full", 8, false, 1]'  # it has, and the devices go on
    ready = iter([False] * 5 + [True])
    together.wait(types.SimpleNamespace(is_ready=lambda: next(ready)))
    assert not together.broken
