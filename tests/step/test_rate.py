"""The learning rate that is found in an optimizer's closures: the right one, or none."""

import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kaun import Data, Trainer, layers, reports, rng
from kaun._step import find_rate

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 30)
MASK = lambda params: False
OWN = optax.GradientTransformation(lambda params: (), lambda updates, state, params=None: (updates, state))

KNOWN = [
    "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad", "lamb",
    "lars", "lion", "nadam", "nadamw", "novograd", "radam", "rmsprop", "sgd", "sign_sgd", "signum", "yogi",
    lambda rate: optax.sgd(rate, momentum=0.9),
    lambda rate: optax.adamw(rate, mask=MASK),
    lambda rate: optax.adafactor(rate, momentum=0.9, weight_decay_rate=0.1),
    lambda rate: optax.noisy_sgd(rate, key=0),
    lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.chain(optax.zero_nans(), optax.adam(rate))),
    lambda rate: optax.named_chain(("clip", optax.clip(1.0)), ("adam", optax.adam(rate))),
    lambda rate: optax.with_extra_args_support(optax.scale_by_learning_rate(rate)),
]  # fmt: skip

UNKNOWN = {
    "a rate inside a transformation": lambda rate: optax.rprop(0.1),
    "another factor beside the rate": lambda rate: optax.fromage(rate),
    "a rate that depends on the loss": lambda rate: optax.polyak_sgd(),
    "a line search": lambda rate: optax.lbfgs(),
    "no rate": lambda rate: optax.adafactor(),
    "a sign alone": lambda rate: optax.chain(optax.scale_by_adam(), optax.scale(-1.0)),
    "two rates": lambda rate: optax.chain(optax.adam(rate), optax.adam(rate)),
    "a factor before": lambda rate: optax.chain(optax.scale(0.5), optax.adam(rate)),
    "a factor after": lambda rate: optax.chain(optax.adam(rate), optax.scale(0.5)),
    "uphill": lambda rate: optax.scale_by_learning_rate(rate, flip_sign=False),
    "clipped after": lambda rate: optax.chain(optax.adam(rate), optax.clip(0.1)),
    "groups": lambda rate: optax.partition({"a": optax.adam(rate), "b": optax.sgd(rate)}, lambda params: "a"),
    "a part": lambda rate: optax.masked(optax.adam(rate), MASK),
    "one's own schedule": lambda rate: optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda count: -0.1)),
    "one's own transformation": lambda rate: optax.chain(OWN, optax.adam(rate)),
    "one's own object": lambda rate: types.SimpleNamespace(init=optax.adam(rate).init, update=lambda g, s, p: (g, s)),
    "an array of rates": lambda rate: optax.scale(-jnp.ones(3)),
    "schedule-free": lambda rate: optax.contrib.schedule_free_adamw(0.1),
    "muon": lambda rate: optax.contrib.muon(rate),
    "injected": lambda rate: optax.inject_hyperparams(optax.adam)(0.1),
    "other names in optax's closures": lambda rate: renamed(optax.adam(rate)),
}


def renamed(optimizer):
    update = optimizer.update
    code = update.__code__.replace(co_freevars=tuple(f"{name}_" for name in update.__code__.co_freevars))
    other = types.FunctionType(code, update.__globals__, closure=update.__closure__)
    other.__qualname__ = update.__qualname__
    return optax.GradientTransformation(optimizer.init, other)


@pytest.mark.parametrize(
    "make", KNOWN, ids=[make if isinstance(make, str) else f"made {i}" for i, make in enumerate(KNOWN)]
)
def test_the_rate_of_optaxs_optimizers(make):
    make = getattr(optax, make) if isinstance(make, str) else make
    assert find_rate(make(0.01)) == (None, 0.01, False) and find_rate(make(0.01)).fixed == 0.01
    assert find_rate(make(jnp.float32(0.5))) == (None, 0.5, False)
    found = find_rate(make(SCHEDULE))
    assert found.schedule is SCHEDULE and found.fixed is None


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_rate_where_it_is_not_certain(name):
    assert [find_rate(UNKNOWN[name](rate)) for rate in (0.1, SCHEDULE)] == [None, None]


def rates_of(optimizer, losses, **more):
    """The rates in blocks, and by how much each step of gradient 1 lowered the only weight."""
    with rng.scope(0):
        trainer = Trainer(model=layers.linear(1, 1, bias=False), optimizer=optimizer, **more)
        state = trainer.init()
    found, weights = [], [float(state.vars.params["weight"][0, 0])]

    class Rates(reports.Report):
        def block(self, first_step, values):
            found.extend(values["learning_rate"].tolist() if "learning_rate" in values else [None])
            assert values.get("learning_rate", np.zeros(1, np.float32)).dtype == np.float32

    keep = lambda step, loss, state: weights.append(float(state.vars.params["weight"][0, 0]))
    trainer.fit(
        state, Data.from_items([(jnp.ones((1, 1)), loss) for loss in losses]), report=reports.all_of(Rates(), keep)
    )
    return found, -np.diff(weights)


UP = lambda out: out.sum()
BAD = lambda out: out.sum() * jnp.nan


def by_hand(counts):
    with np.errstate(all="ignore"):
        return np.array([float(SCHEDULE(count)) for count in counts])


def test_a_schedule_counts_updates():
    found, moved = rates_of(optax.sgd(SCHEDULE), [UP, UP, BAD, UP, UP], on_nonfinite="skip")
    assert np.isnan(found[2]) and moved[2] == 0
    np.testing.assert_allclose(np.delete(found, 2), by_hand(range(4)), rtol=1e-6)
    np.testing.assert_allclose(np.delete(moved, 2), by_hand(range(4)), rtol=1e-4)


def test_multi_steps_have_a_rate_where_they_update():
    found, moved = rates_of(optax.MultiSteps(optax.sgd(SCHEDULE), 2), [UP] * 6)
    assert [bool(np.isnan(rate)) for rate in found] == [True, False] * 3
    np.testing.assert_allclose(found[1::2], by_hand(range(3)), rtol=1e-6)
    np.testing.assert_allclose(moved[1::2], by_hand(range(3)), rtol=1e-4)


def test_a_constant_rate_costs_the_step_nothing():
    found, moved = rates_of(optax.sgd(0.25), [UP, UP, BAD, UP], on_nonfinite="skip")
    np.testing.assert_equal(found, [0.25, 0.25, np.nan, 0.25])
    np.testing.assert_allclose(moved, [0.25, 0.25, 0, 0.25], rtol=1e-5)


def test_reduce_on_plateau_scales_a_constant_rate():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    found, moved = rates_of(optax.chain(optax.sgd(0.25), plateau), [lambda out: out.sum() * 0 + 1.0] * 3 + [UP] * 3)
    assert found[0] == 0.25 and found[-1] < 0.25
    np.testing.assert_allclose(moved[3:], found[3:], rtol=1e-5)


def test_nothing_is_reported_where_it_is_unknown():
    assert rates_of(optax.chain(optax.sgd(0.25), optax.scale(0.5)), [UP])[0] == [None]
