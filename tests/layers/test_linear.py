"""The linear layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from kaun import layers, rng

quick = settings(max_examples=20, deadline=None)


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


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@given(
    st.sampled_from([(), (3,), (0, 2), (2, 1, 3)]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 99),
)
@quick
def test_is_x_times_weight_plus_bias(lead, n_in, n_out, bias, seed):
    layer = layers.linear(n_in, n_out, bias)
    variables, x = filled(layer, seed), normal(seed, (*lead, n_in))
    y, after = layer.apply(variables, x)
    expected = np.asarray(x, np.float64) @ np.asarray(variables.params["weight"], np.float64)
    if bias:
        expected = expected + np.asarray(variables.params["bias"], np.float64)
    assert y.shape == (*lead, n_out) and y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert after is variables


@given(st.integers(0, 99), st.floats(-2, 2, width=32), st.floats(-2, 2, width=32))
@quick
def test_is_linear(seed, a, b):
    layer = layers.linear(4, 3, bias=False)
    variables, x, y = filled(layer, seed), normal(seed, (5, 4)), normal(seed + 1, (5, 4))
    together, _ = layer.apply(variables, a * x + b * y)
    apart = a * layer.apply(variables, x)[0] + b * layer.apply(variables, y)[0]
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)


def test_parameters():
    variables = made(layers.linear(3, 2))
    assert {k: v.shape for k, v in variables.params.items()} == {"weight": (3, 2), "bias": (2,)}
    assert variables.state == {} and not variables.params["bias"].any()
    assert set(made(layers.linear(3, 2, bias=False)).params) == {"weight"}


def test_default_weights_are_glorot_uniform():
    weight = made(layers.linear(200, 100)).params["weight"]
    bound = (6 / 300) ** 0.5
    assert float(jnp.abs(weight).max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_initializers_are_passed_as_they_are():
    normal_init, ones = jax.nn.initializers.normal(0.5), jax.nn.initializers.ones
    params = made(layers.linear(3, 2, weight_init=normal_init, bias_init=ones), seed=7).params
    with rng.scope(7):
        assert jnp.array_equal(params["weight"], normal_init(rng.next_key(), (3, 2), jnp.float32))
    assert jnp.array_equal(params["bias"], jnp.ones(2))


def test_an_initializer_that_was_not_called():
    layer = layers.linear(3, 2, weight_init=jax.nn.initializers.glorot_uniform)
    with pytest.raises(TypeError, match=r"linear\(3, 2\)\(weight_init=\.\.\.\) returned a function"):
        layer.init(dtype=jnp.float32)


@pytest.mark.parametrize("argument", ["in_features", "out_features"])
def test_sizes_are_checked(argument):
    with pytest.raises(ValueError, match=rf"linear\({argument}=\.\.\.\) expected an int of at least 1, received 0"):
        layers.linear(**{"in_features": 1, "out_features": 1, argument: 0})


def test_a_wrong_width_names_the_layer_by_its_path():
    model = layers.sequential([layers.linear(3, 4), layers.relu(), layers.linear(5, 2)])
    with pytest.raises(
        ValueError, match=r"linear\(5, 2\) at '2' expected float32\[\.\.\., 5\], received float32\[1, 4\]"
    ):
        model.apply(made(model), jnp.ones((1, 3)))


def test_another_dtype_is_refused():
    layer = layers.linear(3, 2)
    with pytest.raises(TypeError, match=r"linear\(3, 2\) expected float32\[\.\.\., 3\], received int32\[1, 3\]"):
        layer.apply(made(layer), jnp.ones((1, 3), jnp.int32))
    with pytest.raises(TypeError, match=r"received float32\[1, 3\]: the parameters are bfloat16"):
        layer.apply(made(layer, dtype=jnp.bfloat16), jnp.ones((1, 3)))


def test_float64_of_numpy_is_canonicalized():
    layer = layers.linear(3, 2)
    y, _ = layer.apply(made(layer), np.ones((1, 3)))
    assert y.dtype == jnp.float32


def test_gradients():
    layer = layers.linear(3, 2)
    variables, x = filled(layer), normal(1, (4, 3))
    apply = jax.jit(lambda p, x: layer.apply(variables.replace(params=p), x)[0])
    check_grads(apply, (variables.params, x), 1, rtol=1e-2, atol=1e-2)


def test_repr():
    assert repr(layers.linear(2, 4)) == "linear(2, 4)"
    assert repr(layers.linear(np.int64(2), 4, bias=False)) == "linear(2, 4, bias=False)"
