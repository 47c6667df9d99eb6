"""SimCLR (Chen, Kornblith, Norouzi and Hinton, 2020): an encoder of images is trained without labels.

Two random views of each image, turned, zoomed, moved and noisy, should have similar projections, and other images
other ones. What it has learned is measured by a linear probe: a linear layer on its features, trained with ten labels
for each class of the handwritten digits, and compared with one on the features of the encoder before training.

Run it with: python examples/models/simclr.py            (half a minute; needs pip install ".[examples]")
         or: python examples/models/simclr.py --epochs 100
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits

import kaun
from kaun import Data, layers, losses, rng


def make_model(*, channels=(16, 32), features=64, projected=32):
    """Make the model: from images ``[batch, 8, 8, 1]`` to their features and the projections of these.

    The output is a dict with ``"features"`` ``[batch, features]``, which are used later, and ``"projected"`` ``[batch,
    projected]``, of which the loss is computed.
    """

    def convolution(inputs, outputs):
        # No bias: batch_norm subtracts the mean.
        conv = layers.conv2d(inputs, outputs, stride=2, bias=False)
        return [conv, layers.batch_norm(outputs, momentum=0.9), layers.relu()]

    first, second = channels
    stack = [*convolution(1, first), *convolution(first, second), layers.flatten()]
    parts = {
        "encoder": layers.sequential([*stack, layers.linear(4 * second, features), layers.relu()]),
        "projector": layers.sequential(
            [layers.linear(features, features), layers.relu(), layers.linear(features, projected)]
        ),
    }

    def forward(m, images):
        features = m.encoder(images)
        return {"features": features, "projected": m.projector(features)}

    return layers.module(parts, forward, name="simclr")


def nt_xent(projected, temperature=0.2):
    """Return the loss of two views of n images, [2 n, features]: view i of one half belongs to view i of the other.

    Each view has to find the other one of its image among all views of the batch, by the cosine (NT-Xent in the paper).
    """
    views = projected / optax.safe_norm(projected, 1e-6, axis=1, keepdims=True)
    scores = views @ views.T / temperature
    scores = jnp.where(jnp.eye(len(scores), dtype=bool), -jnp.inf, scores)  # a view is not its own answer
    return losses.cross_entropy_sparse(scores, jnp.roll(jnp.arange(len(scores)), len(scores) // 2))


def contrast(out):
    return nt_xent(out["projected"])


@jax.jit
def make_views(key, images):
    """Return two random views of each image, [2 n, 8, 8, 1]."""

    def view(key, image):
        turn, zoom, move, noise = jax.random.split(key, 4)
        angle, size = jax.random.uniform(turn, minval=-0.3, maxval=0.3), jax.random.uniform(zoom, (2, 1), minval=0.8)
        matrix = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        places = matrix @ (jnp.indices((8, 8), jnp.float32).reshape(2, 64) - 3.5) * (0.3 + size)
        places = places + 3.5 + jax.random.uniform(move, (2, 1), minval=-1.0)
        pixels = map_coordinates(image[..., 0], places, order=1).reshape(8, 8, 1)
        return pixels + 0.1 * jax.random.normal(noise, pixels.shape)

    return jax.vmap(view)(jax.random.split(key, 2 * len(images)), jnp.concatenate([images, images]))


def load_data():
    """Return 1,797 images, [n, 8, 8, 1] from 0 to 1, and their labels from 0 to 9, in random order."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return (digits.images / 16).astype(np.float32)[order, ..., np.newaxis], digits.target.astype(np.int32)[order]


def probe(features, labels, *, labelled=10, steps=200):
    """Return the accuracy of a linear layer on features, trained on ``labelled`` rows of each class, on the others."""
    rows = np.concatenate([np.flatnonzero(labels == digit)[:labelled] for digit in range(10)])
    features = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-3)
    x, y = features[rows], labels[rows]
    trainer = kaun.Trainer(model=layers.linear(x.shape[1], 10), optimizer=optax.adamw(0.01, weight_decay=0.1))
    loss = lambda logits: losses.cross_entropy_sparse(logits, y)
    state = trainer.fit(trainer.init(dtype=jnp.float32), Data.repeat(steps, (x, loss)))
    right = np.argmax(trainer.predict(state, features), axis=1) == labels
    return np.delete(right, rows).mean()


def main(*, epochs=30, seed=0):
    images, labels = load_data()
    with rng.scope(seed):
        batches = Data.batches(images, 128, shuffle=True, drop_last=True)
        train = batches.random_map(make_views).map(lambda views: (views, contrast))
        schedule = optax.cosine_decay_schedule(3e-3, decay_steps=epochs * len(train))
        trainer = kaun.Trainer(model=make_model(), optimizer=optax.adamw(schedule, weight_decay=1e-4))
        untrained = trainer.init(dtype=jnp.float32)
        history = kaun.reports.history()
        state = trainer.fit(untrained, train.epochs(epochs), report=history)
        before, after = (probe(np.asarray(trainer.predict(s, images)["features"]), labels) for s in (untrained, state))

    first, last = (history.epochs[i]["loss"] for i in (0, -1))
    print(f"The loss was {first:.3f} in the first epoch, and {last:.3f} in the last.")
    print(f"A linear layer trained with 100 labels reads {before:.1%} of the other images from the features of the")
    print(f"untrained encoder, and {after:.1%} from those of the trained one.")
    return trainer, state, history, {"untrained": before, "trained": after}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train an encoder of digits without labels, and probe its features.")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the images (default 30)")
    main(**vars(parser.parse_args()))
