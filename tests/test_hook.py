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


def losses(*values):
    """What a dispatch of these steps gives: as long as its capacity."""
    return len(values), jnp.array([*values, -1.0, -1.0], jnp.float32)


def test_nothing_is_asked_or_kept_without_a_report():
    hook = Hook(None, None)
    assert not hook.wants(1) and hook.ahead(0, 100) == 100
    hook.ran(*losses(1.0))
    hook.finish()
    hook.end()


def test_a_plain_function_wants_every_step_and_stops_by_early_stop():
    hook = Hook(lambda step, loss, state: None, 3)
    assert hook.ahead(0, 100) == 1
    assert hook.wants(1) and not hook.stops(1, jnp.float32(1), None)

    def stop(step, loss, state):
        raise EarlyStop

    assert Hook(stop, None).stops(1, jnp.float32(1), None)


def test_a_report_is_asked_once_for_each_step_in_order_and_never_beyond_what_it_wants():
    asked = []

    def report(step, loss, state):
        pass

    report.wants = lambda step: asked.append(step) or step in (5, 6, 20)
    hook = Hook(report, None)
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
    hook = Hook(recorder, None)
    hook._next = math.inf
    hook.ran(*losses(10.0))
    assert recorder.blocks == []
    hook.ran(*losses(20.0, 30.0))
    hook.stops(3, jnp.float32(30), "state")
    assert recorder.blocks == [(1, [10.0, 20.0, 30.0])] and recorder.called == (3, 30.0, "state")
    hook.ran(*losses(40.0))
    hook.finish()
    hook.finish()
    assert recorder.blocks == [(1, [10.0, 20.0, 30.0]), (4, [40.0])]


def test_long_silences_are_delivered_by_and_by():
    recorder = Recorder()
    recorder.wants = lambda step: False
    hook = Hook(recorder, None)
    for step in range(1, 200):
        hook.ran(1, jnp.full(3, step, jnp.float32).block_until_ready())
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
    hook = Hook(recorder, None)
    hook._next = math.inf
    hook.ran(1, jnp.ones(1).block_until_ready())
    hook.ran(1, Pending())
    assert recorder.blocks == []
    hook._next = 0.0
    hook.ran(500, Pending())
    assert recorder.blocks == [(1, [1.0])]
    hook.ran(1, Pending())
    assert len(recorder.blocks) == 1


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
