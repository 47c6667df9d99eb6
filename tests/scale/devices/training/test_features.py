"""Each argument of a Trainer together with ``sharding=``: as on one device, and fit is the fold of step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import kaun
from kaun import Data, averages, checkpoint, layers, losses, reports, rng


class Pair:
    """The same trainer and start on one device and on eight, run over the same items."""

    def __init__(self, kit, data=None, name="fsdp", optimizer=None, items=None, **options):
        self.kit, self.ends, self.losses = kit, [], []
        optimizer = optax.adam(1e-2) if optimizer is None else optimizer
        for each in ("none", name):
            self.trainer, self.start, self.data = kit.trainer_of(each, optimizer, **options)
            with rng.scope(1):
                self.data = self.data.take(3) if data is None else data()
            found, end = kit.fit(self.trainer, self.start, self.data)
            self.losses.append(found)
            self.ends.append(end)

    def check(self, tolerance=1e-6, weights=1e-4):
        np.testing.assert_allclose(*self.losses[::-1], rtol=tolerance)
        for a, b in zip(*(jax.tree.leaves(end.vars) for end in self.ends), strict=True):
            np.testing.assert_allclose(b, a, rtol=weights, atol=weights)
        folded = self.kit.fold(self.trainer, self.start, self.data)
        assert self.kit.content(folded) == self.kit.content(self.ends[1])
        assert self.kit.misplaced(self.trainer, self.ends[1]) == []
        assert self.kit.misplaced(self.trainer, folded) == []
        return self.ends[1]


@pytest.mark.slow
def test_float16_with_its_loss_scale(kit):
    """A gradient that overflows on one device of eight: all discard the step, and the scale falls."""
    pair = Pair(kit, precision="mixed_float16")
    end = pair.check(tolerance=2e-3, weights=2e-2)
    assert end.opt_state.scale.sharding.spec == P()
    assert int(pair.ends[0].opt_state.good) == int(end.opt_state.good)
    x = kit.X[:48].copy()
    x[5] = 1e30
    loss = lambda output: losses.cross_entropy_sparse(output, kit.Y[:48])
    _, after = pair.trainer.step(end, x, loss=loss)
    assert kit.content(after.vars) == kit.content(end.vars)


@pytest.mark.slow
def test_bfloat16(kit):
    Pair(kit, precision="mixed_bfloat16").check(tolerance=5e-2, weights=5e-2)


def test_frozen_parameters(kit):
    pair = Pair(kit, trainable=lambda path: path.startswith("3."))
    end = pair.check()
    assert kit.content(end.vars.params[0]) == kit.content(pair.start.vars.params[0])
    assert end.vars.params[0]["weight"].sharding.spec == P(None, "data")
    assert [leaf.shape for leaf in jax.tree.leaves(end.opt_state[0].mu)] == [(5,), (64, 5)]


def test_average_accumulate_and_penalty(kit):
    """Windows of 2 items; the third is left for flush. The sums and the average lie as the parameters do."""
    penalty = lambda params: 1e-2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    pair = Pair(kit, accumulate=2, average=averages.ema(0.9), penalty=penalty)
    end = pair.check()
    window = end.opt_state
    assert window.gradient[0]["weight"].sharding.spec == P(None, "data")
    assert window.inner.average[0]["weight"].sharding.spec == P(None, "data")
    assert (int(window.updates), int(end.step)) == (2, 3)
    averaged = [np.asarray(each.averaged.vars.params[3]["weight"]) for each in pair.ends]
    np.testing.assert_allclose(averaged[1], averaged[0], rtol=1e-4, atol=1e-6)


def test_microbatches_and_padded_batches(kit):
    """A last batch that is filled: the filled rows weigh nothing, wherever they lie."""

    def data():
        batches = Data.batches((kit.X[:136], kit.Y[:136]), 48, pad=True)
        return batches.with_loss(losses.cross_entropy_sparse)

    pair = Pair(kit, data, microbatches=3)
    pair.check()
    model = lambda state: pair.trainer.predict(state, kit.X[96:136])
    loss = losses.cross_entropy_sparse(model(kit.fold(pair.trainer, pair.start, data().take(2))), kit.Y[96:136])
    kit.close(pair.losses[1][2], loss, 1e-5)


@pytest.mark.slow
def test_skipped_steps(kit):
    """One row of one batch is nan, on one device: no device takes that step, and reports say so."""
    x = kit.X.copy()
    x[60] = np.nan
    data = lambda: Data.batches((x[:144], kit.Y[:144]), 48).with_loss(losses.cross_entropy_sparse)
    pair = Pair(kit, data, on_nonfinite="skip")
    assert np.isnan(pair.losses[1]).tolist() == [False, True, False]
    end = pair.check()
    assert int(end.opt_state[0].count) == 2 and int(end.step) == 3


@pytest.mark.parametrize("place", ["numpy", pytest.param("committed", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_ends_the_fit_before_it(kit, place):
    trainer, start, _ = kit.trainer_of("fsdp")
    y = kit.Y[:144].copy()
    y[50] = 99
    put = lambda a: a if place == "numpy" else jax.device_put(a, jax.devices()[2])
    batches = Data.batches((kit.X[:144], y), 48).map(lambda b: (put(b[0]), put(b[1])))
    data = batches.with_loss(losses.cross_entropy_sparse)
    with pytest.raises(kaun.NonFiniteLoss, match=r"received indices\[2\] = 99") as caught:
        trainer.fit(start, data)
    expected = kit.fold(trainer, start, data.take(1))
    assert kit.content(caught.value.kaun_state) == kit.content(expected)
    assert kit.misplaced(trainer, caught.value.kaun_state) == []
    assert kaun.explain(trainer, caught.value).rows == (2,)


class Columns(reports.Report):
    """All numbers of all steps by name."""

    numbers = {"layer_norms": 1}

    def __init__(self):
        self.found = {}

    def wants(self, step):
        return False

    def __call__(self, step, loss, state):
        pass

    def block(self, first, values):
        for name, column in values.items():
            self.found.setdefault(name, []).extend(np.asarray(column, np.float64))


@pytest.mark.slow
def test_numbers_of_reports_and_norms_by_layer(kit):
    """What `watch` and `history` show is what they show on one device."""
    found = []
    for name in ("none", "fsdp"):
        trainer, start, data = kit.trainer_of(name, optax.inject_hyperparams(optax.adam)(1e-2))
        columns = Columns()
        trainer.fit(start, data.take(4), report=reports.all_of(columns, reports.watch(every=1)))
        found.append(columns.found)
    assert set(found[0]) == set(found[1]) and any("norm/" in name for name in found[0])
    for key in set(found[0]) - {"step_time", "examples_per_second"}:
        np.testing.assert_allclose(found[1][key], found[0][key], rtol=1e-3, err_msg=key)


def test_dropout_and_batch_norm_are_those_of_one_device(kit):
    """Masks are the same bytes, and the statistics are those of the whole batch."""
    model = layers.sequential(
        [layers.linear(16, 64), layers.batch_norm(64), layers.relu(), layers.dropout(0.3), layers.linear(64, 5)]
    )
    end = Pair(kit, model=model, optimizer=optax.sgd(0.1)).check()
    assert all(leaf.shape == (64,) for leaf in jax.tree.leaves(end.vars.state))


@pytest.mark.slow
def test_a_run_is_resumed_on_the_same_devices_to_the_byte_and_on_one_within_rounding(kit, tmp_path):
    def stop(step, loss, state):
        raise RuntimeError("the machine is gone")

    trainer, start, data = kit.trainer_of("fsdp")
    whole = trainer.fit(start, data)
    for name in ("fsdp", "none"):
        runs = checkpoint.Directory(tmp_path / name, every=2)
        with pytest.raises(RuntimeError, match="gone"):
            trainer.fit(start, data, report=reports.every(5, stop), checkpoints=runs)
        other, again, items = kit.trainer_of(name)
        if name == "none":
            with pytest.warns(UserWarning, match="bytes|device"):
                end = other.fit(again, items, checkpoints=runs)
            for a, b in zip(jax.tree.leaves(end.vars), jax.tree.leaves(whole.vars), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        else:
            end = other.fit(again, items, checkpoints=runs)
            assert kit.content(end) == kit.content(whole) and kit.misplaced(other, end) == []
            opened = other.fit(again, items, checkpoints=runs)
            assert kit.content(opened) == kit.content(whole) and kit.misplaced(other, opened) == []


@pytest.mark.slow
def test_lr_range_and_summary_take_a_trainer_with_a_sharding(kit):
    trainer, start, data = kit.trainer_of("fsdp", optax.inject_hyperparams(optax.adam)(1e-2))
    found = kaun.lr_range(trainer, start, data.epochs(2), low=1e-5, high=1.0, steps=10)
    assert found is not None
    assert "linear" in str(kaun.summary(trainer, kit.X[:8]))


def test_the_argument_is_checked():
    with pytest.raises(TypeError, match=r"Trainer\(sharding=...\) expected a kaun.sharding.Sharding, received .*call"):
        kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.1), sharding=kaun.sharding.fsdp)
    with pytest.raises(TypeError, match=r"received 'fsdp'\. Write sharding.data_parallel\(\), or"):
        kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.1), sharding="fsdp")
