"""A denoising diffusion model (DDPM; Ho, Jain and Abbeel, 2020), on points of the plane whose distribution is known.

Noise is added to the data in small steps until nothing else is left. The model learns to say which noise is in a point
after ``t`` steps. To draw a sample, one begins with noise and removes it step by step. The points lie around four
places, so it can be checked that samples do too, and as many at each place.

Run it with: python examples/models/ddpm.py            (half a minute)
         or: python examples/models/ddpm.py --steps 5000
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, averages, layers, losses, rng

CENTRES = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
SPREAD = 0.2


def noise_schedule(levels):
    """Return the variance that each of ``levels`` steps adds, and the share of the data's that is left after it.

    The linear schedule of the paper, which has 1000 levels, with larger steps where there are fewer.
    """
    added = np.linspace(1e-4, 0.02, levels) * 1000 / levels
    return added, np.cumprod(1 - added)


def embed_time(t, dim):
    """Return sines and cosines of the step numbers [batch], [batch, dim], with wavelengths from 6 to 60,000 steps."""
    rates = 10_000 ** -jnp.linspace(0, 1, dim // 2)
    angles = t[:, None].astype(jnp.float32) * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def make_model(*, features=2, width=128, blocks=3, levels=100):
    """Make the model: from ``{"noisy": [batch, features], "t": [batch]}`` to the noise in it, ``[batch, features]``.

    For ``{"data": [batch, features]}`` it draws step numbers and noise, and returns ``{"found", "noise"}``, what the
    model says of the noise and the noise itself.
    """

    def block():
        parts = {
            "time": layers.linear(width, width),
            "inner": layers.linear(width, width),
            "outer": layers.linear(width, width),
        }
        forward = lambda m, h: h[0] + m.outer(jax.nn.silu(m.inner(jax.nn.silu(h[0])) + m.time(h[1])))
        return layers.module(parts, forward, name="block")

    parts = {
        "time": layers.sequential([layers.linear(width, width), layers.silu()]),
        "begin": layers.linear(features, width),
        "blocks": [block() for _ in range(blocks)],
        "end": layers.sequential([layers.silu(), layers.linear(width, features)]),
    }
    left = jnp.asarray(noise_schedule(levels)[1], jnp.float32)

    def forward(m, x):
        def denoise(noisy, t):
            time, h = m.time(embed_time(t, width)), m.begin(noisy)
            for block in m.blocks:
                h = block((h, time))
            return m.end(h)

        if "noisy" in x:
            return denoise(x["noisy"], x["t"])
        data = x["data"]
        t = jax.random.randint(rng.next_key(), data.shape[:1], 0, levels)
        noise = jax.random.normal(rng.next_key(), data.shape, data.dtype)
        share = left[t][:, None]
        return {"found": denoise(jnp.sqrt(share) * data + jnp.sqrt(1 - share) * noise, t), "noise": noise}

    return layers.module(parts, forward, name="ddpm")


def make_points(count, *, seed=0):
    """Return points [count, 2] around the four places, normally distributed."""
    random = np.random.default_rng(seed)
    places = CENTRES[random.integers(0, 4, count)]
    return (places + SPREAD * random.normal(size=(count, 2))).astype(np.float32)


def draw_samples(trainer, state, count, *, levels=100, seed=0):
    """Return samples [count, 2]: noise, out of which the model's is taken step by step."""
    added, left = noise_schedule(levels)
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 2))
    for t in reversed(range(levels)):
        noisy = {"noisy": x.astype(np.float32), "t": np.full(count, t, np.int32)}
        x = (x - added[t] / np.sqrt(1 - left[t]) * np.asarray(trainer.predict(state, noisy))) / np.sqrt(1 - added[t])
        if t > 0:
            x = x + np.sqrt(added[t]) * random.normal(size=x.shape)
    return x


def describe_samples(samples):
    """Return the share of samples near a place, the shares of each place, and the standard deviation around them."""
    distance = np.linalg.norm(samples[:, None] - CENTRES, axis=2)
    nearest = distance.min(axis=1)
    return {
        "near": (nearest < 3 * SPREAD).mean(),
        "shares": np.bincount(distance.argmin(axis=1), minlength=4) / len(samples),
        "spread": np.median(nearest) / np.sqrt(2 * np.log(2)),  # half of a normal distribution is nearer than this
    }


def main(*, steps=3000, width=128, samples=2000, seed=0):
    with rng.scope(seed):
        batches = Data.batches(make_points(20_000), 256, shuffle=True, drop_last=True)
        train = batches.map(lambda x: ({"data": x}, lambda out: losses.mse(out["found"], out["noise"])))
        schedule = optax.cosine_decay_schedule(0.003, decay_steps=steps)
        trainer = kaun.Trainer(
            model=make_model(width=width), optimizer=optax.adam(schedule), average=averages.ema(0.995)
        )
        state = trainer.init(dtype=jnp.float32)
    history = kaun.reports.history()
    state = trainer.fit(state, train.epochs(-(-steps // len(train))).take(steps), report=history)

    found = describe_samples(draw_samples(trainer, state.averaged, samples))
    print(f"The loss was {history.losses[:5].mean():.3f} at first, and {history.losses[-100:].mean():.3f} in the end.")
    print(f"{found['near']:.1%} of the samples lie near one of the four places, with a standard deviation of")
    low, high = found["shares"].min(), found["shares"].max()
    print(f"{found['spread']:.3f} ({SPREAD} in the data), and {low:.1%} to {high:.1%} at each place.")
    return trainer, state, history, found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a diffusion model on points of the plane.")
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default 3000)")
    main(**vars(parser.parse_args()))
