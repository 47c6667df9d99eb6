"""examples/models/lora.py against torch modules with a LoRA linear written by hand, with the same weights."""

import importlib.util
from pathlib import Path

import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

import kaun  # noqa: E402
from kaun import layers, losses, rng, tree  # noqa: E402

FILE = Path(__file__).resolve().parents[3] / "examples" / "models" / "lora.py"


class LoraLinear(torch.nn.Module):
    """y = x W + b + alpha / rank (x A) B, with the frozen W and b, as the paper states it."""

    def __init__(self, inputs, outputs, rank, alpha, bias):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(inputs, outputs), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else 0.0
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


def theirs_of(path):
    """The name of torch's parameter for a path of kaun, and whether torch has it transposed."""
    part, _, rest = path.partition(".")
    name = rest.removesuffix(".lora_a").removesuffix(".lora_b")
    name = name.replace("attend.inner.left", "norms.0").replace("attend.inner.right", "attention")
    name = name.replace("mlp.inner.left", "norms.1").replace("mlp.inner.right.0", "mlp.0")
    name = name.replace("mlp.inner.right.2", "mlp.1")
    if part == "adapters":
        return name.removesuffix("weight") + path.rpartition(".")[2], False
    return ("positions" if name == "positions.weight" else name), name in ("embed.weight", "head.weight")


def test_lora_agrees_with_a_lora_linear_by_hand():
    spec = importlib.util.spec_from_file_location("lora", FILE)
    lora = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lora)
    g = np.random.default_rng(0)
    x, y = g.normal(size=(5, 8, 8)).astype(np.float32), g.integers(0, 10, 5)
    with rng.scope(0):
        adapted = lora.make_adapted(lora.make_model(width=16, heads=4), rank=3)
        trainer = kaun.Trainer(model=adapted, optimizer=optax.sgd(0.5), trainable=layers.is_lora)
        state = trainer.init()
    # lora_b, biases and norms start as constants, which would hide a mistake.
    params = tree.map_with_path(lambda path, a: a + 0.1 * g.normal(size=a.shape).astype(np.float32), state.vars.params)
    state = trainer.make_state(state.vars.replace(params=params))
    module = Model(16, 4, rank=3, alpha=6)
    named = dict(module.named_parameters())
    paths = {path: theirs_of(path) for path in tree.flatten(params)[0]}
    assert {name for name, _ in paths.values()} == set(named)
    with torch.no_grad():
        for path, leaf in tree.flatten(params)[0].items():
            name, turned = paths[path]
            named[name].copy_(torch.from_numpy(np.array(leaf.T if turned else leaf)))

    logits = module(torch.from_numpy(x))
    np.testing.assert_allclose(trainer.predict(state, x), logits.detach(), atol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y))
    trained = [module for name, module in named.items() if "lora_" in name]
    loss.backward()
    torch.optim.SGD(trained, lr=0.5).step()
    ours, after = trainer.step(state, x, loss=lambda out: losses.cross_entropy_sparse(out, y))
    np.testing.assert_allclose(ours, loss.item(), atol=1e-5)
    before = tree.flatten(params)[0]
    for path, leaf in tree.flatten(after.vars.params)[0].items():
        name, turned = paths[path]
        expected = named[name].detach().numpy()
        np.testing.assert_allclose(leaf, expected.T if turned else expected, atol=1e-5)
        assert (np.abs(leaf - before[path]).max() > 1e-3) == layers.is_lora(path)
