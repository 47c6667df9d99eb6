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
}


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


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_keeps_shape_and_dtype(name, dtype):
    y = apply(name, jnp.ones((2, 1, 3), dtype))
    assert y.shape == (2, 1, 3) and y.dtype == dtype


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_integer_input_names_the_layer(name):
    with pytest.raises(
        TypeError,
        match=rf"{name}\(\) expected float\[\.\.\., channels\], received int32\[3\]: the layer needs floating-point input",
    ):
        apply(name, jnp.arange(3))
    model = getattr(layers, name)() >> layers.relu()
    with pytest.raises(TypeError, match=rf"{name}\(\) at 'left' expected float"):
        model.apply(model.init(dtype=jnp.float32), jnp.arange(3))


@pytest.mark.parametrize("name", [n for n in CATALOGUE if n != "relu"])
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
