"""A graph network (GIN, Xu et al., 2019): whole graphs are classified, many of them in one batch with padding.

Run it with: python examples/models/gnn.py

The graphs are random, with three red nodes among green and blue ones. The question is whether an edge joins two red
nodes. The script prints how often the network is right on graphs that it has not seen.
"""

import argparse
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, reports, rng

COLOURS, NODES, EDGES = 3, 12, 14  # kinds of nodes, and the largest graph


class Graph(NamedTuple):
    """The colour of each node [n], pairs of nodes [m, 2], and whether an edge joins two nodes of colour 0."""

    colours: np.ndarray
    edges: np.ndarray
    label: int


def make_model(*, features=COLOURS, width=32, depth=2, classes=2):
    """Make the model: from graphs as ``collate`` returns them to logits [graphs, classes]."""

    def round_of_messages():
        parts = {
            "eps": layers.parameter(()),
            "first": layers.linear(width, width, bias=False),
            "norm": layers.batch_norm(width, momentum=0.9),
            "second": layers.linear(width, width),
        }

        def forward(m, x):
            h, graphs, real = x
            received = jax.ops.segment_sum(h[graphs["senders"]], graphs["receivers"], len(h))
            h = m.first((1 + m.eps()) * h + received)
            # The statistics are those of real nodes; padding stays 0, so that it cannot grow from round to round.
            h = m.second(jax.nn.relu(m.norm(h, ctx=m.ctx.set("row_mask", real))))
            return jnp.where(real[:, jnp.newaxis], jax.nn.relu(h), 0)

        return layers.module(parts, forward, name="round")

    def forward(m, graphs):
        real = graphs["real"][graphs["graph"]]
        h, logits = m.embed(graphs["nodes"]), 0
        for send, head in zip(m.rounds, m.heads, strict=True):
            h = send((h, graphs, real))
            logits += head(jax.ops.segment_sum(h, graphs["graph"], len(graphs["real"])))
        return logits

    parts = {
        "embed": layers.linear(features, width),
        "rounds": [round_of_messages() for _ in range(depth)],
        "heads": [layers.linear(width, classes) for _ in range(depth)],
    }
    return layers.module(parts, forward, name="gin")


def make_graphs(count):
    """Make random graphs with three red nodes each."""
    draw = np.random.default_rng(np.asarray(jax.random.key_data(rng.next_key())))
    graphs = []
    for _ in range(count):
        nodes = draw.integers(8, NODES + 1)
        pairs = np.stack(np.triu_indices(nodes, 1), axis=1)
        edges = draw.permutation(pairs)[: draw.integers(nodes - 1, EDGES + 1)]
        colours = draw.permutation([0, 0, 0, *draw.integers(1, COLOURS, nodes - 3)])
        graphs.append(Graph(colours, edges, int((colours[edges] == 0).all(axis=1).any())))
    return graphs


def collate(graphs, size):
    """Return a list of up to ``size`` graphs as one, and labels [size + 1], -100 for graphs that are padding.

    All arrays have the same shapes for each list: nodes [n, colours], the graph of each node [n], each edge in both
    directions (senders and receivers [e]), and which graphs are real [size + 1]. What is padded belongs to the last
    graph, which is not real.
    """
    n, e = size * NODES + 1, 2 * size * EDGES
    x = {
        "nodes": np.zeros((n, COLOURS), np.float32),
        "graph": np.full(n, size, np.int32),
        "senders": np.full(e, n - 1, np.int32),
        "receivers": np.full(e, n - 1, np.int32),
        "real": np.arange(size + 1) < len(graphs),
    }
    labels = np.full(size + 1, -100, np.int32)
    labels[: len(graphs)] = [graph.label for graph in graphs]
    node = edge = 0
    for number, graph in enumerate(graphs):
        own, pairs = slice(node, node + len(graph.colours)), np.concatenate([graph.edges, graph.edges[:, ::-1]])
        x["nodes"][own], x["graph"][own] = np.eye(COLOURS)[graph.colours], number
        x["senders"][edge : edge + len(pairs)], x["receivers"][edge : edge + len(pairs)] = node + pairs.T
        node, edge = own.stop, edge + len(pairs)
    return x, labels


def make_batches(graphs, *, batch_size=32):
    return Data.from_items(graphs).shuffle().map_batch(batch_size, functools.partial(collate, size=batch_size))


loss = functools.partial(losses.cross_entropy_sparse, ignore_index=-100)


def accuracy(logits, labels):
    return ((logits.argmax(axis=-1) == labels) & (labels != -100)).sum(), (labels != -100).sum()


def main(*, epochs=20, graphs=1024, seed=0, **sizes):
    with rng.scope(seed):
        train, test = make_batches(make_graphs(graphs)), make_batches(make_graphs(500))
        trainer = kaun.Trainer(model=make_model(**sizes), optimizer=optax.adam(0.003))
        state = trainer.init(dtype=jnp.float32)
    history = reports.history()
    state = trainer.fit(state, train.with_loss(loss).epochs(epochs), report=history)
    right = trainer.evaluate(state, test, {"accuracy": accuracy})["accuracy"]
    print(
        f"The loss was {history.epochs[0]['loss']:.3f} in the first pass, {history.epochs[-1]['loss']:.3f} in the last."
    )
    print(f"The network is right for {100 * right:.1f}% of 500 graphs that it has not seen.")
    return trainer, state, history, right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a graph network to find an edge between two red nodes.")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the graphs (default 20)")
    main(**vars(parser.parse_args()))
