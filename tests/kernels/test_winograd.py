"""Convolutions by minimal filtering compared with JAX's own in float64, and when kaun's convolution uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kaun._kernels import winograd
from kaun._kernels.conv import ConvConfig, convolve


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float64)


def ours(padding):
    return lambda x, w: convolve(x, w, ConvConfig((1, 1), (1, 1), padding), 1)


def stock(padding):
    return lambda x, w: lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("sizes", [(4, 6), pytest.param((5, 7), marks=pytest.mark.slow), (6, 3)])
def test_values_and_derivatives_of_both_orders(monkeypatch, sizes):
    monkeypatch.setattr(winograd, "_WIDE", 1)
    monkeypatch.setattr(winograd, "_TILES", 1)
    padding = [(1, 1), (0, 2)]
    with jax.enable_x64(True):
        x, w = normal(0, 2, *sizes, 3), normal(1, 3, 3, 3, 2)
        directions, bars = (normal(2, *x.shape), normal(3, *w.shape)), stock(padding)(x, w)

        def everything(f):
            slopes = lambda x, w: jax.vjp(f, x, w)[1](bars)
            return f(x, w), slopes(x, w), jax.jvp(f, (x, w), directions), jax.jvp(slopes, (x, w), directions)

        found, expected = (jax.jit(everything, static_argnums=0)(f) for f in (ours(padding), stock(padding)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-11), found, expected)
        assert "dot_general" in str(jax.make_jaxpr(ours(padding))(x, w))


def test_wide_layers_use_it_and_others_do_not():
    def program(batch, size, channels, filters, kernel=3, stride=1):
        shapes = (batch, size, size, channels), (kernel, kernel, channels, filters)
        config = ConvConfig((stride, stride), (1, 1), [(1, 1), (1, 1)])
        made = jax.make_jaxpr(lambda x, w: convolve(x, w, config, 1))
        return str(made(*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)))

    assert "conv_general_dilated" not in program(32, 4, 512, 512)
    few, narrow, other = (31, 4, 512, 512), (32, 8, 256, 128), (32, 8, 256, 256, 5)
    for shapes in (few, narrow, other, (32, 8, 256, 256, 3, 2)):
        assert "conv_general_dilated" in program(*shapes)
