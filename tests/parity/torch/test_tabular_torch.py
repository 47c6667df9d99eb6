"""The model of examples/models/tabular.py with PyTorch."""

import numpy as np
import pytest

from kaun import losses

torch = pytest.importorskip("torch")
F = torch.nn.functional


def transformer(params, x, sizes, heads, blocks):
    numbers, categories = torch.tensor(x["numbers"]), torch.tensor(x["categories"]).long()
    get = lambda name: params[f"{name}.weight"]
    norm = lambda h, name: F.layer_norm(h, h.shape[-1:], get(name), params[f"{name}.bias"])
    linear = lambda h, name: h @ get(name) + params[f"{name}.bias"]
    tokens = [get("answer").expand(len(numbers), 1, -1)]
    tokens += [(column[:, None] * get("number_weight")[:, i] + get("number_bias")[:, i])[:, None]
               for i, column in enumerate(numbers.T)]  # fmt: skip
    tables = torch.split(get("category"), sizes) if sizes else []
    for i, (column, table) in enumerate(zip(categories.T, tables, strict=True)):
        tokens.append((F.embedding(column, table) + get("category_bias")[:, i])[:, None])
    h = torch.cat(tokens, dim=1)
    for i in range(blocks):
        head = f"blocks.{i}.attention.inner"
        y = norm(h, f"{head}.0") if i else h
        head = f"{head}.1" if i else head
        q, k, v = (linear(y, f"{head}.{name}_proj").unflatten(2, (heads, -1)).transpose(1, 2) for name in "qkv")
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + linear(y, f"{head}.out_proj")
        mlp = f"blocks.{i}.mlp.inner"
        value, gate = linear(norm(h, f"{mlp}.0"), f"{mlp}.1").chunk(2, dim=-1)
        h = h + linear(value * torch.relu(gate), f"{mlp}.4")
    return linear(torch.relu(norm(h[:, 0], "head.0")), "head.2")


@pytest.mark.parametrize("categories", [[4, 3], []])
def test_tabular_equals_torch(family, same_step, categories):
    sizes = {"heads": 2, "blocks": 2}
    model = family("tabular").make_model(numbers=3, categories=categories, outputs=3, width=8, dropout=0.0, **sizes)
    random = np.random.default_rng(0)
    x = {
        "numbers": random.normal(size=(6, 3)).astype(np.float32),
        "categories": np.array([random.permutation(6) % n for n in categories], np.int32).reshape(-1, 6).T,
    }
    labels = np.array([0, 1, 2, 0, 1, 1])

    def theirs(params, _):
        logits = transformer(params, x, categories, **sizes)
        return logits, F.cross_entropy(logits, torch.tensor(labels))

    same_step(model, None, None, (x, lambda logits: losses.cross_entropy_sparse(logits, labels)), theirs)
