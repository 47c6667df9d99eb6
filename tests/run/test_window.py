"""Runs with ``Trainer(accumulate=k)``: checkpoints keep the window open, and the end of the data flushes it once."""

import functools
import re
import warnings

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


# Steps that learn nothing


@functools.cache
def skipping(rate=0.1, accumulate=3, scale=0.0):
    with rng.scope(0):
        trainer = kaun.Trainer(
            model=layers.linear(3, 2), optimizer=optax.sgd(lambda count: jnp.float32(rate)), accumulate=accumulate,
            on_nonfinite="skip", penalty=lambda params: scale * optax.tree.norm(params["bias"]) if scale else jnp.float32(0),
        )  # fmt: skip
        return trainer, trainer.init()


GOOD = (X[:2], lambda out: losses.mse(out, Y[:2]))
BAD = (X[:2] * np.float32("nan"), GOOD[1])


def said(trainer, state, items, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        end = trainer.fit(state, items, **options)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught], end


@pytest.mark.parametrize(
    ("options", "n", "text"),
    [
        ({"rate": np.nan}, 9, "discarded 3 steps with no update between them, 3 to 9, so .*: the update in 3 of them"),
        ({"scale": 1.0}, 9, "discarded 3 steps with no update between them, 3 to 9, so .*: the gradient in 3 of them"),
        ({"rate": np.nan}, 2, "discarded the update of the last window, so .*: the update in 1 of them"),
        ({"rate": np.nan}, 4, "discarded step 3, and the update of the last window, so .*: the update in 2 of them"),
        ({"rate": np.nan}, 350, "discarded 100 steps with no update between them, 3 to 300, so .*: the update in 100"),
    ],
    ids=["rate", "penalty", "flush", "both", "many"],
)
def test_skip_says_that_no_update_of_a_window_was_made(options, n, text):
    trainer, state = skipping(**options)
    for report in (None, lambda *_: None) if n < 100 else (None,):
        (message,), end = said(trainer, state, [GOOD] * n, report=report)
        assert re.search(text, message) and same(end.vars, state.vars) and int(end.step) == n


def test_skip_says_nothing_of_windows_where_updates_are_made():
    trainer, state = skipping()
    for items in ([BAD, GOOD], [GOOD, BAD, BAD] * 60, [BAD] * 3 + [GOOD], [BAD] * 3 + [GOOD] * 3):
        messages, end = said(trainer, state, items)
        assert not messages and int(end.opt_state.updates) > 0
    messages, end = said(trainer, state, [BAD, GOOD, GOOD], report=at(2, kaun.EarlyStop()))
    assert not messages and int(end.opt_state.items) == 1, "a good item waits"
    messages, _ = said(trainer, state, [BAD] * 4, report=at(4, kaun.EarlyStop()))
    assert re.search("discarded 4 steps in a row, 1 to 4, so .*: the loss in 4 of them", messages[0])
    wide, state = skipping(accumulate=300)
    assert not said(wide, state, [GOOD, BAD] * 140)[0]
