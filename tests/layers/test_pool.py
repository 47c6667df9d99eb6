"""Pooling against a loop over windows, in NumPy, and its gradient at ties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from kaun import layers

windowings = st.sampled_from(
    [
        ((2, 2), None),
        ((2, 3), (2, 3)),
        ((1, 1), None),
        ((5, 4), None),
        ((3, 2), (1, 2)),
        ((2, 3), (3, 1)),
        ((1, 5), (2, 1)),
    ]
)
quick = settings(max_examples=20, deadline=None)


def apply(layer, x):
    return layer.apply(layer.init(dtype=jnp.float32), x)[0]


@functools.cache
def compiled(make, kernel, stride):
    """The layer and its gradient along given weights, compiled once for each windowing."""
    layer = make(kernel, stride)
    slopes = jax.grad(lambda x, weights: (apply(layer, x) * weights).sum())
    return jax.jit(lambda x: apply(layer, x)), jax.jit(slopes)


def windows(x, kernel, stride):
    """All windows of an image [batch, rows, columns, kernel height, kernel width, channels]."""
    rows, columns = ((x.shape[i + 1] - kernel[i]) // stride[i] + 1 for i in (0, 1))
    out = np.zeros((x.shape[0], rows, columns, *kernel, x.shape[3]), x.dtype)
    for i, j in np.ndindex(rows, columns):
        top, left = i * stride[0], j * stride[1]
        out[:, i, j] = x[:, top : top + kernel[0], left : left + kernel[1]]
    return out


@given(windowings, st.integers(0, 99))
@quick
def test_against_the_loop(windowing, seed):
    kernel, stride = windowing
    x = np.random.default_rng(seed).normal(size=(2, 5, 6, 3)).astype(np.float32)
    found = windows(x, kernel, stride or kernel)
    largest, mean = (compiled(make, kernel, stride)[0](x) for make in (layers.max_pool2d, layers.avg_pool2d))
    assert np.array_equal(largest, found.max((3, 4)))
    np.testing.assert_allclose(mean, found.mean((3, 4)), rtol=1e-5, atol=1e-6)


@given(windowings, st.integers(0, 99))
@quick
def test_the_gradient_of_the_maximum_goes_to_the_first_of_equal_numbers(windowing, seed):
    kernel, stride = windowing
    random = np.random.default_rng(seed)
    x = random.integers(0, 3, (2, 5, 6, 2)).astype(np.float32)  # three values: ties everywhere
    positions = windows(np.arange(x.size).reshape(x.shape), kernel, stride or kernel)
    found = windows(x, kernel, stride or kernel)
    weights = random.normal(size=found.max((3, 4)).shape).astype(np.float32)
    expected = np.zeros(x.size)
    for b, i, j, c in np.ndindex(weights.shape):
        expected[positions[b, i, j, :, :, c].ravel()[found[b, i, j, :, :, c].argmax()]] += weights[b, i, j, c]
    slopes = compiled(layers.max_pool2d, kernel, stride)[1](x, weights)
    np.testing.assert_allclose(slopes.ravel(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [2, 1])
def test_gradients(stride):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 4, 2)), jnp.float32)
    for make in (layers.max_pool2d, layers.avg_pool2d):
        check_grads(jax.jit(lambda x: apply(make(2, stride), x) ** 2), (x,), 1, rtol=1e-2, atol=1e-2)


def test_second_derivatives_and_forward_mode_of_the_maximum():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 1)), jnp.float32)
    check_grads(jax.jit(lambda x: apply(layers.max_pool2d(2), x) ** 3), (x,), 2, rtol=2e-2, atol=2e-2)
    stacked = jnp.stack([x, -x])
    slope_of = jax.grad(lambda x: (apply(layers.max_pool2d(2), x) ** 2).sum())
    slopes, alone = jax.jit(jax.vmap(slope_of))(stacked), jax.jit(slope_of)
    for one, slope in zip(stacked, slopes, strict=True):
        assert jnp.array_equal(slope, alone(one))


@pytest.mark.parametrize("stride", [2, 1])
def test_nan_is_not_lost(stride):
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 0, 0].set(jnp.nan)
    for make in (layers.max_pool2d, layers.avg_pool2d):
        y = np.asarray(compiled(make, 2, stride)[0](x))
        assert np.isnan(y[0, 0, 0, 0])
        assert not np.isnan(y[0, -1, -1, 0])


def test_minus_infinity():
    assert apply(layers.max_pool2d(2), jnp.full((1, 2, 2, 1), -jnp.inf)).item() == -np.inf


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("stride", [None, 2])
def test_half_precision_sums_in_float32(dtype, stride):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 9, 8)), dtype)
    mean, largest = (compiled(make, 3, stride)[0] for make in (layers.avg_pool2d, layers.max_pool2d))
    assert mean(x).dtype == dtype and largest(x).dtype == dtype
    assert jnp.array_equal(mean(x), mean(x.astype(jnp.float32)).astype(dtype))


@pytest.mark.parametrize(("padding", "pads"), [(((0, 2), (1, 0)), ((0, 2), (1, 0))), ("SAME", ((0, 1), (1, 1)))])
def test_padding(padding, pads):
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 3)).astype(np.float32)
    around = [(0, 0), *pads, (0, 0)]
    largest, mean, counted = (
        np.asarray(jax.jit(functools.partial(apply, layer))(x))
        for layer in (
            layers.max_pool2d(3, 2, padding),
            layers.avg_pool2d(3, 2, padding),
            layers.avg_pool2d(3, 2, padding, count_include_pad=False),
        )
    )
    found = windows(np.pad(x, around, constant_values=np.nan), (3, 3), (2, 2))
    assert np.array_equal(largest, np.nanmax(found, (3, 4)))
    np.testing.assert_allclose(mean, np.nan_to_num(found).mean((3, 4)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(counted, np.nanmean(found, (3, 4)), rtol=1e-5, atol=1e-6)


def test_sequences_are_images_with_one_row():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 3)), jnp.float32)
    for name in ("max_pool", "avg_pool"):
        one, two = (getattr(layers, f"{name}{axes}d") for axes in (1, 2))
        y = apply(one(3, 2, (1, 0)), x)
        assert y.shape == (2, 4, 3)
        assert jnp.array_equal(y, apply(two((1, 3), (1, 2), ((0, 0), (1, 0))), x[:, None])[:, 0])


def test_global_pools():
    x = np.random.default_rng(0).integers(0, 3, (2, 3, 4, 2)).astype(np.float32)
    largest, mean = layers.global_max_pool(), layers.global_avg_pool()
    assert np.array_equal(apply(largest, x), x.max((1, 2)))
    np.testing.assert_allclose(apply(mean, x), x.mean((1, 2)), rtol=1e-6)
    assert apply(mean, x[:, 0]).shape == (2, 2)
    slopes = jax.grad(lambda x: apply(largest, x).sum())(jnp.asarray(x)).reshape(2, 12, 2)
    first = np.arange(12)[None, :, None] == x.reshape(2, 12, 2).argmax(1, keepdims=True)
    assert np.array_equal(slopes, first)
    x[0, 1, 1, 0], x[1, 0, 0, 1] = np.nan, -np.inf
    assert np.array_equal(apply(largest, x), x.max((1, 2)), equal_nan=True)


def test_global_pools_refuse_other_inputs():
    for name in ("global_avg_pool", "global_max_pool"):
        layer = getattr(layers, name)()
        for shape in ((2, 3), (2, 0, 3)):
            with pytest.raises(
                ValueError, match=rf"{name}\(\) expected \[batch, \.\.\., channels\] with places .*received"
            ):
                apply(layer, jnp.ones(shape))


@pytest.mark.parametrize("name", ["max_pool1d", "avg_pool2d"])
def test_a_padding_as_large_as_the_window(name):
    pads = 2 if name == "max_pool1d" else ((0, 2), (0, 0))
    with pytest.raises(
        ValueError,
        match=rf"{name}\(kernel_size=2, padding=.*\): the padding must be smaller than the window, .* Write padding=1 or",
    ):
        getattr(layers, name)(2, padding=pads)
    with pytest.raises(
        ValueError, match=r"avg_pool2d\(padding=\.\.\.\) expected one of 'SAME', 'VALID', an int, or a pair"
    ):
        layers.avg_pool2d(2, padding="full")


def test_a_sequence_that_is_too_short_with_its_padding():
    with pytest.raises(
        ValueError,
        match=r"max_pool1d\(4, padding=1\) expected sequences of at least 2, its window size without its padding, received "
        r"float32\[1, 1, 2\]",
    ):
        apply(layers.max_pool1d(4, padding=1), jnp.ones((1, 1, 2)))


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
def test_arguments_are_checked(name):
    with pytest.raises(ValueError, match=rf"{name}\(kernel_size=\.\.\.\) expected an int of at least 1, received 0"):
        getattr(layers, name)(0)
    with pytest.raises(TypeError, match=rf"{name}\(stride=\.\.\.\) expected an int of at least 1, received 1\.5"):
        getattr(layers, name)(2, 1.5)


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
def test_other_inputs_name_the_layer(name):
    layer = getattr(layers, name)((2, 3)) >> layers.flatten()
    variables = layer.init(dtype=jnp.float32)
    with pytest.raises(
        ValueError,
        match=rf"{name}\(\(2, 3\)\) at 'left' expected images of at least 2 x 3, its window size, received float32\[1, 4, 2, 1\]",
    ):
        layer.apply(variables, jnp.ones((1, 4, 2, 1)))
    with pytest.raises(
        ValueError, match=rf"{name}\(\(2, 3\)\) at 'left' expected float\[batch, height, width, channels\].*3 axes"
    ):
        layer.apply(variables, jnp.ones((4, 4, 1)))
    with pytest.raises(TypeError, match=rf"{name}\(\(2, 3\)\) at 'left' expected float.* received uint8\[1, 4, 4, 1\]"):
        layer.apply(variables, jnp.ones((1, 4, 4, 1), jnp.uint8))


@pytest.mark.parametrize(
    ("shape", "flat"), [((3,), (3, 1)), ((2, 5), (2, 5)), ((2, 3, 4), (2, 12)), ((0, 3, 4), (0, 12)), ((2, 0), (2, 0))]
)
def test_flatten_keeps_the_batch_axis(shape, flat):
    x = jnp.arange(float(np.prod(shape))).reshape(shape)
    assert jnp.array_equal(apply(layers.flatten(), x), x.reshape(flat))


def test_flatten_refuses_other_inputs():
    with pytest.raises(TypeError, match=r"flatten\(\) expected float\[\.\.\., channels\], received int32\[2, 3\]"):
        apply(layers.flatten(), jnp.ones((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"flatten\(\) expected .* received float32\[\]: it has 0 axes"):
        apply(layers.flatten(), jnp.float32(1))


def test_repr():
    assert repr(layers.max_pool2d(2)) == "max_pool2d(2)"
    assert repr(layers.avg_pool2d((2, 3), stride=1)) == "avg_pool2d((2, 3), stride=1)"
    assert repr(layers.flatten()) == "flatten()"
