"""Norms by layer against NumPy, and the same bits of the state with and without them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kaun import Data, Trainer, checkpoint, layers, losses, reports, rng

GENERATOR = np.random.default_rng(0)
X, Y = (GENERATOR.normal(size=(64, n)).astype(np.float32) for n in (12, 5))


class Blocks(reports.Report):
    def __init__(self, numbers):
        self.numbers, self.values = numbers, {}

    def block(self, first_step, values):
        for name, array in values.items():
            self.values.setdefault(name, []).append(array)

    def column(self, name):
        return np.ma.concatenate(self.values[name])


def mlp(hidden=16):
    return layers.sequential([layers.linear(12, hidden), layers.tanh(), layers.linear(hidden, 5)])


def made(model, optimizer, **more):
    with rng.scope(0):
        trainer = Trainer(model=model, optimizer=optimizer, **more)
        return trainer, trainer.init()


def items(steps=40):
    return Data.batches((X, Y), 8).epochs(3).take(steps).with_loss(losses.mse)


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree_util.tree_leaves((state.vars, state.opt_state, state.step))]


def norm(*arrays):
    return np.sqrt(sum(np.square(np.asarray(a, np.float64)).sum() for a in arrays))


ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
MOMENTUM = optax.sgd(1e-3, momentum=0.9)
CASES = {
    "adamw": ({}, 16, 7, ADAMW),
    "skip": ({"on_nonfinite": "skip"}, 16, 7, MOMENTUM),
    "ignore, each step": ({"on_nonfinite": "ignore"}, 16, 1, MOMENTUM),
    "float16": ({"precision": "mixed_float16"}, 16, 1, MOMENTUM),
    "microbatches": ({"microbatches": 2}, 16, 7, MOMENTUM),
    "in place": ({}, 12_000, 7, MOMENTUM),
}


IN_SHORT = ("skip", "ignore, each step", "in place")


@pytest.mark.parametrize(
    "case", [case if case in IN_SHORT else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_parameters_have_the_same_bits_with_and_without(case):
    more, hidden, every, optimizer = CASES[case]
    trainer, state = made(mlp(hidden), optimizer, **more)
    plain, blocks = bits(trainer.fit(state, items(20))), Blocks({"layer_norms": every})
    assert bits(trainer.fit(state, items(20), report=blocks)) == plain
    assert bits(trainer.fit(state, items(20), report=reports.all_of(blocks, lambda step, loss, state: None))) == plain
    assert np.isfinite(blocks.column("update_ratio/2")).all()


ADAM = optax.adam(1e-2)


def gradient_by_hand(params, x, y):
    """That of the mean of squares for two layers in a row, computed in float64."""
    w, v = (np.asarray(params[layer]["weight"], np.float64) for layer in ("left", "right"))
    hidden = x @ w + np.asarray(params["left"]["bias"], np.float64)
    error = 2 * (hidden @ v - y) / y.size
    back = error @ v.T
    found = {"left": {"bias": back.sum(axis=0), "weight": x.T @ back}, "right": {"weight": hidden.T @ error}}
    return jax.tree_util.tree_map(np.float32, found)


@jax.jit
def by_hand(gradient, opt_state, params):
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = ADAM.update(gradient, opt_state, params)
    return updates, opt_state, optax.apply_updates(params, updates)


@pytest.mark.parametrize("more", [{}, {"on_nonfinite": "skip"}, {"on_nonfinite": "ignore"}], ids=str)
def test_norms_are_those_of_the_step_by_hand(more):
    trainer, state = made(layers.linear(12, 8) >> layers.linear(8, 5, bias=False), ADAM, **more)
    blocks = Blocks({"layer_norms": 2})
    trainer.fit(state, items(6), report=blocks)
    names = [f"{kind}/{layer}" for kind in ("grad_norm", "weight_norm", "update_ratio") for layer in ("left", "right")]
    assert sorted(name for name in blocks.values if "/" in name) == sorted(names)
    now, opt_state = state.vars.params, ADAM.init(state.vars.params)
    for i, (x, y) in enumerate(Data.batches((X, Y), 8).take(6)):
        gradient = gradient_by_hand(now, x, y)
        updates, opt_state, after = by_hand(gradient, opt_state, now)
        for layer in ("left", "right"):
            found = [blocks.column(f"{kind}/{layer}")[i] for kind in ("grad_norm", "weight_norm", "update_ratio")]
            if i % 2 == 0:
                assert all(value is np.ma.masked for value in found)
                continue
            g, w, u = (norm(*jax.tree_util.tree_leaves(t[layer])) for t in (gradient, now, updates))
            np.testing.assert_allclose(found, [g, w, u / w], rtol=2e-5)
        now = after


def test_the_gradient_is_without_the_loss_scale_and_a_discarded_step_moves_nothing():
    one = lambda out: losses.mse(out.astype(jnp.float32), jnp.zeros((8, 5)))
    huge = lambda out: (out.astype(jnp.float32) * 1e30).sum()
    trainer, state = made(layers.linear(12, 5), optax.sgd(0.5), precision="mixed_float16")
    blocks = Blocks(["layer_norms"])
    trainer.fit(state, [(X[:8], one), (X[:8], huge)], report=blocks)
    x, w, b = (np.asarray(a, np.float64) for a in (X[:8], *(state.vars.params[n] for n in ("weight", "bias"))))
    slope = 2 * (x @ w + b) / 40
    assert blocks.column("grad_norm/weight")[0] == pytest.approx(norm(x.T @ slope), rel=1e-2)  # float16
    ratio = blocks.column("update_ratio/weight")
    assert ratio[0] == pytest.approx(0.5 * norm(x.T @ slope) / norm(w), rel=1e-2) and ratio[1] == 0
    assert blocks.column("update_ratio/bias")[0] == np.inf  # the biases begin at 0


def test_frozen_parameters_have_no_part_in_them():
    trainer, state = made(
        layers.linear(12, 8) >> layers.linear(8, 5),
        optax.sgd(0.1),
        trainable=lambda p: p != "left.bias" and p[:5] != "right",
    )
    blocks = Blocks(["layer_norms"])
    trainer.fit(state, items(3), report=blocks)
    assert [name for name in blocks.values if name.startswith("weight_norm/")] == ["weight_norm/left"]
    assert blocks.column("weight_norm/left")[0] == pytest.approx(norm(state.vars.params["left"]["weight"]), rel=1e-6)


def test_without_them_nothing_is_compiled_and_with_them_the_log_says_why():
    trainer, state = made(layers.linear(12, 5), optax.sgd(0.1))
    trainer.fit(state, items(8), report=reports.history())
    trainer.fit(state, items(8), report=reports.all_of(Blocks(["layer_norms"]), reports.history()))
    trainer.fit(state, items(8))
    trainer.fit(state, items(8), report=Blocks({"layer_norms": 1}))
    why = [c.why for c in trainer.compilations if c.where == "fit"]
    assert why == ["first", "the reports' 'layer_norms' changed from nothing to each 1. step"]


def test_a_run_is_resumed_with_and_without_them(tmp_path):
    trainer, state = made(layers.linear(12, 5), optax.adam(0.1))
    runs = checkpoint.Directory(tmp_path, every=4)
    expected = bits(trainer.fit(state, items(12)))
    trainer.fit(state, items(4), checkpoints=runs)
    trainer.fit(state, items(8), checkpoints=runs, report=(blocks := Blocks(["layer_norms"])))
    assert bits(trainer.fit(state, items(12), checkpoints=runs)) == expected
    assert len(blocks.column("grad_norm/weight")) == 4
