"""What the tests of training on eight devices share: a model with its data, shardings by name, and runs."""

import functools
import types

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import kaun
from kaun import Data, layers, losses, rng, sharding

ROWS, BATCH, FEATURES, WIDTH, CLASSES = 200, 52, 16, 64, 5  # batches of 52, 52, 52 and 44 rows: 8 divides none
MODEL = layers.sequential(
    [layers.linear(FEATURES, WIDTH), layers.layer_norm(WIDTH), layers.relu(), layers.linear(WIDTH, CLASSES)]
)
g = np.random.default_rng(0)
X = g.standard_normal((ROWS, FEATURES)).astype(np.float32)
Y = g.integers(0, CLASSES, ROWS).astype(np.int32)


def mesh_of(count, **axes):
    """A mesh of the first devices, of explicit axes, as users get it from JAX."""
    return jax.make_mesh(tuple(axes.values()) or (count,), tuple(axes) or ("data",), devices=jax.devices()[:count])


@functools.cache
def sharding_of(name, count=8):
    if name == "none":
        return None
    if name == "data":
        return sharding.data_parallel(mesh_of(count))
    if name == "fsdp":
        return sharding.fsdp(mesh_of(count), min_size=64)
    if name == "gather":
        return sharding.fsdp(mesh_of(count), min_size=64, gather=True)
    if name == "replicas":
        return sharding.fsdp(mesh_of(8, replica=2, shard=4), axis="shard", min_size=64, rows=("replica", "shard"))
    both = sharding.fsdp(mesh_of(8, data=2, model=4), axis="data", min_size=64) if name == "tensor and fsdp" else None
    return sharding.by_path(
        {"0.*": P(None, "model"), "3.weight": P("model")}, mesh_of(8, data=2, model=4), otherwise=both
    )


def trainer_of(name, optimizer=None, count=8, model=MODEL, **options):
    """A trainer, its state from seed 0, and two passes of shuffled batches."""
    optimizer = optax.adam(1e-2) if optimizer is None else optimizer
    trainer = kaun.Trainer(model=model, optimizer=optimizer, sharding=sharding_of(name, count), **options)
    with rng.scope(0):
        state = trainer.init()
        data = Data.batches((X, Y), BATCH, shuffle=True).with_loss(losses.cross_entropy_sparse).epochs(2)
    return trainer, state, data


def fit(trainer, state, data, **options):
    """The loss of each step, and the state after them, in blocks."""
    found = []

    class Losses(kaun.reports.Report):
        def wants(self, step):
            return False

        def __call__(self, step, loss, state):
            pass

        def block(self, first, values):
            found.extend(values["loss"].tolist())

    state = trainer.fit(state, data, report=Losses(), **options)
    return np.array(found), state


def fold(trainer, state, data):
    """The state after single steps, flushed."""
    for x, loss, *ctx in data:
        state = trainer.step(state, x, loss=loss, ctx=ctx[0] if ctx else None)[1]
    return trainer.flush(state)


def content(tree):
    """The bytes of each leaf."""
    leaves = [jax.random.key_data(a) if kaun.tree.is_key(a) else a for a in jax.tree.leaves(tree)]
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def misplaced(trainer, state):
    """The paths of the leaves of a state that do not lie where the trainer's sharding says, to the object."""
    where = jax.tree.leaves(trainer.sharding.of(state))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    return [p for p, leaf, w in zip(paths, jax.tree.leaves(state), where, strict=True) if leaf.sharding != w]


def close(a, b, tolerance=1e-6):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=0)


@pytest.fixture(scope="session")
def kit():
    """The functions above: conftest files cannot be imported."""
    return types.SimpleNamespace(**{name: value for name, value in globals().items() if not name.startswith("_")})
