"""Rotary embedding, and the layers that add positions, against NumPy; their messages."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import Context, layers, rng

quick = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 99)


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rotated(x, theta=10000.0, places=None, interleaved=False):
    """Rotary embedding of [batch, seq, heads, size] by complex numbers, in float64."""
    x, half = np.asarray(x, np.float64), x.shape[-1] // 2
    places = np.arange(x.shape[1])[None] if places is None else np.atleast_2d(places)
    angles = places[..., None] * theta ** (-2.0 * np.arange(half) / x.shape[-1])
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    z = (a + 1j * b) * np.exp(1j * angles)[:, :, None, :]
    return np.stack([z.real, z.imag], -1).reshape(x.shape) if interleaved else np.concatenate([z.real, z.imag], -1)


@functools.partial(jax.jit, static_argnums=0)
def run(layer, variables, x, places=None):
    ctx = Context() if places is None else Context(positions=places)
    return layer.apply(variables, x, ctx=ctx)[0]


close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@given(seeds, st.sampled_from([10000.0, 50.0]))
@quick
def test_rope_against_complex_numbers(seed, theta):
    x = normal(seed, (2, 6, 3, 4))
    close(layers.rope(x, theta, seq_axis=1), rotated(x, theta))


@given(seeds, st.integers(0, 5), st.integers(0, 5), st.integers(0, 10))
@quick
def test_rope_is_relative(seed, i, j, shift):
    q, k = normal(seed, (8,)), normal(seed + 1, (8,))
    everywhere = [np.asarray(layers.rope(np.broadcast_to(v, (16, 8))), np.float64) for v in (q, k)]
    near, far = (everywhere[0][i + s] @ everywhere[1][j + s] for s in (0, shift))
    assert near == pytest.approx(far, rel=1e-4, abs=1e-4)


@given(seeds)
@quick
def test_rope_keeps_lengths_and_the_first_position(seed):
    x = normal(seed, (3, 7, 6))
    y = layers.rope(x)
    assert jnp.array_equal(y[:, 0], x[:, 0])
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_rope_axes():
    x = normal(0, (2, 6, 3, 4))
    swapped = layers.rope(x.swapaxes(1, 2), seq_axis=-2).swapaxes(1, 2)
    for axis in (1, -3):
        np.testing.assert_allclose(layers.rope(x, seq_axis=axis), swapped, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rope_computes_angles_in_float32(dtype):
    # In bfloat16 the position 4001 would be 4000, in float16 the angle would be off by a radian.
    x = jnp.ones((4002, 2), dtype)
    y = layers.rope(x)
    assert y.dtype == dtype
    assert jnp.array_equal(y, layers.rope(x.astype(jnp.float32)).astype(dtype))


@pytest.mark.parametrize("axis", [-1, 1, 2, -3, "a", None])
def test_rope_refuses_other_axes(axis):
    with pytest.raises(
        ValueError if isinstance(axis, int) else TypeError,
        match=rf"rope expected seq_axis to name an axis before the last, received seq_axis={axis!r} for float32\[4, 2\]",
    ):
        layers.rope(jnp.ones((4, 2)), seq_axis=axis)


def test_rope_refuses_other_inputs():
    with pytest.raises(
        ValueError,
        match=r"rope expected a last axis of even size, received float32\[4, 3\]: it rotates its two halves\. Write rotary_dim=",
    ):
        layers.rope(jnp.ones((4, 3)))
    with pytest.raises(TypeError, match=r"rope expected float\[\.\.\., channels\], received int32\[4, 2\]"):
        layers.rope(jnp.ones((4, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"rope\(theta=\.\.\.\) expected a finite number above 0, received -1\.0"):
        layers.rope(jnp.ones((4, 2)), theta=-1.0)


@pytest.mark.parametrize("places", [np.array([7, 0, 3, 3]), np.array([[7, 0, 3, 3], [1, 2, 90, 4]])])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_at_positions(places, interleaved):
    x = normal(0, (2, 4, 3, 6))
    found = layers.rope(x, 100.0, seq_axis=1, positions=places, interleaved=interleaved, rotary_dim=4)
    close(found[..., :4], rotated(x[..., :4], 100.0, places, interleaved))
    assert jnp.array_equal(found[..., 4:], x[..., 4:])
    # Another place of the axis of positions, with the batch first.
    moved = layers.rope(x.swapaxes(1, 2), 100.0, positions=places, interleaved=interleaved, rotary_dim=4)
    assert jnp.array_equal(moved.swapaxes(1, 2), found)


def test_rope_refuses_other_positions_and_sizes():
    x = jnp.ones((2, 4, 6))
    expected = r"rope expected positions as int\[4\] or int\[2, 4\], the position of each vector, received "
    with pytest.raises(ValueError, match=expected + r"int32\[3\]\. Write jnp\.arange\(4\)"):
        layers.rope(x, positions=jnp.arange(3))
    with pytest.raises(TypeError, match=expected + r"float32\[4\]\. Write jnp\.arange\(4\)"):
        layers.rope(x, positions=jnp.ones(4))
    with pytest.raises(ValueError, match=r"rope expected positions as int\[2\], the position of each vector, received"):
        layers.rope(x, seq_axis=0, positions=jnp.zeros((2, 2), jnp.int32))
    for wrong in (3, 8):
        with pytest.raises(
            ValueError,
            match=rf"rope expected rotary_dim to be even and at most .* rotary_dim={wrong} for float32\[2, 4, 6\]\. Write "
            "rotary_dim=6",
        ):
            layers.rope(x, rotary_dim=wrong)
    with pytest.raises(ValueError, match=r"rope\(rotary_dim=\.\.\.\) expected an int of at least 1, received 0"):
        layers.rope(x, rotary_dim=0)


def sinusoids(places, dim):
    angles = np.asarray(places, np.float64)[..., None] / 10000 ** (2 * np.arange(dim // 2) / dim)
    found = np.empty((*np.shape(places), dim))
    found[..., ::2], found[..., 1::2] = np.sin(angles), np.cos(angles)
    return found


def test_sinusoidal_positions():
    layer, x = layers.sinusoidal_positions(6), np.asarray(normal(0, (2, 4, 6)))
    variables = layer.init()
    assert variables.params == {} and repr(layer) == "sinusoidal_positions(6)"
    close(run(layer, variables, x), x + sinusoids(range(4), 6))
    for places in (np.array([7, 0, 3, 3]), np.array([[7, 0, 3, 3], [1, 2, 90, 4]])):
        close(run(layer, variables, x, places), x + sinusoids(places, 6))
    long = run(layer, variables, jnp.zeros((1, 4002, 6), jnp.bfloat16))
    assert long.dtype == jnp.bfloat16  # in which the position 4001 would be 4000
    np.testing.assert_allclose(np.asarray(long[0, -1], np.float64), sinusoids(4001, 6), atol=0.005)


def test_learned_positions():
    layer, x = layers.positions(8, 6), np.asarray(normal(0, (2, 4, 6)))
    with rng.scope(0):
        variables = layer.init()
    weight = np.asarray(variables.params["weight"])
    assert weight.shape == (8, 6) and 0.01 < float(weight.std()) < 0.03 and repr(layer) == "positions(8, 6)"
    close(run(layer, variables, x), x + weight[None, :4])
    for places in (np.array([7, 0, 3, 3]), np.array([[7, 0, 3, 3], [1, 2, 5, 4]])):
        close(run(layer, variables, x, places), x + weight[np.atleast_2d(places)])
    outside = jax.jit(lambda places: run(layer, variables, x, places))(np.array([7, 8, -1, 0]))
    assert jnp.isnan(outside).any(axis=(0, 2)).tolist() == [False, True, True, False]
    drawn = layers.positions(2, 3, weight_init=jax.nn.initializers.ones).init()
    assert drawn.params["weight"].tolist() == [[1] * 3] * 2


@pytest.mark.parametrize(
    ("layer", "x", "places", "message"),
    [
        (
            layers.positions(4, 6), (2, 5, 6), None,
            "positions(4, 6) at '0' has 4 positions, received a sequence of 5, float32[2, 5, 6]. Cut the sequence, x[:, :4], "
            "or make max_length 5 or more.",
        ),
        (
            layers.positions(4, 6), (2, 3, 6), np.array([0, -1, 2]),
            "positions(4, 6) at '0' expected ctx['positions'] in [0, 4), received -1. Make max_length larger, or correct",
        ),
        (layers.positions(4, 6), (2, 6), None, "at '0' expected float32[batch, seq, 6], received float32[2, 6]"),
        (
            layers.sinusoidal_positions(6), (2, 3, 6), np.arange(2),
            "sinusoidal_positions(6) at '0' expected ctx['positions'] as int[3] or int[2, 3], the position of each vector, "
            "received int64[2]. Write jnp.arange(3), for example.",
        ),
        (layers.sinusoidal_positions(6), (2, 3, 4), None, "at '0' expected float[batch, seq, 6], received float32[2, 3, 4]"),
    ],
)  # fmt: skip
def test_messages_of_positions(layer, x, places, message):
    model = layers.sequential([layer])
    ctx = Context() if places is None else Context(positions=places)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.apply(model.init(), jnp.ones(x), ctx=ctx)


def test_sizes_of_positions():
    with pytest.raises(ValueError, match=r"sinusoidal_positions\(dim=5\) expected an even number.* Write dim=6"):
        layers.sinusoidal_positions(5)
    with pytest.raises(ValueError, match=r"positions\(max_length=\.\.\.\) expected an int of at least 1, received 0"):
        layers.positions(0, 4)
