"""Handwritten digits: trains a small network on 1,437 images of 8 x 8 pixels and tests it on 360 others.

Run it with: python examples/digits.py           (under a minute; needs pip install "kaun[examples]")
         or: python examples/digits.py --epochs 5 --folder somewhere

It shows a progress bar and the accuracy on the test images after each epoch, draws the loss curve and a sheet of test
images with their predictions, and saves the weights, loads them again and checks that they predict the same.
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
    """Training and test images, [n, 8, 8, 1] from 0 to 1, and their labels, 0 to 9."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., np.newaxis]
    labels = digits.target.astype(np.int32)
    return train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)


def make_model():
    return layers.sequential(
        [
            layers.conv2d(1, 32),
            # An epoch is only 22 steps: with the default momentum the running statistics would lag behind for too long.
            layers.batch_norm(32, momentum=0.9),
            layers.relu(),
            layers.conv2d(32, 64),
            layers.batch_norm(64, momentum=0.9),
            layers.relu(),
            layers.max_pool2d(2),
            layers.flatten(),
            layers.dropout(0.5),
            layers.linear(4 * 4 * 64, 10),
        ]
    )


def main(*, epochs: int = 20, folder: str | Path = "demo-output", seed: int = 0):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train_images, test_images, train_labels, test_labels = load_data()

    # All that is random (weights, order of the images, dropout) depends on this seed alone.
    with rng.scope(seed):
        batches = Data.batches((train_images, train_labels), batch_size=64, shuffle=True, drop_last=True)
        train = batches.with_loss(losses.cross_entropy_sparse)
        learning_rate = optax.cosine_decay_schedule(0.003, decay_steps=epochs * len(train))
        trainer = kaun.Trainer(model=make_model(), optimizer=optax.adam(learning_rate))
        state = trainer.init(dtype=jnp.float32)

    def print_accuracy(epoch, state):
        accuracy = metrics.accuracy(trainer.predict(state, test_images), test_labels)
        tqdm.write(f"epoch {epoch:2}: {accuracy:.2%} of the test images are right")  # a print that spares the bar

    history = reports.history()
    report = reports.all_of(reports.progress(), history, reports.each_epoch(train, print_accuracy))
    state = trainer.fit(state, train.epochs(epochs), report=report)

    logits = trainer.predict(state, test_images)
    predicted = np.argmax(logits, axis=-1)
    curve = history.plot(folder / "loss.png", log=True)
    sheet = draw_sheet(folder / "digits.png", test_images, test_labels, predicted)

    weights = folder / "weights.safetensors"
    checkpoint.save(weights, state.vars)
    loaded = trainer.make_state(checkpoint.load(weights, like=make_model().init(dtype=jnp.float32)))
    np.testing.assert_array_equal(trainer.predict(loaded, test_images), logits)

    print(f"\n{np.sum(predicted == test_labels)} of {len(test_labels)} test images are right", end=", ")
    print(f"{metrics.accuracy(logits, test_labels):.2%}.\nThe files:")
    print(f"  {curve}   the loss of each step")
    print(f"  {sheet}   test images with their predictions")
    print(f"  {weights}   the weights; loaded again, they predict exactly the same")
    return state, history


def draw_sheet(path, images, labels, predicted):
    """Draws 60 test images, each with its prediction; mistakes come first, in red, with what the image is."""
    mistakes_first = np.argsort(predicted == labels, kind="stable")
    figure = Figure(figsize=(10, 7.2), dpi=120, layout="constrained")
    figure.suptitle(f"Test digits as the network reads them: {np.sum(predicted != labels)} of {len(labels)} wrong")
    for axes, i in zip(figure.subplots(6, 10).flat, mistakes_first, strict=False):
        right = predicted[i] == labels[i]
        axes.imshow(images[i, :, :, 0], cmap="gray_r")
        axes.set_title(predicted[i] if right else f"{predicted[i]}, is {labels[i]}", color="black" if right else "red")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("lightgray" if right else "red")
    figure.savefig(path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--folder", default="demo-output")
    main(**vars(parser.parse_args()))
