"""Normalization: derivatives against another computation, and what its gradient keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kaun import layers, rng
from kaun._kernels import normalize, recompute

EPS = 1e-2
SHAPE = (4, 5, 3)
# The axes of the statistics, and the shape of the weight.
CASES = {
    "batch": ((0, 1), (1, 1, 3)),
    "layer": ((2,), (1, 1, 3)),
    "instance": ((1,), (1, 1, 3)),
    "group": ((0, 2), SHAPE),
}


@pytest.fixture
def _all_are_large(monkeypatch):
    monkeypatch.setattr(recompute, "_LARGE", 0)


def plain(axes, is_centred):
    def form(x, weight):
        mean = x.mean(axes, keepdims=True) if is_centred else jnp.zeros_like(x.sum(axes, keepdims=True))
        variance = ((x - mean) ** 2).mean(axes, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + EPS) * weight, mean, variance

    return form


def ours(axes, is_centred):
    return lambda x, weight: normalize(x, weight, axes, EPS, is_centred)


def arrays(seed, shape, dtype=jnp.float64):
    g = np.random.default_rng(seed)
    return [jnp.asarray(g.normal(3, 2, size=size), dtype) for size in (SHAPE, shape)]


@pytest.mark.usefixtures("_all_are_large")
@pytest.mark.parametrize("is_centred", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_and_derivatives_are_those_of_the_plain_form(case, is_centred):
    axes, shape = CASES[case]

    def loss(form):
        def value(*args):
            y, mean, variance = form(*args)
            return jnp.sin(y).sum() + (mean**3).sum() + jnp.cos(variance).sum()

        return jax.value_and_grad(value, argnums=(0, 1))

    with jax.enable_x64(True):
        args, tangents = arrays(0, shape), arrays(1, shape)

        @jax.jit
        def both(args, tangents):
            # Values, gradients, and the forward-mode derivatives of both.
            return [jax.jvp(loss(form(axes, is_centred)), args, tangents) for form in (ours, plain)]

        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), *both(args, tangents))


def test_small_ones_have_the_derivative_of_jax(monkeypatch):
    axes, shape = CASES["layer"]
    x, weight = arrays(0, shape, jnp.float32)
    names = lambda: str(jax.make_jaxpr(lambda *args: ours(axes, True)(*args))(x, weight))
    assert "custom_jvp_call" not in names()
    monkeypatch.setattr(recompute, "_LARGE", x.size)
    assert "custom_jvp_call" in names()


LAYERS = {
    "layer_norm": lambda: layers.layer_norm(4),
    "layer_norm without bias": lambda: layers.layer_norm(4, bias=False),
    "rms_norm": lambda: layers.rms_norm(4),
    "group_norm": lambda: layers.group_norm(2, 4),
    "instance_norm": lambda: layers.instance_norm(4),
    "batch_norm": lambda: layers.batch_norm(4),
    "gelu": layers.gelu,
    "exact gelu": lambda: layers.gelu(approximate=False),
    "silu": layers.silu,
    "elu": layers.elu,
    "selu": layers.selu,
    "glu": layers.glu,
    "swiglu": layers.swiglu,
}


@pytest.mark.usefixtures("_all_are_large")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_keeps_the_input_alone(name, dtype):
    layer = LAYERS[name]()
    with rng.scope(0):
        variables = layer.init(dtype=dtype)
    x = jnp.ones((64, 5, 4), dtype)
    kept = jax.eval_shape(lambda x: jax.vjp(lambda v, x: layer.apply(v, x, training=True)[0], variables, x)[1], x)
    large = [a for a in jax.tree.leaves(kept) if a.size >= x.size // 2]
    assert [(a.size, a.dtype) for a in large] == [(x.size, x.dtype)]


@pytest.mark.parametrize("name", LAYERS)
def test_large_and_small_ones_agree(name, monkeypatch):
    layer = LAYERS[name]()
    with rng.scope(0):
        variables = layer.init(dtype=jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(1, 2, (3, 5, 4)), jnp.float32)

    def loss(params, x):
        return jnp.sin(layer.apply(variables.replace(params=params), x, training=True)[0]).sum()

    def derivatives():
        both = jax.value_and_grad(lambda *args: loss(*args), argnums=(0, 1))
        return jax.jvp(both, (variables.params, x), jax.tree.map(jnp.ones_like, (variables.params, x)))

    small = derivatives()
    monkeypatch.setattr(recompute, "_LARGE", 0)
    large = derivatives()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), large, small)


@pytest.mark.usefixtures("_all_are_large")
@pytest.mark.parametrize("name", ["layer_norm", "gelu"])
def test_a_batch_of_any_length_can_be_exported(name):
    layer = LAYERS[name]()
    variables = layer.init(dtype=jnp.float32)
    x = jax.ShapeDtypeStruct(export.symbolic_shape("batch, 4"), jnp.float32)
    exported = export.export(jax.jit(lambda x: layer.apply(variables, x)[0]))(x)
    given = jnp.ones((7, 4))
    np.testing.assert_allclose(exported.call(given), layer.apply(variables, given)[0], rtol=1e-6)
