"""Winograd's form of a convolution: values and derivatives, rounding against float64, memory, and where it is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kaun import layers, rng
from kaun._kernels import conv
from kaun._kernels.conv import ConvConfig, convolve
from kaun._kernels.winograd import is_worthwhile, winograd

# Of 5 x 6, so that one output is odd and one is not.
PADDINGS = [((0, 2), (1, 0)), pytest.param(((1, 1), (1, 1)), marks=pytest.mark.slow)]


def stock(x, weight, padding=((1, 1), (1, 1))):
    return lax.conv_general_dilated(x, weight, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def wide(padding=((1, 1), (1, 1))):
    config = ConvConfig((1, 1), (1, 1), padding)
    return lambda x, weight: conv._wide(x, weight, config)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def derivatives(f, x, weight, directions, bars):
    slopes = lambda x, weight: jax.vjp(f, x, weight)[1](bars)
    forward = jax.jvp(f, (x, weight), directions)
    alone = jax.grad(lambda x: (f(x, weight) ** 2).sum())(x), jax.grad(lambda w: (f(x, w) ** 2).sum())(weight)
    batched = jax.vmap(slopes, (0, None))(jnp.stack([x, 2 * x]), weight)
    return f(x, weight), slopes(x, weight), forward, alone, jax.jvp(slopes, (x, weight), directions), batched


@pytest.mark.parametrize("padding", PADDINGS)
def test_values_and_derivatives_are_those_of_the_library(padding):
    with jax.enable_x64(True):
        shapes = (2, 5, 6, 3), (3, 3, 3, 4)
        x, weight, *directions = (normal(i, *shapes[i % 2], dtype=jnp.float64) for i in range(4))
        bars = jnp.cos(stock(x, weight, padding))
        run = jax.jit(derivatives, static_argnums=0)
        found, expected = (
            run(f, x, weight, tuple(directions), bars) for f in (wide(padding), lambda *a: stock(*a, padding))
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("shape", [(512, 16), pytest.param((16, 512), marks=pytest.mark.slow)])
def test_rounding_is_within_twice_that_of_the_library(shape):
    # ReLU's outputs, as in a network; the larger sum is over the channels forwards and over the filters backwards.
    x, weight = jnp.maximum(normal(0, 4, 8, 8, shape[0]), 0), normal(1, 3, 3, *shape)
    bars = normal(2, 4, 8, 8, shape[1])

    def errors(f, exact):
        y, back = jax.vjp(f, x, weight)
        return [
            float(np.sqrt(np.square(np.asarray(a, np.float64) - b).mean()))
            for a, b in zip((y, *back(bars)), exact, strict=True)
        ]

    with jax.enable_x64(True):
        y, back = jax.vjp(stock, x.astype(jnp.float64), weight.astype(jnp.float64))
        exact = [np.asarray(a) for a in (y, *back(bars.astype(jnp.float64)))]
    config = ConvConfig((1, 1), (1, 1), ((1, 1), (1, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "_is_wide", lambda *_: False)
        direct = errors(lambda x, w: convolve(x, w, config, 1), exact)
    for ours, theirs in zip(errors(wide(), exact), direct, strict=True):
        assert 0 < ours < 2 * theirs


def test_the_gradient_keeps_image_and_kernel_and_not_their_transforms():
    x, weight = (jax.ShapeDtypeStruct(s, "float32") for s in ((8, 8, 8, 128), (3, 3, 128, 128)))
    kept = jax.eval_shape(lambda x, w: jax.vjp(wide(), x, w)[1], x, weight)
    large = {leaf.shape for leaf in jax.tree.leaves(kept) if leaf.size > 256}  # not the transforms' factors
    assert large == {weight.shape, x.shape}


def test_shapes_decide_where_it_is_used():
    same = ((1, 1), (1, 1))
    assert is_worthwhile((32, 16, 16, 96), (3, 3, 96, 128), same)
    assert not is_worthwhile((32, 32, 32, 64), (3, 3, 64, 128), same)  # few channels
    assert not is_worthwhile((32, 16, 16, 128), (5, 5, 128, 128), same)
    assert not is_worthwhile((8, 4, 4, 512), (3, 3, 512, 512), same)  # few tiles
    assert is_worthwhile((32, 7, 7, 256), (3, 3, 256, 256), same)
    assert not is_worthwhile((32, 5, 5, 256), (3, 3, 256, 256), same)  # 36 places for 25 numbers


@pytest.mark.parametrize(("options", "uses"), [({}, True), ({"stride": 2}, False), ({"dilation": 2}, False)])
def test_layers_use_it(options, uses):
    layer = layers.conv2d(128, 128, padding=2, **options)

    def init():
        with rng.scope(0):
            return layer.init(dtype="float32")

    x = jax.ShapeDtypeStruct((8, 16, 16, 128), "float32")
    text = str(jax.make_jaxpr(lambda v, x: layer.apply(v, x)[0])(jax.eval_shape(init), x))
    assert ("conv_general_dilated" not in text) == uses


def test_a_batch_of_unknown_length_is_not():
    x, weight = (
        jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 16, 16, 128), "float32"),
        jnp.ones((3, 3, 128, 128)),
    )
    config = ConvConfig((1, 1), (1, 1), ((1, 1), (1, 1)))
    exported = jax.export.export(jax.jit(lambda x: convolve(x, weight, config, 1)))(x)
    assert "convolution" in exported.mlir_module()


def test_sums_of_one_place():
    x, weight = jnp.ones((1, 3, 3, 2)), jnp.arange(18.0).reshape(3, 3, 2, 1)
    assert winograd(x, weight, ((0, 0), (0, 0))).ravel() == weight.sum()
