"""prune: a trial gets the measured values, and its fit ends where it is pruned."""

import sys
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, reports, rng


class TrialPruned(Exception):
    """Optuna's exception, where Optuna is not installed."""


class Trial:
    """The part of ``optuna.Trial`` that the report uses."""

    def __init__(self, prune_at):
        self.values, self._prune_at = {}, prune_at

    def report(self, value, step):
        assert type(value) is float and type(step) is int
        self.values[step] = value

    def should_prune(self):
        return max(self.values) >= self._prune_at


class Measured(reports.Report):
    measures = ("score", "other")

    def wants(self, step):
        return step % 5 == 0

    def __call__(self, step, loss, state):
        return {"score": 1 / step} if step != 10 else {"other": 0.0}


@pytest.fixture
def fit(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", types.SimpleNamespace(TrialPruned=TrialPruned))
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
        state = trainer.init().replace(step=jnp.int32(100))
    data = Data.repeat(40, (np.ones((3, 2), np.float32), lambda out: losses.mse(out, jnp.ones((3, 1)))))
    return lambda *each: trainer.fit(state, data, report=reports.all_of(*each))


def test_a_trial_gets_each_value_under_the_step_of_the_state(fit):
    trial = Trial(1000)
    end = fit(reports.prune(trial, "score"), Measured())
    assert trial.values == {100 + step: 1 / step for step in (5, 15, 20, 25, 30, 35, 40)} and int(end.step) == 140


def test_a_pruned_trial_ends_the_fit_with_its_state(fit):
    trial = Trial(120)
    with pytest.raises(TrialPruned, match="pruned at step 120") as caught:
        fit(Measured(), reports.prune(trial, "score"))
    assert list(trial.values) == [105, 115, 120] and int(caught.value.kaun_state.step) == 120


def test_a_value_that_nothing_measures_is_refused(fit):
    with pytest.raises(ValueError, match="A report watches 'accuracy', which no report of this fit measures"):
        fit(Measured(), reports.prune(Trial(0), "accuracy"))


def test_arguments_are_checked():
    with pytest.raises(
        TypeError, match=r"prune expected an optuna.Trial first, with report and should_prune, received str"
    ):
        reports.prune("accuracy", Trial(0))
    with pytest.raises(
        TypeError, match=r'prune expected the name of a measured value, received 3. Write prune\(trial, "loss"\)'
    ):
        reports.prune(Trial(0), 3)


def test_without_optuna_it_names_the_extra(fit, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        ImportError, match=r'reports.prune needs optuna, which is missing: pip install "\.\[optuna\]" in a checkout'
    ):
        fit(Measured(), reports.prune(Trial(0), "score"))
