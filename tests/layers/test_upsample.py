"""Upsampling of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import layers


def apply(layer, x):
    return layer.apply(layer.init(dtype=jnp.float32), x)[0]


def test_nearest_repeats_each_number():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 2)).astype(np.float32)
    y = apply(layers.upsample2d((2, 3)), x)
    assert np.array_equal(y, x.repeat(2, 1).repeat(3, 2))


def test_bilinear_is_that_of_jax_image():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 1, 2)), jnp.float32)
    y = apply(layers.upsample2d((2, 3), "bilinear"), x)
    np.testing.assert_allclose(y, jax.image.resize(x, (2, 6, 3, 2), "bilinear"), rtol=1e-5, atol=1e-6)


def test_half_precision_is_interpolated_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4, 2)), jnp.bfloat16)
    layer = layers.upsample2d((1, 3), "bilinear")
    assert jnp.array_equal(apply(layer, x), apply(layer, x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"upsample2d\(scale=\.\.\.\) expected an int of at least 1, received 0"):
        layers.upsample2d(0)
    with pytest.raises(
        ValueError,
        match=r"upsample2d\(method=\.\.\.\) expected 'nearest' or 'bilinear', received 'cubic'\. .*image\.resize",
    ):
        layers.upsample2d(2, "cubic")
    with pytest.raises(ValueError, match=r"upsample2d\(2\) expected float\[batch, height, width, channels\].*3 axes"):
        apply(layers.upsample2d(2), jnp.ones((4, 4, 1)))
