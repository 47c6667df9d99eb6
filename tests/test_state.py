"""TrainState: the value that training passes along."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import TrainState, Vars, layers, rng

VARS = Vars(params={"w": jnp.ones(2)}, state={}, dtype=jnp.float32)


def make(**changes):
    fields = {"vars": VARS, "opt_state": (), "step": jnp.int32(3), "key": jnp.uint32(1)}
    return TrainState(**{**fields, **changes})


def test_a_later_state_is_made_once_when_it_is_looked_at():
    made = []
    later = TrainState.later(lambda: made.append(1) or make())
    assert made == []
    assert int(later.step) == 3 and later.vars is VARS and later.opt_state == () and int(later.key) == 1
    assert made == [1]


@pytest.mark.parametrize(
    "touch", [copy.copy, copy.deepcopy, jax.tree.leaves, repr, lambda s: s.replace(step=jnp.int32(4))]
)
def test_everything_that_could_keep_a_later_state_makes_it(touch):
    made = []
    later = TrainState.later(lambda: made.append(1) or make())
    touch(later)
    assert made == [1]


def test_pickling_round_trips():
    state = jax.tree.map(np.asarray, make())
    back = pickle.loads(pickle.dumps(state))
    assert int(back.step) == 3 and back.vars.params["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_of_a_trainers_state_have_its_values_and_its_key(through):
    with rng.scope(0):
        state = kaun.Trainer(model=layers.batch_norm(2), optimizer=optax.adam(0.1)).init()
    again = through(state)
    key = lambda s: s.replace(key=jax.random.key_data(s.key))
    assert jax.tree.all(jax.tree.map(np.array_equal, key(again), key(state)))
    assert again.key.dtype == state.key.dtype


def test_dir_shows_the_fields_and_what_a_user_calls():
    assert dir(make()) == ["key", "opt_state", "replace", "step", "vars"]
    assert all(hasattr(make(), name) for name in dir(make()))


def test_it_cannot_be_changed():
    state = make()
    for name in ("vars", "opt_state", "step", "key", "new"):
        with pytest.raises(AttributeError, match=rf"TrainState is immutable: use state = state.replace\({name}=...\)"):
            setattr(state, name, 1)
    with pytest.raises(AttributeError, match="TrainState has no 'params'; it has vars, opt_state, step and key"):
        state.params  # noqa: B018
