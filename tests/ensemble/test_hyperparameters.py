"""Hyperparameters of members, by name, in the state of ``optax.inject_hyperparams``."""

import jax.numpy as jnp
import optax
import pytest

import kaun
from kaun import averages, layers

inject = optax.inject_hyperparams


def ensemble(optimizer, n=3, **options):
    return kaun.Ensemble(kaun.Trainer(model=layers.linear(2, 1), optimizer=optimizer, **options), n)


def test_hyperparameters_lie_in_the_state_of_each_member():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), inject(optax.sgd)(1e-3, momentum=0.9))
    many = ensemble(optimizer, average=averages.ema(0.9))
    states = many.init(learning_rate=jnp.array([0.1, 0.2, 0.3]), momentum=0.5)
    found = states.opt_state.inner.inner[1].hyperparams
    assert found["learning_rate"].tolist() == jnp.array([0.1, 0.2, 0.3]).tolist()
    assert found["momentum"].tolist() == [0.5] * 3
    assert states.member(2).opt_state.inner[1].hyperparams["learning_rate"] == jnp.float32(0.3)
    assert many.make_state(states.vars, momentum=0.0).opt_state.inner.inner[1].hyperparams["momentum"].sum() == 0


def test_what_cannot_be_set_is_refused():
    with pytest.raises(
        TypeError, match=r"init\(learning_rate=\.\.\.\) sets .* optax\.inject_hyperparams\(optax\.adam\)"
    ):
        ensemble(optax.adam(0.1)).init(learning_rate=0.1)
    many = ensemble(inject(optax.sgd)(0.1, momentum=0.9))
    with pytest.raises(ValueError, match=r"no hyperparameter 'rate'; it has 'learning_rate', 'momentum'\."):
        many.init(rate=jnp.ones(3))
    with pytest.raises(ValueError, match=r"for each of 3 members, an array \[3\], .* received float32\[4\]"):
        many.init(learning_rate=jnp.ones(4))
    for value, received in [("0.1", "str"), (None, "NoneType"), (True, r"bool\[\]")]:
        with pytest.raises(ValueError, match=rf"one number for each of 3 members.*received {received}\. Write"):
            many.init(learning_rate=value)
    with pytest.raises(ValueError, match=r"a schedule sets 'learning_rate' in each step"):
        ensemble(inject(optax.sgd)(optax.linear_schedule(1.0, 0.0, 10))).init(learning_rate=0.1)
    twice = optax.chain(inject(optax.scale)(step_size=1.0), inject(optax.scale)(step_size=-0.1))
    with pytest.raises(ValueError, match=r"2 parts of the optimizer have a hyperparameter 'step_size'"):
        ensemble(twice).init(step_size=jnp.ones(3))
    with pytest.raises(ValueError, match=r"made with learning_rate as an int, and received float32\[3\]"):
        ensemble(inject(optax.sgd)(1)).init(learning_rate=jnp.full(3, 0.1))
