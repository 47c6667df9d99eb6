"""Runs with ``Trainer(accumulate=k)``: checkpoints keep the window open, and the end of the data flushes it once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, checkpoint, layers, losses, rng
from kaun.errors import ResumeMismatch

X = np.random.default_rng(0).normal(size=(22, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(22, 2)).astype(np.float32)


@functools.cache
def made(model="small"):
    with rng.scope(0):
        width = {"small": 2, "large": 100_000}[model]
        net = layers.linear(3, width) >> layers.fn(lambda x: x[:, :2])
        trainer = kaun.Trainer(model=net, optimizer=optax.adam(0.1), accumulate=4)
        return trainer, trainer.init(), Data.batches((X, Y), 2).with_loss(losses.mse)  # 11 items, 3 in the last window


class Killed(Exception):
    pass


def at(step, error):
    def report(now, loss, state):
        if now == step:
            raise error

    return report


def same(a, b):
    is_key = lambda v: jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
    plain = lambda tree: [np.asarray(jax.random.key_data(v) if is_key(v) else v) for v in jax.tree.leaves(tree)]
    return all(p.tobytes() == q.tobytes() for p, q in zip(plain(a), plain(b), strict=True))


@pytest.mark.parametrize("model", ["small", "large"])
def test_a_run_killed_inside_a_window_continues_it(tmp_path, model):
    trainer, state, data = made(model)
    whole = trainer.fit(state, data)
    assert int(whole.opt_state.updates) == 3 and int(whole.step) == 11
    runs = checkpoint.Directory(tmp_path / "run", every=3)
    with pytest.raises(Killed) as caught:
        trainer.fit(state, data, report=at(6, Killed()), checkpoints=runs)
    assert int(caught.value.kaun_state.opt_state.position) == 2, "an exception flushes nothing"
    assert same(trainer.fit(state, data, checkpoints=runs), whole)


def test_a_finished_run_is_returned_flushed_and_can_be_extended(tmp_path):
    trainer, state, data = made()
    runs = checkpoint.Directory(tmp_path / "run", every=3)
    short = trainer.fit(state, data.take(7), checkpoints=runs)
    assert int(short.opt_state.position) == 0 and int(short.opt_state.updates) == 2
    assert same(trainer.fit(state, data.take(7), checkpoints=runs), short)
    assert same(trainer.fit(state, data, checkpoints=runs), trainer.fit(state, data)), "the window was kept open"


@pytest.mark.parametrize("step", [6, 11])
def test_early_stop_flushes_nothing_and_neither_does_opening_it_again(tmp_path, step):
    trainer, state, data = made()
    runs = checkpoint.Directory(tmp_path / "run", every=100)
    stopped = trainer.fit(state, data, report=at(step, kaun.EarlyStop()), checkpoints=runs)
    assert int(stopped.opt_state.position) == step % 4 and int(stopped.opt_state.updates) == step // 4
    assert same(trainer.fit(state, data, report=at(step, kaun.EarlyStop()), checkpoints=runs), stopped)
    assert same(trainer.fit(state, data, report=at(step, kaun.EarlyStop())), stopped)


def test_files_without_a_window_load_where_there_is_none(tmp_path):
    trainer, state, data = made()
    plain = kaun.Trainer(model=trainer.model, optimizer=trainer.optimizer).make_state(state.vars)
    opened = trainer.fit(state, data, report=at(2, kaun.EarlyStop()))
    for like, tree in ((state, opened), (plain, plain)):
        checkpoint.save(tmp_path / "state.safetensors", tree)
        assert same(checkpoint.load(tmp_path / "state.safetensors", like=like), tree)
    with pytest.raises(ValueError, match=r"opt_state\.position"):
        checkpoint.load(tmp_path / "state.safetensors", like=state)


def test_another_penalty_is_another_program(tmp_path):
    _, _, data = made()
    runs = checkpoint.Directory(tmp_path / "run", every=2)

    def run(target):
        with rng.scope(0):
            penalty = lambda params: ((params["weight"] - target) ** 2).sum()
            trainer = kaun.Trainer(model=layers.linear(3, 2), optimizer=optax.sgd(0.1), penalty=penalty)
            return trainer.fit(trainer.init(), data.take(4), checkpoints=runs, report=stop)

    stop = at(3, Killed())
    with pytest.raises(Killed):
        run(jnp.ones((3, 2)))
    stop = None
    with pytest.raises(ResumeMismatch, match=r"the compiled step for .*, penalty, accumulate, average"):
        run(jnp.full((3, 2), 2.0))
    assert int(run(jnp.ones((3, 2))).step) == 4
