"""examples/models/lora.py against torch modules with a LoRA linear written by hand, with the same weights."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kaun import layers, losses, tree  # noqa: E402


class LoraLinear(torch.nn.Module):
    """y = x W + b + alpha / rank (x A) B, with the frozen W and b, as the paper states it."""

    def __init__(self, inputs, outputs, rank, alpha, bias):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(inputs, outputs))
        self.bias = torch.nn.Parameter(torch.empty(outputs)) if bias else 0.0
        self.lora_a = torch.nn.Parameter(torch.empty(inputs, rank))
        self.lora_b = torch.nn.Parameter(torch.empty(rank, outputs))
        self.scale = alpha / rank

    def forward(self, x):
        return x @ self.weight + self.bias + self.scale * (x @ self.lora_a) @ self.lora_b


class Block(torch.nn.Module):
    def __init__(self, width, heads, rank, alpha):
        super().__init__()
        adapted = lambda inputs, outputs, bias: LoraLinear(inputs, outputs, rank, alpha, bias)
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(width) for _ in range(2)])
        self.attention = torch.nn.ModuleDict(
            {name: adapted(width, width, False) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp = torch.nn.ModuleList([adapted(width, 2 * width, True), adapted(2 * width, width, True)])
        self.heads = heads

    def forward(self, x):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        h = self.norms[0](x)
        q, k, v = (split(self.attention[name](h)) for name in ("q_proj", "k_proj", "v_proj"))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention["out_proj"](attended)
        h = torch.nn.functional.gelu(self.mlp[0](self.norms[1](x)), approximate="tanh")
        return x + self.mlp[1](h)


class Model(torch.nn.Module):
    def __init__(self, width, heads, rank, alpha):
        super().__init__()
        self.embed, self.head = torch.nn.Linear(8, width), torch.nn.Linear(width, 10)
        self.positions = torch.nn.Parameter(torch.empty(8, width))
        self.blocks = torch.nn.ModuleList([Block(width, heads, rank, alpha) for _ in range(2)])
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, x):
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def name_of(path):
    """The name of torch's parameter for a path of kaun."""
    part, _, rest = path.partition(".")
    name = rest.removesuffix(".lora_a").removesuffix(".lora_b")
    name = name.replace("attend.inner.left", "norms.0").replace("attend.inner.right", "attention")
    name = name.replace("mlp.inner.left", "norms.1").replace("mlp.inner.right.0", "mlp.0")
    name = name.replace("mlp.inner.right.2", "mlp.1")
    if part == "adapters":
        return name.removesuffix("weight") + path.rpartition(".")[2]
    return "positions" if name == "positions.weight" else name


def test_lora_agrees_with_a_lora_linear_by_hand(family, same_step):
    lora, module, g = family("lora"), Model(16, 4, rank=3, alpha=6), np.random.default_rng(0)
    x, y = g.normal(size=(5, 8, 8)).astype(np.float32), g.integers(0, 10, 5)
    adapted = lora.make_adapted(lora.make_model(width=16, heads=4), rank=3)

    def theirs(module, _):
        logits = module(torch.from_numpy(x))
        return logits, torch.nn.functional.cross_entropy(logits, torch.from_numpy(y))

    names = {f"params.{path}": name_of(path) for path in tree.flatten(adapted.init().params)[0]}
    item = (x, lambda out: losses.cross_entropy_sparse(out, y))
    same_step(adapted, module, names, item, theirs, rate=5.0, trainable=layers.is_lora)
