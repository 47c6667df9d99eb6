"""``Trainer(penalty=f)``: added to the loss of a step once, with the values that it captured when the trainer was made."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import layers, losses, metrics, rng
from kaun.errors import CaptureError, NonFiniteLoss

G = np.random.default_rng(0)
X, Y = G.normal(size=(4, 3)).astype(np.float32), G.normal(size=(4, 2)).astype(np.float32)
OLD, FISHER = ({"weight": jnp.asarray(G.normal(size=(3, 2)), jnp.float32), "bias": jnp.full(2, i)} for i in (0.5, 2.0))


def mse(out):
    return losses.mse(out, Y)


@functools.cache
def made(penalty=None, optimizer=None, **options):
    with rng.scope(0):
        optimizer = optimizer or optax.sgd(0.1)
        trainer = kaun.Trainer(model=layers.linear(3, 2), optimizer=optimizer, penalty=penalty, **options)
        return trainer, trainer.init()


def squares(params):
    return 0.05 * optax.tree.norm(params, squared=True)


def absolute(params):
    return jnp.abs(params["weight"]).sum()


def ewc(params):
    return sum(jax.tree.leaves(jax.tree.map(lambda f, p, o: (f * (p - o) ** 2).sum(), FISHER, params, OLD)))


SLOPES = {
    squares: lambda params: jax.tree.map(lambda p: 0.1 * p, params),
    absolute: lambda params: {"weight": np.sign(params["weight"]), "bias": np.zeros(2)},
    ewc: lambda params: jax.tree.map(lambda f, p, o: 2 * f * (p - o), FISHER, params, OLD),
}


def close(a, b, **options):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, **{"rtol": 1e-5, "atol": 1e-6, **options}), a, b)


@functools.cache
def plain():
    """The state without a penalty after a step, the update, and the loss."""
    trainer, state = made()
    value, after = trainer.step(state, X, loss=mse)
    return state, jax.tree.map(lambda a, b: b - a, state.vars.params, after.vars.params), float(value)


# Each penalty in one of the two forms; the other pairs are in the long form.
FORMS = {"each": {}, "accumulated": {"accumulate": 2}}
SHORT = {(squares, "each"), (absolute, "accumulated"), (ewc, "each")}
PAIRS = [
    pytest.param(*pair, id=f"{pair[0].__name__}-{pair[1]}", marks=[] if pair in SHORT else pytest.mark.slow)
    for pair in itertools.product(SLOPES, FORMS)
]


@pytest.mark.parametrize(("penalty", "form"), PAIRS)
def test_its_gradient_is_added_once_for_an_update(penalty, form, blocks):
    options = FORMS[form]
    trainer, state = made(penalty, **options)
    _, update, loss = plain()
    end = trainer.fit(state, [(X, mse)] * options.get("accumulate", 1), report=blocks)
    expected = jax.tree.map(
        lambda p, u, g: p + u - 0.1 * g, state.vars.params, update, SLOPES[penalty](state.vars.params)
    )
    close(end.vars.params, expected)
    value = float(penalty(state.vars.params))
    np.testing.assert_allclose(blocks.values["penalty"], value, rtol=1e-6)
    np.testing.assert_allclose(blocks.values["loss"], loss + value, rtol=1e-6)


def test_l2_is_the_weight_decay_of_optax():
    trainer, state = made(squares)
    other, same = made(optimizer=optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)))
    for _ in range(3):
        _, state = trainer.step(state, X, loss=mse)
        _, same = other.step(same, X, loss=mse)
    close(state.vars.params, same.vars.params)


def test_it_trains_beside_a_loss_without_a_gradient():
    trainer, state = made(squares)
    _, after = trainer.step(state, X, loss=lambda out: (out > 0).mean(dtype=jnp.float32))
    for path, slope in SLOPES[squares](state.vars.params).items():
        expected = np.asarray(state.vars.params[path]) - 0.1 * np.asarray(slope)
        np.testing.assert_allclose(after.vars.params[path], expected, rtol=1e-6, atol=0)


def test_it_is_not_part_of_an_evaluation():
    trainer, state = made(absolute)
    found = trainer.evaluate(state, [(X, Y)], {"loss": losses.mse, "error": metrics.mean_absolute_error})
    np.testing.assert_allclose(found["loss"], plain()[2], rtol=1e-6)


def test_a_window_of_weight_0_has_the_penalty_alone():
    trainer, state = made(ewc, accumulate=2)
    masked = (X, lambda out: losses.mse.parts(out, Y, where=jnp.zeros(4, bool)))
    end = trainer.fit(state, [masked] * 2)
    close(end.vars.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.vars.params, SLOPES[ewc](state.vars.params)))


def test_frozen_parameters_are_seen_and_not_trained(blocks):
    trainer, state = made(absolute, trainable=lambda path: path == "bias", precision="mixed_bfloat16")
    end = trainer.fit(state, [(X, mse)], report=blocks)
    np.testing.assert_allclose(blocks.values["penalty"], absolute(state.vars.params), rtol=1e-6)
    np.testing.assert_array_equal(end.vars.params["weight"], state.vars.params["weight"])


def test_the_loss_as_a_function_of_the_parameters_has_it():
    def update(gradient, opt_state, params, *, value, value_fn):
        return jax.tree.map(lambda p: jnp.full_like(p, value_fn(params) - value), params), opt_state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    trainer, state = made(absolute, optimizer)
    close(trainer.step(state, X, loss=mse)[1].vars.params, state.vars.params)


def test_the_loss_scale_scales_it_too():
    """In float16 a slope of 3 times the first scale is more than the largest number, which halves the scale."""
    precision = "params=float16,compute=float16,output=float32"
    trainer, state = made(lambda params: 3 * params["bias"].sum(), precision=precision)
    _, after = trainer.step(state, X, loss=lambda out: 0.0 * out.sum())
    assert float(after.opt_state.scale) == 2.0**14 and not after.vars.params["bias"].any()
    _, after = trainer.step(after, X, loss=lambda out: 0.0 * out.sum())
    close(after.vars.params["bias"], np.full(2, -0.3), rtol=1e-3)


def test_a_penalty_draws_numbers_of_its_own(blocks):
    """And the layers draw the same ones with it and without it."""
    drawn = lambda params: jax.random.uniform(rng.next_key(), ())
    noisy = lambda out: mse(out + jax.random.normal(rng.next_key(), out.shape))
    (trainer, state), (other, _) = made(drawn, accumulate=2), made()
    trainer.fit(state, [(X, noisy)] * 3, report=blocks)
    assert len(set(blocks.values["penalty"])) == 3
    without = blocks.values["loss"][0] - blocks.values["penalty"][0]
    np.testing.assert_allclose(
        other.step(other.make_state(state.vars).replace(key=state.key), X, loss=noisy)[0], without, rtol=1e-5
    )


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_penalty_whose_gradient_is_not_finite_is_named_as_gradient(accumulate):
    trainer, state = made(lambda p: optax.tree.norm(p["bias"]), accumulate=accumulate)
    with pytest.raises(
        NonFiniteLoss, match=r"gradient is not finite for 'bias' \(1 of 2 .* and at the penalty"
    ) as caught:
        trainer.fit(state, [(X, mse)] * 2)
    assert (caught.value.parameters, caught.value.leaves, caught.value.step) == (("bias",), (), accumulate)
    found = kaun.explain(trainer, caught.value)
    assert found.part == "gradient" and "its gradient is not finite for 'bias'." in found.text
    if accumulate == 2:
        with pytest.raises(
            NonFiniteLoss, match=r"gradient of the penalty is not finite for 'bias' in .* flush"
        ) as caught:
            trainer.fit(state, [(X, mse)])
        assert caught.value.parameters == ("bias",) and "Loss" not in str(caught.value)


# What it may be, and what it captures


@pytest.mark.parametrize("value", [0.1, "l2"])
def test_it_must_be_a_function(value):
    with pytest.raises(TypeError, match=r"Trainer\(penalty=\.\.\.\) expected a function \(params\) -> scalar"):
        made(value)


@pytest.mark.parametrize(
    ("penalty", "error", "text"),
    [
        (lambda params: params["weight"], ValueError, r"must return a real floating scalar, received float32\[3, 2\]"),
        (lambda params: 0.1, TypeError, "it is not computed from the parameters by JAX"),
        (lambda params: params["weight"].argmax(), TypeError, "it has no gradient"),
        (lambda params: None, TypeError, "it has no return statement"),
    ],
)
def test_it_must_return_a_scalar(penalty, error, text):
    trainer, state = made(penalty)
    with pytest.raises(error, match=rf"penalty `<lambda>` \(test_penalty\.py:\d+\).*{text}"):
        trainer.step(state, X, loss=mse)


def test_it_must_not_write():
    seen = []

    def penalty(params):
        seen.append(params)
        return jnp.abs(params["weight"]).sum()

    trainer, state = made(penalty)
    with pytest.raises(CaptureError, match=r"penalty `.*penalty` .* writes to a list, dict or object"):
        trainer.step(state, X, loss=mse)


def test_what_cannot_be_captured_is_refused_when_the_trainer_is_made():
    generator = iter([1.0])
    with pytest.raises(CaptureError, match=r"Trainer\(penalty=\.\.\.\): loss .*captures `generator`"):
        made(lambda params: next(generator) * params["bias"].sum())


def test_values_that_changed_since_are_refused():
    strength, center, config = 0.1, np.zeros(2, np.float32), {"power": 2}

    def penalty(params):
        return strength * (jnp.abs(params["bias"] - center) ** config["power"]).sum()

    trainer, state = made(penalty, accumulate=2)
    item = (X, mse)
    fix = "which changed after the trainer was made.*dataclasses.replace(trainer, penalty=f)"
    entries = (
        lambda: trainer.step(state, X, loss=mse),
        lambda: trainer.fit(state, [item]),
        lambda: trainer.flush(opened),
    )
    opened = trainer.step(state, X, loss=mse)[1]
    changes = [("center", lambda: center.__setitem__(0, 1.0), lambda: center.__setitem__(0, 0.0))]

    def other_strength(value):
        nonlocal strength
        strength = value

    changes += [("strength", lambda: other_strength(0.2), lambda: other_strength(0.1))]
    changes += [("config['power']", lambda: config.update(power=4), lambda: config.update(power=2))]
    for name, change, undo in changes:
        change()
        for run in entries:
            pattern = ".*".join(map(re.escape, fix.split(".*")))
            with pytest.raises(CaptureError, match=rf"penalty `.*penalty`.* captures `{re.escape(name)}`, {pattern}"):
                run()
        undo()
    center = center.copy()  # another array of the same values
    for run in entries:
        run()


def test_the_name_is_reserved():
    trainer, state = made()
    with pytest.raises(TypeError, match="'penalty': the name is kaun's own"):
        trainer.step(state, X, loss=lambda out: (mse(out), {"penalty": out.sum()}))
