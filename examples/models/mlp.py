"""A multilayer perceptron that reads handwritten digits of 8 x 8 pixels.

Run it with: python examples/models/mlp.py            (some seconds; needs pip install ".[examples]")
         or: python examples/models/mlp.py --epochs 50
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import kaun
from kaun import Data, layers, losses, metrics, rng


def make_model(*, features=64, hidden=(256, 128), classes=10, rate=0.2):
    """Make the model: from rows ``[batch, features]`` to the logits of the classes ``[batch, classes]``."""
    he = jax.nn.initializers.he_normal()
    stack = []
    for width in hidden:
        stack += [layers.linear(features, width, weight_init=he), layers.relu(), layers.dropout(rate)]
        features = width
    return layers.sequential([*stack, layers.linear(features, classes)])


def load_data():
    """Return training and test rows, [n, 64] from 0 to 1, and their labels from 0 to 9."""
    digits = load_digits()
    rows, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    return train_test_split(rows, labels, test_size=0.2, stratify=labels, random_state=0)


def main(*, epochs=20, seed=0):
    rows, test_rows, labels, test_labels = load_data()
    with rng.scope(seed):
        train = Data.batches((rows, labels), 64, shuffle=True).with_loss(losses.cross_entropy_sparse)
        schedule = optax.cosine_decay_schedule(3e-3, decay_steps=epochs * len(train))
        trainer = kaun.Trainer(model=make_model(), optimizer=optax.adamw(schedule))
        state = trainer.init(dtype=jnp.float32)
    history = kaun.reports.history()
    state = trainer.fit(state, train.epochs(epochs), report=history)

    test = Data.batches((test_rows, test_labels), 120)
    scores = trainer.evaluate(state, test, {"accuracy": metrics.accuracy, "loss": losses.cross_entropy_sparse})
    first, last = (history.epochs[i]["loss"] for i in (0, -1))
    print(f"The loss was {first:.3f} in the first epoch, and {last:.3f} in the last.")
    print(f"{scores['accuracy']:.1%} of the {len(test_labels)} test images are read correctly.")
    return trainer, state, history, scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a multilayer perceptron to read handwritten digits.")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images (default 20)")
    main(**vars(parser.parse_args()))
