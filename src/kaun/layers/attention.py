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
    """Make a layer of multi-head self-attention (Vaswani et al., 2017).

    Input and output are ``[batch, seq, embed_dim]`` in the model's dtype. Parameters, without biases:
    ``q_proj.weight`` and ``out_proj.weight`` ``[embed_dim, embed_dim]``, ``k_proj.weight`` and ``v_proj.weight``
    ``[embed_dim, num_kv_heads * embed_dim / num_heads]``. The attention is that of
    ``jax.nn.dot_product_attention``, with the softmax in float32.

    If the context has an ``"attention_mask"``, bool or integer ``[batch, seq]``, only positions where it is nonzero are
    attended to. For a position that may attend to none, the input of ``out_proj`` is zero.

    Args:
        embed_dim: Size of the last axis, a multiple of ``num_heads``.
        num_heads: Number of attention heads.
        num_kv_heads: Number of key and value heads, each shared by ``num_heads / num_kv_heads`` query heads (Ainslie et
            al., 2023). Default: ``num_heads``.
        dropout: Probability with which an attention weight is set to zero in training, in [0, 1). Default: 0.
        is_causal: Whether a position attends only to itself and to earlier positions. Default: False.
        rope: Whether queries and keys are rotated by their position, see ``layers.rope``. Default: False.
        rope_theta: The base of the rotation. Default: 10000.
        weight_init: Initializer of the weights, from ``jax.nn.initializers``. Default: ``glorot_uniform()``.

    Raises:
        TypeError: If an argument has another type; when applied, if the input has another dtype, or the mask is
            neither bool nor integer.
        ValueError: If ``num_heads`` does not divide ``embed_dim``, ``num_kv_heads`` does not divide ``num_heads``, the
            head size is odd with ``rope``, or a number is out of its range; when applied, if the input or the mask has
            another shape.

    Examples:
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
    """Rotate each vector by angles that are proportional to its position (RoFormer, Su et al., 2021).

    Element i of the first half of the last axis and element i of the second half form a plane (the convention of LLaMA
    and Hugging Face), which is rotated by ``position * theta ** (-2 i / size)``; positions count from 0. The dot
    product of two rotated vectors depends on the difference of their positions only.

    Args:
        x: ``[..., seq, size]`` of any floating dtype, ``size`` even.
        theta: The base of the angles, which are computed in float32 (float64 for a float64 ``x``). Default: 10000.
        seq_axis: The axis of positions. Default: the one before the last.

    Returns:
        An array of the shape and dtype of ``x``.

    Raises:
        TypeError: If ``x`` is not a floating array.
        ValueError: If ``size`` is odd, ``seq_axis`` is the last axis or does not exist, or ``theta`` is not above 0.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> layers.rope(jnp.array([[1.0, 0.0], [1.0, 0.0]])).round(3)
        Array([[1.   , 0.   ],
               [0.54 , 0.841]], dtype=float32)
    """
    x = float_input("rope", x)
    theta, half = positive("rope", "theta", theta), x.shape[-1] // 2
    if x.shape[-1] % 2:
        raise ValueError(
            f"{here('rope')} expected a last axis of even size, received {tree.describe(x)}: it rotates its two halves."
        )
    axis = seq_axis + x.ndim if seq_axis < 0 else seq_axis
    if not 0 <= axis < x.ndim - 1:
        raise ValueError(
            f"{here('rope')} expected seq_axis to name an axis before the last, received seq_axis={seq_axis} for "
            f"{tree.describe(x)}. Write seq_axis=-2 for [..., seq, size]."
        )
    dtype = accumulation_dtype(x.dtype)
    # Computed with jnp and not with NumPy, whose tables would be constants of every compiled program.
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
            f"{layer}(embed_dim={embed}, num_heads={heads}): num_heads must divide embed_dim evenly, received "
            f"{embed} / {heads} = {embed / heads:g}. Write embed_dim={-(-embed // heads) * heads}, for example."
        )
    if heads % kv_heads:
        raise ValueError(
            f"{layer}(num_heads={heads}, num_kv_heads={kv_heads}): num_kv_heads must divide num_heads evenly, received "
            f"{heads} / {kv_heads} = {heads / kv_heads:g}. Write num_kv_heads={math.gcd(heads, kv_heads)}, for example."
        )
    if rotate and embed // heads % 2:
        raise ValueError(
            f"{layer}(embed_dim={embed}, num_heads={heads}, rope=True) expected an even head size for the rotation, "
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
            "one that is added to the logits; to use no mask, leave attention_mask out of the context."
        )
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"{expected}, received {tree.describe(mask)}. It has one value for each position, nonzero where the "
            "position is attended to."
        )
    return jnp.asarray(mask).astype(bool)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array | None, *, is_causal: bool, rate: float
) -> jax.Array:
    if rate > 0 or q.dtype == jnp.float16 or jax.default_backend() == "cpu":
        # JAX's function has no dropout; on XLA:CPU it fails to compile for float16 because of the precision that it
        # requests, and takes 1.4 times as long.
        y = _softmax_attention(q, k, v, keep, is_causal=is_causal, rate=rate)
    else:
        mask = None if keep is None else keep[:, None, None, :]
        # It promotes bfloat16 to float32, which the user may have forbidden.
        with jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal)
    if keep is None:
        return y
    # Where nothing may be attended to, all logits are equal, and y is the mean of the masked values.
    some = jnp.cumsum(keep, axis=1, dtype=jnp.int32) > 0 if is_causal else keep.any(axis=1, keepdims=True)
    return jnp.where(some[:, :, None, None], y, 0.0)


def _softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array | None, *, is_causal: bool, rate: float
) -> jax.Array:
    """``jax.nn.dot_product_attention`` with dropout of the attention weights."""
    batch, seq, heads, head = q.shape
    q = q.reshape(batch, seq, k.shape[2], heads // k.shape[2], head).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    parts: list[jax.Array] = []
    # Queries in a few blocks, each with the keys that the causal mask allows: two blocks save a quarter of the work.
    blocks = max(1, min(4, seq // 64)) if is_causal else 1
    for i in range(blocks):
        first, last = seq * i // blocks, seq * (i + 1) // blocks
        visible = last if is_causal else seq
        allowed = None if keep is None else keep[:, None, None, None, :visible]
        if is_causal:
            past = (jnp.arange(first, last)[:, None] >= jnp.arange(visible)[None])[None, None, None]
            allowed = past if allowed is None else past & allowed
        parts.append(_attend_to(q[:, :, :, first:last], k[:, :, :visible], v[:, :, :visible], allowed, rate))
    return jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, head)


def _attend_to(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None, rate: float) -> jax.Array:
    """Attention of ``[batch, kv head, group, query, size]`` to ``[batch, kv head, key, size]``."""
    batch, kv_heads, groups, queries, head = q.shape
    flat, dtype = (batch, kv_heads, groups * queries), accumulation_dtype(q.dtype)
    logits = jnp.matmul(q.reshape(*flat, head), k.swapaxes(2, 3), preferred_element_type=dtype) / math.sqrt(head)
    if allowed is not None:
        logits = logits.reshape(batch, kv_heads, groups, queries, k.shape[2])
        logits = jnp.where(allowed, logits, jnp.finfo(dtype).min).reshape(*flat, k.shape[2])
    # Divided by the sum after the product with the values, which has fewer elements than the weights.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    y = jnp.matmul(drop(weights, rate).astype(v.dtype), v, preferred_element_type=dtype)
    y = y / weights.sum(axis=-1, keepdims=True)
    return y.astype(q.dtype).reshape(batch, kv_heads, groups, queries, head)
