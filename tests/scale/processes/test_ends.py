"""The long form of ``test_votes.py``: each failure in each process, on one and four devices, and each point of a kill."""

import contextlib
import signal
from pathlib import Path

import pytest

SCENARIOS = str(Path(__file__).with_name("scenarios.py"))
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
