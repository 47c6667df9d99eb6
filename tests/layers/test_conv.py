"""Convolutions against a loop over positions, in NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from kaun import layers, rng


def made(layer, seed=0, dtype=jnp.float32):
    with rng.scope(seed):
        return layer.init(dtype=dtype)


def filled(layer, seed=0, dtype=jnp.float32):
    """Variables of the layer with random numbers everywhere, made without compiling anything."""

    def init():
        with rng.scope(0):
            return layer.init(dtype=dtype)

    random = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape), a.dtype), jax.eval_shape(init))


def applied(layer, variables, x):
    """The output, as one compiled program; the layer returns the variables themselves."""

    def apply(variables, x):
        y, after = layer.apply(variables, x)
        assert after is variables
        return y

    return jax.jit(apply)(variables, x)


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def pads(n, k, stride, dilation, padding):
    """Zeros before and after an axis."""
    reach = (k - 1) * dilation + 1
    if padding == "VALID":
        return 0, 0
    if padding == "CAUSAL":
        return reach - 1, 0
    total = max((-(-n // stride) - 1) * stride + reach - n, 0)
    return total // 2, total - total // 2


def by_hand(x, weight, stride, dilation, padding, groups):
    """The definition, one output number after the other."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    kh, kw, fan_in, n_out = weight.shape
    x = np.pad(
        x, [(0, 0), *(pads(x.shape[i + 1], weight.shape[i], stride[i], dilation[i], padding) for i in (0, 1)), (0, 0)]
    )
    rows, columns = ((x.shape[i + 1] - (weight.shape[i] - 1) * dilation[i] - 1) // stride[i] + 1 for i in (0, 1))
    y = np.zeros((x.shape[0], rows, columns, n_out))
    for b, i, j, o in np.ndindex(*y.shape):
        first = o // (n_out // groups) * fan_in
        for u, v, c in np.ndindex(kh, kw, fan_in):
            at = x[b, i * stride[0] + u * dilation[0], j * stride[1] + v * dilation[1], first + c]
            y[b, i, j, o] += at * weight[u, v, c, o]
    return y


sizes = st.integers(1, 3)
steps = st.integers(1, 2)
channels = st.sampled_from([(1, 2, 1), (2, 4, 2), (3, 1, 1), (3, 3, 3)])
quick = settings(max_examples=15, deadline=None)


@given(
    st.tuples(sizes, sizes),
    st.tuples(steps, steps),
    st.tuples(steps, steps),
    channels,
    st.sampled_from(["SAME", "VALID"]),
    st.integers(0, 99),
)
@quick
def test_conv2d_against_the_loop(kernel, stride, dilation, shape, padding, seed):
    n_in, n_out, groups = shape
    layer = layers.conv2d(n_in, n_out, kernel, stride, dilation, padding, groups)
    variables, x = filled(layer, seed), normal(seed, (2, 6, 5, n_in))
    expected = by_hand(x, variables.params["weight"], stride, dilation, padding, groups)
    expected += np.asarray(variables.params["bias"])
    np.testing.assert_allclose(applied(layer, variables, x), expected, rtol=1e-5, atol=1e-5)


@given(sizes, st.integers(1, 3), steps, channels, st.sampled_from(["SAME", "VALID", "CAUSAL"]), st.integers(0, 99))
@quick
def test_conv1d_against_the_loop(kernel, stride, dilation, shape, padding, seed):
    n_in, n_out, groups = shape
    layer = layers.conv1d(n_in, n_out, kernel, stride, dilation, padding, groups, bias=False)
    variables, x = filled(layer, seed), normal(seed, (2, 7, n_in))
    y = applied(layer, variables, x)
    expected = by_hand(x[:, :, None], variables.params["weight"][:, None], (stride, 1), (dilation, 1), padding, groups)
    np.testing.assert_allclose(y, expected[:, :, 0], rtol=1e-5, atol=1e-5)


@given(st.sampled_from([(1, 1), (3, 1), (2, 3)]), st.integers(0, 6), st.integers(0, 99))
@quick
def test_causal_does_not_look_ahead(shape, time, seed):
    kernel, dilation = shape
    layer = layers.conv1d(2, 3, kernel, dilation=dilation, padding="CAUSAL")
    variables, x = filled(layer, seed), np.random.default_rng(seed).normal(size=(1, 8, 2)).astype(np.float32)
    other = np.concatenate([x[:, : time + 1], x[:, time + 1 :] + 1], axis=1)
    apply = jax.jit(layer.apply)
    before, after = (np.asarray(apply(variables, v)[0]) for v in (x, other))
    assert np.array_equal(before[:, : time + 1], after[:, : time + 1])
    assert (before[:, time + 1 :] != after[:, time + 1 :]).all()


def test_parameters_and_their_order():
    assert {k: v.shape for k, v in filled(layers.conv2d(4, 6, (3, 5), groups=2)).params.items()} == {
        "weight": (3, 5, 2, 6),
        "bias": (6,),
    }
    assert {k: v.shape for k, v in filled(layers.conv1d(4, 6, 3, bias=False)).params.items()} == {"weight": (3, 4, 6)}
    assert filled(layers.conv2d(1, 2)).params["weight"].shape == (3, 3, 1, 2)
    assert filled(layers.conv1d(1, 2)).params["weight"].shape == (3, 1, 2)


def test_initializers_are_passed_as_they_are():
    ones = jax.nn.initializers.ones
    for layer in (
        layers.conv1d(1, 2, weight_init=ones, bias_init=ones),
        layers.conv2d(1, 2, weight_init=ones, bias_init=ones),
    ):
        assert all(bool((v == 1).all()) for v in made(layer).params.values())


def test_the_output_sizes_that_the_docs_say():
    x = jnp.ones((1, 11, 2))
    for stride in (1, 2, 3):
        for padding, length in (
            ("SAME", -(-11 // stride)),
            ("CAUSAL", -(-11 // stride)),
            ("VALID", -(-(11 - 4) // stride)),
        ):
            layer = layers.conv1d(2, 1, 3, stride, dilation=2, padding=padding, bias=False)
            assert jax.eval_shape(layer.apply, filled(layer), x)[0].shape == (1, length, 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    layer = layers.conv2d(2, 4, groups=2)
    variables, x = filled(layer), normal(1, (1, 5, 5, 2))
    half = jax.tree.map(lambda a: a.astype(dtype), variables.params)
    y, _ = layer.apply(variables.replace(params=half, dtype=dtype), x.astype(dtype))
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), layer.apply(variables, x)[0], rtol=0.02, atol=0.05)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_gradients_2d(padding):
    layer = layers.conv2d(2, 2, (3, 2), stride=(2, 1), dilation=(1, 2), padding=padding, groups=2)
    variables, x = filled(layer), normal(1, (2, 5, 6, 2))
    apply = jax.jit(lambda p, x: layer.apply(variables.replace(params=p), x)[0])
    check_grads(apply, (variables.params, x), 1, rtol=1e-2, atol=1e-2)


def test_gradients_1d_causal():
    layer = layers.conv1d(2, 3, 3, dilation=2, padding="CAUSAL")
    variables, x = filled(layer), normal(1, (2, 6, 2))
    apply = jax.jit(lambda p, x: layer.apply(variables.replace(params=p), x)[0])
    check_grads(apply, (variables.params, x), 1, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("make", "name"), [(layers.conv1d, "conv1d"), (layers.conv2d, "conv2d"), (layers.conv3d, "conv3d")]
)
@pytest.mark.parametrize("argument", ["in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"])
def test_sizes_are_checked(make, name, argument):
    arguments = {"in_channels": 1, "out_channels": 1}
    with pytest.raises(ValueError, match=rf"{name}\({argument}=\.\.\.\) expected an int of at least 1, received 0"):
        make(**{**arguments, argument: 0})
    with pytest.raises(TypeError, match=rf"{name}\({argument}=\.\.\.\) expected an int of at least 1, received 1\.5"):
        make(**{**arguments, argument: 1.5})


def test_conv1d_takes_no_pairs():
    with pytest.raises(
        TypeError, match=r"conv1d\(kernel_size=\.\.\.\) expected an int of at least 1, received \(3, 3\)"
    ):
        layers.conv1d(1, 1, (3, 3))


@pytest.mark.parametrize(("shape", "message"), [
    ((3, 4), r"conv2d\(in_channels=3, groups=2\): .* received 3 / 2 = 1\.5\. Write in_channels=4"),
    ((4, 5), r"conv2d\(out_channels=5, groups=2\): .* Write out_channels=6"),
])  # fmt: skip
def test_groups_must_divide_the_channels(shape, message):
    with pytest.raises(ValueError, match=message):
        layers.conv2d(*shape, groups=2)


@pytest.mark.parametrize(
    ("make", "padding", "error", "received"),
    [
        (layers.conv1d, "same", ValueError, "'same'. Write padding=\"SAME\". For padding with .*jnp.pad"),
        (layers.conv1d, "reflect", ValueError, "'reflect'. For padding with other numbers .*jnp.pad"),
        (layers.conv1d, ((1, 1), (1, 1)), TypeError, "((1, 1), (1, 1)). Write padding=(1, 1)."),
        (layers.conv2d, "CAUSAL", ValueError, "'CAUSAL'. Only conv1d has causal padding."),
        (layers.conv2d, (1, 2), TypeError, "(1, 2). Write padding=((1, 1), (2, 2))."),
        (layers.conv3d, ((1, 1), (1, 1)), TypeError, "((1, 1), (1, 1)). Write padding=((1, 1), (1, 1), (1, 1))."),
        (layers.conv_transpose2d, [(1, 1), 2], TypeError, "[(1, 1), 2]. Write padding=((1, 1), (1, 1))."),
    ],
)
def test_a_padding_of_another_form(make, padding, error, received):
    words = "one of 'SAME', 'VALID', 'CAUSAL'" if make is layers.conv1d else "one of 'SAME', 'VALID'"
    pairs = {
        layers.conv1d: "(before, after)",
        layers.conv3d: "a pair (before, after) for each of depth, height, width",
    }.get(make, "a pair (before, after) for each of height, width")
    text = re.escape(f"{make.__name__}(padding=...) expected {words}, an int, or {pairs}, received {received}")
    with pytest.raises(error, match=text.replace(re.escape(".*jnp.pad"), r".*jnp\.pad")):
        make(1, 1, 3, padding=padding)


@pytest.mark.parametrize(("padding", "error"), [(-1, ValueError), (((0, 0), (0, -1)), ValueError), (1.5, TypeError)])
def test_a_padding_is_not_negative(padding, error):
    with pytest.raises(error, match=r"conv2d\(padding=\.\.\.\) expected an int of at least 0, received (-1|1\.5)"):
        layers.conv2d(1, 1, padding=padding)


def test_a_padding_of_numbers_is_that_many_zeros():
    x = normal(0, (1, 5, 6, 2))
    variables = filled(layers.conv2d(2, 3))
    for padding in (2, ((0, 1), (2, 0))):
        pads = ((2, 2), (2, 2)) if padding == 2 else padding
        y, _ = layers.conv2d(2, 3, stride=2, padding=padding).apply(variables, x)
        alone, _ = layers.conv2d(2, 3, stride=2, padding="VALID").apply(variables, jnp.pad(x, [(0, 0), *pads, (0, 0)]))
        np.testing.assert_allclose(y, alone, rtol=1e-5, atol=1e-5)
    one = layers.conv1d(2, 3, padding=(2, 0))
    causal = layers.conv1d(2, 3, padding="CAUSAL")
    assert jnp.array_equal(one.apply(filled(one), x[0])[0], causal.apply(filled(one), x[0])[0])


def test_volumes_are_sums_over_the_planes_of_the_kernel():
    layer = layers.conv3d(2, 4, (2, 3, 1), stride=(2, 1, 1), dilation=(1, 2, 1), padding=1, groups=2)
    variables, x = filled(layer), normal(0, (2, 3, 5, 4, 2))
    planes = np.pad(np.asarray(x), [(0, 0), (1, 1), *[(0, 0)] * 3])
    inner = layers.conv2d(2, 4, (3, 1), dilation=(2, 1), padding=1, groups=2, bias=False)
    weight = variables.params["weight"]
    expected = [
        sum(inner.apply(variables.replace(params={"weight": weight[k]}), planes[:, d + k])[0] for k in range(2))
        for d in (0, 2)
    ]
    y, _ = layer.apply(variables, x)
    assert y.shape == (2, 2, 3, 6, 4)
    np.testing.assert_allclose(y, np.stack(expected, 1) + np.asarray(variables.params["bias"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make", [layers.conv2d, *(pytest.param(f, marks=pytest.mark.slow) for f in (layers.conv1d, layers.conv3d))]
)
def test_depthwise_layers_keep_the_size_of_their_input(make):
    axes = {"conv1d": 1, "conv2d": 2, "conv3d": 3}[make.__name__]
    layer = make(64, 64, 3, groups=64, bias=False)
    x = y = normal(0, (1, *(256, 16, 8)[axes - 1 : axes] * axes, 64))
    for seed in range(5):
        y, _ = layer.apply(made(layer, seed), y)
    assert 0.5 < float(y.std() / x.std()) < 2  # 1.5e-4 where all outputs count as the fan-out of each group


def test_a_group_is_drawn_as_a_convolution_of_its_own():
    shapes = []

    def init(key, shape, dtype):
        shapes.append(shape)
        return jax.random.normal(key, shape, dtype)

    weight = made(layers.conv2d(6, 8, groups=2, weight_init=init)).params["weight"]
    assert shapes == [(3, 3, 3, 4)] and weight.shape == (3, 3, 3, 8)
    with rng.scope(0):
        keys = jax.random.split(rng.next_key(), 2)
    for group, key in enumerate(keys):
        assert jnp.array_equal(weight[..., 4 * group : 4 * group + 4], jax.random.normal(key, (3, 3, 3, 4)))
    with pytest.raises(TypeError, match=r"weight_init=\.\.\.\) must return a float array float32\[3, 3, 3, 4\]"):
        made(layers.conv2d(6, 8, groups=2, weight_init=lambda key, shape, dtype: jnp.ones((3, 3, 3, 8))))


def test_a_kernel_that_does_not_fit():
    layer = layers.conv2d(1, 1, (2, 3), dilation=(1, 2), padding="VALID") >> layers.relu()
    assert layer.apply(filled(layer), jnp.ones((1, 2, 5, 1)))[0].shape == (1, 1, 1, 1)
    with pytest.raises(
        ValueError,
        match=r"conv2d\(.*\) at 'left' expected at least 2 x 5 positions, which its kernel spans, received float32\[1, 9, 4, 1\].*SAME",
    ):
        layer.apply(filled(layer), jnp.ones((1, 9, 4, 1)))
    padded = layers.conv1d(1, 1, 5, padding=(1, 0))
    with pytest.raises(
        ValueError, match=r"expected at least 4 positions, which its kernel spans beyond its padding, rec"
    ):
        padded.apply(filled(padded), jnp.ones((1, 3, 1)))


def test_other_inputs_name_the_layer():
    model = layers.sequential([layers.conv2d(3, 4, groups=1), layers.conv2d(5, 2)])
    with pytest.raises(
        ValueError,
        match=r"conv2d\(5, 2\) at '1' expected float32\[batch, height, width, 5\], received float32\[1, 4, 4, 4\]",
    ):
        model.apply(filled(model), jnp.ones((1, 4, 4, 3)))
    with pytest.raises(
        ValueError, match=r"conv2d\(3, 4\) at '0' expected .* received float32\[4, 4, 3\]: it has 3 axes instead of 4"
    ):
        model.apply(filled(model), jnp.ones((4, 4, 3)))
    with pytest.raises(
        TypeError, match=r"conv1d\(3, 4\) expected float32\[batch, length, 3\], received uint8\[1, 4, 3\]"
    ):
        layers.conv1d(3, 4).apply(filled(layers.conv1d(3, 4)), jnp.ones((1, 4, 3), jnp.uint8))


def test_repr():
    assert repr(layers.conv2d(1, 8)) == "conv2d(1, 8)"
    assert repr(layers.conv2d(1, 8, 5, stride=2, bias=False)) == "conv2d(1, 8, kernel_size=5, stride=2, bias=False)"
    assert repr(layers.conv3d(1, 8, padding=1)) == "conv3d(1, 8, padding=1)"
    assert repr(layers.conv1d(2, 4, padding="CAUSAL", groups=2)) == "conv1d(2, 4, padding='CAUSAL', groups=2)"
