"""The recurrence of an LSTM compared with a plain loop: values and derivatives of both orders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun._kernels import lstm_states

LENGTH, BATCH, WIDTH = 4, 3, 2
SHAPES = [(LENGTH, BATCH, 4 * WIDTH), (WIDTH, 4 * WIDTH), (BATCH, WIDTH), (BATCH, WIDTH)]
KEEP = np.arange(LENGTH)[:, None, None] < np.array([4, 2, 0])[None, :, None]


def drawn(seed):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in SHAPES]


def plain(inputs, weight, h, c, keep):
    def step(before, at):
        (h, c), (x, moves) = before, at
        i, f, g, o = jnp.split(x + h @ weight, 4, axis=-1)
        after = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h, c = jnp.where(moves, jax.nn.sigmoid(o) * jnp.tanh(after), h), jnp.where(moves, after, c)
        return (h, c), h

    (_, c), y = jax.lax.scan(step, (h, c), (inputs, np.ones_like(KEEP) if keep is None else keep))
    return y, c


def everything(f, keep, *arguments):
    f = lambda *a, f=f: f(*a, keep)
    bars, directions = (jnp.cos(arguments[0][..., :WIDTH]), jnp.sin(arguments[2])), tuple(map(jnp.sin, arguments))
    slopes = lambda *a: jax.vjp(f, *a)[1](bars)
    return f(*arguments), slopes(*arguments), jax.jvp(f, arguments, directions), jax.jvp(slopes, arguments, directions)


@pytest.mark.parametrize("keep", [pytest.param(None, marks=pytest.mark.slow), pytest.param(KEEP, id="lengths")])
def test_values_and_derivatives_are_those_of_a_plain_loop(keep):
    ours, expected = (jax.jit(everything, static_argnums=0)(f, keep, *drawn(0)) for f in (lstm_states, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, expected)


def test_a_derivative_with_respect_to_each_argument_alone():
    given = drawn(1)

    def slopes(f):
        value = lambda i, a: sum((b**2).sum() for b in f(*given[:i], a, *given[i + 1 :], None))
        return [jax.grad(value, argnums=1)(i, a) for i, a in enumerate(given)]

    ours, expected = (jax.jit(slopes, static_argnums=0)(f) for f in (lstm_states, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, expected)


def test_under_vmap():
    value = lambda f: jax.jit(jax.vmap(jax.grad(lambda w, x: (f(x, w, *drawn(2)[2:], None)[0] ** 2).sum())))
    inputs, weights = (jnp.stack([drawn(seed)[i] for seed in range(2)]) for i in range(2))
    np.testing.assert_allclose(value(lstm_states)(weights, inputs), value(plain)(weights, inputs), rtol=2e-5, atol=2e-6)
