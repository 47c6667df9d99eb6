"""Averages over a pass, against NumPy in float64 and scikit-learn, in every way in which the steps of it can run."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

import kaun
from kaun import Data, checkpoint, layers, losses, metrics, reports, rng
from kaun._run import StepValues
from kaun._run.report_state import pack_snapshot, unpack_snapshot
from kaun.data import PassLength

ROWS, SIZE, CLASSES = 23, 5, 3  # batches of 5 and a last one of 3
g = np.random.default_rng(0)
X = g.normal(size=(ROWS, 4)).astype(np.float32)
LABELS = g.integers(0, CLASSES, ROWS).astype(np.int32)
WEIGHTS = g.uniform(0.5, 2, ROWS).astype(np.float32) * (g.random(ROWS) > 0.4)
WEIGHTS[5:10] = 0  # a batch that is masked as a whole
STEPS = -(-ROWS // SIZE)
MACRO = functools.partial(metrics.f1, average="macro")
F1, AUC, R2 = metrics.Counted.of(MACRO), metrics.Counted.of(metrics.auc), metrics.Counted.of(metrics.r2)
SUM = metrics.Counted(lambda number, _: {"sum": number}, lambda sums: float(sums["sum"]))  # of which the order matters
MATRIX = metrics.Counted.of(metrics.confusion_matrix)


def full(logits, batch):
    """A loss in its full form."""
    labels, weights = batch
    logits, right = logits.astype(jnp.float32), logits.argmax(-1) == labels
    return losses.cross_entropy_sparse.parts(logits, labels, weights=weights), {
        "accuracy": losses.Mean(jnp.where(right, weights, 0).sum(), weights.sum()),
        "plain": right.mean(),
        "f1": F1.parts(logits, labels),
        "weighted_f1": F1.parts(logits, labels, weights=weights),
        "auc": AUC.parts(logits[:, 0], labels == 0),
        "matrix": MATRIX.parts(logits, labels),
    }


DATA = Data.batches((X, (LABELS, WEIGHTS)), SIZE).with_loss(full)


def trainer_of(rate=0.0, width=8, **options):
    with rng.scope(0):
        model = layers.sequential([layers.linear(4, width), layers.tanh(), layers.linear(width, CLASSES)])
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(rate), **options)
        return trainer, trainer.init()


@pytest.fixture(scope="module")
def still():
    """A trainer whose updates are 0: all passes have the predictions of the first state."""
    return trainer_of()


@pytest.fixture(scope="module")
def moving():
    return trainer_of(0.1)


def expected(trainer, state, rows=slice(None)):
    """The averages over the rows by NumPy and scikit-learn."""
    logits = np.asarray(trainer.predict(state, X))[rows].astype(np.float64)
    labels, weights = LABELS[rows], WEIGHTS[rows].astype(np.float64)
    predicted, each = logits.argmax(-1), np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]
    score = functools.partial(sklearn_metrics.f1_score, labels, predicted, labels=range(CLASSES), zero_division=0)
    return {
        "loss": np.average(each, weights=weights),
        "accuracy": np.average(predicted == labels, weights=weights),
        "plain": np.mean(predicted == labels),
        "f1": score(average="macro"),
        "weighted_f1": score(average="macro", sample_weight=weights),
        "auc": sklearn_metrics.roc_auc_score(labels == 0, logits[:, 0]),
        "matrix": sklearn_metrics.confusion_matrix(labels, predicted, labels=range(CLASSES)),
    }


def check(epoch, wanted, *, tolerance=1e-6):
    """Metrics of counts are exact; the means are those of float32 values."""
    assert set(epoch) == {"epoch", "step", *wanted}
    for name, value in wanted.items():
        exact = name not in ("loss", "accuracy", "plain")
        np.testing.assert_allclose(epoch[name], value, rtol=1e-12 if exact else tolerance, err_msg=name)


class Every(reports.Report):
    """A report that is called after every step, so that each is dispatched alone."""

    def __call__(self, step, loss, state):
        pass


FORMS = {
    "blocks": {},
    "each step": {},
    "microbatches": {"microbatches": 2},
    "float16": {"precision": "mixed_float16"},
    "large state": {"width": 40_000},
}
SLOW = {"microbatches", "float16", "large state"}


@pytest.mark.parametrize("form", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FORMS])
def test_averages_of_each_pass_are_those_of_all_its_rows(still, form):
    trainer, state = still if not FORMS[form] else trainer_of(**FORMS[form])
    history = reports.history()
    report = reports.all_of(history, Every()) if form == "each step" else history
    before = len(trainer.compilations)
    trainer.fit(state, DATA.epochs(3), report=report)
    assert len(trainer.compilations) - before <= 2  # of batches of 5 rows and of 3
    assert [(e["epoch"], e["step"]) for e in history.epochs] == [(1, STEPS), (2, 2 * STEPS), (3, 3 * STEPS)]
    for epoch in history.epochs:
        check(epoch, expected(trainer, state), tolerance=5e-3 if form == "float16" else 1e-6)


def test_the_full_form_is_a_loss_of_step_and_trains_as_its_loss_alone(moving):
    trainer, state = moving
    (x, loss), *_ = DATA
    value, after = trainer.step(state, x, loss=loss)
    alone = lambda logits: losses.cross_entropy_sparse(logits, LABELS[:SIZE], weights=WEIGHTS[:SIZE])
    wanted, same = trainer.step(state, x, loss=alone)
    assert value == wanted
    assert all(map(np.array_equal, jax.tree.leaves(after.vars), jax.tree.leaves(same.vars)))
    in_fit = trainer.fit(state, DATA.take(1), report=reports.history())
    assert all(map(np.array_equal, jax.tree.leaves(after.vars), jax.tree.leaves(in_fit.vars)))


class Blocks(reports.Report):
    def __init__(self):
        self.blocks = []

    def block(self, first_step, values):
        self.blocks.append(values)

    def __getitem__(self, name):
        return np.concatenate([values[name] for values in self.blocks])


def test_a_block_has_the_weight_of_each_loss_and_the_metrics_of_each_batch(still):
    trainer, state = still
    trainer.fit(state, DATA, report=(blocks := Blocks()))
    weights = [WEIGHTS[i : i + SIZE].sum(dtype=np.float64) for i in range(0, ROWS, SIZE)]
    np.testing.assert_allclose(blocks["loss_weight"], weights, rtol=1e-6)
    assert blocks["loss_weight"].dtype == np.float64 and blocks["loss_weight"][1] == 0 and blocks["loss"][1] == 0
    predicted = np.asarray(trainer.predict(state, X)).argmax(-1)
    each = [
        sklearn_metrics.f1_score(
            LABELS[i : i + SIZE], predicted[i : i + SIZE], labels=range(CLASSES), average="macro", zero_division=0
        )
        for i in range(0, ROWS, SIZE)
    ]
    np.testing.assert_allclose(blocks["f1"], each, rtol=1e-12)
    assert np.isnan(blocks["weighted_f1"][1]) and np.isfinite(blocks["weighted_f1"]).sum() == STEPS - 1
    assert blocks["matrix"].shape == (STEPS, CLASSES, CLASSES)
    assert {"f1", "matrix", "loss_weight"} <= set(blocks.blocks[0]) and len(blocks.blocks[0]) == len(
        {*blocks.blocks[0]}
    )
    trainer.fit(state, DATA.map(lambda item: (item[0], lambda out: out.mean())), report=(scalar := Blocks()))
    assert scalar["loss_weight"].tolist() == [5, 5, 5, 5, 3]
    assert set(scalar.blocks[0]) == {
        "examples_per_second", "examples_per_step", "grad_norm", "loss", "loss_weight", "step", "step_time",
    }  # fmt: skip


def test_a_step_that_was_skipped_counts_nowhere():
    trainer, state = trainer_of(on_nonfinite="skip")
    x = X.copy()
    x[10:15] = np.nan  # its loss is masked in part, and nan
    history = reports.history()
    report = reports.all_of(history, blocks := Blocks())
    trainer.fit(state, Data.batches((x, (LABELS, WEIGHTS)), SIZE).with_loss(full), report=report)
    kept = np.r_[0:10, 15:ROWS]
    assert blocks["skipped"].tolist() == [False, False, True, False, False] and blocks["loss_weight"][2] == 0
    check(history.epochs[0], expected(trainer, state, kept))


@pytest.mark.parametrize("patched", [("_COUNT_BYTES", 2000), ("slow_in_loops", lambda jaxpr: True)], ids=lambda p: p[0])
def test_how_many_steps_share_a_dispatch_changes_no_value(still, monkeypatch, patched):
    trainer, state = still
    trainer.fit(state, DATA.epochs(8), report=(history := reports.history()))
    monkeypatch.setattr(f"kaun._engine.program.{patched[0]}", patched[1])  # the counts of a step have 400 bytes
    trainer, _ = trainer_of()
    trainer.fit(state, DATA.epochs(8), report=(other := reports.history()))
    assert str(history.epochs) == str(other.epochs)


def test_the_steps_before_one_that_is_not_finite_are_counted(still):
    trainer, state = still
    x, history = X.copy(), reports.history()
    x[10:15] = np.nan
    with pytest.raises(kaun.errors.NonFiniteLoss):
        trainer.fit(state, Data.batches((x, (LABELS, WEIGHTS)), SIZE).with_loss(full), report=history)
    check(*history.epochs, expected(trainer, state, slice(0, 10)))


@pytest.mark.parametrize("how", ["killed in a pass", "extended"])
def test_a_resumed_run_has_the_averages_and_the_rows_of_one_that_went_through(moving, tmp_path, how):
    trainer, state = moving

    class Stop(reports.Report):
        def wants(self, step):
            return step == 8

        def __call__(self, step, loss, state):
            raise KeyboardInterrupt

    def run(path, epochs, *others, take=None):
        history = reports.history()
        rows = reports.jsonl(path / "run.jsonl", epochs=True)
        data = DATA.epochs(epochs) if take is None else DATA.epochs(epochs).take(take)
        directory = checkpoint.Directory(path / "runs", every=3)
        trainer.fit(state, data, report=reports.all_of(history, rows, *others), checkpoints=directory)
        lines = [json.loads(line) for line in (path / "run.jsonl").read_text().splitlines()]
        return history.epochs, [
            {k: v for k, v in line.items() if k not in ("step_time", "examples_per_second")} for line in lines
        ]

    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole, rows = run(tmp_path / "whole", 3)
    if how == "extended":
        assert len(run(tmp_path / "parts", 3, take=8)[0]) == 2
    else:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", 3, Stop())
    again, resumed = run(tmp_path / "parts", 3)
    assert str(again) == str(whole) and len(whole) == 3
    assert str(resumed) == str(rows)
    assert [row["step"] for row in rows if "epoch" in row] == [e["step"] for e in whole]
    assert [row["epoch_f1"] for row in rows if "epoch" in row] == [e["f1"] for e in whole]
    assert str(run(tmp_path / "parts", 3)[0]) == str(whole)  # a finished run, opened again


def test_fits_in_turn_append_and_data_without_known_passes_are_one_pass_each(still):
    trainer, state = still
    history = reports.history()
    state = trainer.fit(state, DATA.epochs(2), report=history)
    assert len(history.epochs) == 2
    state = trainer.fit(state, list(DATA)[:3], report=history)
    state = trainer.fit(state, DATA.epochs(2).take(STEPS + 2), report=history)
    steps = [(e["epoch"], e["step"]) for e in history.epochs]
    assert steps == [(1, 5), (2, 10), (3, 13), (4, 18), (5, 20)]
    check(history.epochs[2], expected(trainer, state, slice(0, 15)))
    check(history.epochs[4], expected(trainer, state, slice(0, 10)))


def test_a_training_loss_with_the_weight_0_does_not_stop_the_fit_nor_win(still):
    trainer, state = still
    stopper = reports.early_stopping("loss", mode="min", patience=100)
    trainer.fit(state, DATA.epochs(2), report=stopper)  # each step is a window; the second of a pass has loss 0
    assert stopper.best_value > 0
    stopper = reports.early_stopping("loss", mode="min", patience=100)
    trainer.fit(state, DATA.epochs(2), report=reports.every(STEPS, stopper))
    np.testing.assert_allclose(stopper.best_value, expected(trainer, state)["loss"], rtol=1e-6)


# What a block is cut into, without any step that runs.


@functools.cache
def pool():
    """Batches of 2 and 3 rows, some masked, with the parts of their metrics."""
    found = []
    for size, masked in itertools.product((2, 3), (False, False, True) * 2):
        scores, labels = g.normal(size=(size, CLASSES)).astype(np.float32), g.integers(0, CLASSES, size)
        weights = (g.uniform(0.1, 1, size) * (not masked)).astype(np.float32)
        parts = {
            "f1": F1.parts(scores, labels),
            "weighted": F1.parts(scores, labels, weights=weights),
            "r2": R2.parts(scores[:, 0], weights),
            "sum": SUM.parts(np.float32(10 ** g.uniform(-6, 12)), None),
        }
        found.append((scores, labels, weights, np.float32(g.normal()), parts))
    return found


def block_of(first, batches, passes):
    """The values of steps on batches of one size."""
    losses, sizes = np.array([b[3] for b in batches]), np.array([len(b[1]) for b in batches])
    weights = np.array([b[2].sum(dtype=np.float64) for b in batches])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[b[4] for b in batches])
    columns = {"loss": losses, "share": losses, "examples_per_step": sizes, "loss_weight": weights}
    return StepValues(first, columns, {"loss": weights, "share": sizes.astype(np.float64)}, stacked, passes)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 11), min_size=1, max_size=14), st.integers(1, 5), st.integers(0, 4),
    st.sets(st.integers(1, 13)), st.sets(st.integers(1, 13)),
)  # fmt: skip
def test_any_cut_into_blocks_and_any_checkpoint_between_give_the_same_averages(chosen, items, skipped, cuts, saves):
    batches, passes = [pool()[i] for i in chosen], PassLength(items, skipped)
    count = len(batches)
    # A dispatch holds batches of one size.
    changes = {i for i in range(1, count) if len(batches[i][1]) != len(batches[i - 1][1])}

    def recorded(bounds, saves):
        history = reports.history()
        for start, end in itertools.pairwise([0, *sorted(b for b in bounds if b < count), count]):
            if start in saves:
                saved, arrays = pack_snapshot(history.snapshot())
                history = reports.history()
                history.restore(unpack_snapshot(json.loads(json.dumps(saved)), arrays, None))
                history.begin(start + 1, None)
            history.block(start + 1, block_of(start + 1, batches[start:end], passes))
        return history.epochs

    found = recorded(changes, ())
    assert str(found) == str(recorded(changes | cuts | saves, saves)), "the last digit of no average may change"
    ends = [i for i in range(1, count) if (i + skipped) % items == 0]
    for epoch, (start, end) in zip(found, itertools.pairwise([0, *ends, count]), strict=True):
        scores, labels, weights = (np.concatenate([b[i] for b in batches[start:end]]) for i in range(3))
        own = np.array([b[3] for b in batches[start:end]], np.float64)
        each = [b[2].sum(dtype=np.float64) for b in batches[start:end]]
        score = functools.partial(
            sklearn_metrics.f1_score, labels, scores.argmax(-1), labels=range(CLASSES), average="macro", zero_division=0
        )
        near = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
        near(epoch["loss"], np.average(own, weights=each) if sum(each) else np.nan)
        near(epoch["weighted"], score(sample_weight=weights.astype(np.float64)) if sum(each) else np.nan)
        near(epoch["share"], np.average(own, weights=[len(b[1]) for b in batches[start:end]]))
        near(epoch["f1"], score())
        assert epoch["step"] == end


def test_what_the_result_of_a_metric_raises_reaches_the_user(still):
    trainer, state = still

    def result(sums):
        raise ValueError("no result")

    broken = metrics.Counted(lambda p, t: {"rows": jnp.int32(t.size)}, result)
    data = [(X, lambda out: (out.mean(), {"broken": broken.parts(out, LABELS)}))]
    with pytest.raises(ValueError, match="no result") as raised:
        trainer.fit(state, data, report=Reader())
    assert "In 'broken', which the loss returned." in raised.value.__notes__


def test_a_result_that_reads_an_array_of_the_loss_is_an_error_that_says_what_to_do(still):
    trainer, state = still
    scale = jnp.int32(2)

    def loss(out):
        counted = metrics.Counted(lambda p, t: {"rows": jnp.int32(t.size)}, lambda sums: sums["rows"] * scale)
        return out.mean(), {"broken": counted.parts(out, LABELS)}

    with pytest.raises(jax.errors.UnexpectedTracerError) as raised:
        trainer.fit(state, [(X, loss)], report=Reader())
    assert any("computed on the host, after the step, and cannot read" in note for note in raised.value.__notes__)


class Reader(reports.Report):
    def block(self, first_step, values):
        assert values["broken"]
