"""watch: what it keeps, prints, draws and hands to loggers."""

import json

import numpy as np
import optax
import pytest

from kaun import Data, Trainer, checkpoint, layers, losses, reports, rng

GENERATOR = np.random.default_rng(0)
X, Y = (GENERATOR.normal(size=(40, n)).astype(np.float32) for n in (3, 2))
KINDS = ("grad_norm", "weight_norm", "update_ratio")


@pytest.fixture(scope="module")
def trained():
    with rng.scope(0):
        model = layers.sequential([layers.linear(3, 4), *([layers.tanh()] * 9), layers.linear(4, 2)])
        trainer = Trainer(model=model, optimizer=optax.adam(0.01))
        return trainer, trainer.init(), Data.batches((X, Y), 4).with_loss(losses.mse)


def values(steps, layers=("a",), scale=1.0):
    return {f"{k}/{layer}": scale * np.asarray(steps, np.float32) for k in KINDS for layer in layers} | {
        "step": np.array(steps)
    }


def test_it_records_every_nth_step_of_the_state(trained):
    trainer, state, data = trained
    state = trainer.fit(state, data.take(3))
    watch, each = reports.watch(every=4), reports.watch(every=1)
    trainer.fit(state, data.epochs(2).take(11), report=reports.all_of(watch, each))
    assert watch.steps.tolist() == [4, 8, 12] and each.steps.tolist() == list(range(4, 15)) and len(watch) == 3
    assert watch.layers == ("0", "10")
    for kind in KINDS:
        found = getattr(watch, kind)
        assert found.shape == (3, 2) and (found > 0).all()
        np.testing.assert_array_equal(found, getattr(each, kind)[[0, 4, 8]])


def test_loggers_write_it_at_its_steps(trained, tmp_path):
    trainer, state, data = trained
    report = reports.all_of(
        watch := reports.watch(every=4),
        reports.jsonl(tmp_path / "all.jsonl"),
        reports.every(5, reports.jsonl(tmp_path / "some.jsonl")),
        reports.every(5, reports.csv(tmp_path / "some.csv")),
    )
    trainer.fit(state, data, report=report)
    rows = {
        name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("all.jsonl", "some.jsonl")
    }
    assert [row["step"] for row in rows["all.jsonl"] if "grad_norm/0" in row] == [4, 8]
    assert [(row["step"], "loss" in row, "grad_norm/0" in row) for row in rows["some.jsonl"]] == [
        (4, False, True), (5, True, False), (8, False, True), (10, True, False)
    ]  # fmt: skip
    for name in rows:
        found = [row["update_ratio/10"] for row in rows[name] if "update_ratio/10" in row]
        np.testing.assert_array_equal(np.float32(found), watch.update_ratio[:, 1])
    assert "grad_norm/0" in (tmp_path / "some.csv").read_text()


def test_a_resumed_run_continues_it(trained, tmp_path):
    trainer, state, data = trained
    runs = checkpoint.Directory(tmp_path, every=4)
    trainer.fit(state, data.epochs(2).take(6), checkpoints=runs, report=reports.watch(2))
    trainer.fit(state, data.epochs(2).take(10), checkpoints=runs, report=(watch := reports.watch(2)))
    trainer.fit(state, data.epochs(2).take(10), report=(whole := reports.watch(2)))
    assert watch.steps.tolist() == [2, 4, 6, 8, 10] and watch.layers == whole.layers
    np.testing.assert_array_equal(watch.update_ratio, whole.update_ratio)


def test_steps_that_come_again_replace_the_earlier_ones_and_another_model_begins_again():
    watch = reports.watch(2)
    watch.block(1, values(range(1, 7)))
    watch.block(1, values([3, 4], scale=2.0))
    assert watch.steps.tolist() == [2, 4] and watch.grad_norm[:, 0].tolist() == [2, 8]
    watch.block(1, {"step": np.array([6])})  # of a fit that does not compute them
    watch.block(1, values([7, 8], ("b", "c")))
    assert watch.layers == ("b", "c") and watch.steps.tolist() == [8]


def test_it_prints_its_newest_step():
    watch = reports.watch(2)
    assert repr(watch) == "watch(every=2), nothing recorded"
    watch.block(1, values([1, 2], ("2.q_proj", "10", "2")))
    assert repr(watch).splitlines() == [
        "step 2",
        "layer     gradient  weights  update/weights",
        "2                2        2               2",
        "2.q_proj         2        2               2",
        "10               2        2               2",
    ]


def test_a_plot_has_a_line_for_each_layer(tmp_path):
    watch = reports.watch(1)
    with pytest.raises(
        ValueError, match=r"watch.plot has nothing to draw: no step was recorded. Pass the watch to fit"
    ):
        watch.plot(tmp_path / "norms")
    watch.block(1, values(range(1, 9), ("a", "b")))
    assert watch.plot(tmp_path / "norms").read_bytes()[:4] == b"\x89PNG"


def test_the_ratio_is_nan_at_an_item_that_makes_no_update():
    with rng.scope(0):
        trainer = Trainer(model=layers.linear(3, 2), optimizer=optax.sgd(0.1), accumulate=3, on_nonfinite="skip")
        state = trainer.init()
    first, other, bad = ((x, lambda out: losses.mse(out, Y[:2])) for x in (X[:2], X[2:4], X[:2] * np.float32("nan")))
    end = trainer.fit(state, [first, other, first, first, bad, other], report=(watch := reports.watch(1)))
    assert int(end.opt_state.updates) == 2
    place = watch.layers.index("weight")
    assert np.isnan(watch.update_ratio[:, place]).tolist() == [True, True, False] * 2
    middle = trainer.fit(state, [first, other, first]).vars.params
    for i, (old, new) in ((2, (state.vars.params, middle)), (5, (middle, end.vars.params))):
        ratio = np.linalg.norm(new["weight"] - old["weight"]) / np.linalg.norm(old["weight"])
        np.testing.assert_allclose(watch.update_ratio[i, place], ratio, rtol=1e-4)


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_every_is_a_number_of_steps(every, error):
    with pytest.raises(error, match=r"watch expected a number of steps .*, received .*Write watch\(every=100\)"):
        reports.watch(every)


@pytest.mark.parametrize("n", [0, 1.5, True])
def test_numbers_are_at_every_nth_step(trained, n):
    class Wrong(reports.Report):
        numbers = {"layer_norms": n}

    trainer, state, data = trained
    with pytest.raises(
        TypeError,
        match=r"`numbers` of the report .*Wrong.* must have a number of steps of at least 1 for 'layer_norms', received .*Write numbers = \{'layer_norms': 100\}",
    ):
        trainer.fit(state, data, report=Wrong())
