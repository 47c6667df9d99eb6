"""Activations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from kaun import layers

CATALOGUE = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
}

# Of the others, which are alike, the values alone are in the short form.
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("elu", "selu", "softplus", "mish") else name
    for name in CATALOGUE
]


def apply(name, x):
    layer = getattr(layers, name)()
    return layer.apply(layer.init(dtype=jnp.float32), x)[0]


@pytest.mark.parametrize("name", CATALOGUE)
@given(st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=4))
@settings(max_examples=25, deadline=None)
def test_against_the_formula(name, numbers):
    expected = [CATALOGUE[name](x) for x in numbers]
    np.testing.assert_allclose(apply(name, jnp.array(numbers, jnp.float32)), expected, rtol=2e-5, atol=2e-6)


def test_gelu_is_close_to_the_exact_one():
    x = jnp.linspace(-6, 6, 1001)
    exact = jax.nn.gelu(x, approximate=False)
    assert 1e-4 < float(jnp.abs(apply("gelu", x) - exact).max()) < 5e-4


def test_exact_gelu_against_the_formula():
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    layer = layers.gelu(approximate=False)
    expected = [v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()]
    np.testing.assert_allclose(layer.apply(layer.init(), x)[0], expected, rtol=2e-5, atol=1e-6)
    assert repr(layer) == "gelu(approximate=False)"
    slopes = jax.jit(jax.grad(lambda x: layer.apply(layer.init(), x)[0].sum()))(x)
    density = [
        0.5 * math.erfc(-v / math.sqrt(2)) + v * math.exp(-v * v / 2) / math.sqrt(2 * math.pi) for v in x.tolist()
    ]
    np.testing.assert_allclose(slopes, density, rtol=2e-5, atol=1e-6)
    half = layer.apply(layer.init(), jnp.asarray(x, jnp.bfloat16))[0]
    full = layer.apply(layer.init(), jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))[0]
    assert jnp.array_equal(half, full.astype(jnp.bfloat16))


def test_softmax_over_the_last_axis():
    x = 5 * np.random.default_rng(0).normal(size=(2, 3, 4))
    expected = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    np.testing.assert_allclose(apply("softmax", x), expected, rtol=1e-5)
    np.testing.assert_allclose(apply("log_softmax", x), np.log(expected), rtol=1e-5)
    half = jnp.asarray(x, jnp.bfloat16)
    for name in ("softmax", "log_softmax"):
        assert jnp.array_equal(apply(name, half), apply(name, half.astype(jnp.float32)).astype(jnp.bfloat16))


def test_gates_halve_the_last_axis():
    x = np.random.default_rng(0).normal(size=(2, 3, 6))
    a, b = x[..., :3], x[..., 3:]
    np.testing.assert_allclose(apply("glu", x), a / (1 + np.exp(-b)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(apply("swiglu", x), a / (1 + np.exp(-a)) * b, rtol=1e-5, atol=1e-6)
    for name in ("glu", "swiglu"):
        with pytest.raises(
            ValueError,
            match=rf"{name}\(\) expected float\[\.\.\., 2 \* n\], received float32\[2, 3\]: .* 6 output features",
        ):
            apply(name, jnp.ones((2, 3)))
        with pytest.raises(TypeError, match=rf"{name}\(\) expected float\[\.\.\., channels\], received int32\[4\]"):
            apply(name, jnp.arange(4))


def test_options():
    x = jnp.array([-1.0, 2.0])
    for layer, expected in (
        (layers.leaky_relu(0.5), [-0.5, 2.0]),
        (layers.elu(2.0), [2 * math.expm1(-1), 2.0]),
    ):
        np.testing.assert_allclose(layer.apply(layer.init(), x)[0], expected, rtol=1e-5)
    assert repr(layers.leaky_relu(0.5)) == "leaky_relu(slope=0.5)"
    with pytest.raises(TypeError, match=r"elu\(alpha=\.\.\.\) expected a number that is finite, received 'x'"):
        layers.elu("x")


def test_activation_of_any_function():
    model = layers.relu() >> layers.activation(jax.nn.hard_swish)
    x = jnp.array([-1.0, 2.0])
    assert jnp.array_equal(model.apply(model.init(), x)[0], jax.nn.hard_swish(jax.nn.relu(x)))
    with pytest.raises(TypeError, match=r"activation expected a function of one array, received 'relu'\. Write activ"):
        layers.activation("relu")
    text = r"activation expected a function of one array, received layers\.relu, which makes a layer\. Write layers\.relu\(\)"
    with pytest.raises(TypeError, match=text):
        layers.activation(layers.relu)
    with pytest.raises(TypeError, match=r"activation\(hard_silu\) expected float.*, received int32\[3\]"):
        layers.activation(jax.nn.hard_swish).apply(model.init(), jnp.arange(3))
    for f, received in ((jnp.sum, r"float32\[\]"), (lambda x: x > 0, r"bool\[2\]"), (lambda x: None, "NoneType")):
        with pytest.raises(
            ValueError,
            match=rf"activation\(.*\) expected float32\[2\], the shape and dtype .* {received}\. Write layers\.fn",
        ):
            layers.activation(f).apply(model.init(), x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_keeps_shape_and_dtype(name, dtype):
    y = apply(name, jnp.ones((2, 1, 3), dtype))
    assert y.shape == (2, 1, 3) and y.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_an_integer_input_names_the_layer(name):
    with pytest.raises(
        TypeError,
        match=rf"{name}\(\) expected float\[\.\.\., channels\], received int32\[3\]: the layer needs floating-point input",
    ):
        apply(name, jnp.arange(3))
    model = getattr(layers, name)() >> layers.relu()
    with pytest.raises(TypeError, match=rf"{name}\(\) at 'left' expected float"):
        model.apply(model.init(dtype=jnp.float32), jnp.arange(3))


@pytest.mark.parametrize("name", ["gelu", "silu", "tanh", "sigmoid", *NAMES[-2:]])
def test_gradients(name):
    check_grads(lambda x: apply(name, x), (jnp.array([-2.0, -0.3, 0.0, 0.7, 3.0]),), 2, rtol=2e-2, atol=2e-2)


def test_relu_has_gradient_zero_at_zero():
    slopes = jax.grad(lambda x: apply("relu", x).sum())(jnp.array([-1.0, 0.0, 2.0]))
    assert slopes.tolist() == [0.0, 0.0, 1.0]


def test_extremes_are_finite_or_right():
    x = jnp.array([-1e30, 1e30])
    assert apply("sigmoid", x).tolist() == [0.0, 1.0]
    assert apply("tanh", x).tolist() == [-1.0, 1.0]
    assert apply("silu", x).tolist() == [0.0, float(jnp.float32(1e30))]
    assert jnp.isfinite(jax.grad(lambda x: apply("silu", x).sum())(x)).all()


def test_repr():
    assert repr(layers.sequential([layers.relu(), layers.gelu()])) == "sequential([\n  relu(),\n  gelu(),\n])"


def test_gradients_in_float16_where_a_square_overflows():
    x = jnp.array([-6e4, -300.0, 300.0, 6e4], jnp.float16)
    for approximate in (True, False):
        layer = layers.gelu(approximate)
        slope = jax.grad(lambda x, layer=layer: layer.apply(layer.init(), x)[0].sum())(x)
        assert slope.tolist() == [0.0, 0.0, 1.0, 1.0]
    swiglu = layers.swiglu()
    slope = jax.grad(lambda x: swiglu.apply(swiglu.init(), x)[0].sum())(jnp.array([-300.0, -300.0], jnp.float16))
    assert not slope.any()
