"""A report as fit uses it."""

import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, EarlyStop, Trainer, layers, losses, reports, rng
from kaun._engine import StepResults
from kaun._engine.numbers import NumberLayout
from kaun._report import Composite
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
    layout = NumberLayout(dict.fromkeys(names, held[0]))
    return StepResults(first, len(values), held, [jnp.array(rows, jnp.float32)], layout, None, examples)


def test_nothing_is_asked_or_kept_without_a_report():
    caller = ReportCaller(None, None)
    assert not caller.wants(1) and caller.ahead(0, 100) == 100
    caller.ran(ran(1, 1.0))
    caller.finish()
    caller.end()


def test_a_plain_function_wants_every_step_and_stops_by_early_stop():
    caller = ReportCaller(lambda step, loss, state: None, 3)
    assert caller.ahead(0, 100) == 1
    assert caller.wants(1) and not caller.stops(1, jnp.float32(1), None)

    def stop(step, loss, state):
        raise EarlyStop

    assert ReportCaller(stop, None).stops(1, jnp.float32(1), None)


class Measuring(reports.Report):
    measures = ("loss",)

    def __call__(self, step, loss, state):
        if step == 3:
            raise EarlyStop
        return {"loss": loss} if step == 1 else None


class Several(Composite):
    """Made of several, with a call like that of one alone."""

    measures = ("loss",)
    __call__ = Measuring.__call__


def test_what_was_measured_is_passed_on_and_a_best_step_saved_unless_the_report_stops():
    def stop(step, loss, state):
        if step == 1:
            raise EarlyStop

    for report, expected in [
        (Measuring(), [(1, {"loss": 2.0}), (1, "state")]),
        (Several(), [(1, {"loss": 2.0}), (1, "state")]),
        (reports.all_of(stop, Measuring()), [(1, {"loss": 2.0})]),
    ]:
        found = []
        is_best = lambda *given, found=found: found.append(given) or True
        save_best = lambda *given, found=found: found.append(given)
        caller = ReportCaller(report, 3, is_best=is_best, save_best=save_best)
        stops = [caller.wants(step) and caller.stops(step, jnp.float32(2), "state") for step in (1, 2, 3)]
        assert found == expected and stops == [len(expected) == 1, False, True]


def test_a_report_is_asked_once_for_each_step_in_order_and_never_beyond_what_it_wants():
    asked = []

    def report(step, loss, state):
        pass

    report.wants = lambda step: asked.append(step) or step in (5, 6, 20)
    caller = ReportCaller(report, None)
    assert caller.ahead(0, 3) == 3 and asked == [1, 2, 3]
    assert not caller.wants(3)
    assert caller.ahead(3, 100) == 2 and asked == [1, 2, 3, 4, 5]
    assert caller.ahead(4, 100) == 1, "a step on the way was looked at"
    assert caller.wants(5)
    assert caller.ahead(5, 100) == 1 and caller.wants(6)
    assert caller.ahead(6, 4) == 4 and not caller.wants(10)
    assert [step for step in range(11, 22) if caller.wants(step)] == [20]
    assert asked == list(range(1, 22))


def test_losses_come_in_blocks_before_the_call_and_at_the_end():
    recorder = Recorder()
    caller = ReportCaller(recorder, None)
    caller._next = math.inf
    caller.ran(ran(1, 10.0))
    assert recorder.blocks == []
    caller.ran(ran(2, 20.0, 30.0))
    caller.stops(3, jnp.float32(30), "state")
    assert recorder.blocks == [(1, [10.0, 20.0, 30.0])] and recorder.called == (3, 30.0, "state")
    caller.ran(ran(4, 40.0))
    caller.finish()
    caller.finish()
    assert recorder.blocks == [(1, [10.0, 20.0, 30.0]), (4, [40.0])]


def test_blocks_are_delivered_also_if_no_step_is_wanted():
    recorder = Recorder()
    recorder.wants = lambda step: False
    caller = ReportCaller(recorder, None)
    for step in range(1, 200):
        caller.ran(ran(step, float(step)))
    caller.finish()
    found = [value for _, values in recorder.blocks for value in values]
    assert found == list(range(1, 200))
    assert len(recorder.blocks) > 1


def test_what_is_ready_is_delivered_after_a_moment_without_waiting():
    class Pending:
        def is_ready(self):
            return False

        def __array__(self, *_, **__):
            raise AssertionError("must not be waited for")

    recorder = Recorder()
    recorder.wants = lambda step: False
    caller = ReportCaller(recorder, None)
    caller._next = math.inf
    pending = ran(2, 1.0)._replace(losses=Pending(), numbers=Pending(), status=Pending())
    caller.ran(ran(1, 1.0))
    caller.ran(pending)
    assert recorder.blocks == []
    caller._next = 0.0
    caller.ran(pending._replace(first=3, steps=500))
    assert recorder.blocks == [(1, [1.0])]
    caller.ran(pending._replace(first=503))
    assert len(recorder.blocks) == 1


def test_a_report_must_be_callable():
    with pytest.raises(
        TypeError,
        match=r"fit expected a report, callable as \(step, loss, state\), received 3\. Write def report\(step, loss, state\)",
    ):
        ReportCaller(3, None)
    with pytest.raises(
        TypeError,
        match=r"callable as \(step, loss, state\), received `<lambda>` \(test_reports.py:\d+\), which takes \(step, loss\)",
    ):
        ReportCaller(lambda step, loss: None, None)
    with pytest.raises(TypeError, match=r"received `progress` .*, or call it first if it makes a report\."):
        ReportCaller(reports.progress, None)


