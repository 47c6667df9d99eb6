"""kaun.lr_range: the losses of a loop by hand whose rate rises, for every optimizer whose rate can be set."""

import dataclasses
import re
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, rng
from kaun.diagnose import RateRange

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(256, 4)).astype(np.float32)
Y = X @ np.array([[1.0], [-2.0], [0.5], [3.0]], np.float32)
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 40)


def made(optimizer, **more):
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(4, 1), optimizer=optimizer, **more)
        return trainer, trainer.init(), Data.batches((X, Y), 64, shuffle=True).with_loss(losses.mse).epochs(16)


def by_hand(state, data, rates):
    """The losses of Adam with these rates, in a loop of NumPy's float64."""
    w, b = (np.asarray(state.vars.params[name], np.float64) for name in ("weight", "bias"))
    moments, found = [np.zeros(5), np.zeros(5)], []
    for i, ((x, _), rate) in enumerate(zip(data, rates, strict=False), 1):
        out, y = x @ w + b, np.asarray(x, np.float64) @ np.array([[1.0], [-2.0], [0.5], [3.0]])
        found.append(np.mean((out - y) ** 2))
        slope = 2 * (out - y) / len(x)
        g = np.append(x.T @ slope, slope.sum())
        moments = [0.9 * moments[0] + 0.1 * g, 0.999 * moments[1] + 0.001 * g**2]
        step = moments[0] / (1 - 0.9**i) / (np.sqrt(moments[1] / (1 - 0.999**i)) + 1e-8)
        w, b = w - rate * step[:4, None], b - rate * step[4:]
    return found


OPTIMIZERS = {
    "constant": optax.adam(0.5),
    "schedule that begins with 0": optax.adam(SCHEDULE),
    "injected": optax.inject_hyperparams(optax.adam)(0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_losses_are_those_of_a_loop_by_hand(name):
    trainer, state, data = made(OPTIMIZERS[name])
    found = kaun.lr_range(trainer, state, data, low=1e-4, high=3.0, steps=40)
    np.testing.assert_allclose(found.rates, np.geomspace(1e-4, 3.0, 40), rtol=1e-6)
    np.testing.assert_allclose(found.losses, by_hand(state, data, found.rates), rtol=2e-4, atol=1e-6)
    assert 0.05 < found.suggestion < 2 and found.smoothed.shape == (40,) and not found.diverged


def test_it_is_pure():
    trainer, state, data = made(OPTIMIZERS["constant"])
    before = [np.array(leaf) for leaf in jax.tree_util.tree_leaves((state.vars, state.opt_state))]
    with rng.scope(7):
        first = kaun.lr_range(trainer, state, data, steps=20)
        drawn = rng.next_key()
    again = kaun.lr_range(trainer, state, data, steps=20)
    np.testing.assert_array_equal(first.losses, again.losses)
    with rng.scope(7):
        assert (jax.random.key_data(drawn) == jax.random.key_data(rng.next_key())).all()
    after = jax.tree_util.tree_leaves((state.vars, state.opt_state))
    assert all((a == b).all() for a, b in zip(before, after, strict=True)) and trainer.compilations == ()


def test_it_compiles_once(monkeypatch):
    trainers = []
    replace = dataclasses.replace
    monkeypatch.setattr(dataclasses, "replace", lambda *a, **k: trainers.append(replace(*a, **k)) or trainers[-1])
    trainer, state, data = made(OPTIMIZERS["constant"])
    kaun.lr_range(trainer, state, data, steps=60)
    (tested,) = [t for t in trainers if isinstance(t, kaun.Trainer)]
    assert len(tested.compilations) == 1


def test_it_ends_where_the_loss_diverges_or_is_not_finite():
    trainer, state, data = made(optax.sgd(0.1))
    found = kaun.lr_range(trainer, state, data, low=1e-4, high=1e6, steps=60)
    assert len(found.losses) < 60 and len(found.rates) == len(found.smoothed) == len(found.losses)
    assert 1e-3 < found.suggestion < 10
    assert found.diverged and repr(found).endswith(". The test ended there, because the loss diverged.")
    bad = Data.from_items([(X[:4], jnp.mean)] * 12 + [(X[:4], lambda out: out.mean() * jnp.nan)] * 8)
    assert len(kaun.lr_range(trainer, state, bad, low=1e-9, high=1e-8, steps=20).losses) == 12


def test_an_error_has_the_given_state_and_advice_that_runs(capsys):
    trainer, state, _ = made(optax.sgd(0.1), on_nonfinite="skip")
    data = Data.repeat(10, (X[:4], lambda out: jnp.log(-jnp.abs(out)).mean()))
    with pytest.raises(
        kaun.errors.NonFiniteLoss, match=r"^lr_range: step 1 is not finite \(its loss is nan\)"
    ) as found:
        kaun.lr_range(trainer, state, data, steps=10)
    assert found.value.kaun_state is state
    with pytest.raises(ValueError, match=r"lr_range and update_statistics run steps of other trainers\. Call explain"):
        kaun.explain(trainer, found.value)
    given = {"trainer": trainer, "state": state, "data": data, "kaun": kaun, "dataclasses": dataclasses}
    exec(textwrap.dedent("\n".join(str(found.value).splitlines()[1:])), given)
    assert "`log` of" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError) as stopped:
        kaun.lr_range(trainer, state, ((X, 1 / 0) for _ in range(10)), steps=10)
    assert stopped.value.kaun_state is state


def test_a_trainer_with_options_and_a_loss_that_is_a_mean():
    weighted = lambda b: (b[0], lambda out: losses.mse.parts(out, b[1], weights=jnp.ones(len(b[1]))))
    trainer, state, _ = made(
        optax.MultiSteps(optax.adam(0.1), 2), trainable=lambda p: p == "weight", on_nonfinite="skip", microbatches=2
    )
    items = Data.batches((X, Y), 16).map(weighted).epochs(4)
    found = kaun.lr_range(trainer, state, items, low=1e-3, high=1.0, steps=40)
    assert found.smoothed[-1] < 0.5 * found.smoothed[0]


def test_a_window_of_accumulate_is_a_step():
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(4, 1), optimizer=optax.adam(0.1))
        state = trainer.init()
    halves, whole = (Data.batches((X, Y), size).with_loss(losses.mse).epochs(6) for size in (32, 64))
    expected = kaun.lr_range(trainer, state, whole, low=1e-4, high=1.0, steps=24)
    pairs = dataclasses.replace(trainer, accumulate=2, average=kaun.averages.ema(0.9))
    with rng.scope(0):
        state = pairs.make_state(state.vars)
    found = kaun.lr_range(pairs, state, halves, low=1e-4, high=1.0, steps=24)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(found.smoothed, expected.smoothed, rtol=1e-5)
    with pytest.raises(ValueError, match=r"expected at least 50 items, and the data have 48\. .*train\.epochs\(2\)"):
        kaun.lr_range(pairs, state, halves, low=1e-4, high=1.0, steps=25)


