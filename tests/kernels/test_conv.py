"""kaun's convolution compared with JAX's: values, derivatives of both orders, and which of the two is slow in loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from kaun import layers, rng
from kaun._engine.jaxpr import slow_in_loops
from kaun._kernels import conv
from kaun._kernels.conv import ConvConfig, convolve

quick = settings(max_examples=12, deadline=None)
LAST = ("NHWC", "HWIO", "NHWC")
FIRST = ("NCHW", "OIHW", "NCHW")


def stock(x, weight, stride=(1, 1), dilation=(1, 1), padding="SAME", groups=1, layout=LAST):
    return lax.conv_general_dilated(
        x, weight, stride, padding, rhs_dilation=dilation, dimension_numbers=layout, feature_group_count=groups
    )


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def both(stride, dilation, padding, groups):
    """kaun's convolution and JAX's, as functions of image and weight."""
    config = ConvConfig(stride, dilation, padding)
    ours = lambda x, weight: convolve(x, weight, config, groups)
    return ours, lambda x, weight: stock(x, weight, stride, dilation, padding, groups)


def agree(a, b, tolerance=2e-5):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.shape == right.shape and left.dtype == right.dtype
        left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
        assert np.abs(left - right).max(initial=0) <= tolerance * max(np.abs(right).max(initial=0), 1e-6)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
steps = st.tuples(st.integers(1, 2), st.integers(1, 2))
zeros = st.tuples(st.integers(0, 2), st.integers(0, 2))
# Channels, filters, groups: dense, of one channel, in groups, depthwise, depthwise with two filters for each channel.
channels = st.sampled_from([(2, 3, 1), (1, 3, 1), (4, 6, 2), (3, 3, 3), (2, 4, 2)])


@given(pairs, steps, steps, st.tuples(zeros, zeros), channels)
@quick
def test_values_and_derivatives_are_those_of_the_library(kernel, stride, dilation, padding, shape):
    n_in, n_out, groups = shape
    ours, theirs = both(stride, dilation, padding, groups)
    x, weight = normal(0, 2, 7, 6, n_in), normal(1, *kernel, n_in // groups, n_out)
    directions = normal(2, *x.shape), normal(3, *weight.shape)
    bars = normal(4, *theirs(x, weight).shape)

    def everything(f):
        y, back = jax.vjp(f, x, weight)
        slopes = lambda x, weight: jax.vjp(f, x, weight)[1](bars)
        second = jax.vjp(slopes, x, weight)[1]((x, weight))  # a gradient of a gradient
        return (
            y,
            back(bars),
            jax.jvp(f, (x, weight), directions)[1],
            second,
            jax.jvp(slopes, (x, weight), directions)[1],
        )

    agree(jax.jit(everything, static_argnums=0)(ours), jax.jit(everything, static_argnums=0)(theirs))


def test_the_gradient_of_a_weight_in_parts_of_the_batch(monkeypatch):
    monkeypatch.setattr(conv, "_IMAGES", 2)
    ours, theirs = both((1, 1), (1, 1), ((1, 0), (0, 2)), 1)
    x, weight = normal(0, 5, 4, 6, 8), normal(1, 3, 2, 8, 3)
    bars, directions = theirs(x, weight), (normal(2, *x.shape), normal(3, *weight.shape))

    def everything(f):
        slopes = lambda x, weight: jax.vjp(f, x, weight)[1](bars)
        inner = jax.vmap(lambda weight: jax.grad(lambda w: (f(x, w) ** 2).sum())(weight))
        forward, second = (jax.jvp(g, (x, weight), directions) for g in (f, slopes))
        return slopes(x, weight), forward, second, inner(weight[None])

    agree(jax.jit(everything, static_argnums=0)(ours), jax.jit(everything, static_argnums=0)(theirs))
    # Two convolutions of two images and one of one.
    assert str(jax.make_jaxpr(jax.grad(lambda w: (ours(x, w) ** 2).sum()))(weight)).count("conv_general_dilated[") == 4


def test_the_hessian_of_a_loss():
    ours, theirs = both((1, 1), (1, 1), ((1, 1), (1, 1)), 1)
    x, weight = normal(0, 2, 4, 4, 2), normal(1, 3, 3, 2, 2)
    loss = lambda f: lambda weight: (jnp.tanh(f(x, weight)) ** 2).sum()
    agree(jax.jit(jax.hessian(loss(ours)))(weight), jax.jit(jax.hessian(loss(theirs)))(weight))


BATCHED = [((2, 4, 1), (0, None)), ((4, 4, 2), (0, 0)), ((3, 3, 3), (None, 0))]


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        pytest.param(shape, axes, marks=[] if (shape, axes) in BATCHED else pytest.mark.slow)
        for shape in ((2, 4, 1), (4, 4, 2), (3, 3, 3))
        for axes in ((0, 0), (0, None), (None, 0))
    ],
)
def test_under_vmap(shape, axes):
    n_in, n_out, groups = shape
    ours, theirs = both((1, 2), (1, 1), ((1, 1), (0, 2)), groups)
    xs, weights = normal(0, 3, 2, 5, 5, n_in), normal(1, 3, 3, 3, n_in // groups, n_out)
    x, weight = (a if axis == 0 else a[0] for a, axis in zip((xs, weights), axes, strict=True))
    slopes = lambda f: jax.jit(jax.vmap(jax.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1)), axes))
    agree(slopes(ours)(x, weight), slopes(theirs)(x, weight))


@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 1),
        (4, 4, 2),
        pytest.param((1, 4, 1), marks=pytest.mark.slow),
        pytest.param((3, 3, 3), marks=pytest.mark.slow),
    ],
)
def test_in_double_precision(shape):
    with jax.enable_x64(True):
        ours, theirs = both((1, 1), (1, 1), ((1, 1), (1, 1)), shape[2])
        sizes = (2, 5, 5, shape[0]), (3, 3, shape[0] // shape[2], shape[1])
        x, weight = (normal(i, *size, dtype=jnp.float64) for i, size in enumerate(sizes))
        slopes = lambda f: jax.jit(jax.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1)))
        agree(slopes(ours)(x, weight), slopes(theirs)(x, weight), tolerance=1e-13)


@pytest.mark.parametrize("shape", [(2, 4, 1), (4, 4, 2), (3, 3, 3)])
def test_a_loop_gives_the_bits_of_the_loop_of_one(shape):
    n_in, n_out, groups = shape
    config = ConvConfig((1, 1), (1, 1), ((1, 1), (1, 1)))
    x, weight = normal(0, 4, 8, 8, n_in), 0.1 * normal(1, 3, 3, n_in // groups, n_out)
    step = lambda i, w: w - 0.01 * jax.grad(lambda w: (convolve(x, w, config, groups) ** 2).mean())(w)
    loop = jax.jit(lambda n, w: lax.fori_loop(0, n, step, w))
    once = weight
    for _ in range(3):
        once = loop(1, once)
    assert jnp.array_equal(loop(3, weight), once)
    assert not jnp.array_equal(once, weight)


def test_on_an_accelerator_it_is_the_library(monkeypatch):
    x, weight = normal(0, 1, 5, 5, 4), normal(1, 3, 3, 2, 4)
    traced = lambda which: str(jax.make_jaxpr(both((1, 1), (1, 1), ((1, 1), (1, 1)), 2)[which])(x, weight))
    assert "conv_general_dilated" not in traced(0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert traced(0) == traced(1)


def program(f, *arguments, wrt=(0, 1)):
    return jax.make_jaxpr(jax.grad(lambda *a: (f(*a) ** 2).sum(), argnums=wrt))(*arguments)


options = [
    {}, {"stride": 2}, {"dilation": 2}, {"groups": 4}, {"groups": 16, "stride": 2}, {"padding": "VALID"},
    {"stride": 2, "dilation": 2, "bias": False}, {"kernel_size": 1}, {"kernel_size": 5, "groups": 16},
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind",
    [
        *((layers.conv1d, o) for o in [*options, {"padding": "CAUSAL", "dilation": 2}]),
        *((layers.conv2d, o) for o in options),
    ],
)
def test_the_layers_are_fast_with_their_gradients(kind, dtype):
    make, chosen = kind
    layer = make(16, 32, **chosen)

    def init():
        with rng.scope(0):
            return layer.init(dtype=dtype)

    variables = jax.eval_shape(init)
    shape = (64, 32, 16) if make is layers.conv1d else (64, 32, 32, 16)
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert not slow_in_loops(program(lambda p, x: layer.apply(variables.replace(params=p), x)[0], variables.params, x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (layers.conv3d(16, 32), (4, 16, 16, 16, 16)),
        (layers.conv3d(16, 32, 3, 2, groups=16, padding=1), (4, 16, 16, 16, 16)),
        (layers.conv_transpose2d(16, 32, 4, 2, 1), (64, 16, 16, 16)),
        (layers.conv_transpose2d(16, 32, 3, 2, dilation=2), (64, 16, 16, 16)),
        (layers.conv_transpose1d(16, 32, 5, 3), (64, 32, 16)),
    ],
    ids=repr,
)
def test_volumes_and_transposed_convolutions_are_fast_with_their_gradients(layer, shape):
    def init():
        with rng.scope(0):
            return layer.init(dtype="float32")

    variables, x = jax.eval_shape(init), jax.ShapeDtypeStruct(shape, "float32")
    assert not slow_in_loops(program(lambda p, x: layer.apply(variables.replace(params=p), x)[0], variables.params, x))


IMAGES, KERNEL = jax.ShapeDtypeStruct((8, 16, 16, 4), "float32"), jax.ShapeDtypeStruct((3, 3, 4, 8), "float32")
IMAGES_FIRST, KERNEL_FIRST = (
    jax.ShapeDtypeStruct((8, 4, 16, 16), "float32"),
    jax.ShapeDtypeStruct((8, 4, 3, 3), "float32"),
)


def test_the_library_is_fast_forwards_where_it_is_canonical():
    for more in ({}, {"stride": (2, 2)}, {"dilation": (2, 2)}, {"padding": "VALID"}):
        assert not slow_in_loops(jax.make_jaxpr(lambda x, w, more=more: stock(x, w, **more))(IMAGES, KERNEL))
    grouped = jax.ShapeDtypeStruct((3, 3, 2, 8), "float32")
    assert not slow_in_loops(jax.make_jaxpr(lambda x, w: stock(x, w, groups=2))(IMAGES, grouped))
    assert slow_in_loops(jax.make_jaxpr(lambda x, w: stock(x, w, layout=FIRST))(IMAGES_FIRST, KERNEL_FIRST))
    sequences, weight = jax.ShapeDtypeStruct((8, 64, 8), "float32"), jax.ShapeDtypeStruct((5, 8, 16), "float32")
    conv1d = lambda x, w: lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    assert not slow_in_loops(jax.make_jaxpr(conv1d)(sequences, weight))
    assert slow_in_loops(program(conv1d, sequences, weight))


@pytest.mark.parametrize("wrt", [0, 1])
@pytest.mark.parametrize("layout", [LAST, FIRST])
def test_the_gradients_of_the_library_are_slow(wrt, layout):
    arguments = (IMAGES, KERNEL) if layout is LAST else (IMAGES_FIRST, KERNEL_FIRST)
    assert slow_in_loops(program(lambda x, w: stock(x, w, layout=layout), *arguments, wrt=wrt))


def test_the_gradient_along_a_grouped_weight_is_slow():
    grouped = jax.ShapeDtypeStruct((3, 3, 2, 8), "float32")
    assert slow_in_loops(program(lambda x, w: stock(x, w, groups=2), IMAGES, grouped, wrt=1))


def test_it_looks_into_inner_programs():
    slow = lambda x, w: stock(x, w, layout=FIRST)
    inner = {
        "jit": jax.jit(slow),
        "jit in jit": jax.jit(lambda x, w: jax.jit(slow)(x, w) + 1),
        "remat": jax.checkpoint(slow),
        "scan": lambda x, w: lax.scan(lambda c, _: (c, slow(c, w)), x, length=2)[1],
        "while": lambda x, w: lax.fori_loop(0, 2, lambda i, c: c + slow(x, w), jnp.zeros((8, 8, 16, 16))),
        "cond": lambda x, w: lax.cond(x.sum() > 0, lambda: slow(x, w), lambda: jnp.zeros((8, 8, 16, 16))),
        "custom_jvp": jax.custom_jvp(slow),
        "custom_vjp": jax.custom_vjp(slow),
    }
    inner["custom_jvp"].defjvp(lambda primals, tangents: (slow(*primals), slow(*tangents)))
    inner["custom_vjp"].defvjp(lambda x, w: (slow(x, w), None), lambda _, g: (g, g))
    for name, f in inner.items():
        assert slow_in_loops(jax.make_jaxpr(f)(IMAGES_FIRST, KERNEL_FIRST)), name
    assert not slow_in_loops(jax.make_jaxpr(jax.jit(lambda x, w: x.sum() + w.sum()))(IMAGES_FIRST, KERNEL_FIRST))


def test_what_is_too_small_to_matter_is_not_slow():
    slow = lambda x, w: stock(x, w, layout=FIRST)
    small = jax.ShapeDtypeStruct((2, 2, 4, 4), "float32"), jax.ShapeDtypeStruct((2, 2, 3, 3), "float32")
    assert not slow_in_loops(jax.make_jaxpr(slow)(*small))  # 1,152 multiply-adds
    assert slow_in_loops(jax.make_jaxpr(lambda x, w: [slow(x, w) for _ in range(60)])(*small))
    empty = jax.ShapeDtypeStruct((0, 2, 4, 4), "float32"), jax.ShapeDtypeStruct((0, 2, 3, 3), "float32")
    assert not slow_in_loops(jax.make_jaxpr(slow)(*empty))
