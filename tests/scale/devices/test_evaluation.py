"""Evaluation on eight devices gives what it gives on one: metrics, outputs, and the tools that run a trainer."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import kaun
from kaun import Data, averages, layers, losses, metrics, reports, rng, sharding

G = np.random.default_rng(0)
N = 44
X = G.normal(size=(N, 8)).astype(np.float32)
Y = G.integers(0, 3, N)
AUC = metrics.Counted.of(metrics.auc)
METRICS = {
    "accuracy": metrics.accuracy,
    "auc": metrics.Counted(lambda p, y, weights=None: AUC.counts(p[:, 1], y == 1, weights=weights), AUC.result),
    "entropy": losses.cross_entropy_sparse,
    "f1": metrics.f1,
    "mean": lambda p, y: (p * p).mean(),
}
WHERE = {
    "data_parallel": lambda: sharding.data_parallel(),
    "fsdp": lambda: sharding.fsdp(min_size=64),
    "tensor parallel": lambda: sharding.by_path({"0.*": P(None, "model")}, sharding.mesh(data=2, model=4)),
}


@functools.cache
def trained(where=None):
    """A trainer, and a state after a few steps, which is the same wherever it lies."""
    model = layers.sequential([layers.linear(8, 16), layers.batch_norm(16), layers.tanh(), layers.linear(16, 3)])
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    about = {} if where is None else {"sharding": WHERE[where]()}
    trainer = kaun.Trainer(model=model, optimizer=optimizer, average=averages.ema(0.5), **about)
    with rng.scope(0):
        state = trainer.init()
    if where is not None:
        start = trained()[1]
        return trainer, jax.tree.map(lambda leaf, w: jax.device_put(leaf, w), start, trainer.sharding.of(start))
    return trainer, trainer.fit(state, Data.batches((X, Y), 11).with_loss(losses.cross_entropy_sparse))


def batches(size=16, **options):
    return Data.batches((X, Y), size, **options)


def close(left, right, within=1e-6):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.allclose(np.asarray(a), np.asarray(b), rtol=within, atol=within) for a, b in pairs)


slow = pytest.mark.slow
PADDED = {"pad": True, "sample_weights": np.arange(N) % 3}


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("fsdp", PADDED),
        *(pytest.param(where, {}, marks=slow) for where in WHERE),
        *(pytest.param(where, PADDED, marks=slow) for where in ("data_parallel", "tensor parallel")),
    ],
)
def test_metrics_are_those_of_one_device(where, options):
    (one, plain), (many, state) = trained(), trained(where)
    names = ["accuracy", "auc", "entropy", "f1"] if options else METRICS
    wanted = {name: METRICS[name] for name in names}
    expected = one.evaluate(plain, batches(**options), wanted)
    for data in (batches(**options), batches(**options).local(many.sharding).assemble(many.sharding).prefetch(1)):
        found = many.evaluate(state, data, wanted)
        assert found["accuracy"] == expected["accuracy"] and found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "where", ["fsdp", *(pytest.param(w, marks=slow) for w in ("data_parallel", "tensor parallel"))]
)
def test_outputs_are_those_of_one_device(where):
    (one, plain), (many, state) = trained(), trained(where)
    for n in (16, 12):  # 12 rows on 8 devices
        assert close(many.predict(state, X[:n]), one.predict(plain, X[:n]))
    for data in (batches(), batches(pad=True), batches(pad=True).local(many.sharding).assemble(many.sharding)):
        found = many.predict(state, data.map(lambda b: b[0]))
        assert isinstance(found, np.ndarray) and close(found, one.predict(plain, X))


@slow
def test_a_function_of_the_user_may_return_what_lies_on_all_devices():
    many, _state = trained("fsdp")
    put = lambda b: jax.device_put(b, many.sharding.spread)
    measure = jax.jit(lambda x, y: {"auc": METRICS["auc"].parts(x, y), "mean": losses.Mean(x.sum(), 8.0 * len(x))})
    found = metrics.evaluate_many(lambda b: measure(*put(b)), Data.batches((X, Y), 8, drop_last=True))
    assert found["auc"] == pytest.approx(METRICS["auc"](X[:40], Y[:40]), rel=1e-6)
    assert found["mean"] == pytest.approx(X[:40].mean(), abs=1e-6)


@slow
def test_validation_sees_the_weights_of_the_average():
    results = []
    for where in (None, "fsdp"):
        trainer, state = trained(where)
        check = reports.validate(trainer, batches(), {"entropy": METRICS["entropy"]}, each=2, of=lambda s: s.averaged)
        trainer.fit(state, batches(drop_last=True).epochs(2).with_loss(losses.cross_entropy_sparse), report=check)
        results.append([(step, values["entropy"]) for step, values in check.results])
    assert [step for step, _ in results[0]] == [step for step, _ in results[1]]
    assert close(*results)


@slow
def test_statistics_of_an_average_are_those_of_one_device():
    train = batches(pad=True).with_loss(losses.cross_entropy_sparse)
    (one, plain), (many, state) = trained(), trained("fsdp")
    expected, found = (averages.update_statistics(t, s, train).averaged for t, s in ((one, plain), (many, state)))
    assert close(found.vars, expected.vars) and not close(found.vars.state, state.averaged.vars.state)
    placed = batches(pad=True).local(many.sharding).assemble(many.sharding).with_loss(losses.cross_entropy_sparse)
    assert close(averages.update_statistics(many, state, placed).averaged.vars, expected.vars)


@slow
def test_the_rate_range_is_that_of_one_device():
    found = []
    for where in (None, "data_parallel"):
        trainer, state = trained(where)
        train = batches(drop_last=True).epochs(5).with_loss(losses.cross_entropy_sparse)
        found.append(kaun.lr_range(trainer, state, train, low=1e-3, high=1.0, steps=10).losses)
    assert close(*found)


@slow
def test_a_step_that_is_not_finite_is_explained():
    trainer, state = trained("fsdp")
    x = X[:16].copy()
    x[3, 2] = np.nan
    with pytest.raises(kaun.errors.NonFiniteLoss) as caught:
        trainer.fit(state, [(x, lambda out: losses.cross_entropy_sparse(out, Y[:16]))])
    assert "that are not finite there: 3 (1 of 16)" in str(kaun.explain(trainer, caught.value))


def test_an_exported_program_runs_on_one_device():
    (one, plain), (many, state) = trained(), trained("fsdp")
    assert len(state.vars.params[0]["weight"].devices()) == 8
    exported = many.export(state, X[:4])
    assert exported.nr_devices == 1
    assert close(jax.jit(exported.call)(X), one.predict(plain, X))


@slow
def test_rows_of_similar_lengths_are_those_of_one_device():
    rows = [(G.integers(0, 5, n), G.integers(0, 3, n)) for n in G.integers(1, 9, 30)]
    lengths = [len(tokens) for tokens, _ in rows]
    data = Data.from_items(rows).bucket(lengths, [4, 8], 8)
    found = []
    for about in ({}, {"sharding": sharding.data_parallel()}):
        model = layers.embedding(5, 4) >> layers.linear(4, 3)
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1), **about)
        with rng.scope(0):
            state = trainer.init()
        s = trainer.sharding
        placed = data.local(s).assemble(s).prefetch(1) if about else data
        state = trainer.fit(state, placed.with_loss(losses.cross_entropy_sparse))
        wanted = {"accuracy": metrics.accuracy, "entropy": losses.cross_entropy_sparse}
        outputs = trainer.predict(state, data.take(1).map(lambda b: b[0]))
        found.append([state.vars.params, trainer.evaluate(state, placed, wanted), outputs])
    assert close(*found)
