"""What a notebook and a prompt show of kaun's values: one line without numbers of weights, and HTML that escapes names."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, Vars, _html, averages, layers, losses, metrics, reports, rng, sharding

X, Y = np.ones((8, 3), np.float32), np.ones((8, 2), np.float32)
EVIL = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def trained():
    with rng.scope(0):
        model = layers.sequential(
            {"first": layers.linear(3, 4), "norm": layers.batch_norm(4), "last": layers.linear(4, 2)}
        )
        trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.1), average=averages.ema(0.9))
        return trainer, trainer.init()


@pytest.fixture(scope="module")
def values(trained):
    trainer, state = trained
    train = Data.batches((X, Y), batch_size=4).with_loss(losses.mse)
    history, stopper = reports.history(), reports.early_stopping("mse", mode="min", patience=3)
    validation = reports.validate(trainer, [(X, Y)], {"mse": losses.mse}, each=train)
    for step, loss in ((1, 0.5), (2, 0.25)):
        history.block(step, {"loss": np.array([loss], np.float32)})
        history.observe(step, {"mse": loss}, state)
        stopper.observe(step, {"mse": loss}, state)
        validation.results.append((step, {"mse": loss}))
    return {
        "trainer": trainer,
        "state": state,
        "vars": state.vars,
        "states": kaun.Ensemble(trainer, 3).init(),
        "ensemble": kaun.Ensemble(trainer, 3),
        "data": train.epochs(3),
        "model": trainer.model,
        "history": history,
        "stopper": stopper,
        "validation": validation,
        "watch": reports.watch(every=5),
        "summary": kaun.summary(trainer, X),
    }


def test_each_is_one_short_line_without_numbers_of_weights(values):
    lines = {
        "trainer": "Trainer(model=sequential({3 layers}), optimizer=GradientTransformationExtraArgs, "
        "average=averages.ema(0.9))",
        "state": "TrainState(step=0, 34 parameters in float32)",
        "vars": "Vars(34 parameters in float32: first.bias [4], first.weight [3, 4], last.bias [2], last.weight [4, 2] "
        "and 2 more; 8 numbers of state)",
        "states": "TrainState(3 members, step=0, 34 parameters each in float32)",
        "history": "<history: 2 steps to step 2, loss 0.25, mse=0.25>",
        "validation": "<validate(mse), each 2 steps: step 2: mse=0.25>",
    }
    assert {name: repr(values[name]) for name in lines} == lines
    assert repr(values["ensemble"]) == f"Ensemble({lines['trainer']}, 3)"


def test_reports_and_metrics_are_shown_as_they_are_written(tmp_path):
    def report(step, loss, state=None):
        pass

    path = str(tmp_path / "log.csv")
    place = r"`report` \(test_html\.py:\d+\)"
    shown = {
        reports.progress(200, description="digits"): r"progress\(200, description='digits'\)",
        reports.progress(): r"progress\(\)",
        reports.every(10, report): rf"every\(10, {place}\)",
        reports.all_of(reports.history(), report): rf"all_of\(<history: no steps recorded>, {place}\)",
        reports.each_epoch([1, 2], report): rf"each_epoch\(2 steps, {place}\)",
        reports.csv(path): re.escape(f"csv({path!r})"),
        reports.learning_rate(report): rf"learning_rate\({place}\)",
        reports.time_limit(90): r"time_limit\(90\)",
        reports.throughput(tokens=8): "<throughput: tokens_per_second>",
        reports.prune(type("Trial", (), {"report": report, "should_prune": report})(), "mse"): "<prune: by 'mse'>",
        reports.profile("p", steps=(1, 2)): r"<profile\('.*p', steps=\(1, 2\)\): no trace yet>",
        reports.plot("p.png", log=True): r"plot\('.*p.png', log=True\)",
        metrics.Counted.of(metrics.f1): r"Counted\(counts=score_counts\('f1'\), result=score\('f1'\)\)",
    }
    for value, pattern in shown.items():
        assert re.fullmatch(pattern, repr(value)), repr(value)
    n = jax.device_count()
    assert repr(sharding.data_parallel()) == f"Sharding(mesh(data={n}), rows=('data',), rule=everywhere)"
    assert repr(sharding.fsdp(gather=True)).endswith(", gather='data')")
    tracker = metrics.Tracker()
    tracker.observe("loss", 1.0)
    assert repr(tracker) == "Tracker(loss: 1 values)"


def test_html_needs_nothing_else_and_no_color_of_its_own(values):
    for name, value in values.items():
        html = value._repr_html_()
        assert html.startswith(("<div", "<pre")) and html.count("<div") == html.count("</div>"), name
        assert not re.search(r"https?:|<script|<style|<link|class=|#[0-9a-f]{3}", html), name
        assert not re.search(r"(?:color|background): *(?!inherit|none)", html), name


def test_what_html_shows(values):
    assert "averages.ema(0.9)" in values["trainer"]._repr_html_()
    for part in ("first.weight", "float32[3, 4]", "running_mean", "opt_state"):
        assert part in values["state"]._repr_html_()
    assert ".epochs(3)" in values["data"]._repr_html_() and "Data of 6 items" in values["data"]._repr_html_()
    assert "<polyline" in values["history"]._repr_html_() and "0.25 to 0.5" in values["history"]._repr_html_()
    assert "best value" in values["stopper"]._repr_html_() and "linear(3, 4)" in values["summary"]._repr_html_()


def test_names_are_escaped():
    shown = [
        layers.Layer(init=lambda **_: None, apply=lambda *_: None, name=EVIL),
        Vars(params={EVIL: jnp.ones(2)}, state={}, dtype=jnp.float32),
        Data.from_items([1]).map(type("F", (), {"__call__": lambda self, x: x, "__qualname__": EVIL})()),
    ]
    history = reports.history()
    history.block(1, {"loss": np.ones(1, np.float32)})
    history.observe(1, {EVIL: 1.0}, None)
    texts = [value._repr_html_() for value in (*shown, history)]
    texts += [
        _html.document(
            EVIL, _html.facts([(EVIL, EVIL)]), _html.table([EVIL], [[EVIL]]), _html.folded(EVIL, _html.Part())
        )
    ]
    texts += [_html.curve([1.0, 2.0], EVIL)]
    assert not [text for text in texts if "<script" in text]


def test_long_tables_are_cut_and_numbers_are_readable():
    html = _html.table(["n", "x"], [(1000 * i, i / 3) for i in range(150)])
    assert html.count("<tr") == 1 + 100 and "and 50 more" in html and "99,000" in html and "0.3333" in html


def test_states_without_values_are_shown_too(trained):
    _, state = trained
    gone = jax.tree_util.tree_map(lambda leaf: jnp.array(leaf, copy=True), state.vars)
    deleted = state.replace(vars=gone, step=jnp.array(3))
    for leaf in jax.tree_util.tree_leaves((gone, deleted.step)):
        leaf.delete()
    assert repr(deleted) == "TrainState(step=deleted, 34 parameters in float32)"
    assert repr(gone) == repr(state.vars) and "first.weight" in deleted._repr_html_()
    seen = []
    jax.make_jaxpr(lambda s: (seen.append((repr(s), repr(s.vars), s._repr_html_())), s)[1])(state)
    assert seen[0][:2] == ("TrainState(step=traced, 34 parameters in float32)", repr(state.vars))
    assert "float32[3, 4]" in seen[0][2]
    shapes = jax.eval_shape(lambda: state)
    assert repr(shapes) == "TrainState(step=int32[], 34 parameters in float32)" and "34" in repr(shapes.vars)
    empty = jax.tree_util.tree_map(lambda leaf: None, state)
    assert repr(empty).startswith("TrainState(") and empty._repr_html_()
    assert repr(
        jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(state), [0] * len(jax.tree_util.tree_leaves(state)))
    )


def test_a_long_history_keeps_its_spikes():
    history = reports.history()
    losses_ = np.full(10_000, 1.0, np.float32)
    losses_[4321] = 50
    history.block(1, {"loss": losses_})
    html = history._repr_html_()
    assert "1 to 50" in html and len(html) < 12_000
    history.block(10_001, {"loss": np.array([np.nan], np.float32)})
    assert "1 to 50" in history._repr_html_() and "loss nan" in repr(history)


def test_states_of_optimizers_show_their_numbers_and_how_much_they_hold():
    with rng.scope(0):
        model, average = layers.linear(3, 2), averages.ema(0.9)
        about = {"precision": "mixed_float16", "accumulate": 2, "average": average}
        scaled = kaun.Trainer(model=model, optimizer=optax.sgd(0.1, momentum=0.9), **about).init().opt_state
        members = kaun.Ensemble(kaun.Trainer(model=model, optimizer=optax.sgd(0.1)), 3).init().opt_state
    assert repr(scaled) == "LossScale(scale=32768, good=0, inner=<40 numbers>)"
    window = scaled.inner
    assert repr(window) == (
        "Window(position=0, items=0, weight=0, loss=0, gradient=<8 numbers>, updates=0, inner=<27 numbers>)"
    )
    assert repr(window.inner).startswith("AveragedWeights(rule=averages.ema(0.9), average=<8 numbers>, ")
    assert repr(members).startswith("Members(stopped=bool[3], nonfinite=bool[3], inner=")
    seen = []
    jax.make_jaxpr(lambda scale: (seen.append(repr(scale)), scale)[1])(scaled)
    assert seen == ["LossScale(scale=traced, good=traced, inner=<40 numbers>)"]
