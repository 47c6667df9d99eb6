"""The model of examples/models/gnn.py with PyTorch, without padding: index_add sums over edges and over nodes."""

import pytest

from kaun import rng

torch = pytest.importorskip("torch")
F = torch.nn.functional


def linear(params, name, x):
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def network(params, graphs, colours):
    """Logits [graphs, classes] of a list of graphs; the running statistics are updated."""
    sizes = torch.tensor([len(graph.colours) for graph in graphs])
    offsets = torch.cumsum(sizes, 0) - sizes
    edges = torch.cat([torch.tensor(graph.edges) + first for graph, first in zip(graphs, offsets, strict=True)])
    edges = torch.cat([edges, edges.flip(1)])
    graph_of = torch.repeat_interleave(torch.arange(len(graphs)), sizes)
    nodes = F.one_hot(torch.cat([torch.tensor(graph.colours) for graph in graphs]), colours).float()

    def added(values, index, count):
        return torch.zeros(count, values.shape[1]).index_add(0, index, values)

    h, logits = linear(params, "embed", nodes), 0
    for i in range(2):
        head = f"rounds.{i}"
        received = added(h[edges[:, 0]], edges[:, 1], len(h))
        h = ((1 + params[f"{head}.eps.weight"]) * h + received) @ params[f"{head}.first.weight"]
        with torch.no_grad():  # kaun's running variance is the biased one
            for name, batch in (("mean", h.mean(0)), ("var", h.var(0, correction=0))):
                params[f"state.{head}.norm.running_{name}"].lerp_(batch, 0.1)
        h = F.batch_norm(h, None, None, params[f"{head}.norm.weight"], params[f"{head}.norm.bias"], training=True)
        h = torch.relu(linear(params, f"{head}.second", torch.relu(h)))
        logits = logits + linear(params, f"heads.{i}", added(h, graph_of, len(graphs)))
    return logits


def test_gnn_equals_torch(family, same_step):
    gnn = family("gnn")
    with rng.scope(0):
        graphs = gnn.make_graphs(5)
    x, labels = gnn.collate(graphs, 7)

    def theirs(params, _):
        logits = network(params, graphs, gnn.COLOURS)
        return logits, F.cross_entropy(logits, torch.tensor(labels[:5]).long())

    item = (x, lambda logits: gnn.loss(logits, labels))
    # Two graphs and one more are padding.
    same_step(gnn.make_model(width=8, depth=2), None, None, item, theirs, rate=0.1, compared=lambda logits: logits[:5])
