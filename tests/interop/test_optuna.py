"""A study of Optuna that prunes trials by what ``validate`` measures."""

import runpy
from pathlib import Path

import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, reports, rng


def test_a_study_prunes_the_worse_trials():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    x = np.random.default_rng(0).normal(size=(32, 2)).astype(np.float32)
    pairs = Data.batches((x, x @ np.array([[1.0], [-2.0]], np.float32)), batch_size=8)
    train = pairs.with_loss(losses.mse)

    def objective(trial):
        rate = trial.suggest_categorical("rate", [0.1, 1e-6])
        with rng.scope(0):
            trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(rate))
            state = trainer.init()
        validation = reports.validate(trainer, pairs, {"mse": losses.mse}, each=train)
        trainer.fit(state, train.epochs(5), report=reports.all_of(validation, reports.prune(trial, "mse")))
        return validation.latest["mse"]

    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0))
    study.enqueue_trial({"rate": 0.1})
    study.enqueue_trial({"rate": 1e-6})
    study.optimize(objective, n_trials=2)
    good, bad = study.trials
    assert (good.state, bad.state) == (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    assert sorted(good.intermediate_values) == [4, 8, 12, 16, 20] and sorted(bad.intermediate_values) == [4]
    assert study.best_value == good.value < 0.1


def test_the_example_searches():
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = Path(__file__).resolve().parents[2] / "examples" / "search.py"
    study = runpy.run_path(str(path))["main"](trials=2, epochs=2)
    assert [trial.state for trial in study.trials] == [optuna.trial.TrialState.COMPLETE] * 2
    assert set(study.best_params) == {"learning_rate", "width", "dropout"} and study.best_value < 0.7
