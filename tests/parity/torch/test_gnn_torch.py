"""The model of examples/models/gnn.py with PyTorch, without padding: index_add sums over edges and over nodes."""

import numpy as np
import pytest

from kaun import rng

from .training import agree, close, filled, one_step

torch = pytest.importorskip("torch")
F = torch.nn.functional


def linear(params, name, x):
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def network(params, state, graphs, colours):
    """Logits [graphs, classes] of a list of graphs; ``state`` receives the running statistics."""
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
        mean, var = torch.zeros(h.shape[1]), torch.ones(h.shape[1])
        weight, bias = params[f"{head}.norm.weight"], params[f"{head}.norm.bias"]
        h = F.batch_norm(h, mean, var, weight, bias, training=True, momentum=0.1)
        # PyTorch's running variance is the unbiased one.
        biased = 0.9 + (var - 0.9) * (len(h) - 1) / len(h)
        state |= {f"{head}.norm.running_mean": mean, f"{head}.norm.running_var": biased}
        h = torch.relu(linear(params, f"{head}.second", torch.relu(h)))
        logits = logits + linear(params, f"heads.{i}", added(h, graph_of, len(graphs)))
    return logits


def test_gnn_equals_torch(family):
    gnn = family("gnn")
    model = gnn.make_model(width=8, depth=2)
    variables = filled(model)
    with rng.scope(0):
        graphs = gnn.make_graphs(5)
    x, labels = gnn.collate(graphs, 7)
    ours = one_step(model, variables, x, lambda logits: gnn.loss(logits, labels))
    ours.output = ours.output[:5]  # two graphs and one more are padding
    state = {}
    forward = lambda params: network(params, state, graphs, gnn.COLOURS)
    agree(ours, variables, forward, lambda logits: F.cross_entropy(logits, torch.tensor(labels[:5]).long()))
    assert set(ours.state) == set(state)
    for name, value in state.items():
        close(name, ours.state[name], value)
    assert np.abs(ours.state["rounds.0.norm.running_mean"]).max() > 1e-3
