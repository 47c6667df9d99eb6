"""Distillation: a small network learns from the outputs of a large one, on images of which few have a label.

Run it with: python examples/distill.py           (needs pip install ".[examples]")
         or: python examples/distill.py --epochs 5

The student needs no labels. Its loss is that of Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural
Network" (2015).
"""

import argparse

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import kaun
from kaun import Data, layers, losses, metrics, rng

TEMPERATURE = 4.0


def make_model(*, width, rate=0.0):
    hidden = [layers.linear(64, width), layers.relu(), layers.dropout(rate)]
    return layers.sequential([*hidden, layers.linear(width, 10)])


def soft_loss(logits, teacher):
    """How far the soft outputs are from those of the teacher."""
    soft, wanted = jax.nn.log_softmax(logits / TEMPERATURE), jax.nn.softmax(teacher / TEMPERATURE)
    return TEMPERATURE**2 * losses.kl_divergence(soft, wanted)


def train(model, data, loss, *, epochs, seed=0):
    with rng.scope(seed):
        trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.005))
        state = trainer.init()
        batches = Data.batches(data, batch_size=32, shuffle=True)
    return trainer, trainer.fit(state, batches.with_loss(loss).epochs(epochs))


def main(*, epochs=40):
    x, y = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        (x / 16).astype(np.float32), y.astype(np.int32), test_size=0.5, stratify=y, random_state=0
    )
    hard, few = losses.cross_entropy_sparse, 100
    teacher, taught = train(make_model(width=256, rate=0.3), (x, y), hard, epochs=epochs)
    # The small networks have the labels of 100 images. The student also sees what the teacher says about the others.
    alone = train(make_model(width=16), (x[:few], y[:few]), hard, epochs=epochs)
    student = train(make_model(width=16), (x, np.asarray(teacher.predict(taught, x))), soft_loss, epochs=epochs)

    found = {}
    for name, (trainer, state) in {"teacher": (teacher, taught), "alone": alone, "student": student}.items():
        found[name] = metrics.accuracy(trainer.predict(state, test_x), test_y)
        print(f"{name:8} {found[name]:.2%} of the test images are correct")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Teach a small network by a large one.")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images (default 40)")
    main(**vars(parser.parse_args()))
