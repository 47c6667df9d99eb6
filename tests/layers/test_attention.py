"""Attention against a plain softmax in NumPy, and its masks; test_attention_options has what is asked for by options."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from kaun import Context, layers, rng

quick = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 99)
BATCH, SEQ, EMBED, HEADS = 2, 5, 8, 4


def filled(layer, seed=0, dtype=jnp.float32):
    """Variables of the layer with random numbers everywhere, made without compiling anything."""

    def init():
        with rng.scope(0):
            return layer.init(dtype=dtype)

    random = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(0.5 * random.normal(size=a.shape), a.dtype), jax.eval_shape(init))


def normal(seed, shape=(BATCH, SEQ, EMBED)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def attention(training=False, **options):
    """A layer, and its output as a compiled function of variables, input and mask."""
    layer = layers.multi_head_attention(EMBED, HEADS, **options)

    def apply(variables, x, mask=None, key=None):
        ctx = Context() if mask is None else Context(attention_mask=mask)
        with rng.scope(jax.random.key(0) if key is None else key):
            return layer.apply(variables, x, training=training, ctx=ctx)[0]

    return layer, jax.jit(apply)


def rotated(x, theta):
    """Rotary embedding of [batch, seq, heads, size] by complex numbers, in float64."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * theta ** (-2.0 * np.arange(half) / x.shape[-1])
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None, :]
    return np.concatenate([z.real, z.imag], axis=-1)


def by_hand(variables, x, allowed, kv_heads=HEADS, theta=None):
    """Softmax attention, one head after the other; ``allowed`` is bool [batch, query, key]."""
    w = {key: np.asarray(variables.params[key]["weight"], np.float64) for key in variables.params}
    x, size = np.asarray(x, np.float64), EMBED // HEADS
    q, k, v = ((x @ w[key]).reshape(*x.shape[:2], -1, size) for key in ("q_proj", "k_proj", "v_proj"))
    if theta is not None:
        q, k = rotated(q, theta), rotated(k, theta)
    outs = []
    for h in range(HEADS):
        g = h // (HEADS // kv_heads)
        scores = np.exp(q[:, :, h] @ k[:, :, g].transpose(0, 2, 1) / math.sqrt(size)) * allowed
        total = scores.sum(-1, keepdims=True)
        outs.append(np.divide(scores, total, out=np.zeros_like(scores), where=total > 0) @ v[:, :, g])
    return np.concatenate(outs, axis=-1) @ w["out_proj"]


everything = np.ones((BATCH, SEQ, SEQ), bool)
past = np.tril(everything)


@pytest.mark.parametrize(
    ("is_causal", "kv_heads", "rope"), [(False, 4, False), (True, 4, True), (False, 2, True), (True, 1, False)]
)
def test_against_a_plain_softmax(is_causal, kv_heads, rope):
    layer, apply = attention(is_causal=is_causal, num_kv_heads=kv_heads, rope=rope, rope_theta=100.0)
    variables, x = filled(layer), normal(1)
    mask = np.random.default_rng(2).random((BATCH, SEQ)) < 0.6
    theta = 100.0 if rope else None
    allowed = past if is_causal else everything
    np.testing.assert_allclose(
        apply(variables, x), by_hand(variables, x, allowed, kv_heads, theta), rtol=1e-4, atol=1e-5
    )
    expected = by_hand(variables, x, allowed & mask[:, None, :], kv_heads, theta)
    np.testing.assert_allclose(apply(variables, x, mask), expected, rtol=1e-4, atol=1e-5)


@given(seeds, st.permutations(range(SEQ)))
@quick
def test_without_a_mask_a_permuted_input_gives_the_permuted_output(seed, order):
    layer, apply = attention()
    variables, x = filled(layer, seed), normal(seed)
    order = np.array(order)
    np.testing.assert_allclose(apply(variables, x[:, order]), apply(variables, x)[:, order], rtol=1e-4, atol=1e-5)


@given(seeds, st.integers(0, SEQ - 2), st.sampled_from([0.0, 0.4]))
@quick
def test_causal_does_not_look_ahead(seed, time, dropout):
    layer, apply = attention(training=True, is_causal=True, rope=True, dropout=dropout)
    variables, x = filled(layer, seed), np.asarray(normal(seed))
    other = np.concatenate([x[:, : time + 1], x[:, time + 1 :] + 1], axis=1)
    before, after = (np.asarray(apply(variables, v)) for v in (x, other))
    assert np.array_equal(before[:, : time + 1], after[:, : time + 1])
    assert not np.array_equal(before[:, time + 1 :], after[:, time + 1 :])


