"""Every optimizer of optax that fits a plain tree of parameters trains, and keeps its state's dtypes."""

import inspect
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import layers, losses, rng
from kaun._step import optimizer

NAMES = [
    "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "adan", "amsgrad", "fromage", "lamb",
    "lars", "lbfgs", "lion", "nadam", "novograd", "optimistic_gradient_descent", "polyak_sgd", "radam",
    "rmsprop", "rprop", "sgd", "sign_sgd", "sm3", "yogi",
]  # fmt: skip


def build(name):
    make = getattr(optax, name)
    needs = inspect.signature(make).parameters
    rate = needs.get("learning_rate")
    return make(0.01) if rate is not None and rate.default is inspect.Parameter.empty else make()


# The short form has one of each kind of state and argument: moments, factors, extra arguments, none.
SHORT = {
    "adadelta",
    "adafactor",
    "adam",
    "adamw",
    "lamb",
    "lbfgs",
    "lion",
    "novograd",
    "polyak_sgd",
    "rprop",
    "sgd",
    "sm3",
}
HALF = ["adafactor", "adam", "adamw", "lamb", "nadam", "novograd", "radam", "sm3"]


SHORT_HALF = ["adafactor", "adamw", "sm3"]  # with and without states of other shapes than the parameters


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(pytest.param(n, jnp.float32, marks=[] if n in SHORT else pytest.mark.slow) for n in NAMES),
        *(pytest.param(n, jnp.bfloat16, marks=[] if n in SHORT_HALF else pytest.mark.slow) for n in HALF),
    ],
    ids=str,
)
def test_two_steps_of_optaxs_optimizers(name, dtype):
    """The second step would show a state that changed its dtypes or weak types: it would compile again."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    trainer = kaun.Trainer(model=layers.linear(3, 2, bias=False), optimizer=build(name))
    with rng.scope(0):
        state = trainer.init(dtype=dtype)
    x, y = jnp.ones((4, 3), dtype), jnp.zeros((4, 2), dtype)
    loss = lambda out: losses.mse(out, y)
    _, state = trainer.step(state, x, loss=loss)
    value, state = trainer.step(state, x, loss=loss)
    assert np.isfinite(float(value)) and len(trainer.compilations) == 1
    assert {a.dtype for a in jax.tree.leaves(state.vars.params)} == {jnp.dtype(dtype)}


def test_extra_arguments_go_to_those_that_take_them():
    seen = {}

    def update(gradient, state, params=None, **extra):
        seen.update(extra)
        return gradient, state

    takes = optax.GradientTransformationExtraArgs(lambda p: (), update)
    plain = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (g, s))
    params = {"w": jnp.ones(2)}
    value_fn = lambda p: p["w"].sum()
    for o in (takes, plain):
        after, _ = optimizer.apply_update(o, params, (), params, jnp.float32(3), value_fn)
        assert after["w"].tolist() == [2.0, 2.0]
    assert seen["value"] == 3.0 and seen["grad"] is params
    wide = {"w": np.ones(2, np.float64) * 2}
    assert seen["value_fn"](wide) == seen["obj_fn"](wide) == value_fn(wide)
    assert seen["grad_fn"](params, 0)["w"].tolist() == [1.0, 1.0]


def test_extra_arguments_without_a_double_star_go_by_name():
    seen = {}

    def update(grad, state, params=None, obj_fn=None, *, value, other=4):
        seen.update(value=value, obj_fn=obj_fn, other=other)
        return grad, state

    params = {"w": jnp.ones(2)}
    named = optax.GradientTransformation(lambda p: (), update)
    optimizer.apply_update(named, params, (), params, jnp.float32(3), lambda p: p["w"].sum())
    assert seen["value"] == 3.0 and seen["obj_fn"](params) == 2.0 and seen["other"] == 4
