"""What reports get of an ensemble, and its checkpoints."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, checkpoint, layers, losses, reports, rng

X = jnp.array([[1.0], [2.0], [-1.0]])
PAIR = (X, 3 * X)
TRAIN = Data.from_items([PAIR]).with_loss(lambda out, y: (losses.mse(out, y), {"twice": 2 * losses.mse(out, y)}))
RATES = jnp.array([0.2, 0.05, 1e30, 0.001])
STEPS = 30
BELOW = lambda loss: loss < 0.05

TRAINER = kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.inject_hyperparams(optax.sgd)(0.1))
MANY = kaun.Ensemble(TRAINER, 4)
with rng.scope(0):
    START = MANY.init(learning_rate=RATES)


def host(tree):
    data = lambda leaf: np.asarray(jax.random.key_data(leaf) if kaun.tree.is_key(leaf) else leaf).tobytes()
    return [data(leaf) for leaf in jax.tree.leaves(tree)]


class Blocks(reports.Report):
    def __init__(self):
        self.values = {}

    def block(self, first_step, values):
        for name, column in values.items():
            self.values.setdefault(name, []).append(column)

    def of(self, name):
        return np.ma.concatenate(self.values[name])


def fitted(report=None, **options):
    return MANY.fit(START, TRAIN.epochs(STEPS), report=report, stop=BELOW, **options)


def expected():
    """The losses [steps, members] by steps, masked where a member does not run or is not finite."""
    state, rows = START, []
    for x, loss in TRAIN.epochs(STEPS):
        losses_of, after = MANY.step(state, x, loss=loss, stop=BELOW)
        ended = np.asarray(state.opt_state.stopped | after.opt_state.nonfinite)
        rows.append(np.ma.masked_array(np.asarray(losses_of), ended))
        state = after
    return np.ma.stack(rows)


def test_a_block_has_the_loss_of_each_member_and_means_over_those_that_run():
    blocks, history, calls = Blocks(), reports.history(), []
    shown = reports.every(10, lambda step, loss, state: calls.append((step, loss, state)))
    end = fitted(reports.all_of(blocks, history, shown))
    rows = expected()
    found = blocks.of("losses")
    assert found.shape == (STEPS, 4) and np.array_equal(found.mask, rows.mask) and found.mask[:, 2].sum() == 29
    np.testing.assert_array_equal(found.compressed(), rows.compressed())
    mean = rows.mean(axis=1)
    np.testing.assert_allclose(blocks.of("loss"), mean, rtol=1e-6)
    np.testing.assert_allclose(blocks.of("twice"), 2 * mean, rtol=1e-6)
    np.testing.assert_allclose(blocks.of("loss_weight"), 3)
    runs = ~rows.mask
    np.testing.assert_allclose(blocks.of("learning_rate"), (runs * np.asarray(RATES)).sum(1) / runs.sum(1), rtol=1e-6)
    np.testing.assert_array_equal(history.member_losses, rows.filled(np.nan))
    np.testing.assert_array_equal(history.losses, blocks.of("loss"))
    assert [step for step, _, _ in calls] == [10, 20, 30]
    for step, loss, state in calls:
        np.testing.assert_allclose(loss, mean[step - 1], rtol=1e-6)
        assert state.step.max() == step
    assert host(calls[-1][2]) == host(end)
    assert end.step.tolist()[2:] == [1, 30]
    assert reports.history().member_losses.shape == (0, 0)


def test_where_no_member_runs_the_loss_is_that_of_those_that_stopped():
    blocks = Blocks()
    end = MANY.fit(START, TRAIN.epochs(3), report=blocks, stop=lambda loss: loss < 1e9)
    assert end.step.tolist() == [0] * 4 and end.opt_state.stopped.all()
    first = blocks.of("losses").data[0]
    np.testing.assert_allclose(blocks.of("loss"), [first.mean()] * 3, rtol=1e-6)
    assert blocks.of("losses").mask.tolist() == [[False] * 4] + [[True] * 4] * 2


def test_files_have_a_column_for_each_member(tmp_path):
    fitted(reports.every(5, reports.csv(tmp_path / "run.csv")))
    rows = list(csv.DictReader((tmp_path / "run.csv").read_text().splitlines()))
    found = np.array([[float(row[f"loss/{i}"]) for i in range(4)] for row in rows])
    np.testing.assert_allclose(found, expected().filled(np.nan)[4::5], rtol=1e-6)
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20, 25, 30]


def test_validate_gives_means_and_early_stopping_keeps_all_members():
    pairs = Data.from_items([PAIR])
    validation = reports.validate(MANY, pairs, {"mse": losses.mse}, each=5)
    stopper = reports.early_stopping("mse", mode="min", patience=1)
    good = MANY.init(learning_rate=jnp.array([0.2, 0.05, 0.01, 0.001]))
    MANY.fit(good, TRAIN.epochs(10), report=reports.all_of(validation, stopper))
    assert [step for step, _ in validation.results] == [5, 10] and stopper.best_step == 10
    assert stopper.best_value == validation.latest["mse"]
    np.testing.assert_allclose(
        stopper.best_value, MANY.evaluate(stopper.best, pairs, {"mse": losses.mse})["mse"].mean()
    )
    own = reports.validate(MANY, [pairs] * 4, {"mse": losses.mse}, each=5, per_member=True)
    MANY.fit(good, TRAIN.epochs(10), report=own)
    np.testing.assert_allclose(own.latest["mse"], validation.latest["mse"])
    with pytest.raises(ValueError, match=r"validate\(per_member=True\) expected an Ensemble, received a Trainer"):
        reports.validate(TRAINER, pairs, {"mse": losses.mse}, each=5, per_member=True)


@pytest.mark.parametrize("at", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_was_interrupted_ends_with_the_same_bytes(tmp_path, at):
    uninterrupted, whole = fitted(whole_history := reports.history()), whole_history
    runs = checkpoint.Directory(tmp_path / "run", every=4)

    def fail(step, loss, state):
        if step == at:
            raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        fitted(reports.all_of(reports.history(), reports.every(at, fail)), checkpoints=runs)
    history = reports.history()
    again = fitted(reports.all_of(history, reports.every(at, lambda step, loss, state: None)), checkpoints=runs)
    assert host(again) == host(uninterrupted)
    np.testing.assert_array_equal(history.member_losses, whole.member_losses)
    finished = fitted(reports.all_of(history, reports.every(at, lambda step, loss, state: None)), checkpoints=runs)
    assert host(finished) == host(uninterrupted)
    assert host(runs.load(START, at="newest").member(1)) == host(uninterrupted.member(1))
    with rng.scope(0):
        other = MANY.init(learning_rate=RATES.at[1:].mul(2))
    with pytest.raises(kaun.errors.ResumeMismatch, match=r"rate\[1\] was 0\.05, is 0\.1, and 2 more of 4 differ\."):
        MANY.fit(other, TRAIN.epochs(STEPS), checkpoints=runs, report=reports.history(), stop=BELOW)
    with pytest.raises(kaun.errors.ResumeMismatch, match=r"the compiled step"):
        MANY.fit(START, TRAIN.epochs(STEPS), checkpoints=runs, report=reports.history())


def test_checkpoints_refuse_states_made_outside_a_scope(tmp_path):
    states = MANY.init()
    for start, fit in ((states, MANY.fit), (states.member(1), TRAINER.fit), (MANY.make_state(START.vars), MANY.fit)):
        with pytest.raises(
            ValueError, match=r"cannot be resumed by another process: the state .* outside an rng scope"
        ):
            fit(start, TRAIN, checkpoints=checkpoint.Directory(tmp_path / "run", every=4))
    assert not any(map(kaun.rng.unscoped, (START.key, START.member(1).key)))
