"""DCGAN (Radford, Metz and Chintala, 2016): two convolutional networks learn to draw digits of 8 x 8 pixels.

The generator makes images of noise with transposed convolutions, and the discriminator tells them from real ones. As in
the paper both have batch norms, the last activation of the generator is tanh, and Adam has b1 = 0.5. How far drawn
images are from real ones is measured by the Frechet distance of the means and covariances of their pixels.

Run it with: python examples/models/dcgan.py            (half a minute; needs pip install ".[examples]")
         or: python examples/models/dcgan.py --steps 3000
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import kaun
from kaun import Data, layers, losses, rng

INIT = jax.nn.initializers.normal(0.02)


def make_generator(noise, channels):
    """Make the generator: from noise ``[batch, 1, 1, noise]`` to images ``[batch, 8, 8, 1]`` from -1 to 1."""
    stack = [
        layers.conv_transpose2d(noise, channels, 4, padding="VALID", bias=False, weight_init=INIT),
        layers.batch_norm(channels, momentum=0.9),
        layers.relu(),
        layers.conv_transpose2d(channels, 1, 4, stride=2, padding=1, bias=False, weight_init=INIT),
        layers.tanh(),
    ]
    return layers.sequential(stack)


def make_discriminator(channels):
    """Make the discriminator: from ``{"real": images, "drawn": images}`` to the logits that they are real, ``[batch]``.

    Both go through the network as batches of their own, so that a batch norm does not show which is which.
    """
    stack = [
        layers.conv2d(1, channels, 4, stride=2, padding=1, weight_init=INIT),
        layers.leaky_relu(0.2),
        layers.conv2d(channels, 2 * channels, 3, stride=1, padding=1, bias=False, weight_init=INIT),
        layers.batch_norm(2 * channels, momentum=0.9),
        layers.leaky_relu(0.2),
        layers.conv2d(2 * channels, 1, 4, padding="VALID", bias=False, weight_init=INIT),
    ]

    def forward(m, x):
        return {name: m.net(images)[:, 0, 0, 0] for name, images in x.items()}

    return layers.module({"net": layers.sequential(stack)}, forward, name="discriminator")


def make_model(*, noise=16, channels=16):
    """Make the generator and the discriminator."""
    return make_generator(noise, channels), make_discriminator(channels)


def judged(out):
    """Return the loss of the discriminator: real images are 1, drawn ones are 0."""
    real = losses.binary_cross_entropy(out["real"], jnp.ones_like(out["real"]))
    return real + losses.binary_cross_entropy(out["drawn"], jnp.zeros_like(out["drawn"]))


def make_fooled(discriminator, variables):
    """Return the loss of the generator: images should pass for real ones."""

    def fooled(images):
        # In training mode: with the statistics of this batch, which the running ones follow slowly.
        out, _ = discriminator.apply(variables, {"drawn": images}, training=True)
        return losses.binary_cross_entropy(out["drawn"], jnp.ones_like(out["drawn"]))

    return fooled


def make_round(generator, discriminator, noise):
    """Return the compiled function (states, real images) -> (losses, states), which takes a step of each network."""

    @jax.jit
    def play(states, real):
        # The noise is a function of the run's key and the round, like all random values in a step.
        key = jax.random.fold_in(states["generator"].key, states["generator"].step)
        z = jax.random.normal(key, (len(real), 1, 1, noise))
        drawn, _ = generator.model.apply(states["generator"].vars, z, training=True)
        first, judge = discriminator.step(states["discriminator"], {"real": real, "drawn": drawn}, loss=judged)
        second, painter = generator.step(states["generator"], z, loss=make_fooled(discriminator.model, judge.vars))
        return {"discriminator": first, "generator": second}, {"generator": painter, "discriminator": judge}

    return play


def frechet_distance(a, b):
    """Return the Frechet distance of the normal distributions with the moments of the rows of two arrays."""
    first, second = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    both = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    return ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(first + second) - 2 * both


def load_images():
    """Return 1,797 images, [n, 8, 8, 1] from -1 to 1."""
    return (load_digits().images / 8 - 1).astype(np.float32)[..., np.newaxis]


def main(*, steps=1000, noise=16, channels=16, seed=0):
    images = load_images()
    with rng.scope(seed):
        painter, judge = make_model(noise=noise, channels=channels)
        generator = kaun.Trainer(model=painter, optimizer=optax.adam(3e-3, b1=0.5))
        discriminator = kaun.Trainer(model=judge, optimizer=optax.adam(1e-3, b1=0.5))
        states = {"generator": generator.init(), "discriminator": discriminator.init()}
        batches = Data.batches(images, 64, shuffle=True, drop_last=True)
        z = jax.random.normal(rng.next_key(), (2000, 1, 1, noise))

    def distance(states):
        drawn = np.asarray(generator.predict(states["generator"], z))
        return frechet_distance(drawn.reshape(-1, 64), images.reshape(-1, 64))

    play, distances = make_round(generator, discriminator, noise), {0: distance(states)}
    for step, real in enumerate(batches.epochs(-(-steps // len(batches))).take(steps), start=1):
        values, states = play(states, real)
        if step % 500 == 0 or step == steps:
            distances[step] = distance(states)
            shown = ", ".join(f"loss of the {name} {float(value):.3f}" for name, value in values.items())
            print(f"round {step:4}: {shown}, distance of the drawn digits {distances[step]:.2f}")
    print(f"The distance was {distances[0]:.2f} before the training.")
    return (generator, discriminator), states, distances


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a generator and a discriminator to draw digits.")
    parser.add_argument("--steps", type=int, default=1000, help="number of rounds (default 1000)")
    main(**vars(parser.parse_args()))
