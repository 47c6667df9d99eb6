"""examples/models/lenet.py: LeNet-5 reads digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def lenet(family):
    return family("lenet")


def test_digits_are_read(lenet):
    _, _, history, scores = lenet.main(epochs=6, size=16)
    values = [epoch["loss"] for epoch in history.epochs]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.4 < 1 < values[0]
    assert scores["accuracy"] > 0.88


def test_sizes_are_those_of_the_paper(lenet):
    model = lenet.make_model()
    variables = model.init()
    assert {key: p["weight"].shape for key, p in variables.params.items() if p} == {
        "c1": (5, 5, 1, 6), "c3": (5, 5, 6, 16), "c5": (5, 5, 16, 120), "f6": (120, 84), "output": (84, 10)
    }  # fmt: skip
    assert sum(a.size for a in jax.tree.leaves(variables.params)) == 61_706
    images = jax.ShapeDtypeStruct((3, 32, 32, 1), jnp.float32)
    assert jax.eval_shape(lambda v, x: model.apply(v, x)[0], variables, images).shape == (3, 10)


def test_images_are_enlarged(lenet):
    small, _, labels, _ = lenet.load_data(8)
    large, _, same, _ = lenet.load_data(16)
    assert (small.shape, large.shape) == ((1437, 8, 8, 1), (1437, 16, 16, 1))
    np.testing.assert_array_equal(labels, same)
    assert np.abs(large.reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4)) - small[..., 0]).mean() < 0.1
