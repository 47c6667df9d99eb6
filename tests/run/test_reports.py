"""A report as fit uses it."""

import math
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from kaun import EarlyStop, reports
from kaun._engine.results import StepResults
from kaun._run.reports import ReportCaller


class Recorder:
    def __init__(self):
        self.blocks = []

    def __call__(self, step, loss, state):
        self.called = step, loss, state

    def wants(self, step):
        return step % 2 == 0

    def block(self, first_step, values):
        self.blocks.append((first_step, values["loss"].tolist()))


def ran(first, *values, names=("grad_norm",), examples=4):
    """What a dispatch of these steps gives: as long as its capacity."""
    rows = [[2 * value if name == "grad_norm" else 1.0 for name in names] for value in [*values, -1.0, -1.0]]
    held = jnp.array([*values, -1.0, -1.0], jnp.float32)
    return StepResults(first, len(values), held, names, jnp.array(rows, jnp.float32), None, examples)


def test_nothing_is_asked_or_kept_without_a_report():
    hook = ReportCaller(None, None)
    assert not hook.wants(1) and hook.ahead(0, 100) == 100
    hook.ran(ran(1, 1.0))
    hook.finish()
    hook.end()


def test_a_plain_function_wants_every_step_and_stops_by_early_stop():
    hook = ReportCaller(lambda step, loss, state: None, 3)
    assert hook.ahead(0, 100) == 1
    assert hook.wants(1) and not hook.stops(1, jnp.float32(1), None)

    def stop(step, loss, state):
        raise EarlyStop

    assert ReportCaller(stop, None).stops(1, jnp.float32(1), None)


def test_a_report_is_asked_once_for_each_step_in_order_and_never_beyond_what_it_wants():
    asked = []

    def report(step, loss, state):
        pass

    report.wants = lambda step: asked.append(step) or step in (5, 6, 20)
    hook = ReportCaller(report, None)
    assert hook.ahead(0, 3) == 3 and asked == [1, 2, 3]
    assert not hook.wants(3)
    assert hook.ahead(3, 100) == 2 and asked == [1, 2, 3, 4, 5]
    assert hook.ahead(4, 100) == 1, "a step on the way was looked at"
    assert hook.wants(5)
    assert hook.ahead(5, 100) == 1 and hook.wants(6)
    assert hook.ahead(6, 4) == 4 and not hook.wants(10)
    assert [step for step in range(11, 22) if hook.wants(step)] == [20]
    assert asked == list(range(1, 22))


def test_losses_come_in_blocks_before_the_call_and_at_the_end():
    recorder = Recorder()
    hook = ReportCaller(recorder, None)
    hook._next = math.inf
    hook.ran(ran(1, 10.0))
    assert recorder.blocks == []
    hook.ran(ran(2, 20.0, 30.0))
    hook.stops(3, jnp.float32(30), "state")
    assert recorder.blocks == [(1, [10.0, 20.0, 30.0])] and recorder.called == (3, 30.0, "state")
    hook.ran(ran(4, 40.0))
    hook.finish()
    hook.finish()
    assert recorder.blocks == [(1, [10.0, 20.0, 30.0]), (4, [40.0])]


def test_long_silences_are_delivered_by_and_by():
    recorder = Recorder()
    recorder.wants = lambda step: False
    hook = ReportCaller(recorder, None)
    for step in range(1, 200):
        hook.ran(ran(step, float(step)))
    hook.finish()
    found = [value for _, values in recorder.blocks for value in values]
    assert found == list(range(1, 200))
    assert len(recorder.blocks) > 1


def test_what_is_ready_is_delivered_after_a_moment_and_nothing_is_waited_for():
    class Pending:
        def is_ready(self):
            return False

        def __array__(self, *_, **__):
            raise AssertionError("must not be waited for")

    recorder = Recorder()
    recorder.wants = lambda step: False
    hook = ReportCaller(recorder, None)
    hook._next = math.inf
    pending = ran(2, 1.0)._replace(losses=Pending(), numbers=Pending(), status=Pending())
    hook.ran(ran(1, 1.0))
    hook.ran(pending)
    assert recorder.blocks == []
    hook._next = 0.0
    hook.ran(pending._replace(first=3, steps=500))
    assert recorder.blocks == [(1, [1.0])]
    hook.ran(pending._replace(first=503))
    assert len(recorder.blocks) == 1


def test_a_report_must_be_callable():
    with pytest.raises(TypeError, match="report expected a function"):
        ReportCaller(3, None)
    with pytest.raises(
        TypeError, match=r"report `<lambda>` \(test_hook.py:\d+\) must take three arguments, \(step, loss"
    ):
        ReportCaller(lambda step, loss: None, None)
    with pytest.raises(TypeError, match=r"report `progress` .*or call it if it makes a report: reports.progress\(\)"):
        ReportCaller(reports.progress, None)


