"""Five-fold cross-validation: one model for each fold, and all of them trained at once.

Run it with: python examples/kfold.py
"""

import functools

import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

import kaun
from kaun import Data, layers, losses, metrics, rng


def main(*, epochs=20, seed=0):
    x, y = load_breast_cancer(return_X_y=True)
    x = ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32)
    y = y.astype(np.float32)[:, None]

    with rng.scope(seed):
        # With pad=True the folds, of 113 and 114 rows, have batches of one shape.
        folds = Data.folds((x, y), k=5, batch_size=64, shuffle=True, pad=True)
        model = layers.sequential([layers.linear(30, 16), layers.tanh(), layers.dropout(0.2), layers.linear(16, 1)])
        trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.01))
        many = kaun.Ensemble(trainer, len(folds))
        states = many.init()

    train = [train.with_loss(losses.binary_cross_entropy).epochs(epochs) for train, _ in folds]
    states = many.fit(states, train, per_member=True)

    accuracy = functools.partial(metrics.binary_accuracy, threshold=0.0)  # of logits
    valid = [valid for _, valid in folds]
    found = many.evaluate(states, valid, {"accuracy": accuracy, "loss": losses.binary_cross_entropy}, per_member=True)
    for i, (share, loss) in enumerate(zip(found["accuracy"], found["loss"], strict=True)):
        print(f"fold {i}: accuracy {share:.3f}, loss {loss:.3f}")
    print(f"accuracy {found['accuracy'].mean():.3f} +- {found['accuracy'].std():.3f} over {len(folds)} folds")
    return many, states, found


if __name__ == "__main__":
    main()
