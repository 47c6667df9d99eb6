"""Handwritten digits: train a small convolutional network on 1,437 images of 8 x 8 pixels.

Run it with: python examples/digits.py           (half a minute; needs pip install ".[examples]")
         or: python examples/digits.py --epochs 5 --folder somewhere

The script shows a progress bar and, after each epoch, the accuracy on 360 test images. Then it draws both curves and
test images with their predictions, saves the weights, and checks that the loaded weights predict the same.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import kaun
from kaun import Data, checkpoint, layers, losses, metrics, reports, rng


def load_data():
    """Return training and test images, [n, 8, 8, 1] from 0 to 1, and their labels from 0 to 9."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., np.newaxis]
    labels = digits.target.astype(np.int32)
    return train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)


def make_model(*, width=64):
    """Make the model: from images to the logits of the ten digits."""

    def convolution(inputs, outputs):
        # An epoch has 22 steps: with the default momentum the running statistics would adapt too slowly.
        return [layers.conv2d(inputs, outputs), layers.batch_norm(outputs, momentum=0.9), layers.relu()]

    return layers.sequential(
        [
            *convolution(1, width // 2),
            *convolution(width // 2, width),
            layers.max_pool2d(2),
            *convolution(width, width),
            layers.max_pool2d(2),
            layers.flatten(),
            layers.dropout(0.5),
            layers.linear(2 * 2 * width, 10),
        ]
    )


def main(*, epochs=20, folder="demo-output", seed=0):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train_images, test_images, train_labels, test_labels = load_data()

    # All random values (weights, order of the images, dropout) depend only on this seed.
    with rng.scope(seed):
        batches = Data.batches((train_images, train_labels), batch_size=64, shuffle=True, drop_last=True)
        train = batches.with_loss(losses.cross_entropy_sparse)
        learning_rate = optax.cosine_decay_schedule(0.01, decay_steps=epochs * len(train))
        trainer = kaun.Trainer(model=make_model(), optimizer=optax.adam(learning_rate))
        state = trainer.init(dtype=jnp.float32)

    def print_accuracy(epoch, state):  # above the bar
        tqdm.write(f"epoch {epoch:2}: {validation.latest['accuracy']:.2%} of the test images are correct")

    test, history = Data.batches((test_images, test_labels), batch_size=120), reports.history()
    validation = reports.validate(trainer, test, {"accuracy": metrics.accuracy}, each=train)
    report = reports.all_of(validation, history, reports.progress(), reports.each_epoch(train, print_accuracy))
    state = trainer.fit(state, train.epochs(epochs), report=report)

    curve, sheet, weights = (folder / name for name in ("training.svg", "digits.png", "weights.safetensors"))
    history.plot(curve, log=True)
    logits = trainer.predict(state, test_images)
    draw_sheet(sheet, test_images, test_labels, np.argmax(logits, axis=-1))

    checkpoint.save(weights, state.vars)
    loaded = checkpoint.load(weights, like=make_model().init(dtype=jnp.float32))
    np.testing.assert_array_equal(trainer.predict(trainer.make_state(loaded), test_images), logits)

    print(f"\nFinally {metrics.accuracy(logits, test_labels):.2%} of the {len(test_labels)} test images are correct.")
    print(f"  {curve}: the loss of each step, and the accuracy after each epoch")
    print(f"  {sheet}: test images with their predictions")
    print(f"  {weights}: the weights; after loading, they predict exactly the same")
    return trainer, state


def draw_sheet(path, images, labels, predicted):
    """Draw 60 images with their predictions: first the wrong ones, in red and with their labels, then others."""
    wrong = predicted != labels
    figure = Figure(figsize=(10, 7.6), dpi=120, layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)
    figure.suptitle(f"Test images and predictions: {wrong.sum()} of {len(labels)} wrong")
    for axes, i in zip(figure.subplots(6, 10).flat, np.argsort(~wrong, kind="stable"), strict=False):
        axes.imshow(images[i, :, :, 0], cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("red" if wrong[i] else "lightgray")
        axes.set_title(f"{predicted[i]} (is {labels[i]})" if wrong[i] else predicted[i], pad=3)
        axes.title.set_color("red" if wrong[i] else "black")
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small network to classify handwritten digits.")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images (default 20)")
    parser.add_argument("--folder", default="demo-output", help="folder for the output files (default demo-output)")
    main(**vars(parser.parse_args()))
