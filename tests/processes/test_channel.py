"""What processes tell each other, as far as it can be seen in one. tests/scale/processes has two."""

import jax
import pytest

from kaun import _processes
from kaun.errors import FailedElsewhere


def test_one_process_is_the_first_and_waits_for_none(monkeypatch):
    assert _processes.is_first() and _processes.this_process() == 0
    assert _processes.Channel("alone").exchange("a", repr) == "{0: 'a'}"
    _processes.barrier("alone")


def test_the_seconds_to_wait(monkeypatch):
    assert _processes.timeout_of() == 600 and _processes.timeout_of(2.5) == 2.5
    monkeypatch.setenv("KAUN_TIMEOUT", "30")
    assert _processes.timeout_of() == 30
    for text in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("KAUN_TIMEOUT", text)
        with pytest.raises(
            ValueError, match=rf"one process waits for the others, received '{text}'. Write KAUN_TIMEOUT=600"
        ):
            _processes.timeout_of()


def test_a_service_that_does_not_run_or_does_not_answer(monkeypatch):
    channel = _processes.Channel("two", (0, 1), "the steps")
    with pytest.raises(
        RuntimeError, match=r"distributed service does not run. Make jax.distributed.initialize\(\) the"
    ):
        channel.exchange("", repr)

    class Gone:
        def key_value_set(self, *given):
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: Failed to send RPC\nand more")

    monkeypatch.setattr("kaun._processes.service.coordination_client", Gone)
    with pytest.raises(FailedElsewhere) as raised:
        channel.exchange("", repr)
    assert str(raised.value) == (
        "Process 0 cannot be reached at the steps; it has probably ended, and its own output says why. JAX's "
        "distributed service said: UNAVAILABLE: Failed to send RPC"
    )
    assert (raised.value.process, raised.value.what) == (0, "cannot be reached")
