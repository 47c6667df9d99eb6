"""Optimizers that evaluate other parameters than they train at: predict and evaluate used the wrong ones in silence."""

import textwrap

import jax
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, averages, layers, losses, reports, rng

X = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 1)).astype(np.float32)
DATA = Data.repeat(3, (X, lambda output: losses.mse(output, Y)))


def free(rate=0.1):
    return optax.contrib.schedule_free_sgd(rate)


def sam(**options):
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.3))
    return optax.contrib.sam(optax.sgd(0.1), ascent, **options)


def parts(left, right):
    labels = {side: {"weight": side, "bias": side} for side in ("left", "right")}
    return optax.multi_transform({"left": left, "right": right}, labels)


def trained(optimizer, data=DATA, **options):
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optimizer, **options)
        state = trainer.init()
    return trainer, trainer.fit(state, data)


# What holds the state, and where in the optimizer's state z is.
FREE = {
    "chain": (optax.chain(optax.clip(1.0), free()), {}, lambda s: s[1].z),
    "MultiSteps": (optax.MultiSteps(free(), 2), {}, lambda s: s.inner_opt_state.z),
    "injected": (optax.inject_hyperparams(optax.contrib.schedule_free_sgd)(0.1), {}, lambda s: s.inner_state.z),
    "inside SAM": (optax.contrib.sam(free(), optax.sgd(0.1), opaque_mode=True), {}, lambda s: s.opt_state.z),
    "scaled": (free(), {"precision": "mixed_float16"}, lambda s: s.inner.z),
    "frozen": (free(), {"trainable": lambda path: path.startswith("right.")}, lambda s: s.z),
    "two": (
        parts(free(), free()),
        {},
        lambda s: {side: s.inner_states[side].inner_state.z[side] for side in ("left", "right")},
    ),
    "one of two": (parts(free(), optax.sgd(0.1)), {}, lambda s: {"left": s.inner_states["left"].inner_state.z["left"]}),
}


def code_of(warning):
    """The code of a warning, run for a state: the state to evaluate."""
    code = str(warning.message).split("Write\n")[1].split("\nand use `evaluated`")[0]

    def evaluated(state):
        names = {"optax": optax, "jax": jax, "state": state}
        exec(textwrap.dedent(code), names)
        return names["evaluated"]

    return evaluated


def test_schedule_free_is_warned_of_once_and_the_code_of_the_warning_evaluates_it():
    """A loss of 0.209 was reported for parameters that have 0.201: those of the training iterate."""
    trainer, state = trained(free())
    text = (
        r"the training iterate of optax\.contrib\.schedule_free, and not the average, .*predict, evaluate, export and"
    )
    with pytest.warns(UserWarning, match=text) as caught:
        at_training = trainer.predict(state, X)
        trainer.predict(state, X)
    assert [each.filename for each in caught] == [__file__]
    evaluated = code_of(caught[0])(state)
    expected = optax.contrib.schedule_free_eval_params(state.opt_state, state.vars.params)
    jax.tree.map(np.testing.assert_array_equal, evaluated.vars.params, expected)
    again, _ = trained(free(), DATA.take(1))
    assert (again.predict(evaluated, X) != at_training).any()  # and without a warning


