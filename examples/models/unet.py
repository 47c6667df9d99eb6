"""U-Net (Ronneberger, Fischer and Brox, 2015): segmentation of made images with discs and rings in noise.

As in most versions of today the convolutions keep the size of the image and batch_norm follows them, where the paper
cuts the borders and has no norms.

Run it with: python examples/models/unet.py            (a minute)
         or: python examples/models/unet.py --steps 600
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, metrics, rng

CLASSES = ("background", "disc", "ring")


def make_model(*, in_channels=1, classes=3, widths=(64, 128, 256, 512, 1024)):
    """Make the model: from images ``[batch, height, width, in_channels]`` to logits of each pixel's classes.

    Height and width are multiples of ``2 ** (len(widths) - 1)``. The default widths are those of the paper.
    """

    he = jax.nn.initializers.he_normal()

    def double(inputs, outputs):
        parts = []
        for channels in (inputs, outputs):
            convolution = layers.conv2d(channels, outputs, bias=False, weight_init=he)
            parts += [convolution, layers.batch_norm(outputs, momentum=0.9), layers.relu()]
        return layers.sequential(parts)

    *outer, deepest = widths
    below = list(zip(outer, widths[1:], strict=True))
    parts = {
        "down": [double(inputs, outputs) for inputs, outputs in zip((in_channels, *outer), outer, strict=False)],
        "pool": layers.max_pool2d(2),
        "bottom": double(outer[-1], deepest),
        "up": [layers.conv_transpose2d(deep, width, 2, stride=2) for width, deep in reversed(below)],
        "merge": [double(2 * width, width) for width in reversed(outer)],
        "head": layers.conv2d(outer[0], classes, kernel_size=1),
    }

    def forward(m, x):
        skipped = []
        for block in m.down:
            skipped.append(block(x))
            x = m.pool(skipped[-1])
        x = m.bottom(x)
        for up, merge in zip(m.up, m.merge, strict=True):
            x = merge(jnp.concatenate([skipped.pop(), up(x)], axis=-1))
        return m.head(x)

    return layers.module(parts, forward, name="unet")


def make_images(count, *, size=32, seed=0):
    """Return images [count, size, size, 1] with a disc and a ring in noise, and the class of each pixel."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    images = 0.3 * random.normal(size=(count, size, size, 1))
    labels = np.zeros((count, size, size), np.int32)
    for image, label in zip(images, labels, strict=True):
        for kind in random.permutation([1, 2]):  # the later one covers the earlier
            row, column = random.integers(5, size - 5, 2)
            distance, radius = np.hypot(rows - row, columns - column), random.uniform(4, 6)
            inside = (distance <= radius) & ((kind == 1) | (distance > radius - 2.5))
            level = random.uniform(0.8, 1.2)
            image[inside, 0] = level + 0.3 * random.normal(size=inside.sum())
            label[inside] = kind
    return images.astype(np.float32), labels


def main(*, steps=300, size=32, widths=(8, 16, 32), batch_size=16, seed=0):
    test = Data.batches(make_images(128, size=size, seed=1), 32)
    with rng.scope(seed):
        batches = Data.batches(make_images(512, size=size), batch_size, shuffle=True)
        train = batches.with_loss(losses.cross_entropy_sparse)
        schedule = optax.cosine_decay_schedule(0.01, decay_steps=steps)
        trainer = kaun.Trainer(model=make_model(widths=widths), optimizer=optax.adam(schedule))
        state = trainer.init(dtype=jnp.float32)
    history = kaun.reports.history()
    state = trainer.fit(state, train.epochs(-(-steps // len(train))).take(steps), report=history)

    scores = trainer.evaluate(state, test, {"accuracy": metrics.accuracy, "mean_iou": metrics.mean_iou})
    print(f"The loss was {history.losses[:5].mean():.3f} at first, and {history.losses[-20:].mean():.3f} in the end.")
    print(f"{scores['accuracy']:.1%} of the pixels are right; the mean over {', '.join(CLASSES)} of the intersection")
    print(f"over the union is {scores['mean_iou']:.3f}.")
    return trainer, state, history, scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a U-Net to find discs and rings in noise.")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default 300)")
    main(**vars(parser.parse_args()))
