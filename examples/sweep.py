"""A sweep of the learning rate: 32 classifiers of handwritten digits, one for each rate, trained at once.

Run it with: python examples/sweep.py [--picture sweep.svg]
"""

import argparse

import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import kaun
from kaun import Data, layers, losses, metrics, reports, rng


def main(*, members=32, epochs=8, picture="sweep.svg", seed=0):
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    train = Data.batches((images[:1400], labels[:1400]), batch_size=100).with_loss(losses.cross_entropy_sparse)
    test = Data.batches((images[1400:], labels[1400:]), batch_size=397)

    rates = np.geomspace(1e-3, 1e2, members)
    with rng.scope(seed):
        model = layers.sequential([layers.linear(64, 32), layers.relu(), layers.linear(32, 10)])
        # What inject_hyperparams keeps in the state may differ between members.
        trainer = kaun.Trainer(model=model, optimizer=optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
        many = kaun.Ensemble(trainer, members)
        start = trainer.init().vars  # all begin with the same weights
        states = many.make_state(start, learning_rate=jnp.asarray(rates))

    history = reports.history()
    states = many.fit(states, train.epochs(epochs), report=history)
    accuracy = many.evaluate(states, test, {"accuracy": metrics.accuracy})["accuracy"]
    best = int(accuracy.argmax())
    print(f"best of {members} rates: {rates[best]:.3g}, with an accuracy of {accuracy[best]:.3f}")
    draw(picture, rates, history.member_losses, accuracy)
    print(f"{picture}: the losses, and the accuracy by rate")
    return many, states, states.member(best)  # a state of trainer


def draw(path, rates, found, accuracy):
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kaun"})
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 1, len(rates)))
    smooth = found[: len(found) // 4 * 4].reshape(-1, 4, len(rates)).mean(axis=1)
    for column, color in zip(smooth.T, colors, strict=True):
        left.plot(np.arange(len(column)) * 4 + 2, np.round(column, 3), color=color, linewidth=0.7)
    left.set(xlabel="step", ylabel="training loss", yscale="log", ylim=(0.05, 20))
    right.scatter(rates, accuracy, c=colors, s=14)
    right.set(xlabel="learning rate", ylabel="test accuracy", xscale="log", ylim=(0, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default="sweep.svg", help="the picture to write, default sweep.svg")
    main(picture=parser.parse_args().picture)
