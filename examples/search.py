"""An Optuna search for a learning rate, a width and a rate of dropout; trials that look bad end early.

Run it with: python examples/search.py           (needs pip install ".[examples,optuna]")
         or: python examples/search.py --trials 5

Many learning rates of one model are faster as one Ensemble: examples/sweep.py.
"""

import argparse

import numpy as np
import optax
import optuna
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import kaun
from kaun import Data, layers, losses, reports, rng


def load_data():
    x, y = load_breast_cancer(return_X_y=True)
    x = ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32)
    x, valid_x, y, valid_y = train_test_split(x, y.astype(np.float32)[:, None], stratify=y, random_state=0)
    return (x, y), (valid_x, valid_y)


def main(*, trials=15, epochs=20, seed=0):
    train_arrays, valid_arrays = load_data()
    valid = Data.batches(valid_arrays, batch_size=256)

    def objective(trial):
        rate = trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
        width = trial.suggest_categorical("width", [8, 32])
        dropout = trial.suggest_float("dropout", 0.0, 0.5)
        hidden = [layers.linear(30, width), layers.relu(), layers.dropout(dropout)]
        with rng.scope(seed):
            model = layers.sequential([*hidden, layers.linear(width, 1)])
            trainer = kaun.Trainer(model=model, optimizer=optax.adam(rate))
            state = trainer.init()
            train = Data.batches(train_arrays, batch_size=64, shuffle=True, pad=True)
        train = train.with_loss(losses.binary_cross_entropy)
        validation = reports.validate(trainer, valid, {"loss": losses.binary_cross_entropy}, each=train)
        stopper = reports.early_stopping("loss", mode="min", patience=5)
        report = reports.all_of(validation, stopper, reports.prune(trial, "loss"))
        trainer.fit(state, train.epochs(epochs), report=report)
        return stopper.best_value

    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=14)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner)
    study.optimize(objective, n_trials=trials)
    pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)
    print(f"{trials} trials, {pruned} of them ended early; best loss {study.best_value:.4f} with {study.best_params}")
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Search for good settings of a small network.")
    parser.add_argument("--trials", type=int, default=15, help="number of trials (default 15)")
    main(**vars(parser.parse_args()))
