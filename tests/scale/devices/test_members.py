"""The members of an ensemble spread over eight devices: no collectives, and the numbers of one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, reports, rng, sharding

G = np.random.default_rng(0)
X = G.normal(size=(10, 3)).astype(np.float32)
Y = G.normal(size=(10, 2)).astype(np.float32)
TRAIN = Data.batches((X, Y), 4).with_loss(losses.mse)
N = 16
BELOW = lambda loss: loss < 0.9


def made(where, **options):
    model = layers.linear(3, 4) >> layers.dropout(0.2) >> layers.linear(4, 2)
    trainer = kaun.Trainer(model=model, optimizer=optax.inject_hyperparams(optax.adam)(0.1), **options)
    many = kaun.Ensemble(trainer, N, sharding=where)
    with rng.scope(0):
        return many, many.init(learning_rate=jnp.geomspace(1e-3, 1e-1, N))


def host(tree):
    return [np.asarray(jax.random.key_data(a) if kaun.tree.is_key(a) else a) for a in jax.tree.leaves(tree)]


@pytest.fixture
def programs(monkeypatch):
    """The compiled text of every program of an ensemble."""
    from kaun._engine import ProgramCache

    texts, compile = [], ProgramCache.compile

    def keep(self, program, entry, inputs, training, arguments, traced=None):
        texts.append(program.jitted.lower(*arguments).compile())
        return compile(self, program, entry, inputs, training, arguments, traced)

    monkeypatch.setattr(ProgramCache, "compile", keep)
    return texts


def test_members_are_spread_without_collectives(programs):
    many, start = made(sharding.members())
    one, alone = made(None)
    for a, b in zip(host(start), host(alone), strict=True):
        assert np.array_equal(a, b)  # the bytes of an ensemble on one device
    spread, single = reports.history(), reports.history()
    end = many.fit(start, TRAIN.epochs(3), stop=BELOW, report=spread)
    state = start
    for x, loss in TRAIN.epochs(3):
        values, state = many.step(state, x, loss=loss, stop=BELOW)
    outputs = many.predict(end, X)
    y = np.stack([Y] * N)
    after = many.fit(end, [(np.stack([X] * N), lambda out: losses.mse(out, y))], per_member=True)
    scores = many.evaluate(end, Data.batches((X, Y), 5), {"mse": losses.mse})
    assert len(programs) >= 7
    for program in programs:
        assert not re.search(r"(all-|collective-|reduce-scatter)[a-z-]*\(", program.as_text())
    for leaf in (*jax.tree.leaves((end.vars, end.opt_state, end.step)), *jax.tree.leaves(after.vars), values, outputs):
        assert leaf.sharding.spec == jax.sharding.PartitionSpec("data") and len(leaf.devices()) == 8
    for a, b in zip(host(end), host(state), strict=True):
        assert np.array_equal(a, b)
    expected = one.fit(alone, TRAIN.epochs(3), stop=BELOW, report=single)
    for a, b in zip(host(end), host(expected), strict=True):
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(spread.losses, single.losses, rtol=1e-6)
    np.testing.assert_allclose(spread.member_losses, single.member_losses, rtol=1e-5)
    np.testing.assert_allclose(
        scores["mse"], one.evaluate(expected, Data.batches((X, Y), 5), {"mse": losses.mse})["mse"], rtol=1e-6
    )
    assert repr(end.member(3)) == "TrainState(step=9, 26 parameters in float32)" or end.step[3] < 9


def test_a_member_lies_where_a_state_of_its_trainer_does():
    _, start = made(sharding.members())
    member = made(None)[1].member(3)
    for mine, fresh in zip(jax.tree.leaves(start.member(3)), jax.tree.leaves(member), strict=True):
        assert mine.sharding == fresh.sharding and mine.committed == fresh.committed and mine.dtype == fresh.dtype
    assert all(map(np.array_equal, host(start.member(3)), host(member)))


def test_what_cannot_be_spread_is_refused():
    trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
    with pytest.raises(
        ValueError, match=r"a multiple of 8 members, .* received 12\. Write Ensemble\(trainer, 16, \.\.\.\)"
    ):
        kaun.Ensemble(trainer, 12, sharding=sharding.members())
    with pytest.raises(TypeError, match=r"expected what sharding\.members\(\) returns, received Sharding"):
        kaun.Ensemble(trainer, 8, sharding=sharding.data_parallel())
    with pytest.raises(ValueError, match=r"Trainer\(sharding=sharding\.members\(\)\): a trainer has one model"):
        kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1), sharding=sharding.members())
    spread = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1), sharding=sharding.data_parallel())
    with pytest.raises(ValueError, match=r"cannot use Trainer\(sharding=\.\.\.\).*sharding=sharding\.members\(\)"):
        kaun.Ensemble(spread, 8)
    mesh = sharding.mesh(data=2, model=4)
    with pytest.raises(ValueError, match=r"which of them the members are spread over was not given"):
        sharding.members(mesh)
    where = sharding.members(mesh, axis="data")
    states = kaun.Ensemble(trainer, 2, sharding=where).init()
    assert states.vars.params["weight"].sharding.spec == jax.sharding.PartitionSpec("data")
