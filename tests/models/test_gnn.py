import numpy as np
import pytest

from kaun import Data, rng


@pytest.fixture(scope="module")
def gnn(family):
    return family("gnn")


@pytest.fixture(scope="module")
def trained(gnn):
    return gnn.main(epochs=12, graphs=512, width=16)


@pytest.fixture(scope="module")
def graphs(gnn):
    with rng.scope(5):
        return gnn.make_graphs(40)


def test_it_is_right_on_graphs_that_it_has_not_seen(trained, graphs):
    _, state, history, right = trained
    assert history.epochs[-1]["loss"] < 0.3 * history.epochs[0]["loss"]
    assert right > 0.9
    assert 0.4 < np.mean([graph.label for graph in graphs]) < 0.75  # the more frequent answer is right that often
    assert (np.asarray(state.vars.state["rounds"][0]["norm"]["running_mean"]) != 0).all()


def test_the_order_of_nodes_and_edges_has_no_effect(gnn, trained, graphs):
    random = np.random.default_rng(0)

    def renumbered(graph):
        order = random.permutation(len(graph.colours))  # node i becomes node order[i]
        edges = random.permutation(order[graph.edges])
        return graph._replace(colours=graph.colours[np.argsort(order)], edges=edges)

    trainer, state, _, _ = trained
    before = trainer.predict(state, gnn.collate(graphs[:32], 32)[0])
    after = trainer.predict(state, gnn.collate([renumbered(graph) for graph in graphs[:32]], 32)[0])
    np.testing.assert_allclose(after, before, atol=1e-4)
    other = gnn.Graph(graphs[0].colours[::-1], graphs[0].edges, 0)  # other colours at the same nodes do
    assert np.abs(trainer.predict(state, gnn.collate([other], 32)[0])[0] - before[0]).max() > 0.1


def test_neither_other_graphs_nor_padding_have_an_effect(gnn, trained, graphs):
    trainer, state, _, _ = trained
    whole = trainer.predict(state, gnn.collate(graphs[:32], 32)[0])
    x, labels = gnn.collate(graphs[3:8], 32)
    assert (labels != -100).tolist() == 5 * [True] + 28 * [False]
    assert x["real"].tolist() == 5 * [True] + 28 * [False]
    np.testing.assert_allclose(trainer.predict(state, x)[:5], whole[3:8], atol=1e-4)
    x["nodes"][x["graph"] == 32] = 100  # what is padded
    np.testing.assert_allclose(trainer.predict(state, x)[:5], whole[3:8], atol=1e-4)


def test_a_step_looks_at_real_graphs_alone(gnn, trained, graphs):
    trainer, state, _, _ = trained
    x, labels = gnn.collate(graphs[:5], 32)
    changed = x | {"nodes": np.where((x["graph"] == 32)[:, np.newaxis], 100, x["nodes"]).astype(np.float32)}
    means, values = [], []
    for each in (x, changed):
        data = Data.from_items([(each, labels)]).with_loss(gnn.loss)
        after = trainer.fit(state, data, report=lambda step, loss, state: values.append(loss))
        means.append(after.vars.state["rounds"][1]["norm"]["running_mean"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    np.testing.assert_allclose(*means, rtol=1e-4)
