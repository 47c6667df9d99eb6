"""A neural ordinary differential equation (Chen et al., 2018): the law of a motion, learned from pieces of it.

Run it with: python examples/models/neural_ode.py

The motion is a damped rotation, which runs into the origin along a spiral. The model sees pieces of 8 points, and is
then asked for the whole motion from another start, for five times as long. The script prints how far it is off.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, reports, rng

STEP = 0.1  # time between two points


def make_model(*, size=2, width=32, substeps=2):
    """Make the model: from (starts [batch, size], times [n]) to the motions [batch, n, size]; times[0] is the start.

    Between two times it makes ``substeps`` steps of the classic Runge-Kutta method of fourth order.
    """

    def forward(m, x):
        start, times = x

        def step(y, h):
            k1 = m.field(y)
            k2 = m.field(y + h / 2 * k1)
            k3 = m.field(y + h / 2 * k2)
            k4 = m.field(y + h * k3)
            return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

        def until_next_time(y, interval):
            # A loop has a gradient where its number of iterations is known when the program is compiled.
            y = jax.lax.fori_loop(0, substeps, lambda _, y: step(y, interval / substeps), y)
            return y, y

        _, after = jax.lax.scan(until_next_time, start, jnp.diff(times))
        return jnp.concatenate([start[:, jnp.newaxis], after.swapaxes(0, 1)], axis=1)

    # The rate of change dy / dt, as a function of y.
    field = [layers.linear(size, width), layers.tanh(), layers.linear(width, size)]
    return layers.module({"field": layers.sequential(field)}, forward, name="neural_ode")


def spiral(starts, times, *, damping=0.1, speed=1.0):
    """Return the exact motions [batch, n, 2] of dy/dt = -damping y + speed (-y2, y1)."""
    turned = (starts[:, :1] + 1j * starts[:, 1:]) * np.exp((-damping + 1j * speed) * times)
    return np.stack([turned.real, turned.imag], axis=-1).astype(np.float32)


def times_of(points):
    return STEP * np.arange(points, dtype=np.float32)


def make_batches(*, pieces=512, points=8, batch_size=64, noise=0.01):
    """Make batches ((starts, times), motions) of pieces from random starts, with noise in what is measured."""
    draw = np.random.default_rng(np.asarray(jax.random.key_data(rng.next_key())))
    starts = draw.uniform(-1.5, 1.5, (pieces, 2)).astype(np.float32)
    times = times_of(points)
    motions = spiral(starts, times)
    measured = motions + noise * draw.standard_normal(motions.shape, dtype=np.float32)
    # The times are the same for all rows of a batch, so they are added to it as a whole.
    batches = Data.batches((starts, measured), batch_size, shuffle=True, drop_last=True)
    return batches.map(lambda b: ((b[0], times), b[1]))


def main(*, epochs=100, seed=0, **sizes):
    with rng.scope(seed):
        train = make_batches().with_loss(losses.mse).epochs(epochs)
        rate = optax.cosine_decay_schedule(0.05, len(train))
        trainer = kaun.Trainer(model=make_model(**sizes), optimizer=optax.adam(rate))
        state = trainer.init(dtype=jnp.float32)
    history = reports.history()
    state = trainer.fit(state, train, report=history)
    print(f"The loss was {history.losses[0]:.4f} at the start, and {history.losses[-20:].mean():.5f} at the end.")

    start, times = np.array([[1.2, 0.0], [0.0, -1.0]], np.float32), times_of(41)
    motions = trainer.predict(state, (start, times))
    error = float(np.abs(motions - spiral(start, times)).max())
    print(f"Trained on {STEP * 7:.1f} seconds, it is off by {error:.3f} at most in {times[-1]:.0f} seconds.")
    return trainer, state, history, error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Learn a motion with a neural ordinary differential equation.")
    parser.add_argument("--epochs", type=int, default=100, help="passes over the pieces (default 100)")
    main(**vars(parser.parse_args()))
