"""``layers.multi_head_attention`` against Flax's ``nnx.MultiHeadAttention``: output and gradients from equal weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import Context, layers

nnx = pytest.importorskip("flax.nnx")

HEADS, SIZE, EMBED, KV = 2, 3, 6, 5


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cross", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_attention_of_flax(cross, bias):
    """Under a mask by query and key, in which each query has a key: without one, Flax gives the mean of the values."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    kv_dim = KV if cross else EMBED
    theirs = nnx.MultiHeadAttention(
        HEADS, EMBED, HEADS * SIZE, in_kv_features=kv_dim, use_bias=bias, decode=False, rngs=nnx.Rngs(0)
    )
    ours = layers.multi_head_attention(EMBED, HEADS, bias=bias, kv_dim=kv_dim, head_dim=SIZE)
    flat = {"q_proj": EMBED, "k_proj": kv_dim, "v_proj": kv_dim, "out_proj": HEADS * SIZE}
    params = {key: {"weight": normal(n, HEADS * SIZE if key != "out_proj" else EMBED)} for key, n in flat.items()}
    for part in params.values() if bias else ():
        part["bias"] = normal(part["weight"].shape[1])

    x = (normal(2, 4, EMBED), normal(2, 7, KV)) if cross else (normal(2, 4, EMBED),) * 2
    mask = random.random((2, 4, x[1].shape[1])) < 0.6
    mask[..., 0], aims = True, normal(2, 4, EMBED)
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    definition, state, rest = nnx.split(theirs, nnx.Param, ...)

    def by_flax(params, q, kv):
        values = {
            name: {{"weight": "kernel"}.get(kind, kind): value for kind, value in params[key].items()}
            for key, name in names.items()
        }
        leaves, structure = jax.tree.flatten(state)
        shaped = [a.reshape(b.shape) for a, b in zip(jax.tree.leaves(values), leaves, strict=True)]
        model = nnx.merge(definition, jax.tree.unflatten(structure, shaped), rest)
        return (model(q, kv, mask=mask[:, None]) * aims).sum()

    def by_kaun(params, q, kv):
        variables = layers.Vars(params=params, state={}, dtype=jnp.float32)
        ctx = Context(attention_mask=mask)
        return (ours.apply(variables, (q, kv), ctx=ctx)[0] * aims).sum()

    one, two = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(params, *x) for f in (by_kaun, by_flax))
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(two[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * largest), one, two)
