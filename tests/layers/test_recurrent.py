"""Recurrent layers by hand in NumPy, rows of different lengths, states in and out, and both directions.

tests/parity/torch compares them with PyTorch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, Layer, layers, losses, rng, tree
from kaun.layers.core import abstract_vars

B, T, F, H = 3, 5, 4, 6
X = np.random.default_rng(0).normal(size=(B, T, F)).astype(np.float32)
LENGTHS = np.array([5, 2, 0])
KINDS = {"lstm": layers.lstm, "gru": layers.gru, "rnn": layers.rnn}
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
every = pytest.mark.parametrize("kind", KINDS)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(kind, params, x, h, c):
    """One position in float64: the formulas of PyTorch's documentation."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[kind]
    xs = np.split(x @ p["weight_ih"] + p["bias_ih"], gates, axis=-1)
    hs = np.split(h @ p["weight_hh"] + p["bias_hh"], gates, axis=-1)
    if kind == "rnn":
        return np.tanh(xs[0] + hs[0]), c
    if kind == "lstm":
        i, f, g, o = (a + b for a, b in zip(xs, hs, strict=True))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c
    r, z = sigmoid(xs[0] + hs[0]), sigmoid(xs[1] + hs[1])
    return (1 - z) * np.tanh(xs[2] + r * hs[2]) + z * h, c


@functools.cache
def made(kind):
    layer = KINDS[kind](F, H, return_state=True)
    with rng.scope(0):
        variables = layer.init()
    random = np.random.default_rng(1)
    noisy = jax.tree.map(lambda a: a + jnp.asarray(0.3 * random.normal(size=a.shape), a.dtype), variables.params)
    return layer, variables.replace(params=noisy)


def final(kind, state):
    return state if kind == "lstm" else (state,)


@pytest.mark.parametrize("kind", ["lstm", "rnn", pytest.param("gru", marks=pytest.mark.slow)])
def test_values_with_lengths_row_by_row(kind):
    layer, variables = made(kind)
    (y, state), _ = layer.apply(variables, X, ctx=Context(lengths=LENGTHS))
    for row, length in enumerate(LENGTHS):
        h, c = np.zeros(H), np.zeros(H)
        for t in range(length):
            h, c = by_hand(kind, variables.params, X[row, t], h, c)
            close(y[row, t], h)
        np.testing.assert_array_equal(y[row, length:], 0.0)
        for ours, expected in zip(final(kind, state), (h, c), strict=False):
            close(ours[row], expected)


@every
def test_a_sequence_in_two_parts_is_the_whole(kind):
    layer, variables = made(kind)
    (whole, end), _ = layer.apply(variables, X)
    (first, state), _ = layer.apply(variables, X[:, :2])
    (second, after), _ = layer.apply(variables, (X[:, 2:], state))
    close(jnp.concatenate([first, second], axis=1), whole)
    jax.tree.map(close, after, end)
    alone, _ = KINDS[kind](F, H).apply(variables, X)
    np.testing.assert_array_equal(alone, whole)


@pytest.mark.parametrize("kind", ["lstm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gru", "rnn"))])
def test_what_lies_behind_a_row_changes_nothing(kind):
    """Neither the outputs nor the gradients of the parameters, in both directions."""
    layer = layers.bidirectional(made(kind)[0])
    variables = layer.init()
    inside = np.arange(T)[None] < LENGTHS[:, None]
    other = np.where(inside[:, :, None], X, 7.0).astype(np.float32)

    def total(params, x):
        (y, state), _ = layer.apply(variables.replace(params=params), x, ctx=Context(lengths=LENGTHS))
        return (y**2).sum() + sum((a**2).sum() for a in jax.tree.leaves(state)), y

    (_, one), slopes = jax.value_and_grad(total, has_aux=True)(variables.params, X)
    (_, two), again = jax.value_and_grad(total, has_aux=True)(variables.params, other)
    np.testing.assert_array_equal(one, two)
    jax.tree.map(np.testing.assert_array_equal, slopes, again)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(slopes))


def test_the_backward_direction_reads_each_row_from_its_end():
    layer = layers.bidirectional(layers.gru(F, H))
    variables = layer.init()
    assert list(tree.flatten(variables.params)[0])[:2] == ["backward.bias_hh", "backward.bias_ih"]
    y, _ = layer.apply(variables, X, ctx=Context(lengths=LENGTHS))
    assert y.shape == (B, T, 2 * H)
    backward = variables.replace(params=variables.params["backward"], state={})
    alone, _ = layers.gru(F, H).apply(backward, X[1:2, 1::-1])
    close(y[1, :2, H:], alone[0, ::-1])
    whole, _ = layer.apply(variables, X)
    turned, _ = layers.gru(F, H).apply(backward, X[:, ::-1])
    close(whole[:, :, H:], turned[:, ::-1])


def test_both_directions_take_and_return_a_state():
    layer = layers.bidirectional(made("lstm")[0])
    variables = layer.init()
    (y, (forward, backward)), _ = layer.apply(variables, X)
    close(y[:, -1, :H], forward[0])
    close(y[:, 0, H:], backward[0])
    (again, _), _ = layer.apply(variables, (X, (forward, backward)))
    assert not np.allclose(again[:, 0, :H], y[:, 0, :H])
    text = r"expected \(x, \(forward, backward\)\), the state of each direction, received the state float32\[3, 6\]\. Pass what a"
    with pytest.raises(ValueError, match=text):
        layer.apply(variables, (X, jnp.zeros((B, H))))
    with pytest.raises(ValueError, match=r"bidirectional expected an array .* received a tuple of 1"):
        layer.apply(variables, (X,))


