"""Models of other libraries under `Trainer(sharding=)`: as on one device, spread, and fit is the fold of step."""

import os
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, interop, losses, rng, sharding, tree

g = np.random.default_rng(0)
X = g.standard_normal((60, 8)).astype(np.float32)
Y = g.integers(0, 3, 60).astype(np.int32)
WIDTH = 32


def of_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, WIDTH, rngs=rngs)
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
            self.drop = nnx.Dropout(0.2, rngs=rngs)
            self.last = nnx.Linear(WIDTH, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))

    return interop.flax_nnx(Net(nnx.Rngs(0)))


def of_linen():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(WIDTH)(x))
            return nn.Dense(3)(nn.Dropout(0.2, deterministic=not train)(nn.relu(x)))

    return interop.linen(Net(), X[:1])


def of_equinox():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 2)
    parts = [
        eqx.nn.Linear(8, WIDTH, key=keys[0]),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Dropout(0.2),
        eqx.nn.Linear(WIDTH, 3, key=keys[1]),
    ]
    return interop.equinox(eqx.nn.Sequential(parts))


def of_haiku():
    hk = pytest.importorskip("haiku")

    def forward(x, is_training):
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Linear(WIDTH)(x), is_training))
        return hk.Linear(3)(x)

    return interop.haiku(hk.transform_with_state(forward), X[:1])


def content(state):
    leaves = [jax.random.key_data(a) if tree.is_key(a) else a for a in jax.tree.leaves(state)]
    return [np.asarray(leaf).tobytes() for leaf in leaves]


@pytest.fixture(autouse=True)
def standard_promotion():
    """The other libraries mix dtypes: haiku's average of batch statistics raises a float to an int32 counter."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("make", [of_nnx, of_linen, of_equinox, of_haiku], ids=lambda make: make.__name__)
def test_a_model_of_another_library_is_spread(make):
    model, where = make(), sharding.fsdp(min_size=64)
    found, spread = [], jax.device_count() > 1
    for each in (None, where):
        trainer = kaun.Trainer(model=model, optimizer=optax.adam(1e-2), sharding=each)
        with rng.scope(0):
            start = trainer.init()
            data = Data.batches((X, Y), 24, shuffle=True).with_loss(losses.cross_entropy_sparse).epochs(2)
        values = []
        end = trainer.fit(start, data, report=lambda step, loss, state, values=values: values.append(loss))
        found.append((content(start), values, end))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=2e-6)
    folded = start
    for x, loss in data:
        folded = trainer.step(folded, x, loss=loss)[1]
    assert content(folded) == content(end)
    placed = jax.tree.leaves(where.of(end))
    assert [leaf.sharding for leaf in jax.tree.leaves(end)] == placed
    assert spread == any(w.spec for w in placed) or not spread
    np.testing.assert_allclose(trainer.predict(end, X[:20]), trainer.predict(found[1][2], X[:20]), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(len(jax.devices()) > 1, reason="is this test's own process")
def test_the_same_on_eight_devices():
    for library in ("flax", "equinox", "haiku"):
        pytest.importorskip(library)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **flags}, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "4 passed, 1 skipped" in done.stdout