def test_a_batch_that_is_masked_as_a_whole_is_not_a_low_loss():
    trainer, state, _ = made(optax.adam(0.1))
    keep = jnp.ones((64, 1), bool)
    items = [(X[:64], lambda out, k=keep & (i != 12): losses.mse.parts(out, Y[:64], where=k)) for i in range(24)]
    found = kaun.lr_range(trainer, state, items, low=1e-4, high=1e-2, steps=24)
    assert found.losses[12] == 0 and found.smoothed[12] == found.smoothed[11] > 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_that_a_loss_scale_skips_are_left_out(accumulate):
    """A loss that depends on the rate alone: with a gradient of -1e4 an overflow skips the first steps."""
    with rng.scope(0):
        model = layers.linear(4, 1, bias=False, weight_init=jax.nn.initializers.zeros)
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1), precision="mixed_float16", accumulate=accumulate)
        state = trainer.init()
    item = (np.ones((1, 4), np.float32), lambda out: 1e4 - 1e4 * out.astype(jnp.float32).sum())
    found = kaun.lr_range(trainer, state, Data.repeat(80, item), low=1e-8, high=1e-6, steps=20)
    rates = np.geomspace(1e-8, 1e-6, 20)
    np.testing.assert_array_equal(found.rates, rates)
    weight = np.concatenate([[0.0], np.cumsum(1e4 * rates)[:-1]])
    np.testing.assert_allclose(1e4 - found.losses, 4e4 * weight, rtol=5e-3)
    assert found.smoothed.shape == (20,) and found.smoothed[0] == 1e4
    part = kaun.lr_range(trainer, state, Data.repeat(20 * accumulate, item), low=1e-8, high=1e-6, steps=20)
    assert 5 < len(part.losses) < 20
    np.testing.assert_array_equal(part.losses, found.losses[: len(part.losses)])


