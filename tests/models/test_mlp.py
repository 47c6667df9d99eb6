"""examples/models/mlp.py: digits are read by linear layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import rng


@pytest.fixture(scope="module")
def mlp(family):
    return family("mlp")


def test_digits_are_read(mlp):
    trainer, state, history, scores = mlp.main(epochs=6)
    values = [epoch["loss"] for epoch in history.epochs]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.2 < 1 < values[0]
    assert scores["accuracy"] > 0.95
    rows, labels = mlp.load_data()[1::2]
    logits = trainer.predict(state, rows)
    assert logits.shape == (360, 10)
    assert scores["accuracy"] == pytest.approx((np.argmax(logits, axis=-1) == labels).mean())


def test_sizes_and_dropout(mlp):
    model = mlp.make_model(features=5, hidden=(7, 4), classes=3, rate=0.5)

    def init(model):
        with rng.scope(0):
            return model.init(dtype=jnp.float32)

    variables = jax.jit(lambda: init(model))()
    shapes = [layer["weight"].shape for layer in variables.params if layer]
    assert shapes == [(5, 7), (7, 4), (4, 3)]
    x = np.ones((2, 5), np.float32)

    @jax.jit
    def outputs(variables, x):
        with rng.scope(0):
            trained = [model.apply(variables, x, training=True)[0] for _ in range(2)]
        return trained, [model.apply(variables, x)[0] for _ in range(2)]

    trained, still = outputs(variables, x)
    assert not np.array_equal(*trained)
    np.testing.assert_array_equal(*still)
    full = jax.eval_shape(lambda: init(mlp.make_model()).params)
    assert sum(a.size for a in jax.tree.leaves(full)) == 64 * 256 + 256 * 129 + 128 * 11 + 10
