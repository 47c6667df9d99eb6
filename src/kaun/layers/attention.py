"""Multi-head attention, of a sequence to itself or to another one."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from kaun import tree
from kaun._calls import explained
from kaun._kernels import matmul
from kaun.context import Context
from kaun.layers.arguments import accumulation_dtype, along_last, call_text, fraction, positive, size
from kaun.layers.core import Float, Layer, Vars
from kaun.layers.dropout import drop
from kaun.layers.init import GLOROT_UNIFORM, Initializer, init_affine
from kaun.layers.inputs import float_input
from kaun.layers.path import here
from kaun.layers.positions import positions_of
from kaun.layers.positions import rope as rotate

__all__ = ["multi_head_attention"]


@explained("layers.multi_head_attention")
def multi_head_attention(
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    rope: bool = False,
    rope_theta: float = 10000.0,
    *,
    bias: bool = False,
    kv_dim: int | None = None,
    head_dim: int | None = None,
    scale: float | None = None,
    weight_init: Initializer = GLOROT_UNIFORM,
    bias_init: Initializer = jax.nn.initializers.zeros,
) -> Layer[Float, Float]:
    """Make a layer of multi-head attention (Vaswani et al., 2017).

    Input and output are ``[batch, seq, embed_dim]`` in the model's dtype. For cross-attention the input is a pair ``(q,
    kv)`` of ``[batch, q, embed_dim]`` and ``[batch, k, kv_dim]``, and the output has the shape of ``q``. Parameters:
    ``q_proj.weight`` ``[embed_dim, num_heads * head_dim]``, ``k_proj.weight`` and ``v_proj.weight`` ``[kv_dim,
    num_kv_heads * head_dim]``, ``out_proj.weight`` ``[num_heads * head_dim, embed_dim]``, and with ``bias`` a ``bias``
    for each. The attention is that of ``jax.nn.dot_product_attention``, with the softmax in float32.

    Names of the context that the layer reads:

    - ``"attention_mask"``, bool or integer ``[batch, k]``, ``[batch, q, k]`` or ``[batch, num_heads or 1, q, k]``: only
      what is nonzero is attended to. For a position that may attend to nothing, the input of ``out_proj`` is zero.
    - ``"attention_bias"``, floating ``[batch or 1, num_heads, q, k]``: it is added to the logits, after scaling, such
      as a relative position bias. Where it is -inf, nothing is attended to.
    - ``"positions"``, integers ``[seq]`` or ``[batch, seq]``: the positions for ``rope``. Default: 0, 1, 2, ...

    Args:
        embed_dim: Size of the last axis, a multiple of ``num_heads`` unless ``head_dim`` is given.
        num_heads: Number of attention heads.
        num_kv_heads: Number of key and value heads, each shared by ``num_heads / num_kv_heads`` query heads (Ainslie et
            al., 2023). Default: ``num_heads``.
        dropout: Probability with which an attention weight is set to zero in training, in [0, 1). Default: 0.
        is_causal: Whether a position attends only to itself and to earlier positions. Default: False.
        rope: Whether queries and keys are rotated by their position, see ``layers.rope``. Default: False.
        rope_theta: The base of the rotation. Default: 10000.
        bias: Whether the four projections have biases. Default: False.
        kv_dim: Size of the last axis of ``kv``. Default: ``embed_dim``.
        head_dim: Size of each head. Default: ``embed_dim / num_heads``.
        scale: The factor of the logits, 1.0 in T5. Default: ``head_dim ** -0.5``.
        weight_init: Initializer of the weights, from ``jax.nn.initializers``. Default: ``glorot_uniform()``.
        bias_init: Initializer of the biases. Default: ``zeros``.

    Raises:
        TypeError: If an argument has another type; when applied, if the input has another dtype, the mask is neither
            bool nor integer, or ``attention_bias`` is not floating.
        ValueError: If ``num_heads`` does not divide ``embed_dim``, ``num_kv_heads`` does not divide ``num_heads``, the
            head size is odd with ``rope``, or a number is out of its range; when applied, if the input or a name of the
            context has another shape, if a pair is the input of a layer with ``rope``, whose positions would have no
            common origin, or if q and kv of a causal layer differ in length, so that it is not known which keys are
            earlier.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import Context, layers
        >>> layer = layers.multi_head_attention(8, 2, is_causal=True, rope=True)
        >>> ctx = Context(attention_mask=jnp.array([[1, 1, 1, 0]]))
        >>> y, _ = layer.apply(layer.init(dtype=jnp.float32), jnp.ones((1, 4, 8)), ctx=ctx)
        >>> y.shape
        (1, 4, 8)
        >>> cross = layers.multi_head_attention(8, 2, kv_dim=6, bias=True)
        >>> y, _ = cross.apply(cross.init(dtype=jnp.float32), (jnp.ones((1, 4, 8)), jnp.ones((1, 5, 6))))
        >>> y.shape
        (1, 4, 8)
    """
    embed, heads, kv_heads, head = _sizes(embed_dim, num_heads, num_kv_heads, head_dim, rope)
    kv_embed = embed if kv_dim is None else size("multi_head_attention", "kv_dim", kv_dim)
    rate = fraction("multi_head_attention", "dropout", dropout)
    theta = positive("multi_head_attention", "rope_theta", rope_theta)
    factor = None if scale is None else positive("multi_head_attention", "scale", scale)
    name = call_text(
        multi_head_attention, embed_dim=embed, num_heads=heads, num_kv_heads=num_kv_heads, dropout=rate,
        is_causal=is_causal, rope=rope, rope_theta=theta, bias=bias, kv_dim=kv_dim, head_dim=head_dim, scale=factor,
    )  # fmt: skip
    shapes = {
        "q_proj": (embed, heads * head),
        "k_proj": (kv_embed, kv_heads * head),
        "v_proj": (kv_embed, kv_heads * head),
        "out_proj": (heads * head, embed),
    }

    def init(*, dtype: Any) -> Vars:
        second = bias_init if bias else None
        params = {key: init_affine(name, weight_init, shape, second, dtype) for key, shape in shapes.items()}
        return Vars(params=params, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        def project(z: jax.Array, key: str) -> jax.Array:
            y = matmul(z, vars.params[key]["weight"])
            return y + along_last(vars.params[key]["bias"], y.ndim) if bias else y

        given, kv = _pair(name, x, vars.dtype, embed, kv_embed, rope=rope, is_causal=is_causal)
        keep, added = _masks(name, ctx, (given.shape[0], heads, given.shape[1], kv.shape[1]))
        q, k, v = (
            project(z, key).reshape(*z.shape[:2], shapes[key][1] // head, head)
            for key, z in (("q_proj", given), ("k_proj", kv), ("v_proj", kv))
        )
        if rope:
            places = positions_of(name, given, ctx)
            q, k = (rotate(z, theta, seq_axis=-3, positions=places) for z in (q, k))
        y = _attend(q, k, v, keep, added, is_causal=is_causal, scale=factor, rate=rate if training else 0.0)
        return project(y.reshape(*y.shape[:2], heads * head), "out_proj"), vars

    return Layer(init=init, apply=apply, name=name)


def _sizes(
    embed_dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None, rotated: bool
) -> tuple[int, int, int, int]:
    """The checked sizes: of the embedding, heads, key and value heads, and of each head."""
    layer = "multi_head_attention"
    embed, heads = size(layer, "embed_dim", embed_dim), size(layer, "num_heads", num_heads)
    kv_heads = heads if num_kv_heads is None else size(layer, "num_kv_heads", num_kv_heads)
    if head_dim is None and embed % heads:
        raise ValueError(
            f"{layer}(embed_dim={embed}, num_heads={heads}): num_heads must divide embed_dim evenly, received "
            f"{embed} / {heads} = {embed / heads:g}. Write embed_dim={-(-embed // heads) * heads}, for example."
        )
    if heads % kv_heads:
        raise ValueError(
            f"{layer}(num_heads={heads}, num_kv_heads={kv_heads}): num_kv_heads must divide num_heads evenly, received "
            f"{heads} / {kv_heads} = {heads / kv_heads:g}. Write num_kv_heads={math.gcd(heads, kv_heads)}, for example."
        )
    head = embed // heads if head_dim is None else size(layer, "head_dim", head_dim)
    if rotated and head % 2:
        if head_dim is not None:
            raise ValueError(
                f"{layer}(head_dim={head}, rope=True) expected an even head size for the rotation, received {head}. "
                f"Write head_dim={head + 1}, for example."
            )
        raise ValueError(
            f"{layer}(embed_dim={embed}, num_heads={heads}, rope=True) expected an even head size for the rotation, "
            f"received {embed} / {heads} = {head}. Write embed_dim={2 * embed}, for example."
        )
    return embed, heads, kv_heads, head


def _pair(
    name: str, x: Any, dtype: Any, embed: int, kv_embed: int, *, rope: bool, is_causal: bool
) -> tuple[jax.Array, jax.Array]:
    """The checked input: what queries are made from, and what keys and values are made from."""
    pair = f"{here(name)} expected a pair (q, kv) of [batch, q, {embed}] and [batch, k, {kv_embed}]"
    if not isinstance(x, tuple):
        if kv_embed != embed:
            raise ValueError(
                f"{pair}, because of kv_dim={kv_embed}, received {tree.describe(x)}. Pass (x, memory), or leave "
                "kv_dim out for self-attention."
            )
        x = float_input(name, x, dtype, features=embed, ndim=3, layout="batch, seq")
        return x, x
    parts: tuple[Any, ...] = x
    if len(parts) != 2:
        raise ValueError(f"{pair}, received a tuple of {len(parts)}. Keys and values are made from one array.")
    q = float_input(f"q of {name}", parts[0], dtype, features=embed, ndim=3, layout="batch, q")
    kv = float_input(f"kv of {name}", parts[1], dtype, features=kv_embed, ndim=3, layout="batch, k")
    received = f"received {tree.describe(q)} and {tree.describe(kv)}"
    if q.shape[0] != kv.shape[0]:
        raise ValueError(f"{pair} with the same batch, {received}. Repeat one of them, jnp.repeat(kv, n, axis=0).")
    if rope:
        raise ValueError(
            f"{here(name)} expected one array, {received}: with rope=True positions in q and in kv would have no "
            "common origin. Make the layer without rope, or rotate with layers.rope in a layers.module."
        )
    if is_causal and q.shape[1] != kv.shape[1]:
        raise ValueError(
            f"{pair} of one length, {received}: with is_causal=True it is not known which keys are earlier. Make the "
            "layer without is_causal, and pass which keys each query attends to, Context(attention_mask=...) [batch, "
            "q, k]."
        )
    return q, kv


def _masks(name: str, ctx: Context, shape: tuple[int, int, int, int]) -> tuple[jax.Array | None, jax.Array | None]:
    """What may be attended to, bool ``[batch or 1, heads or 1, q or 1, k]``, and what is added to the logits."""
    keep = _keep(name, ctx["attention_mask"], *shape) if "attention_mask" in ctx else None
    if "attention_bias" not in ctx:
        return keep, None
    added, (batch, heads, q, k) = ctx["attention_bias"], shape
    expected = f"{here(name)} expected ctx['attention_bias'] as float {[batch, heads, q, k]} or {[1, heads, q, k]}"
    if not (tree.is_array(added) and jnp.issubdtype(added.dtype, jnp.floating)):
        raise TypeError(
            f"{expected}, received {tree.describe(added)}. A mask of bools or integers is ctx['attention_mask']."
        )
    if added.shape not in ((batch, heads, q, k), (1, heads, q, k)):
        raise ValueError(
            f"{expected}, [batch or 1, heads, q, k], received {tree.describe(added)}. It is added to the logits of "
            "each head; jnp.broadcast_to gives all heads the same."
        )
    added = jnp.asarray(added)
    # As a mask, so that a row of -inf is not nan, and not attended to where a mask excludes the other keys.
    finite = added != -jnp.inf
    return finite if keep is None else keep & finite, added


def _keep(name: str, mask: Any, batch: int, heads: int, q: int, k: int) -> jax.Array:
    expected = (
        f"{here(name)} expected ctx['attention_mask'] as bool or int {[batch, k]}, {[batch, q, k]} or "
        f"[{batch}, {heads} or 1, {q}, {k}]"
    )
    kinds = (jnp.bool_, jnp.integer)
    if not (tree.is_array(mask) and any(jnp.issubdtype(mask.dtype, kind) for kind in kinds)):
        raise TypeError(
            f"{expected}, received {tree.describe(mask)}. Write mask != 0 for a mask of zeros and ones, mask == 0 for "
            "one of zeros and -inf, and Context(attention_bias=...) for what is added to the logits; to use no mask, "
            "leave attention_mask out of the context."
        )
    if mask.shape not in ((batch, k), (batch, q, k), (batch, heads, q, k), (batch, 1, q, k)):
        raise ValueError(
            f"{expected}, received {tree.describe(mask)}: [batch, k], [batch, q, k] or [batch, heads or 1, q, k], "
            "nonzero where a key is attended to. In forward of a module, m.name(x, ctx=m.ctx.set('attention_mask', "
            "mask)) gives a layer a mask for it alone."
        )
    middle = tuple(range(1, 5 - mask.ndim))
    return jnp.expand_dims(jnp.asarray(mask).astype(bool), middle)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array | None, added: jax.Array | None,
    *, is_causal: bool, scale: float | None, rate: float,
) -> jax.Array:  # fmt: skip
    if k.shape[1] == 0:  # nothing to attend to
        return jnp.zeros_like(q)
    if rate > 0 or q.dtype == jnp.float16 or jax.default_backend() == "cpu":
        # JAX's function has no dropout; on XLA:CPU it fails to compile for float16 because of the precision that it
        # requests, and takes 1.4 times as long.
        run = _softmax_attention if rate > 0 else _jitted_attention
        y = run(q, k, v, keep, added, is_causal=is_causal, scale=scale, rate=rate)
    else:
        # It promotes bfloat16 to float32, which the user may have forbidden.
        with jax.numpy_dtype_promotion("standard"):
            y = jax.nn.dot_product_attention(q, k, v, bias=added, mask=keep, is_causal=is_causal, scale=scale)
    if keep is None:
        return y
    # Where nothing may be attended to, all logits are equal, and y is the mean of the masked values.
    if not is_causal:
        some = keep.any(axis=3)
    elif keep.shape[2] == 1:
        some = jnp.cumsum(keep[:, :, 0], axis=2, dtype=jnp.int32) > 0
    else:
        some = (keep & _past(0, keep.shape[2], keep.shape[3])[None, None]).any(axis=3)
    return jnp.where(some.swapaxes(1, 2)[..., None], y, 0.0)


def _past(first: int, last: int, keys: int) -> jax.Array:
    """Which of ``keys`` are not after the queries from ``first`` to ``last``."""
    return jnp.arange(first, last)[:, None] >= jnp.arange(keys)[None]


def _softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array | None, added: jax.Array | None,
    *, is_causal: bool, scale: float | None, rate: float,
) -> jax.Array:  # fmt: skip
    """``jax.nn.dot_product_attention`` with dropout of the attention weights."""
    batch, seq, heads, head = q.shape
    grouped = (k.shape[2], heads // k.shape[2])
    q = q.reshape(batch, seq, *grouped, head).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    parts: list[jax.Array] = []
    # Queries in a few blocks, each with the keys that the causal mask allows: two blocks save a quarter of the work.
    blocks = max(1, min(4, seq // 64)) if is_causal else 1
    for i in range(blocks):
        first, last = seq * i // blocks, seq * (i + 1) // blocks
        visible = last if is_causal else k.shape[2]

        def block(a: jax.Array | None, first: int = first, last: int = last, visible: int = visible) -> Any:
            """The part for this block of ``[batch, head, query, key]``, as ``[batch, kv head, group, query, key]``."""
            if a is None:
                return None
            a = a[:, :, first:last, :visible] if a.shape[2] > 1 else a[..., :visible]
            return a[:, :, None] if a.shape[1] == 1 else a.reshape(a.shape[0], *grouped, *a.shape[2:])

        allowed = block(keep)
        if is_causal:
            past = _past(first, last, visible)[None, None, None]
            allowed = past if allowed is None else past & allowed
        part = q[:, :, :, first:last], k[:, :, :visible], v[:, :, :visible]
        parts.append(_attend_to(*part, allowed, block(added), scale, rate))
    return jnp.concatenate(parts, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, seq, heads, head)


# Without dropout, which draws a key: traced and differentiated once for all layers of a shape.
_jitted_attention = jax.jit(_softmax_attention, static_argnames=("is_causal", "scale", "rate"))


def _attend_to(
    q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array | None, added: jax.Array | None,
    scale: float | None, rate: float,
) -> jax.Array:  # fmt: skip
    """Attention of ``[batch, kv head, group, query, size]`` to ``[batch, kv head, key, size]``."""
    batch, kv_heads, groups, queries, head = q.shape
    flat, dtype = (batch, kv_heads, groups * queries), accumulation_dtype(q.dtype)
    logits = jnp.matmul(q.reshape(*flat, head), k.swapaxes(2, 3), preferred_element_type=dtype)
    logits = logits / math.sqrt(head) if scale is None else logits * scale
    if allowed is not None:
        logits = logits.reshape(batch, kv_heads, groups, queries, k.shape[2])
        if added is not None:  # where it is -inf, it is also not allowed
            logits = logits + added.astype(dtype)
        logits = jnp.where(allowed, logits, jnp.finfo(dtype).min).reshape(*flat, k.shape[2])
    # Divided by the sum after the product with the values, which has fewer elements than the weights.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    y = jnp.matmul(drop(weights, rate).astype(v.dtype), v, preferred_element_type=dtype)
    y = y / weights.sum(axis=-1, keepdims=True)
    return y.astype(q.dtype).reshape(batch, kv_heads, groups, queries, head)