def test_an_iterator_of_items_is_enough():
    trainer, state, data = made(OPTIMIZERS["constant"])
    assert len(kaun.lr_range(trainer, state, iter(list(data)), low=1e-4, high=1e-3, steps=12).losses) == 12
    with pytest.raises(
        ValueError,
        match=r"lr_range expected at least 12 items, and the data have 3. Write lr_range\(trainer, state, Data.from_items\(list\(items\)\).epochs\(4\), \.\.\.\), or fewer steps",
    ):
        kaun.lr_range(trainer, state, iter(list(data)[:3]), low=1e-4, high=1e-3, steps=12)
    few = list(data)[:3]
    for source, text in ((data.take(3), "train"), (few, "Data.from_items(items)")):
        with pytest.raises(ValueError, match=re.escape(f"have 3. Write lr_range(trainer, state, {text}.epochs(4), ")):
            kaun.lr_range(trainer, state, source, steps=12)
    loader = type("Loader", (), {"__iter__": lambda self: iter(few)})()
    with pytest.raises(ValueError, match=r"state, Data\.from_iterable\(loader\)\.epochs\(4\), "):
        kaun.lr_range(trainer, state, loader, steps=12)
    assert len(kaun.lr_range(trainer, state, Data.from_items(few).epochs(4), steps=12, high=1e-3).losses) == 12


REFUSED = {
    "none of the places where optax keeps one": optax.chain(optax.adam(0.1), optax.scale(0.5)),
    "a schedule given to inject_hyperparams": optax.inject_hyperparams(optax.adam)(SCHEDULE),
    "reduce_on_plateau changes it": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
}


@pytest.mark.parametrize("why", REFUSED)
def test_an_optimizer_whose_rate_cannot_be_set_is_refused_with_the_fix(why):
    trainer, state, data = made(REFUSED[why])
    with pytest.raises(
        ValueError, match=rf"lr_range cannot set the learning rate of the optimizer \(.*\): .*{why}. Pass a"
    ) as err:
        kaun.lr_range(trainer, state, data)
    fix = {"trainer": trainer, "state": state, "data": data, "optax": optax, "kaun": kaun, "dataclasses": dataclasses}
    exec("\n".join(line.strip() for line in str(err.value).splitlines()[1:]).replace("data)", "data, steps=10)"), fix)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"low": 0.0}, ValueError, r"expected 0 < low < high, received 0.0 and 10.0. Write low=1e-7"),
        ({"low": 1.0, "high": 0.1}, ValueError, r"expected 0 < low < high"),
        ({"high": float("inf")}, ValueError, r"expected 0 < low < high"),
        ({"high": "1"}, TypeError, r"expected high as a learning rate, received '1'. Write high=1e-3"),
        ({"steps": 9}, ValueError, r"expected at least 10 steps, received 9. Write steps=100"),
        ({"steps": 20.0}, TypeError, r"expected steps as an int, received 20.0. Write steps=100"),
    ],
)
def test_arguments_are_checked(given, error, text):
    trainer, state, data = made(OPTIMIZERS["constant"])
    with pytest.raises(error, match="^lr_range " + text):
        kaun.lr_range(trainer, state, data, **given)


def test_a_trainer_comes_first():
    trainer, state, data = made(OPTIMIZERS["constant"])
    with pytest.raises(
        TypeError, match=r"lr_range expected a Trainer first, received TrainState. Write lr_range\(trainer"
    ):
        kaun.lr_range(state, trainer, data)
    with pytest.raises(TypeError, match="lr_range expected a TrainState, received Vars"):
        kaun.lr_range(trainer, state.vars, data)


RATES, LOSSES = np.geomspace(1e-3, 1.0, 20), np.concatenate([np.linspace(2, 1, 15), np.linspace(1, 9, 5)])


def test_it_prints_and_draws(tmp_path):
    found = RateRange(RATES, LOSSES, LOSSES, 0.01)
    assert repr(found) == (
        "20 steps with learning rates from 0.001 to 1: the smoothed loss is lowest, 1, at 0.16, and falls fastest at 0.01."
    )
    assert repr(dataclasses.replace(found, suggestion=None)).endswith("at 0.16, which never falls.")
    assert found.plot(tmp_path / "rates.svg").read_text().startswith("<?xml")
    assert found.plot(tmp_path / "rates").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_needs_matplotlib(monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError,
        match=r'lr_range\(...\).plot needs matplotlib, which is missing: pip install "\.\[plot\]" in a checkout',
    ):
        RateRange(RATES, LOSSES, LOSSES, None).plot(tmp_path / "rates")
