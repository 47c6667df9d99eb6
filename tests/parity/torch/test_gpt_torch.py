"""examples/models/gpt.py in nanoGPT's form (no biases, exact gelu, tied head) against the same in torch modules."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kaun import losses  # noqa: E402

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


def test_nanogpt_agrees_with_torch(family, same_step):
    gpt, module = family("gpt"), Model(**SIZES)
    tokens = np.random.default_rng(0).integers(0, 19, (3, 12)).astype(np.int32)

    def theirs(module, _):
        logits = module(torch.from_numpy(tokens).long())
        targets = torch.from_numpy(tokens[:, 1:]).long()
        return logits, torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())

    item = (tokens, lambda y: losses.cross_entropy_sparse(y[:, :-1], tokens[:, 1:]))
    names = {f"params.{name}": name for name, _ in module.named_parameters()}
    same_step(gpt.make_model(**{**gpt.NANO, **SIZES}), module, names, item, theirs)
