"""The model of examples/models/moe.py with PyTorch, where each token is sent to its experts in a loop."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional


def rms_norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, eps=1e-6)


def rotated(x):
    """Rotary positions of [batch, length, heads, size]: the halves of the last axis form the planes."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = torch.cos(angles)[:, None], torch.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(params, head, x, heads):
    q, k, v = (
        (x @ params[f"{head}.{name}_proj.weight"]).reshape(*x.shape[:2], heads, x.shape[2] // heads) for name in "qkv"
    )
    q, k, v = (each.transpose(1, 2) for each in (rotated(q), rotated(k), v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
    return y @ params[f"{head}.out_proj.weight"]


def mixture(params, head, x, top, capacity_factor):
    get = lambda name: params[f"{head}.{name}.weight"]
    tokens = x.reshape(-1, x.shape[-1])
    probs = torch.softmax(tokens @ get("router"), dim=-1)
    experts = probs.shape[1]
    capacity = math.ceil(capacity_factor * top * len(tokens) / experts)
    gates, chosen = probs.topk(top, dim=-1)
    gates = gates / gates.sum(dim=1, keepdim=True) if top > 1 else gates
    y, taken, dropped = [torch.zeros(x.shape[-1]) for _ in tokens], [0] * experts, 0
    for rank in range(top):
        for n, token in enumerate(tokens):
            e = int(chosen[n, rank])
            taken[e] += 1
            if taken[e] > capacity:
                dropped += 1
                continue
            h = torch.relu(token @ get("up")[e] + get("up_bias")[e])
            y[n] = y[n] + gates[n, rank] * (h @ get("down")[e] + get("down_bias")[e])
    assert dropped  # the test looks at a full expert too
    use = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    return torch.stack(y).reshape(x.shape), experts * (use * probs.mean(dim=0)).sum(), use


def transformer(params, tokens, heads, blocks, top, capacity_factor):
    width = params["embedding.weight"].shape[1]
    x, balance, uses = params["embedding.weight"][tokens] * math.sqrt(width), 0.0, []
    for i in range(blocks):
        head = f"blocks.{i}"
        x = x + attention(params, f"{head}.attention", rms_norm(x, params[f"{head}.attention_norm.weight"]), heads)
        h = rms_norm(x, params[f"{head}.mixture_norm.weight"])
        y, one, use = mixture(params, f"{head}.mixture", h, top, capacity_factor)
        x, balance = x + y, balance + one
        uses.append(use)
    logits = rms_norm(x, params["norm.weight"]) @ params["head.weight"]
    return {"logits": logits, "balance": balance, "use": torch.stack(uses)}


@pytest.mark.parametrize(("top", "capacity_factor"), [(1, 1.0), (2, 0.7)])
def test_moe_equals_torch(family, same_step, top, capacity_factor):
    moe = family("moe")
    sizes = {"heads": 2, "blocks": 2, "top": top, "capacity_factor": capacity_factor}
    model = moe.make_model(vocab_size=11, width=8, hidden=6, experts=3, **sizes)
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, 11, (2, 3, 7))
    targets[:, 0] = -100

    def theirs(params, _):
        out = transformer(params, torch.tensor(tokens), **sizes)
        main = F.cross_entropy(out["logits"].transpose(1, 2), torch.tensor(targets), ignore_index=-100)
        return out, main + 0.5 * out["balance"]

    item = (tokens.astype(np.int32), lambda out: moe.switch_loss(out, targets, weight=0.5))
    same_step(model, None, None, item, theirs)