def test_lengths_of_any_integer_dtype():
    layer = layers.bidirectional(layers.rnn(F, H))
    variables = layer.init()
    expected, _ = layer.apply(variables, X, ctx=Context(lengths=LENGTHS))
    for dtype in ("uint8", "uint16", "int8"):  # the last row has none, and 0 - 1 is 255 in uint8
        with jax.numpy_dtype_promotion("strict"):
            y, _ = layer.apply(variables, X, ctx=Context(lengths=LENGTHS.astype(dtype)))
        np.testing.assert_array_equal(y, expected)


def test_a_sequence_of_any_length_is_exported():
    layer = layers.lstm(F, H)
    variables = layer.init()
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"batch, length, {F}"), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: layer.apply(variables, x)[0]))(shape)
    close(exported.call(X), layer.apply(variables, X)[0])


def test_an_lstm_learns_to_remember():
    """The first number of a sequence, from the hidden state at its end."""
    x = np.random.default_rng(2).normal(size=(32, 4, 1)).astype(np.float32)
    parts = {"lstm": layers.lstm(1, 8, return_state=True), "out": layers.linear(8, 1)}
    model = layers.module(parts, lambda m, x: m.out(m.lstm(x)[1][0]))
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.05))
        state = trainer.init()
    loss = lambda y: losses.mse(y, jnp.asarray(x[:, 0]))
    state = trainer.fit(state, kaun.Data.repeat(100, (x, loss)))
    assert trainer.step(state, x, loss=loss)[0] < 0.1 < 0.5 < float((x[:, 0] ** 2).mean())


def test_half_precision_computes_its_gates_in_float32():
    layer, variables = made("lstm")
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables).replace(dtype=jnp.bfloat16)
    (y, state), _ = layer.apply(narrow, X.astype(jnp.bfloat16))
    assert {a.dtype for a in (y, *state)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(y.astype(np.float32), layer.apply(variables, X)[0][0], atol=0.03)


@every
def test_shapes_of_the_parameters(kind):
    params = abstract_vars(KINDS[kind](F, H), jnp.float16).params
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[kind]
    assert {k: v.shape for k, v in params.items()} == {
        "weight_ih": (F, gates * H), "weight_hh": (H, gates * H), "bias_ih": (gates * H,), "bias_hh": (gates * H,),
    }  # fmt: skip
    assert {v.dtype for v in params.values()} == {jnp.dtype(jnp.float16)}
    assert repr(KINDS[kind](F, H, True)) == f"{kind}(4, 6, return_state=True)"


def test_the_recurrent_weight_is_orthogonal_and_biases_are_zero():
    params = layers.lstm(F, H).init(dtype=jnp.float16).params
    weight = np.asarray(params["weight_hh"], np.float32)
    np.testing.assert_allclose(weight @ weight.T, np.eye(H), atol=1e-2)
    assert not np.any(params["bias_ih"]) and not np.any(params["bias_hh"])


@pytest.mark.parametrize(
    ("apply", "error", "text"),
    [
        (lambda f: f(X[:, :, :3]), ValueError, r"lstm\(4, 6\) at '0' expected float32\[batch, length, 4\], received float32\[3, 5, 3\]"),
        (lambda f: f(X[0]), ValueError, "it has 2 axes instead of 3"),
        (lambda f: f(X, lengths=jnp.ones(3)), TypeError, r"expected ctx\['lengths'\] as int\[3\], the length of each row, received float32\[3\]\. Write"),
        (lambda f: f(X, lengths=np.ones(2, int)), ValueError, r"received int\d+\[2\]\. Write jnp\.full\(\d+, \d+\) for whole rows"),
        (lambda f: f(X, lengths=np.array([1, 6, 2])), ValueError, r"in 0 to 5, received 6\. Cut the lengths .* jnp\.minimum\(lengths, 5\)"),
        (lambda f: f(X, lengths=np.array([1, -1, 2])), ValueError, r"in 0 to 5, received -1\."),
        (lambda f: f((X, jnp.zeros((3, 6)))), ValueError, r"expected \(x, state\) with the state \(float32\[3, 6\], float32\[3, 6\]\), received float32\[3, 6\]\. Pass"),
        (lambda f: f((X, X, X)), ValueError, r"lstm\(4, 6\) at '0' expected an array \[batch, length, features\] or a pair \(x, state\), received a tuple of 3\. Pass one"),
        (lambda f: f((X, (jnp.zeros((3, 6)), jnp.zeros((3, 5))))), ValueError, r"received float32\[3, 6\], float32\[3, 5\]"),
    ],
)  # fmt: skip
def test_what_is_refused(apply, error, text):
    model = layers.sequential([layers.lstm(F, H)])
    variables = model.init()
    with pytest.raises(error, match=text):
        apply(lambda x, **ctx: model.apply(variables, x, ctx=Context(ctx)))


def test_sizes_and_a_layer_are_needed():
    with pytest.raises(ValueError, match=r"gru\(hidden=\.\.\.\) expected an int of at least 1, received 0"):
        layers.gru(3, 0)
    with pytest.raises(TypeError, match=r"rnn\(in_features=\.\.\.\) expected an int of at least 1, received '3'"):
        layers.rnn("3", 2)
    with pytest.raises(
        TypeError,
        match=r"bidirectional expected layers, received lstm\. Call it: layers\.lstm\(in_features, hidden\)\.$",
    ):
        layers.bidirectional(layers.lstm)
    assert isinstance(layers.bidirectional(layers.rnn(2, 3)), Layer)
    with pytest.raises(
        ValueError, match=r"bidirectional expected float\[batch, length, channels\], .* 2 axes instead of 3"
    ):
        layers.bidirectional(layers.rnn(2, 3)).apply(layers.bidirectional(layers.rnn(2, 3)).init(), X[0])
