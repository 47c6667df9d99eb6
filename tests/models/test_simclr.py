"""examples/models/simclr.py: an encoder trained without labels, and a linear probe of its features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import Data, rng


@pytest.fixture(scope="module")
def simclr(family):
    return family("simclr")


def test_the_features_are_better_than_those_of_the_untrained_encoder(simclr, monkeypatch):
    # Half of the channels: simple machine code takes 0.03 s for a step of them, and 0.09 s for one of all.
    monkeypatch.setattr(simclr, "make_model", functools.partial(simclr.make_model, channels=(8, 16)))
    trainer, state, history, accuracy = simclr.main(epochs=4)
    values = [epoch["loss"] for epoch in history.epochs]
    assert values[-1] < 4.5 < 5.0 < values[0]
    assert accuracy["untrained"] > 0.5
    assert accuracy["trained"] > accuracy["untrained"] + 0.07
    out = trainer.predict(state, simclr.load_data()[0])
    assert {key: a.shape for key, a in out.items()} == {"features": (1797, 64), "projected": (1797, 32)}


def test_views_are_random_and_of_the_same_images(simclr):
    images = simclr.load_data()[0][:128]
    with rng.scope(0):
        data = Data.batches(images, 128).random_map(simclr.make_views)
    one, two, other = (np.asarray(next(iter(d))) for d in (data, data, data.epoch(1)))
    assert one.shape == (256, 8, 8, 1)
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[:128], one[128:])
    # Each view is more like its own image than like another one.
    distance = lambda a, b: np.sqrt(((a - b) ** 2).sum(axis=(1, 2, 3))).mean()
    for half in (one[:128], one[128:]):
        assert distance(half, images) < 0.85 * distance(half, np.roll(images, 1, axis=0))


def test_the_loss_is_that_of_the_paper(simclr):
    views = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    lengths = np.linalg.norm(views, axis=1)
    near = np.exp(views @ views.T / np.outer(lengths, lengths) / 0.2)
    rows = [-np.log(near[i, (i + 4) % 8] / (near[i].sum() - near[i, i])) for i in range(8)]
    value, slope = jax.jit(jax.value_and_grad(simclr.nt_xent))(jnp.asarray(views))
    np.testing.assert_allclose(value, np.mean(rows), rtol=1e-5)
    np.testing.assert_allclose((slope * views).sum(axis=1), 0, atol=1e-6)  # the length of a view does not matter
