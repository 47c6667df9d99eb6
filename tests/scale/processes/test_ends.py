"""The long form of ``test_votes.py``: each failure in each process, on one and four devices, and each point of a kill."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCENARIOS = str(Path(__file__).with_name("scenarios.py"))
SINGLE = str(Path(__file__).with_name("single_scenarios.py"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def group(make_group):
    """Two processes of one device each; a test that ends one of them makes its own."""
    with contextlib.closing(make_group(devices=1)) as made:
        yield made


def both(group, name, **arguments):
    (how, *state, warned), (other, *same, _) = group.run(SCENARIOS, name, **arguments)
    assert state == same
    return how, other, state[0], warned


def ends_all(group, name, process, error, step, **arguments):
    *how, at, _ = both(group, name, process=process, **arguments)
    assert at == step and how[process] == error
    assert f"Process {process} failed, so process {1 - process} ends too: {error}" in how[1 - process]


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("at", [1, 2, 19])
def test_data_that_fails_in_one_process(group, process, at):
    ends_all(group, "data_fails", process, "ValueError: no such file", at, at=at)


@pytest.mark.parametrize("process", [0, 1])
def test_data_that_fails_at_the_first_item(group, process):
    *how, step, _ = both(group, "data_fails", process=process, at=0)
    assert step == 0 and how[process] == "ValueError: no such file" and "FailedElsewhere" in how[1 - process]


@pytest.mark.parametrize("process", [0, 1])
def test_data_without_items_in_one_process(group, process):
    *how, step, _ = both(group, "data_ends", process=process, at=0)
    assert step == 0 and how[process].startswith("ValueError: fit received no items: the data is empty.")
    assert f"Process {process} failed, so process {1 - process} ends too: ValueError: fit received" in how[1 - process]


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("at", [1, 12, 19])
def test_data_that_ends_early_in_one_process(group, process, at):
    how, other, step, warned = both(group, "data_ends", process=process, at=at)
    assert how == other == "returned" and step == at and f"The data of process {process} ended after" in warned[0]


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("at", [1, 6])
def test_a_report_that_stops_or_fails_in_one_process(group, process, everywhere, at):
    stopped = both(group, "report_does", process=process, at=at, what="stop", everywhere=everywhere)
    assert stopped == ("returned", "returned", at, [])
    ends_all(group, "report_does", process, "OSError: disk full", at, at=at, what="fail", everywhere=everywhere)


@pytest.mark.parametrize("process", [0, 1])
def test_a_loss_that_fails_in_one_process(group, process):
    ends_all(group, "loss_fails", process, "ArithmeticError: no such row", 3, at=3)


@pytest.mark.parametrize("what", ["values", "later", "shapes", "key", "stages", "unscoped"])
def test_what_differs_between_the_processes(group, what):
    assert all(how.startswith("ValueError: ") for how in both(group, "other_items", what=what)[:2])


@pytest.mark.parametrize("process", [0, 1])
def test_numbers_that_the_report_of_one_process_wants(group, process):
    ends = group.run(SCENARIOS, "layer_norms_in", process=process)
    assert ends[0][0] == ends[1][0] and ends[process][1] == [2, 4, 6] and ends[1 - process][1] == []


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_signals(group, process, number):
    *how, step, _ = both(group, "signalled", process=process, at=70, number=int(number))
    assert step == 70 and how[process] == ("KeyboardInterrupt: " if number == signal.SIGINT else "SystemExit: 138")


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("report_in", [None, 0, 1])
def test_signals_where_no_vote_is_due_for_each_dispatch(group, process, report_in):
    for number, error in ((signal.SIGINT, "KeyboardInterrupt: "), (signal.SIGUSR1, "SystemExit: 138")):
        *how, step, _ = both(group, "interrupted", process=process, number=int(number), report_in=report_in)
        assert how[process] == error and step > 0
        assert how[1 - process] == error or f"Process {process} failed, so" in how[1 - process]


def test_steps_that_are_not_finite(group):
    how, other, step, _ = both(group, "not_finite", at=7)
    assert how == other and how.startswith("NonFiniteLoss: The loss is nan at step 8") and step == 7


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("tool", ["lr_range", "update_statistics", "validate"])
def test_what_runs_a_fit_of_its_own_and_fails_in_one_process(group, process, tool):
    ends = group.run(SCENARIOS, "tool_fails", process=process, tool=tool)
    assert ends[process][0].startswith("ArithmeticError: no such ")
    (ended, seconds) = ends[1 - process]
    assert ended.startswith(f"FailedElsewhere: Process {process} failed, so process {1 - process} ends too: Arithm")
    assert seconds < 15


@pytest.mark.parametrize("process", [0, 1])
def test_a_time_limit_in_one_process(group, process):
    how, other, step, _ = both(group, "limited", process=process)
    assert how == other == "returned" and step > 0


@pytest.mark.parametrize("service", ["1", "0"])
def test_sigterm_with_and_without_the_preemption_service(make_group, service):
    with contextlib.closing(make_group(JAX_ENABLE_PREEMPTION_SERVICE=service)) as group:
        how, other, step, _ = both(group, "signalled", process=1, at=70, number=int(signal.SIGTERM))
        assert how == other == "SystemExit: 143" and (70 <= step < 2000 if service == "1" else step == 70)


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("pause", [0.0, 0.01])
def test_kills(make_group, process, pause):
    with contextlib.closing(make_group()) as group:
        group.begin(SCENARIOS, "killed", process=process, at=100, pause=pause, timeout=2)
        if process == 1:
            ((how, step, _, _),) = group.results(among=[0])
            assert how.startswith("FailedElsewhere: Process 1 ") and step <= 100
        else:  # process 0 holds the service: without it JAX ends the others itself, or they find that it is gone
            how = group.result_or_exit(1)
            assert how in (-6, 1) or how[0].startswith("FailedElsewhere: Process 0 ")


def test_reports_that_write(group, tmp_path):
    first, second = group.run(SCENARIOS, "ready_made_reports", folder=str(tmp_path), traced=(3, 4))
    assert first[0] == second[0] and first[1:3] == (["curve.png", "log.csv", "loss.png", "trace"], True)
    assert second[1:3] == ([], False)


def test_four_devices_each(make_group):
    with contextlib.closing(make_group(devices=4)) as group:
        assert both(group, "plain", n=12)[:3] == ("returned", "returned", 12)
        ends_all(group, "data_fails", 1, "ValueError: no such file", 7, at=7)


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("entry", ["step", "predict", "no input", "init", "flush"])
def test_single_calls_that_fail_in_one_process(group, process, entry):
    found = group.run(SINGLE, "call_fails", process=process, entry=entry)
    (own, _, after), (other, seconds, same) = found[process], found[1 - process]
    assert "only here" in own or entry in ("predict", "no input")
    assert other.startswith(f"FailedElsewhere: Process {process} failed, so process {1 - process} ends too: {own[:60]}")
    assert seconds < 15 and after == same


@pytest.mark.parametrize("process", [0, 1])
def test_a_single_call_that_one_process_leaves_out(group, process):
    ends = group.run(SINGLE, "one_predicts", process=process)
    assert all("waits in predict (single_scenarios.py:" in how and seconds < 15 for how, seconds, _ in ends)
    assert ends[0][2] == ends[1][2]


def test_a_program_that_is_new_in_one_process_alone_and_one_that_fails_there(make_group):
    with contextlib.closing(
        make_group()
    ) as group:  # at the end the devices of process 0 wait on for those of process 1
        (found, _, after), (other, _, same) = group.run(SINGLE, "steps_differ", what="programs")
        assert len(found) == len(other) == 3 and after == same
        (how, seconds), (own, _) = group.run(SINGLE, "fails_later", process=1)
        assert how.startswith(f"FailedElsewhere: Process 1 failed, so process 0 ends too: {own[:40]}") and seconds < 15


@pytest.mark.parametrize("mode", ["skip", "ignore"])
def test_steps_that_are_not_finite_and_go_on(group, mode):
    first, second = group.run(SINGLE, "discards", mode=mode)
    assert first == second and first[0] == first[1] and first[2:] == (3, mode == "skip")


def test_an_ensemble_over_both_processes(group):
    first, second = group.run(SINGLE, "ensemble")
    assert first == second
    same, seen, mse, own, shape, alone, member, lost = first
    assert same and len(seen) == 4 and mse == own and (shape, alone, member) == ((4, 16, 2), (16, 2), (3, 2))
    assert lost.startswith("NonFiniteLoss: No member of the ensemble is finite any more.")


@pytest.mark.parametrize("how", ["raise KeyError(2)", "sys.exit()"])
def test_a_process_that_ends_outside_of_kaun(tmp_path, how):
    """The other one learns of it in its next call, and does not wait for a time limit."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    script = tmp_path / "train.py"
    script.write_text(ENDS.format(port=port, how=how))
    flags = {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "KAUN_TIMEOUT": "100"}
    env = os.environ | flags | {"PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    start = time.monotonic()
    started = [
        subprocess.Popen([sys.executable, str(script), str(rank)], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    texts = [process.communicate(timeout=90)[1] for process in started]
    what = "it ended with KeyError: 2" if "Key" in how else "it has ended"
    assert f"FailedElsewhere: Process 1 failed, so process 0 ends too: {what}." in texts[0], texts
    assert time.monotonic() - start < 80


ENDS = """
import sys
import jax
rank = int(sys.argv[1])
jax.distributed.initialize("127.0.0.1:{port}", 2, rank)
import numpy as np, optax, kaun
from kaun import layers, rng, sharding
with rng.scope(0):
    trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1), sharding=sharding.data_parallel())
    state = trainer.init()
if rank:
    {how}
trainer.fit(state, [(np.ones((4, 2), np.float32), lambda output: output.mean())])
"""