def test_what_is_watched_must_be_measured():
    def report(step, loss, state):
        pass

    report.watches = ("f1", "accuracy")
    report.measures = ("accuracy", "mse")
    with pytest.raises(
        ValueError,
        match=r"A report watches 'f1', which no report of this fit measures; measured names: 'accuracy', 'mse'\. Add a report that measures it: reports\.all_of\(reports\.validate\(trainer, valid, {\"f1\": \.\.\.}",
    ):
        ReportCaller(report, None)
    report.measures = ()
    with pytest.raises(ValueError, match=r"watches 'accuracy', .*measured names: none"):
        ReportCaller(report, None)
    report.measures = ("accuracy", "f1")
    ReportCaller(report, None)


def test_compiling_is_called_before_and_what_it_returned_afterwards():
    called = []
    recorder = Recorder()

    def compile(report):
        caller = ReportCaller(report, None)
        caller.compiling("fit")
        caller.compiled(2.0)
        caller.compiled(3.0)

    compile(recorder)
    compile(None)
    recorder.compiling = called.append
    compile(recorder)
    assert called == ["fit"]
    recorder.compiling = lambda where: called.append(where) or called.append
    compile(recorder)
    assert called == ["fit", "fit", 2.0]


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
    caller = ReportCaller(report, None, done=10, before=jnp.int32(110))
    caller.ran(ran(11, 1.0, 2.0))
    caller.finish()
    ((first, values),) = report.blocks
    assert first == 11 and values["step"] == [111, 112]
    assert values["loss"] == [1.0, 2.0] and values["grad_norm"] == [2.0, 4.0]
    assert "finite" not in values and "skipped" not in values
    assert values["step_time"][0] > 0 and np.isclose(values["examples_per_second"][0], 4 / values["step_time"][0])


def test_steps_with_other_numbers_are_another_block():
    report = Values()
    caller = ReportCaller(report, None)
    caller._next = math.inf
    caller.ran(ran(1, 1.0, names=("accuracy",), examples=None))
    caller.ran(ran(2, 2.0, 3.0))
    caller._deliver(2)
    assert [(first, values["loss"]) for first, values in report.blocks] == [(1, [1.0]), (2, [2.0, 3.0])]
    assert report.blocks[0][1]["accuracy"] == [1.0] and "examples_per_second" not in report.blocks[0][1]


def test_the_step_that_ended_the_run_and_those_after_it_are_not_reported():
    report = Values()
    caller = ReportCaller(report, None, mode="raise")
    caller.ran(ran(1, 1.0, 2.0, math.nan, 9.0))
    caller.ran(ran(5, 9.0, 9.0))
    caller.finish()
    assert [(first, values["loss"]) for first, values in report.blocks] == [(1, [1.0, 2.0])]


def test_skipped_steps_are_reported_with_their_loss():
    report = Values()
    caller = ReportCaller(report, None, mode="skip")
    skipping = ran(1, 1.0, math.inf, 3.0, names=("grad_norm", "finite"))
    caller.ran(skipping._replace(numbers=[skipping.numbers[0].at[1, 1].set(0.0)]))
    caller.finish()
    assert report.blocks[0][1]["skipped"] == [False, True, False] and report.blocks[0][1]["loss"][1] == math.inf


def test_the_loss_of_a_report_that_was_interrupted_is_remembered():
    def failing(step, loss, state):
        raise OSError

    caller = ReportCaller(failing, None)
    with pytest.raises(OSError):
        caller.stops(1, jnp.float32(0.5), None)
    assert caller.pending_report_loss == 0.5
    resumed = ReportCaller(lambda step, loss, state: None, None, done=1, pending_report_loss=0.5)
    assert (
        resumed.wants(1)
        and not resumed.stops(1, resumed.pending_report_loss, None)
        and resumed.pending_report_loss is None
    )


def test_the_time_of_a_report_and_of_compiling_does_not_count_as_step_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(
        "kaun._run.reports.time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
    )
    report = Values()

    def slow(step, loss, state):
        now[0] += 100.0

    slow.block = report.block
    caller = ReportCaller(slow, None)
    caller.begin(lambda: None)
    now[0] += 12.0
    caller.compiled(8.0)
    caller.ran(ran(1, 1.0, 1.0))
    caller.stops(2, 1.0, None)
    now[0] += 3.0
    caller.ran(ran(3, 1.0))
    caller.finish()
    assert [values["step_time"] for _, values in report.blocks] == [[2.0, 2.0], [3.0]]


def test_a_plain_report_after_each_step_costs_few_calls_and_one_that_wants_none_hardly_any():
    """kaun's Python calls for a warm step, between two fits of other lengths."""
    with rng.scope(0):
        trainer = Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
        start = trainer.init()
    x = np.linspace(-1, 1, 400, dtype=np.float32).reshape(200, 2)
    data = Data.batches((x, x[:, :1]), batch_size=2).with_loss(losses.mse)
    root, calls = str(Path(kaun.__file__).parent), [0]

    def count(frame, event, _):
        calls[0] += event == "call" and frame.f_code.co_filename.startswith(root)

    def per_step(report):
        found = []
        for epochs in (1, 1, 3):
            calls[0] = 0
            sys.setprofile(count)
            trainer.fit(start, data.epochs(epochs), report=report)
            sys.setprofile(None)
            found.append(calls[0])
        return (found[2] - found[1]) / 200

    plain = lambda step, loss, state: None
    assert per_step(plain) <= 43.1
    assert per_step(reports.all_of(plain, reports.every(10, plain))) <= 49.4
    # Both count by the dispatch, and a clock decides how many steps one has: the least of some fits is compared.
    least = lambda report: min(per_step(report) for _ in range(4))
    assert least(reports.Report()) <= least(reports.every(10**6, plain)) + 1
