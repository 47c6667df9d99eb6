"""examples/models/gpt.py in nanoGPT's form (no biases, exact gelu, tied head) against the same in torch modules."""

import importlib.util
from pathlib import Path

import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

import kaun  # noqa: E402
from kaun import losses, rng, tree  # noqa: E402

FILE = Path(__file__).resolve().parents[3] / "examples" / "models" / "gpt.py"
SIZES = {"vocab_size": 19, "n_positions": 12, "n_embd": 16, "n_head": 4, "n_layer": 2}


class Block(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        linear = lambda inputs, outputs: torch.nn.Linear(inputs, outputs, bias=False)
        self.ln_1, self.ln_2 = (torch.nn.LayerNorm(width, bias=False) for _ in range(2))
        self.attn = torch.nn.ModuleDict(
            {name: linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp = torch.nn.ModuleDict({"c_fc": linear(width, 4 * width), "c_proj": linear(4 * width, width)})
        self.heads = heads

    def forward(self, x):
        h = self.ln_1(x)
        q, k, v = (
            self.attn[name](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["out_proj"](attended.transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](torch.nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Model(torch.nn.Module):
    def __init__(self, vocab_size, n_positions, n_embd, n_head, n_layer):
        super().__init__()
        self.wte, self.wpe = torch.nn.Embedding(vocab_size, n_embd), torch.nn.Embedding(n_positions, n_embd)
        self.h = torch.nn.ModuleList([Block(n_embd, n_head) for _ in range(n_layer)])
        self.ln_f = torch.nn.LayerNorm(n_embd, bias=False)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


def test_nanogpt_agrees_with_torch():
    spec = importlib.util.spec_from_file_location("gpt", FILE)
    gpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpt)
    g = np.random.default_rng(0)
    tokens = g.integers(0, 19, (3, 12)).astype(np.int32)
    with rng.scope(0):
        trainer = kaun.Trainer(model=gpt.make_model(**{**gpt.NANO, **SIZES}), optimizer=optax.sgd(0.5))
        state = trainer.init()
    params = tree.map_with_path(lambda _, a: a + 0.1 * g.normal(size=a.shape).astype(np.float32), state.vars.params)
    state = trainer.make_state(state.vars.replace(params=params))
    module = Model(**SIZES)
    named = dict(module.named_parameters())
    turned = lambda path, leaf: leaf.T if ".attn." in path or ".mlp." in path else leaf
    assert set(named) == set(tree.flatten(params)[0])
    with torch.no_grad():
        for path, leaf in tree.flatten(params)[0].items():
            named[path].copy_(torch.from_numpy(np.array(turned(path, leaf))))

    logits = module(torch.from_numpy(tokens).long())
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.from_numpy(tokens[:, 1:]).long().flatten()
    )
    loss.backward()
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    np.testing.assert_allclose(trainer.predict(state, tokens), logits.detach(), atol=1e-5)
    ours, after = trainer.step(state, tokens, loss=lambda y: losses.cross_entropy_sparse(y[:, :-1], tokens[:, 1:]))
    np.testing.assert_allclose(ours, loss.item(), atol=1e-5)
    before = tree.flatten(params)[0]
    for path, leaf in tree.flatten(after.vars.params)[0].items():
        np.testing.assert_allclose(turned(path, leaf), named[path].detach(), atol=1e-5)
        assert np.abs(leaf - before[path]).max() > 1e-4
