"""Members that end before the others: those that ``stop=`` stops, and those whose step is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, rng

X = jnp.array([[1.0], [2.0], [-1.0]])
LOSS = lambda out: losses.mse(out, 3 * X)
DATA = Data.repeat(40, (X, LOSS))
RATES = jnp.array([0.2, 0.05, 0.01, 0.001])
LEAST = 0.05


def made(n=4, **options):
    optimizer = optax.inject_hyperparams(optax.sgd)(0.1)
    trainer = kaun.Trainer(model=layers.linear(1, 1), optimizer=optimizer, **options)
    return kaun.Ensemble(trainer, n)


MANY = made()
with rng.scope(0):
    START = MANY.make_state(MANY.trainer.init().vars, learning_rate=RATES)
BELOW = lambda loss: loss < LEAST


def host(tree):
    data = lambda leaf: np.asarray(jax.random.key_data(leaf) if kaun.tree.is_key(leaf) else leaf).tobytes()
    return [data(leaf) for leaf in jax.tree.leaves(tree)]


def steps_alone(state):
    """How many steps the trainer makes with this state until the loss is below the least, at most 40."""
    for k in range(40):
        loss, after = MANY.trainer.step(state, X, loss=LOSS)
        if loss < LEAST:
            return k, state
        state = after
    return 40, state


def test_stop_keeps_a_member_as_it_was_when_its_loss_was_low():
    end = MANY.fit(START, DATA, stop=BELOW)
    for i in range(4):
        steps, state = steps_alone(START.member(i))
        assert end.member(i).step == steps
        np.testing.assert_allclose(end.member(i).vars.params["weight"], state.vars.params["weight"], rtol=1e-6)
    assert end.opt_state.stopped.tolist() == [True, True, False, False]
    state = START
    for _ in range(40):
        values, state = MANY.step(state, X, loss=LOSS, stop=BELOW)
    assert host(state) == host(end) and values.shape == (4,)
    # A later fit with stop= keeps what is stopped, and one without trains it again.
    again = MANY.fit(end, DATA, stop=BELOW)
    assert host(again.member(0)) == host(end.member(0)) and again.step.tolist()[3] == 80
    after = MANY.fit(end, DATA)
    assert after.step.tolist() == [s + 40 for s in end.step.tolist()] and not after.opt_state.stopped.any()
    assert "step=7 to 40" in repr(end) or repr(end).startswith("TrainState(4 members, step=")


def test_a_member_that_is_not_finite_stops_alone():
    with rng.scope(0):
        start = MANY.make_state(START.member(0).vars, learning_rate=RATES.at[1].set(1e30))
    end = MANY.fit(start, DATA)
    assert end.opt_state.nonfinite.tolist() == [False, True, False, False]
    assert end.step.tolist() == [40, 1, 40, 40]
    assert np.isfinite(end.vars.params["weight"]).all()
    expected = MANY.fit(START, DATA)
    for i in (0, 2, 3):
        assert host(end.member(i).vars) == host(expected.member(i).vars)  # bit for bit, whatever the other does
    values, after = MANY.step(end, X, loss=LOSS)
    assert after.step.tolist() == [41, 1, 41, 41]
    assert np.isfinite(values).tolist() == [True, False, True, True]  # the loss of the state that it keeps


def test_fit_ends_when_no_member_is_left():
    bad = Data.concat(Data.repeat(3, (X, LOSS)), Data.repeat(2, (X * jnp.nan, LOSS)))
    with pytest.raises(
        kaun.NonFiniteLoss, match=r"No member of the ensemble is finite any more\. At step 4 the last"
    ) as e:
        MANY.fit(START, bad)
    error = e.value
    assert error.step == 4 and np.isnan(error.loss) and error.kaun_state.step.tolist() == [3] * 4
    assert host(error.kaun_state.vars) == host(MANY.fit(START, Data.repeat(3, (X, LOSS))).vars)
    assert "x" in str(kaun.explain(MANY.trainer, error))
    # Where another member was stopped, the fit goes to its end.
    end = MANY.fit(START, Data.concat(DATA, bad), stop=BELOW)
    assert end.opt_state.nonfinite.tolist() == [False, False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["skip", "ignore"])
def test_other_modes_hold_for_each_member(mode):
    many = made(2, on_nonfinite=mode)
    x = jnp.stack([X, X.at[0].set(jnp.nan)])
    y = jnp.stack([3 * X] * 2)
    loss = lambda out: losses.mse(out, y)
    start = many.make_state(START.member(0).vars)
    _, after = many.step(start, x, loss=loss, per_member=True)
    end = many.fit(after, Data.repeat(2, (X, LOSS)))
    _, one = many.trainer.step(start.member(1), x[1], loss=LOSS)
    assert end.step.tolist() == [3, 3] and one.step == 1
    assert host(after.member(1)) == host(one)
    assert np.isfinite(end.vars.params["weight"]).all() == (mode == "skip")


def test_what_stop_may_be():
    with pytest.raises(TypeError, match=r"stop expected a function of a member's loss, received float"):
        MANY.fit(START, DATA, stop=0.05)
    with pytest.raises(TypeError, match=r"stop `<lambda>` \(test_stop\.py:\d+\) must return whether a member stops"):
        MANY.fit(START, DATA, stop=lambda loss: loss)
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        MANY.step(START, X, loss=LOSS, stop=lambda loss: loss > 0 and loss < 1)
    assert "(loss > 0) & (loss < 0.05)" in "".join(error.value.__notes__)


@pytest.mark.slow
def test_the_error_for_the_last_member_names_what_refuses_its_labels():
    trainer = kaun.Trainer(model=layers.linear(1, 2), optimizer=optax.sgd(0.1))
    many = kaun.Ensemble(trainer, 2)
    labels = jnp.array([[0, 1, 0], [0, 5, 0]])
    x = jnp.stack([X.at[0].set(jnp.nan), X])
    data = Data.from_items([(x, lambda out: losses.cross_entropy_sparse(out, labels))])
    states = many.init()
    with pytest.raises(kaun.NonFiniteLoss, match=r"At step 1 the last one, member 0, had the loss nan") as error:
        many.fit(states, data, per_member=True)
    assert "kaun.explain(trainer, err)" in str(error.value) and error.value.kaun_state.step.tolist() == [0, 0]
    y = labels[1:].repeat(2, axis=0)
    with pytest.raises(kaun.NonFiniteLoss, match=r"Run outside of the compiled step, it is refused: .*indices"):
        many.fit(states, [(x[1:].repeat(2, axis=0), lambda out: losses.cross_entropy_sparse(out, y))], per_member=True)
