"""Modules inside models of other libraries: rows of kaun.summary, and errors that name the module."""

import cProfile
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import interop, layers, rng

eqx, hk, nnx, nn = (pytest.importorskip(name) for name in ("equinox", "haiku", "flax.nnx", "flax.linen"))

X = np.ones((6, 4), np.float32)
TOO_WIDE = np.ones((6, 5), np.float32)


@pytest.fixture(autouse=True)
def as_the_libraries_expect():
    with jax.numpy_dtype_promotion("standard"):
        yield


class Block(nnx.Module):
    def __init__(self, inputs, outputs, rngs):
        self.fc = nnx.Linear(inputs, outputs, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, rngs=rngs)

    def __call__(self, x):
        return self.encode(x)

    def encode(self, x):
        return self._hidden(self.fc(x))

    def _hidden(self, x):
        return self.norm(x)


class Net(nnx.Module):
    def __init__(self, *widths):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Block(a, b, rngs) for a, b in widths])
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        x = self.blocks[0](x)
        return self.scale[...] * self.blocks[1].encode(x)


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(3)(x))
        return nn.Sequential([nn.Dense(2), nn.relu])(x)


class Tree(eqx.Module):
    layers: list
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.layers = [eqx.nn.Linear(4, 3, key=key), eqx.nn.MLP(3, 2, 5, 1, key=key)]
        self.norm = eqx.nn.BatchNorm(2, "batch", mode="batch")

    def __call__(self, x, state):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x, state)


def of_equinox():
    return interop.equinox(*eqx.nn.make_with_state(Tree)(jax.random.key(0)))


def of_haiku():
    return interop.haiku(hk.transform(lambda x: hk.Linear(2)(hk.nets.MLP([3, 3])(x))), X)


CASES = {
    "nnx": (
        lambda: interop.flax_nnx(Net((4, 3), (3, 2))),
        [
            ("", "flax_nnx(Net)", "float32[6, 2]", 1, 4),
            ("blocks.0.fc", "Linear", "float32[6, 3]", 15, 60),
            ("blocks.0.norm", "BatchNorm", "float32[6, 3]", 6, 48),
            ("blocks.1.fc", "Linear", "float32[6, 2]", 8, 32),
            ("blocks.1.norm", "BatchNorm", "float32[6, 2]", 4, 32),
        ],
        "In the part 'blocks.0.fc', a Linear, of flax_nnx(Net).",
    ),
    "equinox": (
        of_equinox,
        [
            ("layers.0", "Linear", "float32[3]", 15, 60),
            ("layers.1.layers.0", "Linear", "float32[5]", 20, 80),
            ("layers.1.layers.1", "Linear", "float32[2]", 12, 48),
            ("norm", "BatchNorm", "float32[2]", 4, 36),
        ],
        "In the part 'layers.0', a Linear, of equinox(Tree).",
    ),
    "linen": (
        lambda: interop.linen(Dense(), X),
        [
            ("Dense_0", "Dense", "float32[6, 3]", 15, 60),
            ("norm", "BatchNorm", "float32[6, 3]", 6, 48),
            ("Dense_1", "Dense", "float32[6, 2]", 8, 32),
        ],
        "In the part 'Dense_0', a Dense, of linen(Dense).",
    ),
    "haiku": (
        of_haiku,
        [
            ("mlp/~/linear_0", "Linear", "float32[6, 3]", 15, 60),
            ("mlp/~/linear_1", "Linear", "float32[6, 3]", 12, 48),
            ("linear", "Linear", "float32[6, 2]", 8, 32),
        ],
        "In the part 'mlp/~/linear_0', a Linear, of haiku(x).",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_summary_has_the_modules_by_their_own_paths(case):
    make, rows, note = CASES[case]
    with rng.scope(0):
        trainer = kaun.Trainer(model=make(), optimizer=optax.sgd(0.1))
    found = kaun.summary(trainer, X)
    assert [(r.path, r.layer, r.output, r.parameters, r.bytes) for r in found.rows] == rows
    assert sum(row.parameters for row in found.rows) == found.parameters
    assert sum(row.bytes for row in found.rows) == found.bytes
    assert sys.getprofile() is None
    with pytest.raises(Exception, match=r"shape") as wide:
        kaun.summary(trainer, TOO_WIDE)
    assert sys.getprofile() is None
    assert note in wide.value.__notes__


def test_an_error_in_a_step_names_the_module_and_the_layer():
    model = layers.linear(4, 4) >> interop.flax_nnx(Net((4, 3), (5, 2)))
    trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
    state = trainer.init()
    with pytest.raises(TypeError, match=r"contracting dimensions") as wrong:
        trainer.step(state, X, loss=jnp.mean)
    assert "In the part 'blocks.1.fc', a Linear, of flax_nnx(Net) at 'right'." in wrong.value.__notes__
    assert "In the model's layer 'right'." in wrong.value.__notes__


def test_a_part_that_runs_twice_counts_once_and_paths_are_the_models():
    class Twice(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.fc(self.fc(x))

    trainer = kaun.Trainer(model=layers.tanh() >> interop.flax_nnx(Twice()), optimizer=optax.sgd(0.1))
    rows = kaun.summary(trainer, X).rows
    assert [(row.path, row.parameters) for row in rows] == [("left", 0), ("right.fc", 20), ("right.fc", 0)]


def test_a_profiler_pauses_and_goes_on():
    trainer = kaun.Trainer(model=interop.flax_nnx(nnx.Linear(4, 2, rngs=nnx.Rngs(0))), optimizer=optax.sgd(0.1))
    seen, before = [], lambda frame, event, result: seen.append(event)
    sys.setprofile(before)
    try:
        kaun.summary(trainer, X)
        assert sys.getprofile() is before
    finally:
        sys.setprofile(None)
    assert seen
    with cProfile.Profile() as profile:
        kaun.summary(trainer, X)
        jnp.shape(X)
    assert any("shape" in str(entry.code) for entry in profile.getstats())
