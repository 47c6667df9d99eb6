"""Dropout of numbers, channels and items."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import layers, rng
from kaun._kernels import random_bits

quick = settings(max_examples=20, deadline=None)


def apply(layer, x, seed=0, training=True):
    with rng.scope(seed):
        return layer.apply(layer.init(dtype=jnp.float32), x, training=training)[0]


def compiled(layer):
    """``apply`` as one program, for a key and an input."""
    return jax.jit(lambda key, x: apply(layer, x, key))


@given(st.floats(0.05, 0.95), st.integers(0, 99))
@quick
def test_zeroes_the_share_and_scales_the_rest(rate, seed):
    n = 4000
    y = np.asarray(apply(layers.dropout(rate), jnp.full(n, 3.0), seed))
    kept = y != 0
    # Binomial: six standard deviations, so that no seed is unlucky.
    assert abs(kept.mean() - (1 - rate)) < 6 * (rate * (1 - rate) / n) ** 0.5
    np.testing.assert_allclose(y[kept], 3.0 / (1 - rate), rtol=1e-6)
    assert abs(y.mean() - 3.0) < 6 * 3.0 * (rate / (1 - rate) / n) ** 0.5


@pytest.mark.parametrize(
    ("rate", "bits"), [(0.5, 8), (0.125, 8), (0.1, 16), (1 / 3, 16), (0.98, 16), (0.01, 32), (0.999, 32)]
)
def test_the_share_is_exact_to_the_documented_precision(monkeypatch, rate, bits):
    # All numbers there are, each once (of 32 bits the 65,536 around the threshold): what is zero is the share itself.
    least = rate * 2**bits
    first = max(round(least) - 2**15, 0) if bits == 32 else 0
    numbers = (first + np.arange(2 ** min(bits, 16))).astype(f"uint{bits}")
    asked = []
    monkeypatch.setattr(
        sys.modules["kaun.layers.dropout"],
        "random_bits",
        lambda key, bits, shape: asked.append(bits) or jnp.asarray(numbers),
    )
    dropped = int((apply(layers.dropout(rate), jnp.ones(len(numbers))) == 0).sum())
    assert asked == [bits]
    assert abs(first + dropped - least) <= 0.5


@pytest.mark.parametrize(
    ("make", "mask"), [(layers.spatial_dropout, (400, 1, 1, 8)), (layers.drop_path, (400, 1, 1, 1))]
)
@pytest.mark.parametrize("rate", [0.25, 0.3])
def test_whole_channels_and_items(make, mask, rate):
    y = np.asarray(compiled(make(rate))(jax.random.key(3), jnp.full((400, 2, 3, 8), 3.0)))
    kept = y != 0
    first = kept[:, :1, :1, : mask[3]]
    assert np.array_equal(kept, np.broadcast_to(first, kept.shape))
    n = first.size
    assert abs(first.mean() - (1 - rate)) < 6 * (rate * (1 - rate) / n) ** 0.5
    np.testing.assert_allclose(y[kept], 3.0 / (1 - rate), rtol=1e-6)


def test_channels_and_items_need_their_axes():
    with pytest.raises(
        ValueError,
        match=r"spatial_dropout\(0\.5\) expected \[batch, \.\.\., channels\] .*received float32\[4, 3\].*layers\.dropout",
    ):
        apply(layers.spatial_dropout(0.5), jnp.ones((4, 3)), training=False)
    with pytest.raises(ValueError, match=r"drop_path\(0\.5\) expected .* received float32\[\]: it has 0 axes"):
        apply(layers.drop_path(0.5), jnp.float32(1), training=False)


def test_no_number_is_drawn_twice():
    def numbers(bits, shape):
        with rng.scope(0):
            draw = jax.jit(random_bits, static_argnums=(1, 2))
            return np.asarray(draw(rng.next_key(), bits, shape)).ravel()

    for shape in ((4096,), (64, 64), (3, 7, 195), (4095, 1)):
        drawn = numbers(32, shape)
        # Of 4,096 numbers out of 2**32 two are equal once in 500 draws, by chance; of this seed none are.
        assert drawn.shape == (math.prod(shape),) and len(np.unique(drawn)) == len(drawn)
    for bits, dtype in ((8, np.uint8), (16, np.uint16)):
        drawn = numbers(bits, (8, 33, 1000))
        assert drawn.dtype == dtype
        share = np.bincount(drawn >> (bits - 4), minlength=16) / len(drawn)
        assert np.abs(share - 1 / 16).max() < 6 * (1 / 16 / len(drawn)) ** 0.5


def test_neighbours_are_dropped_independently():
    mask = np.asarray(apply(layers.dropout(0.3), jnp.ones((40, 50, 61)))) == 0
    for axis in range(3):
        for apart in (1, 2, 3, 4, 8):
            a, b = (
                np.take(mask, range(apart, mask.shape[axis]), axis),
                np.take(mask, range(mask.shape[axis] - apart), axis),
            )
            n = a.size
            assert abs((a & b).mean() - 0.09) < 6 * (0.09 * 0.91 / n) ** 0.5 * 2


def test_a_loop_drops_what_is_dropped_outside():
    keys, x = jax.random.split(jax.random.key(0), 3), jnp.ones((4, 9))

    def dropped(key):
        with rng.scope(key):
            return layers.dropout(0.2).apply(layers.dropout(0.2).init(dtype=jnp.float32), x, training=True)[0]

    looped = jax.jit(lambda keys: jax.lax.scan(lambda c, key: (c, dropped(key)), 0, keys)[1])(keys)
    assert jnp.array_equal(looped, jnp.stack([dropped(key) for key in keys]))
    assert jnp.array_equal(looped, jax.vmap(dropped)(keys))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_any_kind(impl):
    y = compiled(layers.dropout(0.25))(jax.random.key(1, impl=impl), jnp.ones((50, 80)))
    assert abs(float((y == 0).mean()) - 0.25) < 6 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (1,), (2, 1, 1)])
def test_any_shape(shape):
    assert compiled(layers.dropout(0.5))(jax.random.key(0), jnp.ones(shape)).shape == shape


@given(st.floats(0, 0.95), st.integers(0, 99))
@quick
def test_the_mask_is_a_function_of_the_key(rate, seed):
    layer, x = layers.dropout(rate), jnp.ones((8, 8))
    assert jnp.array_equal(apply(layer, x, seed), apply(layer, x, seed))


def test_two_layers_drop_independently():
    layer, x = layers.dropout(0.5), jnp.ones(100)
    with rng.scope(0):
        variables = layer.init(dtype=jnp.float32)
        first, second = (layer.apply(variables, x, training=True)[0] for _ in range(2))
    assert not jnp.array_equal(first, second)


@pytest.mark.parametrize(("rate", "training"), [(0.5, False), (0.0, True), (0, False)])
@pytest.mark.parametrize("make", [layers.dropout, layers.spatial_dropout, layers.drop_path])
def test_is_the_identity_and_draws_no_key(make, rate, training):
    layer, x = make(rate), jnp.arange(8.0).reshape(2, 2, 2)
    with rng.scope(0):
        assert jnp.array_equal(layer.apply(layer.init(dtype=jnp.float32), x, training=training)[0], x)
        key = rng.next_key()
    with rng.scope(0):
        assert key == rng.next_key()


def test_the_gradient_goes_where_the_value_goes():
    layer, x = layers.dropout(0.25), jnp.ones(64)
    slopes = jax.grad(lambda x: apply(layer, x).sum())(x)
    assert jnp.array_equal(slopes, apply(layer, x))


def test_what_is_dropped_is_zero_even_from_infinity():
    y = apply(layers.dropout(0.5), jnp.full(100, jnp.inf))
    assert set(y.tolist()) == {0.0, float("inf")}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_keeps_the_dtype(dtype):
    y = apply(layers.dropout(0.5), jnp.ones((4, 4), dtype))
    assert y.dtype == dtype and set(y.astype(jnp.float32).ravel().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("rate", [1.0, -0.1, 50])
def test_a_rate_outside_is_refused(rate):
    for name in ("dropout", "spatial_dropout", "drop_path"):
        with pytest.raises(ValueError, match=rf"{name}\(rate=\.\.\.\) expected a number in \[0, 1\), received"):
            getattr(layers, name)(rate)


def test_an_integer_input_is_refused():
    with pytest.raises(TypeError, match=r"dropout\(0\.5\) expected float\[\.\.\., channels\], received int32\[3\]"):
        apply(layers.dropout(0.5), jnp.arange(3), training=False)


def test_a_compiled_function_with_its_scope_outside_is_refused():
    layer = layers.dropout(0.5)
    variables = layer.init(dtype=jnp.float32)
    compiled = jax.jit(lambda x: layer.apply(variables, x, training=True)[0])
    with rng.scope(0), pytest.raises(RuntimeError, match="frozen into the compiled program"):
        compiled(jnp.ones(3))


def test_compiled_with_its_scope_inside_it_is_the_same():
    layer, x = layers.dropout(0.5), jnp.ones((8, 8))

    @jax.jit
    def compiled(key, x):
        with rng.scope(key):
            return layer.apply(layer.init(dtype=jnp.float32), x, training=True)[0]

    assert jnp.array_equal(compiled(jax.random.key(0), x), apply(layer, x))


def test_repr():
    assert repr(layers.dropout(0.5)) == "dropout(0.5)"
