"""Evaluation on eight devices gives what it gives on one: metrics, outputs, and the tools that run a trainer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import kaun
from kaun import Data, averages, layers, losses, metrics, rng, sharding

G = np.random.default_rng(0)
N = 44
X = G.normal(size=(N, 8)).astype(np.float32)
Y = G.integers(0, 3, N)
METRICS = {
    "accuracy": metrics.accuracy,
    "auc": lambda p, y, weights=None: (jnp.sum(p[:, 1] * y), y.size),
    "entropy": losses.cross_entropy_sparse,
    "f1": metrics.f1,
    "mean": lambda p, y: p.mean(),
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


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("options", [{}, {"pad": True, "sample_weights": np.arange(N) % 3}], ids=["ragged", "padded"])
def test_metrics_are_those_of_one_device(where, options):
    (one, plain), (many, state) = trained(), trained(where)
    names = ["accuracy", "entropy", "f1"] if options else METRICS
    wanted = {name: METRICS[name] for name in names}
    expected = one.evaluate(plain, batches(**options), wanted)
    for data in (batches(**options), batches(**options).local(many.sharding).assemble(many.sharding).prefetch(1)):
        found = many.evaluate(state, data, wanted)
        assert found["accuracy"] == expected["accuracy"] and found == pytest.approx(expected, rel=1e-6)
