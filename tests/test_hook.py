"""A report as fit uses it."""

import math

import jax.numpy as jnp
import pytest

from kaun import EarlyStop, reports
from kaun.hook import Hook


class Recorder:
    def __init__(self):
        self.blocks = []

    def __call__(self, step, loss, state):
        self.called = step, loss, state

    def wants(self, step):
        return step % 2 == 0

    def block(self, first_step, values):
        self.blocks.append((first_step, values["loss"].tolist()))


def test_nothing_is_asked_or_kept_without_a_report():
    hook = Hook(None, None)
    assert not hook.wants(1, jnp.float32(1))
    hook.finish()
    hook.end()


def test_a_plain_function_wants_every_step_and_stops_by_early_stop():
    hook = Hook(lambda step, loss, state: None, 3)
    assert hook.wants(1, jnp.float32(1)) and not hook.stops(1, jnp.float32(1), None)

    def stop(step, loss, state):
        raise EarlyStop

    assert Hook(stop, None).stops(1, jnp.float32(1), None)


def test_losses_come_in_blocks_before_the_call_and_at_the_end():
    recorder = Recorder()
    hook = Hook(recorder, None)
    assert not hook.wants(1, jnp.float32(10))
    assert recorder.blocks == []
    assert hook.wants(2, jnp.float32(20))
    hook.stops(2, jnp.float32(20), "state")
    assert recorder.blocks == [(1, [10.0, 20.0])] and recorder.called == (2, 20.0, "state")
    hook.wants(3, jnp.float32(30))
    hook.finish()
    hook.finish()
    assert recorder.blocks == [(1, [10.0, 20.0]), (3, [30.0])]


def test_long_silences_are_delivered_by_and_by():
    recorder = Recorder()
    recorder.wants = lambda step: False
    hook = Hook(recorder, None)
    for step in range(1, 200):
        hook.wants(step, jnp.float32(step))
    hook.finish()
    found = [value for _, values in recorder.blocks for value in values]
    assert found == list(range(1, 200))
    assert len(recorder.blocks) > 1 and all(len(values) < 128 for _, values in recorder.blocks)


def test_what_is_ready_is_delivered_after_a_moment_and_nothing_is_waited_for():
    class Pending:
        def is_ready(self):
            return False

        def __array__(self, *_, **__):
            raise AssertionError("must not be waited for")

    recorder = Recorder()
    recorder.wants = lambda step: False
    hook = Hook(recorder, None)
    hook._next = math.inf
    hook.wants(1, jnp.float32(1).block_until_ready())
    hook.wants(2, Pending())
    assert recorder.blocks == []
    hook._next = 0.0
    hook.wants(3, Pending())
    assert recorder.blocks == [(1, [1.0])]


def test_a_report_must_be_callable():
    with pytest.raises(TypeError, match="report expected a function"):
        Hook(3, None)
    with pytest.raises(TypeError, match=r"report `<lambda>` \(test_hook.py:\d+\) must take three arguments, \(step, loss"):
        Hook(lambda step, loss: None, None)
    with pytest.raises(TypeError, match=r"report `progress` .*or call it if it makes a report: reports.progress\(\)"):
        Hook(reports.progress, None)


def test_what_is_watched_must_be_measured():
    def report(step, loss, state):
        pass

    report.watches = ("f1", "accuracy")
    report.measures = ("accuracy", "mse")
    with pytest.raises(ValueError, match=r"A report watches 'f1', which no report of this fit measures; measured are 'accuracy', 'mse'\. Put one beside it: reports\.all_of\(reports\.validate\(trainer, valid, {\"f1\": \.\.\.}"):
        Hook(report, None)
    report.measures = ()
    with pytest.raises(ValueError, match=r"watches 'accuracy', .*measured are none"):
        Hook(report, None)
    report.measures = ("accuracy", "f1")
    Hook(report, None)


def test_compilation_is_told_to_those_who_listen():
    told = []
    recorder = Recorder()
    Hook(recorder, None).compiled(1.0)
    Hook(None, None).compiled(1.0)
    recorder.compiled = told.append
    Hook(recorder, None).compiled(2.0)
    assert told == [2.0]
