"""Attention with biases, to another sequence, under masks of every shape and a bias of the logits, against NumPy."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import Context, layers, rng

B, Q, K, HEADS, EMBED, KV = 2, 3, 5, 4, 8, 6
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def some(seed, *shape):
    return np.random.default_rng(seed).random(shape) < 0.6


@functools.cache
def made(**options):
    """A layer with random numbers everywhere, in float32, drawn without compiling anything."""
    layer = layers.multi_head_attention(EMBED, HEADS, **options)

    def init():
        with rng.scope(0):
            return layer.init()

    random = np.random.default_rng(1)
    return layer, jax.tree.map(lambda a: 0.5 * random.normal(size=a.shape).astype(np.float32), jax.eval_shape(init))


@functools.partial(jax.jit, static_argnums=0)
def run(layer, variables, x, ctx=None):
    return layer.apply(variables, x, ctx=ctx)[0]


def by_hand(params, q, kv, *, kv_heads=HEADS, scale=None, allowed=True, added=0.0):
    """Softmax attention in float64, one head after the other; ``allowed`` and ``added`` as [batch, heads, q, k]."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    project = lambda z, key: z @ p[key]["weight"] + p[key].get("bias", 0.0)
    q, k, v = project(q, "q_proj"), project(kv, "k_proj"), project(kv, "v_proj")
    size = q.shape[-1] // HEADS
    q, k, v = (z.reshape(*z.shape[:2], -1, size) for z in (q, k, v))
    shape = (len(q), HEADS, q.shape[1], k.shape[1])
    allowed, added = np.broadcast_to(allowed, shape), np.broadcast_to(added, shape)
    outs = []
    for h in range(HEADS):
        g = h // (HEADS // kv_heads)
        logits = q[:, :, h] @ k[:, :, g].transpose(0, 2, 1) * (scale or 1 / math.sqrt(size)) + added[:, h]
        scores = np.exp(logits) * allowed[:, h]
        total = scores.sum(-1, keepdims=True)
        outs.append(np.divide(scores, total, out=np.zeros_like(scores), where=total > 0) @ v[:, :, g])
    return project(np.concatenate(outs, axis=-1), "out_proj")


MASKS = {
    "batch, k": (some(0, B, K), lambda m: m[:, None, None]),
    "batch, q, k": (some(1, B, Q, K), lambda m: m[:, None]),
    "batch, 1, q, k": (some(2, B, 1, Q, K), lambda m: m),
    "batch, heads, q, k": (some(3, B, HEADS, Q, K), lambda m: m),
}
# Rows of every mask that attend to nothing.
for mask, _ in MASKS.values():
    mask[(0, *(0 for _ in mask.shape[1:-1]))] = False


@pytest.mark.parametrize(
    "kind",
    [
        "batch, k",
        "batch, heads, q, k",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("batch, q, k", "batch, 1, q, k")),
    ],
)
def test_cross_attention_under_masks_of_every_shape(kind):
    mask, full = MASKS[kind]
    layer, variables = made(num_kv_heads=2, bias=True, kv_dim=KV)
    x = normal(2, B, Q, EMBED), normal(3, B, K, KV)
    loss = lambda params, x, ctx: (run(layer, variables.replace(params=params), x, ctx) ** 2).sum()
    y = run(layer, variables, x, Context(attention_mask=mask.astype(np.int8) * 3))
    expected = by_hand(variables.params, *x, kv_heads=2, allowed=full(mask))
    close(y, expected)
    if kind != "batch, heads, q, k":  # there the first head alone attends to nothing
        close(y[0, 0], variables.params["out_proj"]["bias"])
    slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables.params, x, Context(attention_mask=mask))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    # The derivative of the loss in the direction of the gradient, by differences in float64.
    length = math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(slopes)))
    moved = lambda t: jax.tree.map(
        lambda a, s: np.float64(a) + t / length * np.float64(s), (variables.params, x), slopes
    )
    values = [(by_hand(p, *z, kv_heads=2, allowed=full(mask)) ** 2).sum() for p, z in (moved(-1e-4), moved(1e-4))]
    assert (values[1] - values[0]) / 2e-4 == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize(("dtype", "kv_heads", "dropout"), [("float16", 1, 0.0), ("bfloat16", 2, 0.3)])
