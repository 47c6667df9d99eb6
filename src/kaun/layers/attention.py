"""Multi-head self-attention and rotary position embedding."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from kaun import tree
from kaun._kernels import matmul
from kaun.context import Context
from kaun.layers.arguments import accumulation_dtype, call_text, fraction, positive, size
from kaun.layers.core import Float, Layer, Vars
from kaun.layers.dropout import drop
from kaun.layers.init import GLOROT_UNIFORM, Initializer, init_param
from kaun.layers.inputs import float_input
from kaun.layers.path import here

__all__ = ["multi_head_attention", "rope"]


def multi_head_attention(
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    rope: bool = False,
    rope_theta: float = 10000.0,
    *,
    weight_init: Initializer = GLOROT_UNIFORM,
) -> Layer[Float, Float]:
    """The layer in which each position of a sequence takes from all others what it attends to (Vaswani et al., 2017).

    Input and output ``[batch, seq, embed_dim]`` in the model's dtype. Parameters, without biases: ``q_proj.weight``
    and ``out_proj.weight`` ``[embed_dim, embed_dim]``, ``k_proj.weight`` and ``v_proj.weight`` ``[embed_dim,
    num_kv_heads * embed_dim / num_heads]``. The attention is ``jax.nn.dot_product_attention``, its softmax in float32.

    Where the context has an ``"attention_mask"``, bool or integer ``[batch, seq]``, only positions where it is nonzero
    are attended to. A position that may attend to none at all takes nothing: zeros enter ``out_proj``.

    Arguments:
        embed_dim: size of the last axis; ``num_heads`` divides it.
        num_heads: number of attention heads.
        num_kv_heads: number of key and value heads, each shared by ``num_heads / num_kv_heads`` query heads (Ainslie et
            al., 2023); default ``num_heads``.
        dropout: share of attention weights that are zeroed in training, in [0, 1), default 0.
        is_causal: whether a position attends only to itself and those before it, default False.
        rope: whether queries and keys are rotated by their position (see ``layers.rope``), default False.
        rope_theta: the base of that rotation, default 10000.
        weight_init: from ``jax.nn.initializers``, default ``glorot_uniform()``.

    Raises:
        TypeError: an argument of another type; applied, another dtype, or a mask that is neither bool nor integer.
        ValueError: sizes that do not divide each other, an odd head size with ``rope``, a number out of its range;
            applied, another shape of input or mask.

    >>> import jax.numpy as jnp
    >>> from kaun import Context, layers
    >>> layer = layers.multi_head_attention(8, 2, is_causal=True, rope=True)
    >>> ctx = Context(attention_mask=jnp.array([[1, 1, 1, 0]]))
    >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.ones((1, 4, 8)), ctx=ctx)
    >>> y.shape
    (1, 4, 8)
    """
    embed, heads, kv_heads = _heads(embed_dim, num_heads, num_kv_heads, rope)
    rate = fraction("multi_head_attention", "dropout", dropout)
    theta = positive("multi_head_attention", "rope_theta", rope_theta)
    head = embed // heads
    name = call_text(
        multi_head_attention, embed_dim=embed, num_heads=heads, num_kv_heads=num_kv_heads, dropout=rate,
        is_causal=is_causal, rope=rope, rope_theta=theta,
    )  # fmt: skip
    widths = {"q_proj": embed, "k_proj": kv_heads * head, "v_proj": kv_heads * head, "out_proj": embed}

    def init(*, dtype: Any) -> Vars:
        drawn = {key: init_param(name, "weight_init", weight_init, (embed, n), dtype) for key, n in widths.items()}
        return Vars(params={key: {"weight": weight} for key, weight in drawn.items()}, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        x = float_input(name, x, vars.dtype, features=embed, ndim=3, layout="batch, seq")
        keep = _key_mask(name, x, ctx)
        q, k, v = (
            matmul(x, vars.params[key]["weight"]).reshape(*x.shape[:2], widths[key] // head, head)
            for key in ("q_proj", "k_proj", "v_proj")
        )
        if rope:
            q, k = _rotated(q, theta), _rotated(k, theta)
        y = _attend(q, k, v, keep, is_causal=is_causal, rate=rate if training else 0.0)
        return matmul(y.reshape(x.shape), vars.params["out_proj"]["weight"]), vars

    return Layer(init=init, apply=apply, name=name)


def rope(x: Any, theta: float = 10000.0, seq_axis: int = -2) -> jax.Array:
    """``x`` with each vector rotated by an angle that grows with its position (RoFormer, Su et al., 2021).

    Number i of the first half of the last axis and number i of the second half are one plane (the convention of LLaMA
    and Hugging Face), rotated by ``position * theta ** (-2 i / size)``, positions counted from 0. The dot product of
    two rotated vectors depends on how far they are apart, not on where they are.

    Arguments:
        x: ``[..., seq, size]`` of any floating dtype, ``size`` even.
        theta: the base of the angles, default 10000. They are computed in float32 (float64 for a float64 ``x``).
        seq_axis: the axis of positions, default the one before the last.

    Returns:
        An array of the shape and dtype of ``x``.

    Raises:
        TypeError: not a floating array.
        ValueError: an odd ``size``, a ``seq_axis`` that is the last one or not there, ``theta`` not above 0.

    >>> import jax.numpy as jnp
    >>> from kaun import layers
    >>> layers.rope(jnp.array([[1.0, 0.0], [1.0, 0.0]])).round(3)
    Array([[1.   , 0.   ],
           [0.54 , 0.841]], dtype=float32)
    """
    x = float_input("rope", x)
    theta, half = positive("rope", "theta", theta), x.shape[-1] // 2
    if x.shape[-1] % 2:
        raise ValueError(f"{here('rope')} rotates pairs and needs an even last axis, received {tree.describe(x)}.")
    axis = seq_axis + x.ndim if seq_axis < 0 else seq_axis
    if not 0 <= axis < x.ndim - 1:
        raise ValueError(
            f"{here('rope')} expected seq_axis to name an axis before the last, received seq_axis={seq_axis} for "
            f"{tree.describe(x)}. Write seq_axis=-2 for [..., seq, size]."
        )
    dtype = accumulation_dtype(x.dtype)
    # Computed, not taken from NumPy: tables would be constants of every compiled program.
    frequencies = theta ** (-jnp.arange(half, dtype=dtype) / half)
    angles = jnp.outer(jnp.arange(x.shape[axis], dtype=dtype), frequencies)
    shape = [x.shape[axis] if i == axis else 1 for i in range(x.ndim - 1)]
    cos, sin = jnp.cos(angles).reshape(*shape, half), jnp.sin(angles).reshape(*shape, half)
    a, b = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _rotated(x: jax.Array, theta: float) -> jax.Array:
    return rope(x, theta, seq_axis=-3)


def _heads(embed_dim: int, num_heads: int, num_kv_heads: int | None, rotate: bool) -> tuple[int, int, int]:
    layer = "multi_head_attention"
    embed, heads = size(layer, "embed_dim", embed_dim), size(layer, "num_heads", num_heads)
    kv_heads = heads if num_kv_heads is None else size(layer, "num_kv_heads", num_kv_heads)
    if embed % heads:
        raise ValueError(
            f"{layer}(embed_dim={embed}, num_heads={heads}): the heads must divide embed_dim evenly, received "
            f"{embed} / {heads} = {embed / heads:g}. Write embed_dim={-(-embed // heads) * heads}, for example."
        )
    if heads % kv_heads:
        raise ValueError(
            f"{layer}(num_heads={heads}, num_kv_heads={kv_heads}): num_kv_heads must divide num_heads evenly, received "
            f"{heads} / {kv_heads} = {heads / kv_heads:g}. Write num_kv_heads={math.gcd(heads, kv_heads)}, for example."
        )
    if rotate and embed // heads % 2:
        raise ValueError(
            f"{layer}(embed_dim={embed}, num_heads={heads}, rope=True) rotates pairs and needs an even head size, "
            f"received {embed} / {heads} = {embed // heads}. Write embed_dim={2 * embed}, for example."
        )
    return embed, heads, kv_heads


def _key_mask(name: str, x: jax.Array, ctx: Context) -> jax.Array | None:
    if "attention_mask" not in ctx:
        return None
    mask = ctx["attention_mask"]
    expected = f"{here(name)} expected ctx['attention_mask'] as bool or int {list(x.shape[:2])}, [batch, seq]"
    kinds = (jnp.bool_, jnp.integer)
    if not (tree.is_array(mask) and any(jnp.issubdtype(mask.dtype, kind) for kind in kinds)):
        raise TypeError(
            f"{expected}, received {tree.describe(mask)}. Write mask != 0 for a mask of zeros and ones, mask == 0 for "
            "one that is added to the logits, and leave the name out for no mask."
        )
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"{expected}, received {tree.describe(mask)}. It says for each position whether it is attended to."
        )
    return jnp.asarray(mask).astype(bool)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array | None, *, is_causal: bool, rate: float
) -> jax.Array:
    if rate > 0 or q.dtype == jnp.float16 or jax.default_backend() == "cpu":
        # The library's has no dropout, for float16 asks for a precision that XLA:CPU refuses when it compiles, and
        # takes 1.4 times as long there.
        y = _softmax_attention(q, k, v, keep, is_causal=is_causal, rate=rate)
    else:
        mask = None if keep is None else keep[:, None, None, :]
        # It mixes float32 into bfloat16 by promotion, which the user may have forbidden.
        with jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal)
    if keep is None:
        return y
    # Where nothing may be attended to, the softmax is over equal numbers: the mean of all that is masked.
    some = jnp.cumsum(keep, axis=1, dtype=jnp.int32) > 0 if is_causal else keep.any(axis=1, keepdims=True)
    return jnp.where(some[:, :, None, None], y, 0.0)


def _softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array | None, *, is_causal: bool, rate: float
) -> jax.Array:
    """As ``jax.nn.dot_product_attention``, with dropout on the attention weights."""
    batch, seq, heads, head = q.shape
    q = q.reshape(batch, seq, k.shape[2], heads // k.shape[2], head).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    parts: list[jax.Array] = []
    # Queries in a few blocks, each with the keys that the causal mask leaves it: with two of them a quarter less work.
    blocks = max(1, min(4, seq // 64)) if is_causal else 1
    for i in range(blocks):
        first, last = seq * i // blocks, seq * (i + 1) // blocks
        seen = last if is_causal else seq
        allowed = None if keep is None else keep[:, None, None, None, :seen]
        if is_causal:
            past = (jnp.arange(first, last)[:, None] >= jnp.arange(seen)[None])[None, None, None]
            allowed = past if allowed is None else past & allowed
        parts.append(_attend_to(q[:, :, :, first:last], k[:, :, :seen], v[:, :, :seen], allowed, rate))
    return jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, head)


def _attend_to(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None, rate: float) -> jax.Array:
    """Attention of ``[batch, kv head, group, query, size]`` to ``[batch, kv head, key, size]``."""
    batch, kv_heads, groups, queries, head = q.shape
    flat, dtype = (batch, kv_heads, groups * queries), accumulation_dtype(q.dtype)
    logits = jnp.matmul(q.reshape(*flat, head), k.swapaxes(2, 3), preferred_element_type=dtype) / math.sqrt(head)
    if allowed is not None:
        logits = logits.reshape(batch, kv_heads, groups, queries, k.shape[2])
        logits = jnp.where(allowed, logits, jnp.finfo(dtype).min).reshape(*flat, k.shape[2])
    # The softmax is divided by its sum after the product with the values: there are fewer of them than weights.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    y = jnp.matmul(drop(weights, rate).astype(v.dtype), v, preferred_element_type=dtype)
    y = y / weights.sum(axis=-1, keepdims=True)
    return y.astype(q.dtype).reshape(batch, kv_heads, groups, queries, head)