paths = [(True, 0.0), (False, 0.4)]  # is_causal and dropout


@given(seeds, st.lists(st.booleans(), min_size=BATCH * SEQ, max_size=BATCH * SEQ), st.sampled_from(paths))
@quick
def test_masked_positions_do_not_matter(seed, mask, path):
    layer, apply = attention(training=True, is_causal=path[0], dropout=path[1])
    variables, x = filled(layer, seed), np.asarray(normal(seed))
    mask = np.array(mask).reshape(BATCH, SEQ)
    other = np.where(mask[..., None], x, x + 1)
    before, after = (np.asarray(apply(variables, v, mask)) for v in (x, other))
    assert np.isfinite(before).all()
    assert np.array_equal(before[mask], after[mask])


@pytest.mark.parametrize(("is_causal", "dropout"), paths)
def test_a_position_that_may_attend_to_nothing_takes_nothing(is_causal, dropout):
    layer, apply = attention(training=True, is_causal=is_causal, dropout=dropout)
    variables, x = filled(layer), normal(1)
    mask = np.array([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    y = np.asarray(apply(variables, x, mask))
    dead = np.array([[is_causal, is_causal, False, False, False], [True] * 5])
    assert not y[dead].any() and y[~dead].any(-1).all()
    slopes = jax.jit(jax.grad(lambda v, x: (apply(v, x, mask) ** 2).sum(), argnums=(0, 1)))(variables, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize("mask", [np.array([[3, 0, 1, -1, 0]] * 2), jnp.array([[1, 0, 1, 1, 0]] * 2, jnp.int8)])
def test_an_integer_mask_keeps_what_is_not_zero(mask):
    layer, apply = attention()
    variables, x = filled(layer), normal(1)
    assert jnp.array_equal(apply(variables, x, mask), apply(variables, x, np.asarray(mask) != 0))


def test_a_mask_of_ones_is_no_mask():
    layer, apply = attention(is_causal=True)
    variables, x = filled(layer), normal(1)
    np.testing.assert_allclose(
        apply(variables, x, np.ones((BATCH, SEQ), bool)), apply(variables, x), rtol=1e-6, atol=1e-6
    )


def test_the_context_may_hold_other_names():
    layer, apply = attention()
    variables, x = filled(layer), normal(1)
    y, after = layer.apply(variables, x, ctx=Context(segment=jnp.zeros(3)))
    np.testing.assert_allclose(y, apply(variables, x), rtol=1e-6, atol=1e-6)
    assert after is variables


@pytest.mark.parametrize(
    ("seq", "is_causal", "kv_heads"),
    [
        (64, True, 4),
        (131, False, 2),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((131, True, 2), (300, True, 1))),
    ],
)
def test_long_sequences_against_the_library(monkeypatch, seq, is_causal, kv_heads):
    layer = layers.multi_head_attention(EMBED, HEADS, kv_heads, is_causal=is_causal)
    variables, x, bars = filled(layer), normal(1, (2, seq, EMBED)), normal(2, (2, seq, EMBED))
    mask = np.random.default_rng(3).random((2, seq)) < 0.7

    def found(mask):
        ctx = Context() if mask is None else Context(attention_mask=mask)
        apply = lambda params, x: layer.apply(variables.replace(params=params), x, ctx=ctx)[0]
        y, back = jax.vjp(apply, variables.params, x)
        return y, back(bars), jax.jvp(apply, (variables.params, x), (variables.params, bars))[1]

    for given_mask in (None, mask):
        ours = jax.jit(found)(given_mask)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: "gpu")  # there it is the library's attention
            theirs = jax.jit(lambda mask: found(mask))(given_mask)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))


def test_on_an_accelerator_it_is_the_library(monkeypatch):
    called = []
    library = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, **options: called.append(1) or library(*a, **options)
    )
    layer = layers.multi_head_attention(EMBED, HEADS)
    layer.apply(filled(layer), normal(1))
    assert not called
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    layer.apply(filled(layer), normal(1))
    assert called


