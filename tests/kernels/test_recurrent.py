"""Recurrences compared with plain loops: values and derivatives of both orders."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun._kernels import GRU, LSTM, RNN, recurrence

MATMUL = importlib.import_module("kaun._kernels.matmul")  # whose name in the package is the function
LENGTH, BATCH, WIDTH = 4, 3, 2
KEEP = np.arange(LENGTH)[:, None, None] < np.array([4, 2, 0])[None, :, None]
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def lstm(h, x, p):
    i, f, g, o = jnp.split(x + p, 4, axis=-1)
    c = jax.nn.sigmoid(f) * h[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru(h, x, p):
    (xr, xz, xn), (pr, pz, pn) = jnp.split(x, 3, axis=-1), jnp.split(p, 3, axis=-1)
    z = jax.nn.sigmoid(xz + pz)
    return ((1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + pr) * pn) + z * h[0],)


def rnn(h, x, p):
    return (jnp.tanh(x + p),)


# The cell, the same in plain operations, its gates and its states.
CELLS = {"lstm": (LSTM, lstm, 4, 2), "gru": (GRU, gru, 3, 1), "rnn": (RNN, rnn, 1, 1)}


def drawn(kind, seed):
    *_, gates, states = CELLS[kind]
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    wide = gates * WIDTH
    return draw(LENGTH, BATCH, wide), draw(WIDTH, wide), draw(wide), tuple(draw(BATCH, WIDTH) for _ in range(states))


def both(kind, keep=None):
    """The recurrence, and a plain loop."""
    ours, cell = CELLS[kind][:2]
    moves = np.ones_like(KEEP) if keep is None else keep

    def plain(inputs, weight, bias, start):
        def step(before, at):
            after = cell(before, at[0], before[0] @ weight + bias[None])
            after = tuple(jnp.where(at[1], a, b) for a, b in zip(after, before, strict=True))
            return after, after[0]

        end, y = jax.lax.scan(step, start, (inputs, moves))
        return y, end

    return lambda *a: recurrence(ours, *a, keep), plain


def everything(f, *arguments):
    bars = jnp.cos(arguments[0][..., :WIDTH]), jax.tree.map(jnp.sin, arguments[3])
    directions = jax.tree.map(jnp.sin, arguments)
    slopes = lambda *a: jax.vjp(f, *a)[1](bars)
    return f(*arguments), slopes(*arguments), jax.jvp(f, arguments, directions), jax.jvp(slopes, arguments, directions)


slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "keep"),
    [("lstm", KEEP), slow("lstm", None), ("gru", KEEP), slow("gru", None), slow("rnn", KEEP), slow("rnn", None)],
)
def test_values_and_derivatives_are_those_of_a_plain_loop(kind, keep):
    ours, expected = (jax.jit(everything, static_argnums=0)(f, *drawn(kind, 0)) for f in both(kind, keep))
    jax.tree.map(close, ours, expected)


@pytest.mark.parametrize("kind", ["lstm", slow("gru"), slow("rnn")])
def test_a_derivative_with_respect_to_each_argument_alone(kind):
    given = drawn(kind, 1)

    def slopes(f):
        value = lambda i, a: sum((b**2).sum() for b in jax.tree.leaves(f(*given[:i], a, *given[i + 1 :])))
        return [jax.grad(value, argnums=1)(i, a) for i, a in enumerate(given)]

    jax.tree.map(close, *(jax.jit(slopes, static_argnums=0)(f) for f in both(kind)))


def test_the_gradient_of_the_weight_is_one_product_on_the_fast_kernel(monkeypatch):
    arguments = drawn("gru", 3)
    slope = lambda f: jax.jit(jax.grad(lambda w: (f(arguments[0], w, *arguments[2:])[0] ** 2).sum()))
    seen = []
    transposed = MATMUL._transposed
    monkeypatch.setattr(MATMUL, "_ROWS", 0)
    monkeypatch.setattr(MATMUL, "_LARGE", 0)
    monkeypatch.setattr(MATMUL, "_transposed", lambda a: seen.append(a.shape) or transposed(a))
    ours, expected = (slope(f)(arguments[1]) for f in both("gru"))
    close(ours, expected)
    assert seen == [(LENGTH * BATCH, WIDTH)]


def test_what_the_gradient_keeps_of_the_gates_takes_the_place_of_the_inputs():
    length, batch, width = 64, 16, 32
    weight, bias, start = jnp.zeros((width, 4 * width)), jnp.zeros(4 * width), (jnp.zeros((batch, width)),) * 2
    loss = lambda x, weight: (recurrence(LSTM, jnp.sin(x), weight, bias, start, None)[0] ** 2).sum()
    compiled = jax.jit(jax.grad(loss, argnums=1)).lower(jnp.zeros((length, batch, 4 * width)), weight).compile()
    # In arrays of the width of the states: 13, and 15 with the slopes in an array of their own.
    assert compiled.memory_analysis().temp_size_in_bytes < 14 * 4 * length * batch * width


def test_under_vmap():
    inputs, weights = (jnp.stack([drawn("lstm", seed)[i] for seed in range(2)]) for i in range(2))
    rest = drawn("lstm", 2)[2:]
    value = lambda f: jax.jit(jax.vmap(jax.grad(lambda w, x: (f(x, w, *rest)[0] ** 2).sum())))
    close(*(value(f)(weights, inputs) for f in both("lstm")))
