"""The GPT of nanoGPT's setting for a CPU: no biases, exact gelu, a head that is the embedding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

VOCAB, WIDTH, BLOCKS, HEADS, LENGTH = 65, 128, 4, 4, 64
SHAPES = dict.fromkeys(("q", "k", "v", "out"), (WIDTH, WIDTH)) | {
    "up": (WIDTH, 4 * WIDTH),
    "down": (4 * WIDTH, WIDTH),
}


def weights(g):
    small = lambda *shape: {"weight": 0.02 * g.standard_normal(shape, np.float32)}
    norm = lambda: {"weight": np.ones(WIDTH, np.float32)}
    blocks = [
        {"norm1": norm(), "norm2": norm(), **{key: small(*shape) for key, shape in SHAPES.items()}}
        for _ in range(BLOCKS)
    ]
    return {"tokens": small(VOCAB, WIDTH), "positions": small(LENGTH, WIDTH), "blocks": blocks, "norm": norm()}


def hand(params, x):
    def norm(layer, x):
        x = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * layer["weight"]

    def attention(block, x):
        q, k, v = (jnp.reshape(x @ block[key]["weight"], (*x.shape[:2], HEADS, WIDTH // HEADS)) for key in "qkv")
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(WIDTH // HEADS)
        logits = jnp.where(jnp.tri(x.shape[1], dtype=bool), logits, -jnp.inf)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)
        return y.reshape(x.shape) @ block["out"]["weight"]

    y = params["tokens"]["weight"][x] + params["positions"]["weight"]
    for block in params["blocks"]:
        y = y + attention(block, norm(block["norm1"], y))
        hidden = jax.nn.gelu(norm(block["norm2"], y) @ block["up"]["weight"], approximate=False)
        y = y + hidden @ block["down"]["weight"]
    return norm(params["norm"], y) @ params["tokens"]["weight"].T


def kaun(weights):
    from kaun import layers

    def block():
        norm = layers.layer_norm(WIDTH, bias=False)
        parts = {
            "norm1": norm,
            "attention": layers.multi_head_attention(WIDTH, HEADS, is_causal=True),
            "norm2": norm,
            "up": layers.linear(WIDTH, 4 * WIDTH, bias=False),
            "gelu": layers.gelu(approximate=False),
            "down": layers.linear(4 * WIDTH, WIDTH, bias=False),
        }

        def forward(m, x):
            x = x + m.attention(m.norm1(x))
            return x + m.down(m.gelu(m.up(m.norm2(x))))

        return layers.module(parts, forward, name="block")

    parts = {
        "tokens": layers.embedding(VOCAB, WIDTH, scale=False),
        "positions": layers.positions(LENGTH, WIDTH),
        "blocks": layers.sequential([block() for _ in range(BLOCKS)]),
        "norm": layers.layer_norm(WIDTH, bias=False),
    }

    def forward(m, x):
        y = m.norm(m.blocks(m.positions(m.tokens(x))))
        return y @ m.params["tokens"]["weight"].T

    def below(w):
        attention = {f"{key}_proj": w[key] for key in ("q", "k", "v", "out")}
        return {key: w[key] for key in ("norm1", "norm2", "up", "down")} | {"attention": attention, "gelu": {}}

    params = {**weights, "blocks": [below(w) for w in weights["blocks"]]}
    return layers.module(parts, forward, name="nanogpt"), params


def torch(weights):
    from torch import nn
    from torch.nn import functional

    from bench.runners.by_torch import parameter, tensor

    class Block(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.norm1, self.norm2 = (parameter(w[key]["weight"]) for key in ("norm1", "norm2"))
            # One product for q, k and v, as nanoGPT has it.
            self.qkv = parameter(np.concatenate([w[key]["weight"] for key in "qkv"], axis=1).T)
            self.out, self.up, self.down = (parameter(w[key]["weight"].T) for key in ("out", "up", "down"))

        def forward(self, x):
            h, shape = functional.layer_norm(x, (WIDTH,), self.norm1), (*x.shape[:2], HEADS, WIDTH // HEADS)
            q, k, v = (a.view(shape).transpose(1, 2) for a in functional.linear(h, self.qkv).split(WIDTH, dim=2))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + functional.linear(y.transpose(1, 2).reshape(x.shape), self.out)
            hidden = functional.gelu(functional.linear(functional.layer_norm(x, (WIDTH,), self.norm2), self.up))
            return x + functional.linear(hidden, self.down)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding.from_pretrained(tensor(weights["tokens"]["weight"]), freeze=False)
            self.positions = parameter(weights["positions"]["weight"])
            self.blocks = nn.Sequential(*map(Block, weights["blocks"]))
            self.norm = parameter(weights["norm"]["weight"])

        def forward(self, x):
            y = self.blocks(self.tokens(x) + self.positions)
            return functional.linear(functional.layer_norm(y, (WIDTH,), self.norm), self.tokens.weight)

    return Model()


def nnx(weights):
    from flax import nnx

    from bench.runners.by_nnx import put

    class Block(nnx.Module):
        def __init__(self, w, rngs):
            plain = {"use_bias": False, "rngs": rngs}
            self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, epsilon=1e-5, **plain) for _ in range(2))
            self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, **plain)
            self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, **plain), nnx.Linear(4 * WIDTH, WIDTH, **plain)
            for key, layer in (("up", self.up), ("down", self.down)):
                put(layer.kernel, w[key]["weight"])
            for key, layer in (("q", self.attention.query), ("k", self.attention.key), ("v", self.attention.value)):
                put(layer.kernel, w[key]["weight"].reshape(WIDTH, HEADS, WIDTH // HEADS))
            put(self.attention.out.kernel, w["out"]["weight"].reshape(HEADS, WIDTH // HEADS, WIDTH))

        def __call__(self, x, mask):
            x = x + self.attention(self.norm1(x), mask=mask)
            return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=False))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.tokens, self.positions = nnx.Embed(VOCAB, WIDTH, rngs=rngs), nnx.Embed(LENGTH, WIDTH, rngs=rngs)
            self.blocks = nnx.List([Block(w, rngs) for w in weights["blocks"]])
            self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, use_bias=False, rngs=rngs)
            put(self.tokens.embedding, weights["tokens"]["weight"])
            put(self.positions.embedding, weights["positions"]["weight"])

        def __call__(self, x):
            mask = nnx.make_causal_mask(x)
            y = self.tokens(x) + self.positions(jnp.arange(x.shape[1])[None])
            for block in self.blocks:
                y = block(y, mask)
            return self.tokens.attend(self.norm(y))

    return Model(nnx.Rngs(0))