def test_dropout_leaves_the_expectation():
    layer, apply = attention(training=True, dropout=0.3, is_causal=True, num_kv_heads=2)
    variables, x = filled(layer), normal(1)
    keys = jax.random.split(jax.random.key(5), 2000)
    draws = np.asarray(jax.vmap(lambda key: apply(variables, x, None, key))(keys), np.float64)
    errors = draws.std(0) / math.sqrt(len(keys))
    # Six standard errors of the mean over the draws, for each number.
    assert (np.abs(draws.mean(0) - by_hand(variables, x, past, kv_heads=2)) < 6 * errors + 1e-5).all()
    assert (draws.std(0) > 0.01).any()


def test_dropout_drops_weights_not_outputs():
    layer, apply = attention(training=True, dropout=0.5)
    eye = {key: {"weight": jnp.eye(EMBED)} for key in ("v_proj", "out_proj")}
    zero = {key: {"weight": jnp.zeros((EMBED, EMBED))} for key in ("q_proj", "k_proj")}
    variables = filled(layer).replace(params={**eye, **zero})
    # Equal weights of 1/5 and values 2**i: an output is 2/5 of the sum of those that stayed.
    x = jnp.broadcast_to(2.0 ** jnp.arange(SEQ, dtype=jnp.float32)[None, :, None], (BATCH, SEQ, EMBED))
    kept = np.asarray(apply(variables, x)) * SEQ / 2
    np.testing.assert_allclose(kept, kept.round(), atol=1e-4)
    heads = kept.reshape(BATCH, SEQ, HEADS, EMBED // HEADS)
    assert np.allclose(heads, heads[..., :1], atol=1e-4)
    assert len(np.unique(heads[..., 0].round())) > 10


def test_dropout_is_off_in_evaluation():
    layer, apply = attention(dropout=0.5)
    variables, x = filled(layer), normal(1)
    assert jnp.array_equal(apply(variables, x), attention()[1](variables, x))


def test_dropping_next_to_nothing_changes_nothing():
    layer, apply = attention(training=True, dropout=1e-9, is_causal=True, num_kv_heads=2)
    variables, x, mask = filled(layer), normal(1), np.array([[1, 1, 0, 1, 1], [0, 0, 1, 0, 1]])
    without = attention(is_causal=True, num_kv_heads=2)[1]
    np.testing.assert_allclose(apply(variables, x, mask), without(variables, x, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    layer, apply = attention(is_causal=True, rope=True)
    variables, x = filled(layer), normal(1)
    half = filled(layer, dtype=dtype)
    y = apply(half, x.astype(dtype), np.ones((BATCH, SEQ), bool))
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), apply(variables, x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients(dropout):
    layer, apply = attention(training=True, is_causal=True, rope=True, num_kv_heads=2, dropout=dropout)
    variables, x = filled(layer), normal(1)
    mask = np.array([[1, 1, 0, 1, 1], [0, 0, 1, 1, 1]], bool)
    check_grads(
        lambda p, x: apply(variables.replace(params=p), x, mask),
        (variables.params, x),
        1,
        ["rev"],
        rtol=2e-2,
        atol=2e-2,
    )


def test_parameters():
    shapes = {
        k: {n: a.shape for n, a in v.items()} for k, v in filled(layers.multi_head_attention(8, 4, 2)).params.items()
    }
    assert shapes == {
        "q_proj": {"weight": (8, 8)}, "k_proj": {"weight": (8, 4)}, "v_proj": {"weight": (8, 4)}, "out_proj": {"weight": (8, 8)},
    }  # fmt: skip
    ones = layers.multi_head_attention(2, 1, weight_init=jax.nn.initializers.ones).init(dtype=jnp.float32)
    assert all(leaf.tolist() == [[1, 1], [1, 1]] for leaf in jax.tree.leaves(ones.params)) and ones.state == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (6, 4),
            r"\(embed_dim=6, num_heads=4\): num_heads must divide embed_dim evenly, received 6 / 4 = 1\.5\. Write embed_dim=8",
        ),
        (
            (8, 4, 3),
            r"\(num_heads=4, num_kv_heads=3\): num_kv_heads must divide .* 4 / 3 = 1\.33333\. Write num_kv_heads=1",
        ),
        ((0, 4), r"\(embed_dim=\.\.\.\) expected an int of at least 1, received 0"),
        ((8, 0), r"\(num_heads=\.\.\.\) expected an int of at least 1, received 0"),
        ((8, 4, 0), r"\(num_kv_heads=\.\.\.\) expected an int of at least 1, received 0"),
        ((8, 4, None, 1.0), r"\(dropout=\.\.\.\) expected a number in \[0, 1\), received 1\.0"),
        ((8, 4, None, 0.0, False, True, 0.0), r"\(rope_theta=\.\.\.\) expected a finite number above 0, received 0\.0"),
        (
            (12, 4, None, 0.0, False, True),
            r"\(embed_dim=12, num_heads=4, rope=True\) expected an even head size for the rotation, received 12 / 4 = 3\. Write embed_dim=24",
        ),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=r"^multi_head_attention" + message):
        layers.multi_head_attention(*arguments)


def test_other_inputs_name_the_layer():
    model = layers.sequential([layers.multi_head_attention(8, 4)])
    variables = filled(model)
    with pytest.raises(
        ValueError,
        match=r"multi_head_attention\(8, 4\) at '0' expected float32\[batch, seq, 8\], received float32\[2, 5, 6\]",
    ):
        model.apply(variables, jnp.ones((2, 5, 6)))
    with pytest.raises(
        ValueError,
        match=r"at '0' expected float32\[batch, seq, 8\], received float32\[5, 8\]: it has 2 axes instead of 3",
    ):
        model.apply(variables, jnp.ones((5, 8)))
    with pytest.raises(TypeError, match=r"at '0' expected float32\[batch, seq, 8\], received int32\[2, 5, 8\]"):
        model.apply(variables, jnp.ones((2, 5, 8), jnp.int32))


@pytest.mark.parametrize(
    ("mask", "kind", "received"),
    [
        (
            np.ones((2, 4), bool),
            ValueError,
            r"received bool\[2, 4\]: \[batch, k\], \[batch, q, k\] or \[batch, heads or 1, q, k\], nonzero where a key is "
            r"attended to\. In forward of a module, m\.name\(x, ctx=m\.ctx\.set\('attention_mask', mask\)\) gives",
        ),
        (np.ones((2, 1, 1, 5), bool), ValueError, r"received bool\[2, 1, 1, 5\]"),
        (
            np.ones((2, 5), np.float32),
            TypeError,
            r"received float32\[2, 5\]\. Write mask != 0 for a mask of zeros and ones, mask == 0 for one of zeros and -inf, "
            r"and Context\(attention_bias=\.\.\.\) for what is added to the logits",
        ),
        (None, TypeError, r"received NoneType.* to use no mask, leave attention_mask out of the context\."),
    ],
)
def test_other_masks_name_the_layer(mask, kind, received):
    model = layers.sequential([layers.multi_head_attention(8, 4)])
    message = (
        r"multi_head_attention\(8, 4\) at '0' expected ctx\['attention_mask'\] as bool or int \[2, 5\], \[2, 5, 5\] or "
        r"\[2, 4 or 1, 5, 5\], " + received
    )
    with pytest.raises(kind, match=message):
        model.apply(filled(model), normal(0), ctx=Context(attention_mask=mask))


def test_repr():
    assert repr(layers.multi_head_attention(8, 4)) == "multi_head_attention(8, 4)"
    layer = layers.multi_head_attention(8, 4, 2, dropout=0.1, is_causal=True, rope=True)
    assert repr(layer) == "multi_head_attention(8, 4, num_kv_heads=2, dropout=0.1, is_causal=True, rope=True)"


def test_layers_of_one_shape_are_traced_once_and_dropout_draws_in_each(monkeypatch):
    module, calls = importlib.import_module("kaun.layers.attention"), []
    run = module._attend_to
    monkeypatch.setattr(module, "_attend_to", lambda *of: calls.append(of) or run(*of))
    x = jax.ShapeDtypeStruct((3, 7, EMBED), jnp.float32)  # a shape of no other test

    def count(rate, layer_count=3):
        calls.clear()
        model = layers.sequential([layers.multi_head_attention(EMBED, HEADS, dropout=rate)] * layer_count)
        vars = filled(model)

        def score(params, x):
            with rng.scope(0):
                return model.apply(vars.replace(params=params), x, training=True)[0].sum()

        jax.make_jaxpr(jax.grad(score))(vars.params, x)
        return len(calls)

    assert count(0.0) == 1
    assert count(0.5) == 3
