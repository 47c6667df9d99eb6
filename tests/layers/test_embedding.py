"""The embedding layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from kaun import layers, rng

quick = settings(max_examples=20, deadline=None)


def filled(layer, seed=0, dtype=jnp.float32):
    """Variables of the layer with random numbers everywhere, made without compiling anything."""

    def init():
        with rng.scope(0):
            return layer.init(dtype=dtype)

    random = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape), a.dtype), jax.eval_shape(init))


def made(layer, seed=0, dtype=jnp.float32):
    with rng.scope(seed):
        return layer.init(dtype=dtype)


@given(st.integers(1, 3), st.integers(1, 2), st.booleans(), st.sampled_from([(), (3,), (2, 2)]), st.integers(0, 99))
@quick
def test_is_a_row_of_the_table(vocab, dim, scale, shape, seed):
    layer = layers.embedding(vocab, dim, scale)
    variables = filled(layer, seed)
    indices = np.random.default_rng(seed).integers(0, vocab, shape)
    y, after = layer.apply(variables, indices)
    expected = np.asarray(variables.params["weight"])[indices] * np.float32(dim**0.5 if scale else 1)
    assert y.shape == (*shape, dim) and y.dtype == jnp.float32 and after is variables
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [True, False])
def test_the_default_output_has_variance_one(scale):
    layer = layers.embedding(500, 64, scale)
    y, _ = layer.apply(made(layer), jnp.arange(500))
    assert float(y.var()) == pytest.approx(1, rel=0.03)


def test_the_initializer_is_passed_as_it_is():
    layer = layers.embedding(5, 3, weight_init=jax.nn.initializers.normal(0.02))
    with rng.scope(0):
        expected = jax.nn.initializers.normal(0.02)(rng.next_key(), (5, 3), jnp.float32)
    assert jnp.array_equal(made(layer).params["weight"], expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_every_integer_dtype(dtype):
    layer = layers.embedding(300, 2, scale=False)
    variables = made(layer)
    indices = jnp.array([0, 1, 127], dtype)
    assert jnp.array_equal(layer.apply(variables, indices)[0], variables.params["weight"][jnp.array([0, 1, 127])])


@pytest.mark.parametrize(
    ("dtype", "values"),
    [("int8", [5, -1, -128]), ("int32", [299, 300, -1, 2**31 - 1]), ("uint32", [0, 300, 2**32 - 1])],
)
def test_compiled_an_index_outside_is_nan_and_its_neighbours_are_right(dtype, values):
    layer = layers.embedding(300, 2)
    variables = made(layer)
    y = jax.jit(lambda x: layer.apply(variables, x)[0])(jnp.array(values, dtype))
    inside = [0 <= v < 300 for v in values]
    assert np.isnan(y).all(-1).tolist() == [not i for i in inside]
    first = layer.apply(variables, jnp.array(values[:1], dtype))[0]
    assert jnp.array_equal(y[:1], first)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (
            jnp.array([[1, 2], [3, 10]]),
            r"embedding\(10, 4\) expected indices in \[0, 10\), received 10 at position \[1, 1\]\. Make vocab_size 11",
        ),
        (np.array([3, -1]), r"received -1 at position \[1\]\. Use an index below 10 for padding"),
        (np.array([2**32 + 1]), r"received 4294967297 at position \[0\]"),
        (np.int32(12), r"received 12 at position \[\]"),
    ],
)
def test_concrete_indices_outside_are_refused(indices, message):
    layer = layers.embedding(10, 4)
    with pytest.raises(ValueError, match=message):
        layer.apply(made(layer), indices)


def test_concrete_indices_are_checked_under_grad_and_named_by_path():
    model = layers.embedding(10, 4) >> layers.linear(4, 1)
    variables = made(model)
    with pytest.raises(ValueError, match=r"embedding\(10, 4\) at 'left' expected indices"):
        jax.grad(lambda p: model.apply(variables.replace(params=p), jnp.array([10]))[0].sum())(variables.params)


@pytest.mark.parametrize("x", [jnp.ones(3), jnp.ones(3, bool)])
def test_what_is_not_an_index_is_refused(x):
    layer = layers.embedding(10, 4)
    with pytest.raises(
        TypeError, match=r"embedding\(10, 4\) expected int\[\.\.\.\], received .*\[3\]: the layer needs integer indices"
    ):
        layer.apply(made(layer), x)


def test_no_indices():
    layer = layers.embedding(10, 4)
    assert layer.apply(made(layer), jnp.zeros((0, 3), jnp.int32))[0].shape == (0, 3, 4)


@pytest.mark.parametrize("argument", ["vocab_size", "embed_dim"])
def test_sizes_are_checked(argument):
    with pytest.raises(
        TypeError, match=rf"embedding\({argument}=\.\.\.\) expected an int of at least 1, received 2\.5"
    ):
        layers.embedding(**{"vocab_size": 1, "embed_dim": 1, argument: 2.5})


def test_gradients_add_up_over_equal_indices():
    layer = layers.embedding(4, 3, scale=False)
    variables, x = filled(layer), jnp.array([1, 1, 3])
    slopes = jax.grad(lambda p: layer.apply(variables.replace(params=p), x)[0].sum())(variables.params)["weight"]
    assert slopes.tolist() == [[0] * 3, [2] * 3, [0] * 3, [1] * 3]
    square = jax.jit(lambda p: layer.apply(variables.replace(params=p), x)[0] ** 2)
    check_grads(square, (variables.params,), 1, rtol=1e-2, atol=1e-2)


def test_repr():
    assert repr(layers.embedding(10, 4)) == "embedding(10, 4)"
    assert repr(layers.embedding(10, 4, scale=False)) == "embedding(10, 4, scale=False)"
