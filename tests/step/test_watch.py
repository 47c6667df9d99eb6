"""What is looked at in an update before it is made. That it is the same in every form of fit: field/test_updates.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kaun import _jax
from kaun._step import watch
from kaun._step.ranges import Proof
from kaun._step.watch import Update, check_names, checks_of, gradient_finite, spoiled_leaves

PARAMS = {"a": jnp.ones(3), "b": [jnp.ones((2, 2), jnp.bfloat16)]}


def tree_of(params, state=(), opt_state=()):
    return {"params": params, "state": state, "opt_state": opt_state}


def test_of_a_gradient_there_are_the_squares_of_each_leaf_in_float32():
    gradient = {"a": jnp.full(3, 2.0), "b": [jnp.full((2, 2), 3, jnp.bfloat16)]}
    before = tree_of(PARAMS)
    found = checks_of(gradient, before, before, jnp.float32)
    assert found.dtype == jnp.float32 and found.tolist() == [12.0, 36.0]


def test_what_an_update_spoils_is_marked_at_the_parameter_that_it_belongs_to():
    spoilt = jnp.array([1.0, jnp.inf, 1.0])
    moments = lambda a: (optax.EmptyState(), {"mu": {"a": a, "b": [jnp.ones((2, 2))]}, "scale": jnp.float32(1)})
    before = tree_of(PARAMS, {"mean": jnp.ones(2)}, moments(jnp.ones(3)))
    of = lambda after: checks_of(PARAMS, before, after, jnp.float32).tolist()
    copied = jax.tree.map(lambda leaf: leaf + 0, before)
    assert of(copied) == [3.0, 4.0, 0.0, 0.0]
    assert of(copied | {"params": PARAMS | {"a": spoilt}}) == [-np.inf, 4.0, 0.0, 0.0]
    assert of(copied | {"opt_state": moments(spoilt)}) == [-np.inf, 4.0, 0.0, 0.0]
    assert of(copied | {"state": {"mean": spoilt[:2]}}) == [3.0, 4.0, 0.0, -np.inf]
    assert len(of(before)) == 4, "of one length for all items, whatever they leave as it is"
    assert check_names(before) == ["params.a", "params.b.0", "opt_state.1.scale", "state.mean"]


def test_a_gradient_that_is_not_finite_is_told_from_an_update_that_is_not():
    before = tree_of(PARAMS)
    after = tree_of(jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS))
    update = checks_of(PARAMS, before, after, jnp.float32)
    gradient = checks_of({**PARAMS, "a": jnp.array([1.0, jnp.nan, 2.0])}, before, after, jnp.float32)
    assert update.tolist() == [-np.inf, -np.inf] and gradient_finite(update)
    assert np.isnan(gradient[0]) and gradient[1] == -np.inf and not gradient_finite(gradient)
    assert np.isnan(jnp.sqrt(update.sum())) and np.isnan(jnp.sqrt(gradient.sum()))


def test_a_large_gradient_that_is_not_finite_is_told_from_an_update_that_is_not():
    gradient, before = {"a": np.ones((64, 64), np.float32)}, tree_of({"a": np.ones((64, 64), np.float32)})
    spoilt = tree_of({"a": np.ones((64, 64), np.float32)})
    spoilt["params"]["a"][3, 5] = np.inf
    of = lambda gradient, after: float(checks_of(gradient, before, after, jnp.float32)[0])
    assert of(gradient, jax.tree.map(np.copy, before)) == 64 * 64 and of(gradient, spoilt) == -np.inf
    for value in (np.inf, -np.inf, np.nan):
        for place in ((3, 5), (3, 6)):
            bad = {"a": gradient["a"].copy()}
            bad["a"][place] = value
            assert not of(bad, spoilt) < np.inf and not of(bad, jax.tree.map(np.copy, before)) < np.inf


def test_leaves_that_an_update_spoils():
    before = [jnp.array([1.0, -jnp.inf]), jnp.array([1.0, -jnp.inf]), jnp.int32(1), jnp.float32(jnp.inf)]
    after = [jnp.array([1.0, jnp.nan]), jnp.array([jnp.nan, -jnp.inf]), jnp.int32(2), jnp.float32(1)]
    assert spoiled_leaves(before, after).tolist() == [False, True, False, False]


def half(factor):
    """An update that halves everything, or makes it nan, with a count in its state."""
    return lambda state: tree_of({"a": PARAMS["a"] * factor(state)}, (), {"count": state["count"] + 1})


@pytest.mark.parametrize("factor", [
    lambda state: jnp.where(state["count"] < 1, 0.5, jnp.nan),
    lambda state: jax.lax.cond(state["count"] < 1, lambda: 0.5, lambda: jnp.nan),
    lambda state: jnp.where(state["count"] < 1, 0.5, jnp.nan) * jnp.sort(PARAMS["a"])[0],
], ids=["twice", "with a condition", "once"])  # fmt: skip
@pytest.mark.parametrize("discards", [False, True])
def test_an_update_is_made_or_discarded(factor, discards):
    def run(count):
        before = tree_of({"a": PARAMS["a"]}, (), {"count": count})
        update = Update(half(factor), before, discards=discards)
        checks = update.checks({"a": PARAMS["a"]}, jnp.float32)
        return checks, update.made(jnp.isfinite(checks.sum()))

    checks, after = jax.jit(run)(0)
    assert checks.tolist() == [3.0] and after["params"]["a"].tolist() == [0.5] * 3 and after["opt_state"]["count"] == 1
    checks, after = jax.jit(run)(1)
    assert checks.tolist() == [-np.inf]
    if discards:
        assert after["params"]["a"].tolist() == [1.0] * 3 and after["opt_state"]["count"] == 1
    else:
        assert np.isnan(after["params"]["a"]).all() and after["opt_state"]["count"] == 2


def test_leaves_of_one_shape_are_looked_at_by_one_program(monkeypatch):
    traced = []
    look = watch._sound_elements
    monkeypatch.setattr(watch, "_sound_elements", lambda *of: traced.append(of[0].shape) or look(*of))
    params = {name: jnp.ones(shape) for name, shape in {"a": 19, "b": (19, 23), "c": 19, "d": (19, 23)}.items()}
    before = tree_of(params, params, (params, params))
    after = jax.tree.map(lambda leaf: leaf + 1, before)
    program = jax.make_jaxpr(lambda after: checks_of(params, before, after, jnp.float32))(after)
    assert traced == [(19,)] * 4 + [(19, 23)] * 4, "of a parameter, a layer's state and two moments"
    assert sum(equation.primitive.name == "jit" for equation in program.eqns) >= 4


def test_leaves_of_one_shape_and_bounds_are_marked_by_one_program():
    names = ["a", "b", "c"]
    before = tree_of({name: jnp.ones(5) for name in names}, (), {name: jnp.ones(5) for name in names})
    proof = Proof(9, ((0.0, 2.0),) * 6)  # the optimizer's state, then the parameters
    program = jax.make_jaxpr(lambda after: watch._marks(before["params"], before, after, proof, jnp.float32))(before)
    found = [equation.params["jaxpr"] for equation in program.eqns if equation.params.get("name") == "_mark"]
    assert len(found) == 3 and len(set(map(id, found))) == 1


def test_an_update_that_is_made_twice_is_one_program_and_traced_once():
    calls = []

    def function(state):
        calls.append(state)
        return tree_of({"a": PARAMS["a"] * 0.5}, (), {"count": state["count"] + 1})

    def step(count):
        update = Update(function, tree_of({"a": PARAMS["a"]}, (), {"count": count}), discards=True)
        return update.made(jnp.isfinite(update.checks({"a": PARAMS["a"]}, jnp.float32).sum()))

    program = jax.make_jaxpr(step)(0)
    operations = [equation for part in _jax.programs_in(program) for equation in getattr(part, "jaxpr", part).eqns]
    made = [id(equation.params["jaxpr"]) for equation in operations if equation.params.get("name") == "run"]
    assert len(calls) == 1 and len(made) == 2 and len(set(made)) == 1


def test_a_large_leaf_is_looked_at_in_one_pass_and_stored_once():
    def of(weight, slope):
        slope = jnp.tanh(slope)
        update = [tree_of({"weight": each}) for each in (weight, weight - 0.1 * slope)]
        return checks_of({"weight": slope}, *update, jnp.float32)

    arrays = [jnp.ones((256, 128))] * 2
    text = jax.jit(of).lower(*arrays).compile().as_text()
    made = [line for line in text[text.index("\nENTRY") :].splitlines() if "= f32[256,128]" in line]
    assert sum("parameter(" not in line for line in made) <= 1