def test_half_precision_with_rows_that_attend_to_nothing(dtype, kv_heads, dropout):
    layer, variables = made(num_kv_heads=kv_heads, bias=True, is_causal=True, dropout=dropout)
    half = jax.tree.map(lambda a: jnp.asarray(a, dtype), variables.params)
    x, mask, added = normal(2, B, K, EMBED), some(4, B, HEADS, K, K), normal(5, 1, HEADS, K, K)
    mask[:, :, 0], mask[1] = False, False
    ctx = Context(attention_mask=mask, attention_bias=added)

    @jax.jit
    def both(params, x):
        def loss(params, x):
            with rng.scope(0):
                y, _ = layer.apply(variables.replace(params=params, dtype=dtype), x, training=dropout > 0, ctx=ctx)
            return y.astype(jnp.float32).sum(), y

        return jax.grad(loss, has_aux=True)(params, x)

    slopes, y = both(half, x.astype(dtype))
    assert y.dtype == dtype and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    y = np.asarray(y, np.float64)
    assert (y[:, 0] == np.asarray(half["out_proj"]["bias"], np.float64)).all() and (y[1] == y[0, 0]).all()
    if not dropout:
        allowed = mask & np.tril(np.ones((K, K), bool))
        expected = by_hand(variables.params, x, x, kv_heads=kv_heads, allowed=allowed, added=added)
        np.testing.assert_allclose(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("batch", [1, B])
def test_a_bias_is_added_to_the_logits(batch):
    layer, variables = made(num_kv_heads=2, head_dim=3, scale=1.0)
    assert variables.params["q_proj"]["weight"].shape == (EMBED, 12)
    assert variables.params["v_proj"]["weight"].shape == (EMBED, 6)
    assert variables.params["out_proj"]["weight"].shape == (12, EMBED)
    x, added = normal(2, B, K, EMBED), normal(3, batch, HEADS, K, K)
    hand = functools.partial(by_hand, variables.params, x, x, kv_heads=2, scale=1.0)
    close(run(layer, variables, x, Context(attention_bias=added)), hand(added=added))
    added[0, :, 1], added[:, 2, :, 0] = -np.inf, -np.inf  # a row of nothing, and a key that one head does not see
    mask = some(4, B, K)
    apply = lambda added: run(layer, variables, x, Context(attention_mask=mask, attention_bias=added))
    allowed = mask[:, None, None] & np.isfinite(added)
    close(apply(added), hand(allowed=allowed, added=np.where(np.isfinite(added), added, 0)))
    assert np.isfinite(jax.grad(lambda a: apply(a).sum())(jnp.asarray(added))).all()


def test_nan_in_a_bias_is_not_hidden():
    layer, variables = made()
    added = normal(3, 1, HEADS, K, K)
    added[0, 0, 1, 2] = np.nan
    y = run(layer, variables, normal(2, B, K, EMBED), Context(attention_bias=added))
    assert np.isnan(y).all(axis=-1).tolist() == [[False, True, False, False, False]] * B


def test_masks_in_blocks_of_queries():
    # 131 queries of a causal layer are computed in two blocks.
    layer, variables = made(is_causal=True, num_kv_heads=2)
    x, mask, added = normal(2, 1, 131, EMBED), some(3, 1, 131, 131), normal(4, 1, HEADS, 131, 131)
    y = run(layer, variables, x, Context(attention_mask=mask, attention_bias=added))
    allowed = mask[:, None] & np.tril(np.ones((131, 131), bool))
    close(y, by_hand(variables.params, x, x, kv_heads=2, allowed=allowed, added=added))


def test_on_an_accelerator_it_is_the_same(monkeypatch):
    x, ctx = normal(2, B, K, EMBED), Context(attention_mask=some(3, B, K, K), attention_bias=normal(4, 1, HEADS, K, K))
    layer, variables = made(is_causal=True, num_kv_heads=2, bias=True, scale=0.3)
    ours = run(layer, variables, x, ctx)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # there it is jax.nn.dot_product_attention
    close(jax.jit(lambda x: layer.apply(variables, x, ctx=ctx)[0])(x), ours)


@pytest.mark.parametrize("batch", [1, 2])
def test_positions_of_the_context(batch):
    """At positions with gaps, it is a longer sequence in which the gaps are masked."""
    layer, variables = made(rope=True)
    places = np.array([[0, 2, 3, 7, 8], [1, 2, 3, 4, 8]])[:batch]
    x, long, mask = normal(2, batch, K, EMBED), normal(3, batch, 9, EMBED), np.zeros((batch, 9), bool)
    rows = np.arange(batch)[:, None]
    long[rows, places], mask[rows, places] = x, True
    found = run(layer, variables, x, Context(positions=places if batch > 1 else places[0]))
    close(found, run(layer, variables, long, Context(attention_mask=mask))[rows, places])
    assert np.abs(found - run(layer, variables, x)).max() > 0.01


def test_biases_and_their_initializer():
    ones = jax.nn.initializers.ones
    layer = layers.multi_head_attention(4, 2, 1, bias=True, weight_init=ones, bias_init=ones)
    biases = {key: part["bias"].tolist() for key, part in layer.init().params.items()}
    assert biases == {"q_proj": [1] * 4, "k_proj": [1] * 2, "v_proj": [1] * 2, "out_proj": [1] * 4}
    layer = layers.multi_head_attention(4, 2, bias=True, kv_dim=3, head_dim=8, scale=1.0)
    assert repr(layer) == "multi_head_attention(4, 2, bias=True, kv_dim=3, head_dim=8, scale=1.0)"
    layer = layers.multi_head_attention(4, 2, bias=True, weight_init=ones)
    assert not any(part["bias"].any() for part in layer.init().params.values())


X = np.ones((B, K, EMBED), np.float32)


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        (
            {"kv_dim": 6}, X,
            "at '0' expected a pair (q, kv) of [batch, q, 8] and [batch, k, 6], because of kv_dim=6, received float32[2, 5, "
            "8]. Pass (x, memory), or leave kv_dim out for self-attention.",
        ),
        ({}, (X, X, X), "received a tuple of 3. Keys and values are made from one array."),
        ({}, (X, X[:1]), "with the same batch, received float32[2, 5, 8] and float32[1, 5, 8]. Repeat one of them, jnp.repeat"),
        ({"kv_dim": 6}, (X, X), "kv of multi_head_attention(8, 4, kv_dim=6) at '0' expected float32[batch, k, 6], received"),
        ({}, (X[0], X), "q of multi_head_attention(8, 4) at '0' expected float32[batch, q, 8], received float32[5, 8]"),
        (
            {"rope": True}, (X, X),
            "expected one array, received float32[2, 5, 8] and float32[2, 5, 8]: with rope=True positions in q and in kv "
            "would have no common origin. Make the layer without rope, or rotate with layers.rope in a layers.module.",
        ),
        (
            {"is_causal": True}, (X[:, :3], X),
            "of one length, received float32[2, 3, 8] and float32[2, 5, 8]: with is_causal=True it is not known which keys "
            "are earlier. Make the layer without is_causal, and pass which keys each query attends to, "
            "Context(attention_mask=...) [batch, q, k].",
        ),
    ],
)  # fmt: skip
def test_other_pairs_name_the_layer(options, x, message):
    layer, variables = made(**options)
    model = layers.sequential([layer])
    with pytest.raises(ValueError, match=re.escape(message)):
        model.apply(variables.replace(params=[variables.params], state=[{}]), x)


