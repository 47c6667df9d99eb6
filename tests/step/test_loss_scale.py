"""Loss scaling: gradients that float16 would lose, forced overflow, growth, and which nan is not due to the scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, rng
from kaun._step import loss_scale
from kaun.errors import NonFiniteLoss

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)


def mse(out):
    return losses.mse(out, Y)


@functools.cache
def trained(precision, optimizer, **options):
    """Trainers and states are values, so the tests share them, and what they have compiled."""
    with rng.scope(0):
        model = layers.sequential([layers.linear(3, 4), layers.batch_norm(4), layers.tanh(), layers.linear(4, 2)])
        trainer = kaun.Trainer(model=model, optimizer=optimizer, precision=precision, **options)
        return trainer, trainer.init()


ADAM, SGD, STILL = optax.adam(0.1), optax.sgd(1e7), optax.sgd(0.0)


def made(*, precision="mixed_float16", optimizer=ADAM, scale=None, good=0, **options):
    trainer, state = trained(precision, optimizer, **options)
    if scale is not None:
        state = state.replace(opt_state=state.opt_state._replace(scale=jnp.float32(scale), good=jnp.int32(good)))
    return trainer, state


def numbers(state):
    return float(state.opt_state.scale), int(state.opt_state.good)


class Rows:
    """A report that keeps the values of each step and wants no call."""

    def __init__(self):
        self.rows = {}

    def __call__(self, step, loss, state): ...

    def wants(self, step):
        return False

    def block(self, first, values):
        for name in values:
            self.rows.setdefault(name, []).extend(values[name].tolist())


def unchanged(before, after):
    jax.tree.map(np.testing.assert_array_equal, after.vars, before.vars)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state.inner, before.opt_state.inner)


def test_a_fresh_state_has_a_scale_and_other_precisions_none():
    _, state = made()
    assert numbers(state) == (2.0**15, 0)
    assert not isinstance(made(precision="mixed_bfloat16")[1].opt_state, loss_scale.LossScale)


def test_gradients_too_small_for_float16_arrive():
    # the largest is 1e-8 or so; the smallest number of float16 is 6e-8
    tiny = lambda out: mse(out) * 1e-8
    trainer, state = made(optimizer=SGD)
    _, after = trainer.step(state, X, loss=tiny)
    exact, _ = made(precision=None, optimizer=SGD)
    _, expected = exact.step(exact.make_state(state.vars), X, loss=tiny)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3), after.vars.params, expected.vars.params
    )
    _, unscaled = trainer.step(state.replace(opt_state=state.opt_state._replace(scale=jnp.float32(1))), X, loss=tiny)
    assert np.array_equal(unscaled.vars.params[0]["weight"], state.vars.params[0]["weight"])


@pytest.mark.parametrize("mode", ["raise", "skip", pytest.param("ignore", marks=pytest.mark.slow)])
def test_an_overflow_halves_the_scale_and_changes_nothing_else(mode):
    trainer, state = made(scale=2.0**24, on_nonfinite=mode, good=7)
    value, after = trainer.step(state, X, loss=mse)
    unchanged(state, after)
    assert numbers(after) == (2.0**23, 0)
    assert int(after.step) == 1
    assert np.isfinite(value)


@pytest.mark.parametrize("mode", ["raise", "ignore", pytest.param("skip", marks=pytest.mark.slow)])
def test_a_fit_goes_on_until_the_scale_fits(mode):
    report = Rows()
    trainer, state = made(scale=2.0**24, on_nonfinite=mode)
    end = trainer.fit(state, Data.repeat(60, (X, mse)), report=report)
    rows = report.rows
    scale, good = numbers(end)
    overflowed = round(24 - np.log2(scale))
    assert 3 < overflowed < 20 and good <= 60 - overflowed and int(end.step) == 60
    skipped = np.array(rows["skipped"])
    assert skipped[:4].all() and skipped.sum() == overflowed
    assert (np.array(rows["grad_norm"]) == 0).tolist() == skipped.tolist()
    assert rows["loss"][-1] < rows["loss"][0] / 2
    assert int(end.opt_state.inner[0].count) == 60 - overflowed


def test_the_first_nonfinite_step_is_found_after_overflows_in_its_block():
    trainer, state = made(scale=2.0**24)
    good, bad = (X, mse), (X, lambda out: mse(out) * jnp.nan)
    with pytest.raises(NonFiniteLoss, match="The loss is nan at step 4") as caught:
        trainer.fit(state, [good, good, good, bad, good])
    assert int(caught.value.kaun_state.step) == 3
    assert numbers(caught.value.kaun_state) == (2.0**21, 0)


def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale():
    trainer, state = made()
    with pytest.raises(NonFiniteLoss, match="The loss is inf at step 1"):
        trainer.fit(state, [(X, lambda out: mse(out) / 0.0)])


def test_at_scale_one_the_scale_is_not_the_reason():
    nonfinite = lambda out: jnp.sqrt(jnp.abs(out - out)).sum()  # 0, with a nan for a gradient
    trainer, state = made(scale=4.0)
    with pytest.raises(NonFiniteLoss, match=r"The loss is 0 at step 3; the gradient is not finite for '0\.bias'"):
        trainer.fit(state, Data.repeat(9, (X, nonfinite)))


def test_2000_good_steps_double_it_up_to_a_limit():
    trainer, state = made(optimizer=STILL)
    data = Data.repeat(loss_scale.GROWTH - 1, (X, mse))
    before = trainer.fit(state, data)
    assert numbers(before) == (2.0**15, 1999)
    after = trainer.fit(before, Data.repeat(1, (X, mse)))
    assert numbers(after) == (2.0**16, 0)
    small = lambda out: mse(out) * 1e-6
    trainer, state = made(optimizer=STILL, scale=2.0**24, good=1999)
    assert numbers(trainer.step(state, X, loss=small)[1]) == (2.0**24, 0)


def test_the_learning_rate_is_found_inside():
    trainer, state = made(optimizer=optax.inject_hyperparams(optax.adam)(0.1))
    report = Rows()
    trainer.fit(state, Data.repeat(3, (X, mse)), report=report)
    np.testing.assert_allclose(report.rows["learning_rate"], [0.1] * 3)


def test_checkpoints_keep_the_scale(tmp_path):
    trainer, state = made(scale=2.0**20)
    state = trainer.fit(state, Data.repeat(5, (X, mse)))
    kaun.checkpoint.save(tmp_path / "state.safetensors", state)
    again = kaun.checkpoint.load(tmp_path / "state.safetensors", like=trainer.init())
    assert numbers(again) == numbers(state) != (2.0**15, 0)


def test_a_state_of_another_precision_is_refused():
    trainer, state = made()
    plain, other = made(precision="mixed_bfloat16")
    with pytest.raises(
        ValueError, match=r"The state has no loss scale, but this trainer scales its loss.*make_state\(state\.vars\)"
    ):
        trainer.step(other, X, loss=mse)
    with pytest.raises(ValueError, match="The state has a loss scale, but this trainer does not scale its loss"):
        plain.step(state, X, loss=mse)