@pytest.mark.parametrize("name", FREE)
def test_its_state_is_found_wherever_it_is(name):
    """In a chain, MultiSteps, injected hyperparameters, another optimizer, a loss scale, and beside frozen parameters."""
    optimizer, options, z_of = FREE[name]
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(2, 2) >> layers.linear(2, 1), optimizer=optimizer, **options)
        state = trainer.init()
    state = state.replace(opt_state=jax.tree.map(lambda a: a + 1, state.opt_state))
    with pytest.warns(UserWarning, match="the training iterate") as caught:
        trainer.predict(state, X)
    evaluated = code_of(caught[0])(state)
    b1 = next(leaf for path, leaf in kaun.tree.flatten(state.opt_state)[0].items() if path.endswith("b1"))
    expected = {**state.vars.params}
    for side, z in z_of(state.opt_state).items():
        for leaf, a in z.items():
            if a is not None:
                expected[side] = {**expected[side], leaf: (expected[side][leaf] - (1 - b1) * a) / b1}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), evaluated.vars.params, expected)
    assert (evaluated.vars.params["right"]["bias"] != state.vars.params["right"]["bias"]).all() or name == "one of two"


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.slow), {"trainable": lambda path: path == "weight"}]
)
def test_sam_between_two_outer_steps_is_warned_of(options):
    """A loss of 0.248 after an odd number of steps, of 0.009 after the next one: the weights were perturbed."""
    trainer, outer = trained(sam(), DATA.take(2), **options)
    trainer.predict(outer, X)
    _, state = trainer.step(outer, X, loss=lambda output: losses.mse(output, Y))
    with pytest.warns(
        UserWarning, match=r"perturbed: .*multiple of sync_period steps, or use sam\(\.\.\., opaque_mode="
    ) as caught:
        trainer.predict(state, X)
    evaluated = code_of(caught[0])(state)
    jax.tree.map(np.testing.assert_array_equal, evaluated.vars.params, outer.vars.params)
    assert len(caught) == 1


@pytest.mark.parametrize("optimizer", [sam(opaque_mode=True), optax.adam(0.1)])
def test_other_optimizers_are_not_warned_of(optimizer):
    trainer, state = trained(optimizer)
    trainer.predict(state, X)


def test_a_state_that_was_not_trained_is_not_warned_of():
    trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=free())
    trainer.predict(trainer.init(), X)


@pytest.mark.parametrize(
    "use",
    [
        lambda trainer, state: trainer.evaluate(state, [(X, Y)], {"mse": losses.mse}),
        lambda trainer, state: jax.jit(lambda state: trainer.predict(state, X))(state),
        lambda trainer, state: trainer.export(state, X),
    ],
    ids=["evaluate", "predict inside jit", "export"],
)
def test_all_that_evaluate_warn(use):
    trainer, state = trained(free())
    with pytest.warns(UserWarning, match="training iterate"):
        use(trainer, state)


def test_validate_warns_once_in_a_fit():
    model = layers.linear(2, 1)
    trainer = kaun.Trainer(model=model, optimizer=free())
    report = reports.validate(trainer, [(X, Y)], {"mse": losses.mse}, each=2)
    with pytest.warns(UserWarning, match="training iterate") as caught:
        trainer.fit(trainer.init(), DATA, report=report)
    assert [each.filename for each in caught] == [__file__]


def test_the_warning_names_the_average_that_an_optimizer_has():
    trainer, state = trained(free())
    with pytest.warns(
        UserWarning, match=r"write Trainer\(..., average=averages.from_optimizer\(f\)\), where f\(opt_state, "
    ):
        trainer.predict(state, X)


def test_with_that_average_its_state_is_not_warned_of_and_the_live_one_is():
    rule = averages.from_optimizer(optax.contrib.schedule_free_eval_params)
    trainer, state = trained(free(), average=rule)
    for same in (state.averaged, jax.tree.map(jax.numpy.asarray, state.averaged), state.averaged.averaged):
        trainer.predict(same, X)
        trainer.evaluate(same, [(X, Y)], {"mse": losses.mse})
    trainer.export(state.averaged, X)
    fix = r"Use state.averaged in its place, and in validate write of=lambda s: s.averaged. This warning is given once."
    with pytest.warns(UserWarning, match=rf"training iterate .*{fix}"):
        trainer.predict(state, X)


def test_sam_has_its_outer_parameters_as_an_average():
    rule = averages.from_optimizer(lambda opt_state, params: opt_state.cache)
    trainer, state = trained(sam(), average=rule)
    _, at_two = trained(sam(), DATA.take(2))
    jax.tree.map(np.testing.assert_array_equal, state.averaged.vars.params, at_two.vars.params)
    trainer.predict(state.averaged, X)


def test_validate_of_the_average_does_not_warn():
    rule = averages.from_optimizer(optax.contrib.schedule_free_eval_params)
    trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=free(), average=rule)
    report = reports.validate(trainer, [(X, Y)], {"mse": losses.mse}, each=2, of=lambda s: s.averaged)
    trainer.fit(trainer.init(), DATA, report=report)
