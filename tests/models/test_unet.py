"""examples/models/unet.py: a U-Net finds discs and rings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import rng


@pytest.fixture(scope="module")
def unet(family):
    return family("unet")


@pytest.fixture(scope="module")
def trained(unet):
    return unet.main(steps=80, size=20, widths=(8, 16), batch_size=8)


def test_shapes_are_found(trained):
    _, state, history, scores = trained
    assert int(state.step) == len(history.losses) == 80
    assert history.losses[:5].mean() > 0.6
    assert history.losses[-20:].mean() < 0.25
    assert scores["mean_iou"] > 0.7


def test_each_pixel_has_its_class(unet, trained):
    trainer, state, *_ = trained
    images, labels = unet.make_images(32, size=20, seed=2)
    found = np.argmax(trainer.predict(state, images), axis=-1)
    assert found.shape == labels.shape == (32, 20, 20)
    # Much noise and shapes of one brightness: what is right cannot be read off single pixels.
    alone = (images[..., 0] > 0.5) * np.where((labels == 1).sum() > (labels == 2).sum(), 1, 2)
    assert (found == labels).mean() > (alone == labels).mean() + 0.05


def test_sizes_are_those_of_the_paper(unet):
    model = unet.make_model()

    def init():
        with rng.scope(0):
            return model.init()

    variables = jax.eval_shape(init)
    assert [p[0]["weight"].shape for p in variables.params["down"]] == [
        (3, 3, 1, 64), (3, 3, 64, 128), (3, 3, 128, 256), (3, 3, 256, 512)
    ]  # fmt: skip
    assert [p["weight"].shape for p in variables.params["up"]] == [
        (2, 2, 1024, 512), (2, 2, 512, 256), (2, 2, 256, 128), (2, 2, 128, 64)
    ]  # fmt: skip
    images = jax.ShapeDtypeStruct((2, 48, 32, 1), jnp.float32)
    assert jax.eval_shape(lambda v, x: model.apply(v, x)[0], variables, images).shape == (2, 48, 32, 3)
