"""ResNet-18 (He et al., 2015) for images of 32 x 32 pixels: a stem of 3 x 3 without a pool."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.networks import uniform

CLASSES = 10
# Channels in, channels out and stride of each block.
WIDTHS = (64, 64, 64, 128, 128, 256, 256, 512, 512)
BLOCKS = [(i, o, 1 if i == o else 2) for i, o in itertools.pairwise(WIDTHS)]


def weights(g):
    conv = lambda i, o, k=3: {"weight": uniform(g, k * k * i, k * k * o, (k, k, i, o))}
    norm = lambda n: {"weight": np.ones(n, np.float32), "bias": np.zeros(n, np.float32)}

    def block(i, o, stride):
        made = {"conv1": conv(i, o), "norm1": norm(o), "conv2": conv(o, o), "norm2": norm(o)}
        return made | ({"conv3": conv(i, o, 1), "norm3": norm(o)} if i != o else {})

    head = {"weight": uniform(g, 512, CLASSES, (512, CLASSES)), "bias": np.zeros(CLASSES, np.float32)}
    return {"conv": conv(3, 64), "norm": norm(64), "blocks": [block(*sizes) for sizes in BLOCKS], "head": head}


def hand(params, x):
    """In training, without the running statistics."""

    def conv(layer, x, stride=1):
        pad = layer["weight"].shape[0] // 2
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, layer["weight"], (stride, stride), [(pad, pad)] * 2, dimension_numbers=layout
        )

    def norm(layer, x):
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return (x - mean) * (layer["weight"] * lax.rsqrt(variance + 1e-5)) + layer["bias"]

    x = jax.nn.relu(norm(params["norm"], conv(params["conv"], x)))
    for w, (_, _, stride) in zip(params["blocks"], BLOCKS, strict=True):
        y = jax.nn.relu(norm(w["norm1"], conv(w["conv1"], x, stride)))
        y = norm(w["norm2"], conv(w["conv2"], y))
        x = jax.nn.relu(y + (norm(w["norm3"], conv(w["conv3"], x, stride)) if "conv3" in w else x))
    return x.mean((1, 2)) @ params["head"]["weight"] + params["head"]["bias"]


def kaun(weights):
    from kaun import layers

    conv = lambda i, o, k=3, s=1: layers.conv2d(i, o, k, stride=s, padding=k // 2, bias=False)

    def block(i, o, stride):
        parts = {"conv1": conv(i, o, 3, stride), "norm1": layers.batch_norm(o), "conv2": conv(o, o)}
        parts |= {"norm2": layers.batch_norm(o)}
        if i != o:
            parts |= {"conv3": conv(i, o, 1, stride), "norm3": layers.batch_norm(o)}

        def forward(m, x):
            y = m.norm2(m.conv2(jax.nn.relu(m.norm1(m.conv1(x)))))
            return jax.nn.relu(y + (m.norm3(m.conv3(x)) if i != o else x))

        return layers.module(parts, forward, name="block")

    parts = {
        "conv": conv(3, 64), "norm": layers.batch_norm(64), "relu": layers.relu(),
        "blocks": layers.sequential([block(*sizes) for sizes in BLOCKS]),
        "pool": layers.global_avg_pool(), "head": layers.linear(512, CLASSES),
    }  # fmt: skip
    return layers.sequential(parts), weights | {"relu": {}, "pool": {}}


def torch(weights):
    from torch import nn
    from torch.nn import functional

    from bench.runners.by_torch import linear, parameter

    def conv(w, stride=1):
        size, _, i, o = w["weight"].shape
        made = nn.Conv2d(i, o, size, stride=stride, padding=size // 2, bias=False, device="meta")
        made.weight = parameter(w["weight"].transpose(3, 2, 0, 1))
        return made

    norm = lambda w: nn.BatchNorm2d(len(w["weight"]), momentum=0.01)

    class Block(nn.Module):
        def __init__(self, w, stride):
            super().__init__()
            self.conv1, self.norm1 = conv(w["conv1"], stride), norm(w["norm1"])
            self.conv2, self.norm2 = conv(w["conv2"]), norm(w["norm2"])
            shorter = (conv(w["conv3"], stride), norm(w["norm3"])) if "conv3" in w else ()
            self.shortcut = nn.Sequential(*shorter)

        def forward(self, x):
            y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
            return functional.relu(y + self.shortcut(x))

    blocks = [Block(w, stride) for w, (_, _, stride) in zip(weights["blocks"], BLOCKS, strict=True)]
    stem = (conv(weights["conv"]), norm(weights["norm"]), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(weights["head"]))


def nnx(weights):
    from flax import nnx

    from bench.runners.by_nnx import fill, put

    rngs = nnx.Rngs(0)

    def conv(w, stride=1):
        size, _, i, o = w["weight"].shape
        made = nnx.Conv(i, o, (size, size), stride, padding=size // 2, use_bias=False, rngs=rngs)
        put(made.kernel, w["weight"])
        return made

    norm = lambda w: nnx.BatchNorm(len(w["weight"]), momentum=0.99, rngs=rngs)

    class Block(nnx.Module):
        def __init__(self, w, stride):
            self.conv1, self.norm1 = conv(w["conv1"], stride), norm(w["norm1"])
            self.conv2, self.norm2 = conv(w["conv2"]), norm(w["norm2"])
            shorter = (conv(w["conv3"], stride), norm(w["norm3"])) if "conv3" in w else ()
            self.shortcut = nnx.Sequential(*shorter) if shorter else (lambda x: x)

        def __call__(self, x):
            y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
            return nnx.relu(y + self.shortcut(x))

    class Model(nnx.Module):
        def __init__(self):
            self.conv, self.norm = conv(weights["conv"]), norm(weights["norm"])
            pairs = zip(weights["blocks"], BLOCKS, strict=True)
            self.blocks = nnx.List([Block(w, stride) for w, (_, _, stride) in pairs])
            self.head = nnx.Linear(512, CLASSES, rngs=rngs)
            fill(self.head, weights["head"])

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv(x)))
            for block in self.blocks:
                x = block(x)
            return self.head(jnp.mean(x, axis=(1, 2)))

    return Model()
