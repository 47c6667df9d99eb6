"""What is left when an exception ends a fit. ``test_run.py`` and tests/scale/processes have whole fits."""

import types

import jax
import pytest

from kaun._run.failure import save_on_error
from kaun.errors import FailedElsewhere


@pytest.mark.parametrize("several", [True, False])
def test_what_the_devices_say_after_another_process_has_failed_does_not_replace_its_name(several):
    gloo = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    together = types.SimpleNamespace(fail=lambda error: None, broken=True) if several else None
    run = types.SimpleNamespace(together=together, saver=None, now=None)
    loop = types.SimpleNamespace(failure=lambda: gloo, recover=lambda: "newest", done=3)
    hook = types.SimpleNamespace(
        begin=lambda now: None, end=lambda: None, finish=lambda: None, pending_report_loss=None
    )
    elsewhere = FailedElsewhere("Process 1 did not come", 1, "did not come")
    kinds = (FailedElsewhere, jax.errors.JaxRuntimeError)
    with pytest.raises(kinds) as raised, save_on_error(run, loop, lambda: "state", hook):
        raise elsewhere
    assert raised.value is (elsewhere if several else gloo) and raised.value.kaun_state == "state"
