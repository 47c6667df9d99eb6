"""examples/models/resnet.py: a small residual network reads digits, and ResNet-18 has its sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import rng


@pytest.fixture(scope="module")
def resnet(family):
    return family("resnet")


def test_digits_are_read(resnet):
    trainer, state, history, scores = resnet.main(epochs=3, widths=(8, 16))
    values = [epoch["loss"] for epoch in history.epochs]
    assert values == sorted(values, reverse=True) and values[-1] < 0.5
    assert scores["accuracy"] > 0.9
    # Evaluation reads the running statistics, which the training has updated.
    before, after = (s.vars.state["stem"]["normalization"]["running_var"] for s in (trainer.init(), state))
    assert np.abs(after - before).min() > 0.05


def shapes_of(model, x):
    def init():
        with rng.scope(0):
            return model.init()

    variables = jax.eval_shape(init)
    return variables, jax.eval_shape(lambda v, x: model.apply(v, x)[0], variables, x).shape


def test_resnet_18_has_the_sizes_of_the_paper(resnet):
    variables, logits = shapes_of(resnet.make_model(), jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32))
    assert logits == (2, 1000)
    assert sum(a.size for a in jax.tree.leaves(variables.params)) == 11_689_512
    assert "shortcut" not in variables.params["stages"][0][0]
    assert variables.params["stages"][1][0]["shortcut"]["convolution"]["weight"].shape == (1, 1, 64, 128)


def test_the_stem_for_small_images_keeps_their_size(resnet):
    model = resnet.make_model(stem="cifar", classes=10)
    variables, logits = shapes_of(model, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))
    assert logits == (2, 10)
    assert variables.params["stem"]["convolution"]["weight"].shape == (3, 3, 3, 64)
