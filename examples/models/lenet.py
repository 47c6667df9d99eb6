"""LeNet-5, the convolutional network with which LeCun, Bottou, Bengio and Haffner (1998) read handwritten digits.

The images of scikit-learn have 8 x 8 pixels and are enlarged to the 32 x 32 of the paper. As in most versions of today,
the second convolution sees all channels and the last layer is linear; activations are tanh, and pools take the mean.

Run it with: python examples/models/lenet.py            (half a minute; needs pip install ".[examples]")
         or: python examples/models/lenet.py --epochs 20
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


def make_model(*, size=32, channels=(6, 16, 120), hidden=84, classes=10):
    """Make the model: from images ``[batch, size, size, 1]`` to the logits of the classes ``[batch, classes]``.

    The third convolution is as large as what the second pool leaves, 5 x 5 of the 32 x 32: a linear layer over it.
    """
    first, second, third = channels
    left = ((size - 4) // 2 - 4) // 2
    return layers.sequential(
        {
            "c1": layers.conv2d(1, first, 5, padding="VALID"),
            "tanh1": layers.tanh(),
            "s2": layers.avg_pool2d(2),
            "c3": layers.conv2d(first, second, 5, padding="VALID"),
            "tanh3": layers.tanh(),
            "s4": layers.avg_pool2d(2),
            "c5": layers.conv2d(second, third, left, padding="VALID"),
            "tanh5": layers.tanh(),
            "flatten": layers.flatten(),
            "f6": layers.linear(third, hidden),
            "tanh6": layers.tanh(),
            "output": layers.linear(hidden, classes),
        }
    )


def load_data(size=32):
    """Return training and test images, [n, size, size, 1] from 0 to 1, and their labels from 0 to 9."""
    digits = load_digits()
    images, labels = (digits.images / 16).astype(np.float32)[..., np.newaxis], digits.target.astype(np.int32)
    if size != 8:
        images = np.asarray(jax.image.resize(images, (len(images), size, size, 1), "bilinear"))
    return train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)


def main(*, epochs=5, size=32, seed=0, **sizes):
    images, test_images, labels, test_labels = load_data(size)
    with rng.scope(seed):
        train = Data.batches((images, labels), 64, shuffle=True).with_loss(losses.cross_entropy_sparse)
        schedule = optax.cosine_decay_schedule(3e-3, decay_steps=epochs * len(train))
        trainer = kaun.Trainer(model=make_model(size=size, **sizes), optimizer=optax.adam(schedule))
        state = trainer.init(dtype=jnp.float32)
    history = kaun.reports.history()
    state = trainer.fit(state, train.epochs(epochs), report=history)

    scores = trainer.evaluate(state, Data.batches((test_images, test_labels), 120), {"accuracy": metrics.accuracy})
    first, last = (history.epochs[i]["loss"] for i in (0, -1))
    print(f"The loss was {first:.3f} in the first epoch, and {last:.3f} in the last.")
    print(f"{scores['accuracy']:.1%} of the {len(test_labels)} test images are read correctly.")
    return trainer, state, history, scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train LeNet-5 to read handwritten digits.")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training images (default 5)")
    main(**vars(parser.parse_args()))
