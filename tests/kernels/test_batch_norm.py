"""Batch normalization: derivatives against another computation, and what its gradient keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import layers, rng
from kaun._kernels import batch_norm, normalize_batch

EPS = 1e-2


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch):
    monkeypatch.setattr(batch_norm, "_LARGE", 0)


def plain(x, weight, bias):
    mean, variance = x.mean((0, 1)), x.var((0, 1))
    wide = lambda vector: jnp.broadcast_to(vector[None, None], x.shape)
    return (x - wide(mean)) / jnp.sqrt(wide(variance) + EPS) * wide(weight) + wide(bias), mean, variance


def ours(x, weight, bias):
    return normalize_batch(x, weight, bias, EPS)


def arrays(seed, dtype=jnp.float64):
    g = np.random.default_rng(seed)
    return [jnp.asarray(g.normal(3, 2, size=size), dtype) for size in ((4, 5, 3), (3,), (3,))]


def test_values_and_derivatives_are_those_of_the_plain_form():
    def loss(form):
        def value(*args):
            y, mean, variance = form(*args)
            return jnp.sin(y).sum() + (mean**3).sum() + jnp.cos(variance).sum()

        return jax.value_and_grad(value, argnums=(0, 1, 2))

    with jax.enable_x64(True):
        args, tangents = arrays(0), arrays(1)

        @jax.jit
        def both(args, tangents):
            # Values, gradients, and the forward-mode derivatives of both.
            return [jax.jvp(loss(form), args, tangents) for form in (ours, plain)]

        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), *both(args, tangents))


def test_small_ones_have_the_derivative_of_jax(monkeypatch):
    x, weight, bias = arrays(0, jnp.float32)
    names = lambda: str(jax.make_jaxpr(lambda *args: ours(*args))(x, weight, bias))
    assert "custom_jvp_call" in names()
    monkeypatch.setattr(batch_norm, "_LARGE", x.size + 1)
    assert "custom_jvp_call" not in names()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_keeps_the_input_alone(dtype):
    layer = layers.batch_norm(3)
    with rng.scope(0):
        variables = layer.init(dtype=dtype)
    x = jnp.ones((64, 5, 3), dtype)
    kept = jax.eval_shape(lambda x: jax.vjp(lambda v, x: layer.apply(v, x, training=True)[0], variables, x)[1], x)
    large = [a for a in jax.tree.leaves(kept) if a.size >= x.size]
    assert [(a.shape, a.dtype) for a in large] == [(x.shape, x.dtype)]
