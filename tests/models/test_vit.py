"""ViT learns scikit-learn's digits; its patches are parts of the image, and their places count."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def vit(family):
    return family("vit")


@functools.cache
def trained(vit):
    return vit.main(steps=180)


def test_it_learns_digits(vit):
    _, _, losses, right = trained(vit)
    assert losses[:5].mean() > 2 > 0.4 > losses[-5:].mean()
    assert right > 0.85


def test_patches_in_another_order_are_another_image(vit):
    trainer, state, _, right = trained(vit)
    images, labels = (a[1437:] for a in vit.digits())  # the shapes that main has compiled
    order = np.array([2, 0, 3, 1])
    patches = images.reshape(-1, 2, 4, 2, 4, 1).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, 4, 1)[:, order]
    moved = patches.reshape(-1, 2, 2, 4, 4, 1).transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
    assert np.mean(np.argmax(trainer.predict(state, moved), axis=-1) == labels) < right - 0.15
    # With the places in the same order it is the same image.
    places = state.vars.params["places"]["weight"]
    places = jnp.concatenate([places[:, :1], places[:, 1:][:, order]], axis=1)
    params = {**state.vars.params, "places": {"weight": places}}
    same = trainer.make_state(state.vars.replace(params=params))
    np.testing.assert_allclose(trainer.predict(same, moved), trainer.predict(state, images), rtol=1e-3, atol=1e-3)
