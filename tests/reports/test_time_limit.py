"""time_limit with a fake clock, and in a fit."""

import importlib
import json
import math

import numpy as np
import optax
import pytest

from kaun import Data, EarlyStop, Trainer, layers, losses, reports, rng

MODULE = importlib.import_module("kaun.reports.time_limit")


@pytest.fixture(scope="module")
def made():
    with rng.scope(0):
        trainer = Trainer(model=layers.linear(2, 1), optimizer=optax.adam(3e-2))
        start = trainer.init()
        x = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
        train = Data.batches((x, x[:, :1]), batch_size=8, shuffle=True).with_loss(losses.mse)
    return trainer, start, train


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(MODULE, "monotonic", lambda: Clock.now)
    return Clock


def test_time_runs_from_the_beginning_of_each_fit(clock):
    report = reports.time_limit(minutes=2)
    for _ in range(2):
        clock.now += 1000
        report.begin(1, None)
        clock.now += 119.5
        assert not report.wants(7)
        report(7, 0.5, None)  # also where a function passes every step on
        report.begin(1, None)  # a fit inside
        assert not report.wants(1)
        report.end()
        clock.now += 0.5
        assert report.wants(8)
        with pytest.raises(EarlyStop):
            report(8, 0.5, None)
        report.end()


def test_a_resumed_run_has_what_is_left(clock):
    report = reports.time_limit(2)
    report.begin(1, None)
    clock.now += 50
    kept = report.snapshot()
    report.end()
    again = reports.time_limit(2)
    again.restore(json.loads(json.dumps(kept)))
    clock.now += 10_000
    assert again.snapshot() == {"seconds": 50}
    again.begin(301, None)
    clock.now += 69
    assert not again.wants(400) and again.snapshot() == {"seconds": 119}
    clock.now += 1
    assert again.wants(401)
    again.end()
    again.begin(1, None)
    assert not again.wants(1)


def test_time_limit_ends_a_fit_and_the_other_reports_see_the_step(made, clock):
    trainer, start, train = made
    seen = []

    def tick(step, loss, state):
        clock.now += 1
        seen.append(step)

    end = trainer.fit(start, train.epochs(12), report=reports.all_of(reports.time_limit(0.5), tick))
    assert int(end.step) == 31 and seen == list(range(1, 32))


@pytest.mark.parametrize(
    ("minutes", "error", "text"),
    [
        ("1", TypeError, r"time_limit expected a number of minutes, received '1'\. Write time_limit\(minutes=90\)"),
        (True, TypeError, "received True"),
        (0, ValueError, "time_limit expected a finite number of minutes above 0, received 0"),
        (math.inf, ValueError, "received inf"),
    ],
)
def test_errors_of_time_limit(minutes, error, text):
    with pytest.raises(error, match=text):
        reports.time_limit(minutes)