def test_what_is_watched_must_be_measured():
    def report(step, loss, state):
        pass

    report.watches = ("f1", "accuracy")
    report.measures = ("accuracy", "mse")
    with pytest.raises(
        ValueError,
        match=r"A report watches 'f1', which no report of this fit measures; measured are 'accuracy', 'mse'\. Put one beside it: reports\.all_of\(reports\.validate\(trainer, valid, {\"f1\": \.\.\.}",
    ):
        ReportCaller(report, None)
    report.measures = ()
    with pytest.raises(ValueError, match=r"watches 'accuracy', .*measured are none"):
        ReportCaller(report, None)
    report.measures = ("accuracy", "f1")
    ReportCaller(report, None)


def test_compilation_is_told_to_those_who_listen():
    told = []
    recorder = Recorder()
    ReportCaller(recorder, None).compiled(1.0)
    ReportCaller(None, None).compiled(1.0)
    recorder.compiled = told.append
    ReportCaller(recorder, None).compiled(2.0)
    assert told == [2.0]


class Values:
    def __init__(self):
        self.blocks = []

    def __call__(self, step, loss, state):
        pass

    def wants(self, step):
        return False

    def block(self, first_step, values):
        self.blocks.append((first_step, {name: list(array) for name, array in values.items()}))


def test_a_block_has_every_number_of_its_steps_and_their_place_in_the_states_life():
    report = Values()
    hook = ReportCaller(report, None, done=10, before=jnp.int32(110))
    hook.ran(ran(11, 1.0, 2.0))
    hook.finish()
    ((first, values),) = report.blocks
    assert first == 11 and values["step"] == [111, 112]
    assert values["loss"] == [1.0, 2.0] and values["grad_norm"] == [2.0, 4.0]
    assert "finite" not in values and "skipped" not in values
    assert values["step_time"][0] > 0 and np.isclose(values["examples_per_second"][0], 4 / values["step_time"][0])


def test_steps_with_other_numbers_are_another_block():
    report = Values()
    hook = ReportCaller(report, None)
    hook._next = math.inf
    hook.ran(ran(1, 1.0, names=("accuracy",), examples=None))
    hook.ran(ran(2, 2.0, 3.0))
    hook._deliver(2)
    assert [(first, values["loss"]) for first, values in report.blocks] == [(1, [1.0]), (2, [2.0, 3.0])]
    assert report.blocks[0][1]["accuracy"] == [1.0] and "examples_per_second" not in report.blocks[0][1]


def test_nothing_is_told_of_the_step_that_ended_the_run_and_of_those_after_it():
    report = Values()
    hook = ReportCaller(report, None, mode="raise")
    hook.ran(ran(1, 1.0, 2.0, math.nan, 9.0))
    hook.ran(ran(5, 9.0, 9.0))
    hook.finish()
    assert [(first, values["loss"]) for first, values in report.blocks] == [(1, [1.0, 2.0])]


def test_skipped_steps_are_told_with_their_loss():
    report = Values()
    hook = ReportCaller(report, None, mode="skip")
    skipping = ran(1, 1.0, math.inf, 3.0, names=("grad_norm", "finite"))
    hook.ran(skipping._replace(numbers=skipping.numbers.at[1, 1].set(0.0)))
    hook.finish()
    assert report.blocks[0][1]["skipped"] == [False, True, False] and report.blocks[0][1]["loss"][1] == math.inf


def test_a_report_that_did_not_come_back_is_remembered():
    def failing(step, loss, state):
        raise OSError

    hook = ReportCaller(failing, None)
    with pytest.raises(OSError):
        hook.stops(1, jnp.float32(0.5), None)
    assert hook.again == 0.5
    resumed = ReportCaller(lambda step, loss, state: None, None, done=1, again=0.5)
    assert resumed.wants(1) and not resumed.stops(1, resumed.again, None) and resumed.again is None


def test_the_time_of_a_report_and_of_compiling_is_no_part_of_a_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(
        "kaun._run.reports.time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
    )
    report = Values()

    def slow(step, loss, state):
        now[0] += 100.0

    slow.block = report.block
    hook = ReportCaller(slow, None)
    hook.begin()
    now[0] += 12.0
    hook.compiled(8.0)
    hook.ran(ran(1, 1.0, 1.0))
    hook.stops(2, 1.0, None)
    now[0] += 3.0
    hook.ran(ran(3, 1.0))
    hook.finish()
    assert [values["step_time"] for _, values in report.blocks] == [[2.0, 2.0], [3.0]]
