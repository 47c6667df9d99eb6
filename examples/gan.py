"""A GAN: a generator and a discriminator, each with its own optimizer, are trained to draw digits of 8 x 8 pixels.

Run it with: python examples/gan.py              (half a minute; needs pip install ".[examples]")
         or: python examples/gan.py --steps 500 --folder somewhere

One round is a `step` of each trainer; both are compiled as one function. The loss of the discriminator has a penalty on
its gradient at the real images (R1, Mescheder et al., 2018), computed with `kaun.grad`. Every 500 rounds a checkpoint
with both states is written. When the script is started again, it resumes from there, with bitwise the same result.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import kaun
from kaun import Data, Layer, checkpoint, grad, layers, losses, rng

NOISE, BATCH = 16, 64


def make_generator():
    """Make the generator: from noise [n, 16] to images [n, 64] with values from 0 to 1."""
    hidden = [layers.linear(NOISE, 128), layers.layer_norm(128), layers.gelu(), layers.linear(128, 128), layers.gelu()]
    return layers.sequential([*hidden, layers.linear(128, 64), layers.sigmoid()])


def make_discriminator():
    """Make the discriminator: from images to the logits that they are real, and the R1 penalty of each real one."""
    hidden = [layers.linear(64, 128), layers.gelu(), layers.linear(128, 128), layers.gelu()]
    net = layers.sequential([*hidden, layers.linear(128, 1)])

    def apply(vars, x, *, training, ctx):
        judge = lambda images: net.apply(vars, images, training=training)[0][:, 0]
        slope = grad.grad(lambda images: judge(images).sum(), x["real"])
        return {"real": judge(x["real"]), "drawn": judge(x["drawn"]), "penalty": (slope**2).sum(axis=1)}, vars

    return Layer(init=net.init, apply=apply, name="discriminator")


def make_round(generator, discriminator):
    """Return the compiled function (states, real images) -> (losses, states), which takes a step of each network."""

    def judged(out):
        real = losses.binary_cross_entropy(out["real"], jnp.ones_like(out["real"]))
        drawn = losses.binary_cross_entropy(out["drawn"], jnp.zeros_like(out["drawn"]))
        return real + drawn + 0.5 * out["penalty"].mean()

    @jax.jit
    def play(states, real):
        # The noise is a function of the run's key and the round, like all random values in a step.
        key = jax.random.fold_in(states["generator"].key, states["discriminator"].step)
        noise = jax.random.normal(key, (real.shape[0], NOISE))
        drawn = generator.predict(states["generator"], noise)
        first, judge = discriminator.step(states["discriminator"], {"real": real, "drawn": drawn}, loss=judged)

        def fooled(images):
            out = discriminator.predict(judge, {"real": real, "drawn": images})["drawn"]
            return losses.binary_cross_entropy(out, jnp.ones_like(out))

        second, painter = generator.step(states["generator"], noise, loss=fooled)
        return {"discriminator": first, "generator": second}, {"generator": painter, "discriminator": judge}

    return play


def main(*, steps=3000, folder="demo-output", seed=0):
    images = (load_digits().data / 16).astype(np.float32)
    with rng.scope(seed):
        adam = optax.adam(1e-3, b1=0.5)
        generator = kaun.Trainer(model=make_generator(), optimizer=adam)
        discriminator = kaun.Trainer(model=make_discriminator(), optimizer=adam)
        states = {"generator": generator.init(), "discriminator": discriminator.init()}
        batches = Data.from_arrays(images).shuffle().batch(BATCH, drop_last=True).epochs(10**6)

    saved = Path(folder) / "gan.safetensors"
    saved.parent.mkdir(parents=True, exist_ok=True)
    if saved.exists():
        states = checkpoint.load(saved, like=states)
    done, play = int(states["generator"].step), make_round(generator, discriminator)
    for step, real in enumerate(batches.skip(done).take(max(steps - done, 0)), start=done + 1):
        values, states = play(states, real)
        if step % 500 == 0 or step == steps:
            checkpoint.save(saved, states)
            print(f"round {step:4}: " + ", ".join(f"loss of the {name} {float(v):.3f}" for name, v in values.items()))

    drawn = np.asarray(generator.predict(states["generator"], jax.random.normal(jax.random.key(seed), (60, NOISE))))
    draw_sheet(saved.with_suffix(".png"), drawn)
    print(f"{saved.with_suffix('.png')}: drawn digits\n{saved}: both states; the script resumes from this file")
    return states, drawn


def draw_sheet(path, images):
    figure = Figure(figsize=(10, 6), dpi=80, layout="constrained")
    for axes, image in zip(figure.subplots(6, 10).flat, images, strict=True):
        axes.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axes.set_axis_off()
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a generator and a discriminator to draw digits.")
    parser.add_argument("--steps", type=int, default=3000, help="total number of rounds (default 3000)")
    parser.add_argument("--folder", default="demo-output", help="folder for the output files (default demo-output)")
    main(**vars(parser.parse_args()))
