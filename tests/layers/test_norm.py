"""Normalization against its formulas in NumPy float64, and what batch_norm's state does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from kaun import layers

quick = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 99)


def made(layer, dtype=jnp.float32):
    return layer.init(dtype=dtype)


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shaken(variables, seed):
    """The variables with other numbers in params, so that weight and bias show."""
    return variables.replace(params=jax.tree.map(lambda a: normal(seed + a.ndim, a.shape), variables.params))


def applied(layer, variables, x, training=False):
    """The output, as one compiled program; the layer returns the variables themselves."""

    def apply(variables, x):
        y, after = layer.apply(variables, x, training=training)
        assert after is variables
        return y

    return jax.jit(apply)(variables, x)


def standardized(x, axes, eps):
    x = np.asarray(x, np.float64)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def scaled(z, variables):
    return z * np.asarray(variables.params["weight"], np.float64) + np.asarray(
        variables.params.get("bias", 0.0), np.float64
    )


@given(st.sampled_from([(), (3,), (2, 3)]), st.integers(2, 4), st.sampled_from([1e-5, 0.1]), seeds)
@quick
def test_layer_norm_against_the_formula(lead, dim, eps, seed):
    layer = layers.layer_norm(dim, eps)
    variables, x = shaken(made(layer), seed), normal(seed, (*lead, dim))
    y = applied(layer, variables, x, training=True)
    np.testing.assert_allclose(y, scaled(standardized(x, -1, eps), variables), rtol=1e-4, atol=1e-4)


@given(st.sampled_from([(), (3,), (2, 3)]), st.integers(1, 3), st.sampled_from([1e-6, 0.1]), seeds)
@quick
def test_rms_norm_against_the_formula(lead, dim, eps, seed):
    layer = layers.rms_norm(dim, eps)
    variables, x = shaken(made(layer), seed), normal(seed, (*lead, dim))
    y = applied(layer, variables, x)
    z = np.asarray(x, np.float64)
    expected = scaled(z / np.sqrt((z**2).mean(-1, keepdims=True) + eps), variables)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert set(variables.params) == {"weight"}


@given(st.sampled_from([(1, 4), (2, 4), (4, 4), (3, 6)]), st.sampled_from([(), (3,), (2, 3)]), seeds)
@quick
def test_group_norm_against_the_formula(shape, spatial, seed):
    groups, channels = shape
    layer = layers.group_norm(groups, channels, eps=0.01)
    variables, x = shaken(made(layer), seed), normal(seed, (2, *spatial, channels))
    y = applied(layer, variables, x)
    parts = np.split(np.asarray(x), groups, axis=-1)
    axes = tuple(range(1, x.ndim))
    z = np.concatenate([standardized(part, axes, 0.01) for part in parts], axis=-1)
    np.testing.assert_allclose(y, scaled(z, variables), rtol=1e-4, atol=1e-4)


def test_layer_norm_without_a_bias():
    layer = layers.layer_norm(3, bias=False)
    variables, x = shaken(made(layer), 0), normal(1, (2, 3))
    assert set(variables.params) == {"weight"} and repr(layer) == "layer_norm(3, bias=False)"
    expected = standardized(x, -1, 1e-5) * np.asarray(variables.params["weight"])
    np.testing.assert_allclose(applied(layer, variables, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spatial", [(5,), (2, 3)])
def test_instance_norm_against_the_formula(spatial):
    layer = layers.instance_norm(4, eps=0.01)
    variables, x = shaken(made(layer), 0), normal(1, (2, *spatial, 4))
    expected = scaled(standardized(x, tuple(range(1, x.ndim - 1)), 0.01), variables)
    np.testing.assert_allclose(applied(layer, variables, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4), (3, 1, 1, 4)])
def test_instance_norm_of_single_places(shape):
    layer = layers.instance_norm(4)
    with pytest.raises(
        ValueError,
        match=r"instance_norm\(4\) expected \[batch, \.\.\., 4\] with two or more places .*Write layers\.layer_norm",
    ):
        layer.apply(made(layer), jnp.ones(shape))


@given(st.sampled_from([(2,), (5,), (1, 3), (2, 3, 2)]), seeds)
@quick
def test_batch_norm_in_training_against_the_formula(lead, seed):
    layer = layers.batch_norm(3, eps=0.01)
    variables, x = shaken(made(layer), seed), normal(seed, (*lead, 3))
    y, _ = jax.jit(functools.partial(layer.apply, training=True))(variables, x)
    np.testing.assert_allclose(
        y, scaled(standardized(x, tuple(range(x.ndim - 1)), 0.01), variables), rtol=1e-4, atol=1e-4
    )


@given(st.integers(1, 6), st.floats(0, 0.99), seeds)
@quick
def test_batch_norm_after_n_steps_is_the_closed_form(n, momentum, seed):
    layer = layers.batch_norm(2, momentum)
    variables = made(layer)
    batches = [1 + 2 * normal(seed + i, (5, 2)) for i in range(n)]
    for x in batches:
        _, variables = layer.apply(variables, x, training=True)
    shares = (1 - momentum) * momentum ** np.arange(n - 1, -1, -1.0)
    means, variances = (np.array([f(np.asarray(x, np.float64), axis=0) for x in batches]) for f in (np.mean, np.var))
    assert set(variables.state) == {"running_mean", "running_var"}
    np.testing.assert_allclose(variables.state["running_mean"], shares @ means, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variables.state["running_var"], momentum**n + shares @ variances, rtol=1e-4, atol=1e-5)


@given(seeds)
@quick
def test_batch_norm_in_evaluation_uses_the_state_and_leaves_it(seed):
    layer = layers.batch_norm(3)
    state = {"running_mean": normal(seed, (3,)), "running_var": 0.5 + normal(seed + 1, (3,)) ** 2}
    variables, x = shaken(made(layer), seed).replace(state=state), normal(seed + 2, (1, 3))
    y, after = layer.apply(variables, x, training=False)
    mean, var = (np.asarray(v, np.float64) for v in state.values())
    np.testing.assert_allclose(y, scaled((np.asarray(x) - mean) / np.sqrt(var + 1e-5), variables), rtol=1e-4, atol=1e-4)
    assert after is variables


def test_batch_norm_defaults():
    variables = made(layers.batch_norm(2))
    assert {k: v.tolist() for k, v in variables.params.items()} == {"weight": [1, 1], "bias": [0, 0]}
    assert {k: v.tolist() for k, v in variables.state.items()} == {"running_mean": [0, 0], "running_var": [1, 1]}
    _, after = layers.batch_norm(2).apply(variables, jnp.array([[1.0, 2.0], [3.0, 2.0]]), training=True)
    np.testing.assert_allclose(after.state["running_mean"], [0.02, 0.02], rtol=1e-5)
    np.testing.assert_allclose(after.state["running_var"], [1.0, 0.99], rtol=1e-5)
    assert after.params is variables.params


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_batch_norm_keeps_small_steps_in_half_precision(dtype):
    layer = layers.batch_norm(1)
    variables = made(layer, dtype)
    assert {v.dtype for v in variables.state.values()} == {jnp.dtype("float32")}
    x = jnp.array([[0.9], [1.1]], dtype)
    step = jax.jit(lambda variables: layer.apply(variables, x, training=True))
    for _ in range(500):
        y, variables = step(variables)
    assert y.dtype == dtype and {v.dtype for v in variables.state.values()} == {jnp.dtype("float32")}
    assert float(variables.state["running_mean"][0]) == pytest.approx((1 - 0.99**500) * float(x.mean()), rel=1e-3)


def test_batch_norm_keeps_the_dtype_that_its_state_came_in():
    layer = layers.batch_norm(2)
    variables = made(layer)
    variables = variables.replace(state=jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables.state))
    for training in (True, False):
        _, after = layer.apply(variables, normal(0, (4, 2)), training=training)
        assert {v.dtype for v in after.state.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("shape", [(1, 2), (2,), (1, 1, 2), (0, 2)])
def test_batch_norm_refuses_to_train_on_one_value(shape):
    model = layers.sequential([layers.batch_norm(2)])
    variables = made(model)
    assert model.apply(variables, jnp.ones(shape))[0].shape == shape
    with pytest.raises(
        ValueError, match=r"batch_norm\(2\) at '0' expected two or more values .* received float32\[.*drop_last=True"
    ):
        model.apply(variables, jnp.ones(shape), training=True)


CATALOGUE = [layers.layer_norm(4), layers.rms_norm(4), layers.group_norm(2, 4), layers.batch_norm(4)]


@pytest.mark.parametrize("layer", CATALOGUE, ids=repr)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sums_in_float32(layer, dtype):
    # The squares of 300 and more overflow float16; 8 bits cannot tell 300 from 301.
    x = (300 + 50 * normal(0, (3, 4))).astype(dtype)
    y, _ = layer.apply(made(layer, dtype), x, training=True)
    wide, _ = layer.apply(made(layer), x.astype(jnp.float32), training=True)
    assert y.dtype == dtype
    assert jnp.array_equal(y, wide.astype(dtype))


@pytest.mark.parametrize("layer", [CATALOGUE[0], CATALOGUE[2], CATALOGUE[3]], ids=repr)
def test_a_large_mean_does_not_cancel(layer):
    x = normal(0, (6, 4))
    y, _ = layer.apply(made(layer), x, training=True)
    far, _ = layer.apply(made(layer), x + 4096.0, training=True)
    # x + 4096 is itself rounded by up to 2.5e-4.
    np.testing.assert_allclose(far, y, atol=5e-3)


@pytest.mark.parametrize("layer", CATALOGUE, ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_gradients(layer, training):
    variables, x = shaken(made(layer), 0), normal(1, (5, 4))
    apply = jax.jit(lambda p, x: layer.apply(variables.replace(params=p), x, training=training)[0])
    check_grads(apply, (variables.params, x), 1, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layer", CATALOGUE, ids=repr)
def test_a_constant_input_has_finite_gradients(layer):
    variables = made(layer)
    slopes = jax.jit(jax.grad(lambda x: (layer.apply(variables, x, training=True)[0] ** 3).sum()))(jnp.zeros((3, 4)))
    assert jnp.isfinite(slopes).all()


@pytest.mark.parametrize("layer", CATALOGUE, ids=repr)
def test_other_inputs_name_the_layer(layer):
    model = layers.sequential([layer])
    head = layer.name.split("(")[0]
    with pytest.raises(
        ValueError,
        match=rf"{head}\(.*\) at '0' expected float32\[.*, 4\], received float32\[2, 3\]: the last axis has size 3",
    ):
        model.apply(made(model), jnp.ones((2, 3)))
    with pytest.raises(TypeError, match=rf"{head}\(.*\) at '0' expected float32\[.*, 4\], received int32\[2, 4\]"):
        model.apply(made(model), jnp.ones((2, 4), jnp.int32))


def test_group_norm_needs_a_batch_axis():
    with pytest.raises(
        ValueError, match=r"group_norm\(2, 4\) expected \[batch, \.\.\., 4\], received float32\[4\].*x\[None\]"
    ):
        layers.group_norm(2, 4).apply(made(layers.group_norm(2, 4)), jnp.ones(4))


def test_groups_must_divide_the_channels():
    with pytest.raises(
        ValueError, match=r"group_norm\(num_groups=4, num_channels=6\): .* 6 / 4 = 1\.5\. Write num_groups=2"
    ):
        layers.group_norm(4, 6)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (layers.layer_norm, "dim"),
        (layers.rms_norm, "dim"),
        (layers.batch_norm, "num_features"),
        (lambda num_groups: layers.group_norm(num_groups, 4), "num_groups"),
        (lambda num_channels: layers.group_norm(1, num_channels), "num_channels"),
    ],
)
def test_sizes_are_checked(make, argument):
    with pytest.raises(ValueError, match=rf"_norm\({argument}=\.\.\.\) expected an int of at least 1, received 0"):
        make(**{argument: 0})


@pytest.mark.parametrize(
    "make", [layers.layer_norm, layers.rms_norm, layers.batch_norm, lambda n, eps: layers.group_norm(1, n, eps)]
)
def test_eps_is_checked(make):
    with pytest.raises(ValueError, match=r"_norm\(eps=\.\.\.\) expected a finite number above 0, received 0\.0"):
        make(4, eps=0.0)


@pytest.mark.parametrize("momentum", [1.0, -0.1, 99])
def test_momentum_is_checked(momentum):
    with pytest.raises(ValueError, match=r"batch_norm\(momentum=\.\.\.\) expected a number in \[0, 1\), received"):
        layers.batch_norm(4, momentum)


def test_repr():
    assert list(map(repr, CATALOGUE)) == ["layer_norm(4)", "rms_norm(4)", "group_norm(2, 4)", "batch_norm(4)"]
    assert repr(layers.batch_norm(4, momentum=0.9, eps=1e-3)) == "batch_norm(4, momentum=0.9, eps=0.001)"