def test_a_causal_pair_of_one_length():
    layer, variables = made(is_causal=True)
    x = normal(2, B, K, EMBED)
    assert jnp.array_equal(run(layer, variables, (x, x)), run(layer, variables, x))


@pytest.mark.parametrize(
    ("added", "kind", "message"),
    [
        (np.ones((1, 1, K, K), np.float32), ValueError, "[batch or 1, heads, q, k], received float32[1, 1, 5, 5]. It is added"),
        (
            np.ones((1, HEADS, K, K), bool), TypeError,
            "as float [2, 4, 5, 5] or [1, 4, 5, 5], received bool[1, 4, 5, 5]. A mask of bools or integers is "
            "ctx['attention_mask'].",
        ),
    ],
)  # fmt: skip
def test_other_biases_name_the_layer(added, kind, message):
    layer, variables = made()
    with pytest.raises(
        kind, match=re.escape("multi_head_attention(8, 4) expected ctx['attention_bias'] as float ")
    ) as err:
        layer.apply(variables, X, ctx=Context(attention_bias=added))
    assert message in str(err.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"head_dim": 3, "rope": True},
            r"\(head_dim=3, rope=True\) expected an even head size .* received 3\. Write head_dim=4",
        ),
        ({"head_dim": 0}, r"\(head_dim=\.\.\.\) expected an int of at least 1, received 0"),
        ({"kv_dim": 0}, r"\(kv_dim=\.\.\.\) expected an int of at least 1, received 0"),
        ({"scale": 0.0}, r"\(scale=\.\.\.\) expected a finite number above 0, received 0\.0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=r"^multi_head_attention" + message):
        layers.multi_head_attention(8, 4, **options)


def test_without_keys_nothing_is_attended_to():
    layer, variables = made(bias=True)
    y = run(layer, variables, (X, X[:, :0]), Context(attention_mask=np.ones((B, 0), bool)))
    np.testing.assert_array_equal(y, np.broadcast_to(variables.params["out_proj"]["bias"], X.shape))
    assert run(layer, variables, X[:, :0], Context()).shape == (B, 0, EMBED)
