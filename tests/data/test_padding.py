"""Batches whose last one is filled: filled rows weigh nothing, through every stage, and one program serves all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Data, checkpoint, layers, losses, metrics, reports, rng
from kaun.data import with_rows

few = settings(max_examples=60, deadline=None)
G = np.random.default_rng(0)
N, SIZE = 10, 4
X = G.normal(size=(N, 3)).astype(np.float32)
Y = G.integers(0, 2, N)


def batches(arrays=(X, Y), size=SIZE, shuffle=False, seed=0, **options):
    with rng.scope(seed):
        return Data.batches(arrays, size, shuffle, **options)


@functools.cache
def trained():
    """A trainer with batch_norm, and its first state."""
    with rng.scope(0):
        model = layers.linear(3, 8, bias=False) >> layers.batch_norm(8) >> layers.tanh() >> layers.linear(8, 2)
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1, momentum=0.9))
        return trainer, trainer.init()


def close(left, right, within=1e-6):
    pairs = zip(jax.tree.leaves(left.vars), jax.tree.leaves(right.vars), strict=True)
    return all(np.allclose(a, b, rtol=within, atol=within) for a, b in pairs)


def same(left, right):
    return all(map(np.array_equal, jax.tree.leaves(left.vars), jax.tree.leaves(right.vars)))


def real(data):
    """The items of a padded pipeline without their filled rows."""
    return [item.rows.real(item.item) for item in with_rows(data)]


def equal_items(left, right):
    pairs = list(zip(left, right, strict=True))
    return all(jax.tree.all(jax.tree.map(np.array_equal, *pair)) for pair in pairs)


# What the items are


@few
@given(st.integers(1, 13), st.integers(1, 6), st.booleans(), st.data())
def test_items_are_those_of_the_unpadded_pipeline_and_rows_of_the_data(n, size, shuffle, data):
    arrays = {"i": np.arange(n), "x": np.arange(n) * 0.5}
    padded, plain = (batches(arrays, size, shuffle, pad=pad).epochs(2) for pad in (True, False))
    assert len(padded) == len(plain) and all(len(r.item["i"]) == size for r in with_rows(padded))
    assert equal_items(real(padded), plain) and equal_items(padded, plain)
    assert all(np.array_equal(b["x"], b["i"] * 0.5) and {*b["i"].tolist()} <= {*range(n)} for b in padded)
    s = data.draw(st.integers(0, len(plain)))
    assert equal_items(real(padded.skip(s)), list(plain)[s:])
    masks = [item.rows.mask for item in with_rows(padded)]
    assert sum(mask.sum() for mask in masks) == 2 * n and all(np.all(np.diff(mask.astype(int)) <= 0) for mask in masks)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_items_taken_many_at_a_time_are_those_taken_one_by_one(shuffle, kind):
    weights = np.arange(N)
    data = batches((kind(X), np.arange(N) * 1.0), shuffle=shuffle, pad=True, sample_weights=weights).epochs(2)
    chunks = data._node._replace(rows=frozenset()).chunks
    for start in range(4):
        found = []
        for first, count, rows in chunks(None, start, lambda left: min(left, 5)):
            leaves = [*first.item, first.rows.mask, first.rows.weights]
            out = [np.empty((count, *leaf.shape), np.asarray(leaf).dtype) for leaf in leaves]
            for leaf, whole in zip(leaves, out, strict=True):
                if count == 1:
                    whole[0] = leaf
                elif isinstance(leaf, jax.Array):
                    whole[...] = rows[id(leaf)].on_device(0, count, count)
                else:
                    rows[id(leaf)].into(whole, 0)
            found += list(zip(*out, strict=True))
        expected = [(*i.item, i.rows.mask, i.rows.weights) for i in with_rows(data.skip(start))]
        assert equal_items(found, expected)


STAGES = {
    "map": lambda d: d.map(lambda b: (b[0] * 2, b[1])),
    "random_map": lambda d: d.random_map(lambda key, b: (b[0] + float(jax.random.uniform(key)), b[1])),
    "filter": lambda d: d.filter(lambda b: b[0][0, 0] > 0),
    "shuffle": lambda d: d.shuffle().epochs(2),
    "sample": lambda d: d.sample([1, 1, 5], 6),
    "epochs, skip, take": lambda d: d.epochs(3).skip(2).take(5),
    "epoch": lambda d: d.epoch(1),
    "prefetch": lambda d: d.map(lambda b: b).prefetch(2),
    "concat": lambda d: Data.concat(d, d.map(lambda b: (-b[0], b[1]))),
    "mix": lambda d: Data.mix([d.epochs(9), d.map(lambda b: b).epochs(9)], [0.5, 0.5]),
}


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_passes_on_which_rows_are_filled(name):
    def of(**options):
        with rng.scope(3):
            data = Data.batches((X, Y), SIZE, shuffle=name != "sample", **options)
            return STAGES[name](data)

    padded = of(pad=True)
    assert padded._node.rows == {"where"} and all(r.item[0].shape == (SIZE, 3) for r in with_rows(padded))
    assert equal_items(real(padded), of()) and equal_items(padded, of())
    masks = [ctx["row_mask"].sum() for *_, ctx in padded.with_loss(losses.cross_entropy_sparse)]
    assert masks == [len(y) for _, y in of()] and (name == "filter" or 2 in masks)


def test_a_concat_with_an_unpadded_pipeline_has_items_of_both():
    data = Data.concat(batches(pad=True), batches()).with_loss(losses.cross_entropy_sparse)
    assert [len(item) for item in data] == [3, 3, 3, 2, 2, 2]


# Training


@pytest.mark.parametrize("shuffle", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_is_that_of_the_unpadded_batches_with_one_compilation(shuffle):
    trainer, state = trained()
    loss = losses.cross_entropy_sparse
    plain = batches(shuffle=shuffle).with_loss(loss).epochs(3)
    padded = batches(shuffle=shuffle, pad=True).with_loss(loss).epochs(3)
    before = len(trainer.compilations)
    fitted = trainer.fit(state, padded)
    assert len(trainer.compilations) - before == 1
    assert close(fitted, trainer.fit(state, plain)) and not close(fitted, state)
    # Items made one by one, by a thread too, are the same, and so are single steps.
    by_map = batches(shuffle=shuffle, pad=True).map(lambda b: b).with_loss(loss).epochs(3)
    assert same(fitted, trainer.fit(state, by_map)) and same(fitted, trainer.fit(state, by_map.prefetch(2)))
    single = state
    for x, of_batch, ctx in padded:
        _, single = trainer.step(single, x, loss=of_batch, ctx=ctx)
    assert same(fitted, single)


def test_reports_count_the_rows_of_the_data_as_examples():
    class Examples(reports.Report):
        def __init__(self):
            self.found = []

        def block(self, first_step, values):
            self.found += values["examples_per_step"].tolist()
            assert np.isfinite(values["examples_per_second"]).all()

    trainer, state = trained()
    for data in (batches(pad=True), batches(pad=True).map(lambda b: b)):
        report = Examples()
        trainer.fit(state, data.with_loss(losses.cross_entropy_sparse).epochs(2), report=report)
        assert report.found == [4, 4, 2] * 2


ROWS = G.normal(size=(5, 4)).astype(np.float32)
PROBABLE = np.exp(ROWS) / np.exp(ROWS).sum(-1, keepdims=True)
LABELS = {
    "mse": ROWS * 2,
    "cross_entropy_sparse": np.arange(5) % 4,
    "binary_cross_entropy": (ROWS > 0).astype(np.float32),
    "info_nce": ROWS + 1,
    "mae": ROWS * 2,
    "huber": ROWS * 2,
    "log_cosh": ROWS * 2,
    "poisson_nll": np.ones((5, 4), np.int32),
    "focal": (ROWS > 0).astype(np.float32),
    "hinge": np.sign(ROWS),
    "cross_entropy": PROBABLE,
    "kl_divergence": PROBABLE,
    "cosine_distance": ROWS * 2 + 1,
}
KINDS = list(LABELS)[:4]


@pytest.mark.parametrize("name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in LABELS])
def test_every_loss_of_two_arguments_is_that_of_the_real_rows(name):
    loss = getattr(losses, name)
    x = np.log(PROBABLE) if name == "kl_divergence" else ROWS
    bound = functools.partial(loss, temperature=0.5) if name == "info_nce" else loss
    of = lambda pad: Data.batches((x, LABELS[name]), 3, pad=pad).with_loss(bound)
    for (a, padded, ctx), (b, plain) in zip(of(True), of(False), strict=True):
        assert a.shape == (3, 4) and ctx["row_mask"].sum() == len(b)
        found, expected = jax.jit(padded)(a), jax.jit(plain)(b)
        assert np.allclose(found.value, expected.value, rtol=1e-6, atol=1e-6) and found.weight == expected.weight


def test_a_function_that_takes_where_and_returns_a_mean_with_scalars():
    def loss(output, y, *, where):
        right = (output.argmax(-1) == y) & where
        return losses.cross_entropy_sparse.parts(output, y, where=where), {
            "right": losses.Mean(right.sum(), where.sum())
        }

    trainer, state = trained()
    report = reports.history()
    fitted = trainer.fit(state, batches(pad=True).with_loss(loss), report=report)
    assert close(fitted, trainer.fit(state, batches().with_loss(losses.cross_entropy_sparse)))


def test_batch_norm_sees_the_real_rows_alone():
    layer = layers.batch_norm(3)
    variables = layer.init(dtype=jnp.float32)
    x = jnp.asarray(G.normal(size=(5, 2, 3)).astype(np.float32)).at[4].set(1e6)
    mask = np.arange(5) < 4
    y, after = layer.apply(variables, x, training=True, ctx=kaun.Context(row_mask=mask))
    expected, state = layer.apply(variables, x[:4], training=True)
    assert np.allclose(y[:4], expected, rtol=1e-6, atol=1e-6)
    assert all(np.allclose(after.state[k], state.state[k], rtol=1e-6, atol=1e-7) for k in state.state)
    for wrong in (mask[:4], mask.astype(np.float32)):
        with pytest.raises(ValueError, match=r"expected ctx\['row_mask'\] as bool\[5\], one for each row of"):
            layer.apply(variables, x, training=True, ctx=kaun.Context(row_mask=wrong))
    layer.apply(variables, x, training=False, ctx=kaun.Context(row_mask=mask[:4]))


# Evaluation


def test_metrics_of_padded_batches_are_those_of_all_rows_with_one_compilation():
    trainer, state = trained()
    of = {
        "accuracy": metrics.accuracy,
        "f1": metrics.f1,
        "matrix": metrics.confusion_matrix,
        "top": metrics.top_k_accuracy(1),
        "iou": functools.partial(metrics.mean_iou, num_classes=2),
        "perplexity": metrics.perplexity,
        "loss": losses.cross_entropy_sparse,
    }
    of["weighted"] = lambda p, t, *, weights: ((p[:, 0] * weights).sum(), weights.sum())
    of["where"] = lambda p, t, *, where: losses.Mean(p[:, 0].sum(where=where), where.sum())
    plain = dict(of, weighted=lambda p, t: p[:, 0].mean(), where=lambda p, t: p[:, 0].mean())
    before = len(trainer.compilations)
    found = trainer.evaluate(state, batches(pad=True).prefetch(1), of)
    assert len(trainer.compilations) - before == 1
    expected = trainer.evaluate(state, batches(), plain)
    assert found.keys() == expected.keys()
    assert all(np.allclose(found[name], expected[name], rtol=1e-6, atol=1e-6) for name in found)


@pytest.mark.slow
def test_metrics_of_scores_and_of_numbers_of_padded_batches_are_those_of_all_rows():
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(3, 1) >> layers.fn(lambda x: x[:, 0]), optimizer=optax.sgd(0.1))
        state = trainer.init()
    ranked = ("auc", "average_precision", "binary_accuracy")
    for arrays, names in (((X, Y), ranked), ((X, X[:, 0] * 2), ("rmse", "r2", "mean_absolute_error"))):
        of = {name: getattr(metrics, name) for name in names}
        found, expected = (trainer.evaluate(state, batches(arrays, pad=pad), of) for pad in (True, False))
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_metric_without_weights_gets_the_real_rows():
    trainer, state = trained()
    of = {"largest": lambda p, t: p.max(), "rows": lambda p, t: (t.size, 1), "accuracy": metrics.accuracy}
    expected = trainer.evaluate(state, batches(), of)
    assert trainer.evaluate(state, batches(pad=True), of) == expected and expected["rows"] == 10 / 3
    padded = batches(pad=True)
    assert metrics.evaluate(lambda b: (b[1].sum(), b[1].size), padded) == Y.mean()
    assert metrics.evaluate_many(lambda b: {"rows": len(b[0])}, padded.epochs(2)) == {"rows": 10 / 3}


def test_validate_of_padded_data():
    trainer, state = trained()
    report = reports.validate(trainer, batches(pad=True), {"accuracy": metrics.accuracy}, each=1)
    after = trainer.fit(state, batches(pad=True).with_loss(losses.cross_entropy_sparse).take(1), report=report)
    assert report.latest == trainer.evaluate(after, batches(), {"accuracy": metrics.accuracy})


def test_predict_cuts_filled_rows_off_with_one_compilation():
    trainer, state = trained()
    before = len(trainer.compilations)
    found = trainer.predict(state, batches(pad=True).map(lambda b: b[0]))
    assert found.shape == (N, 2) and len(trainer.compilations) - before <= 1
    assert np.allclose(found, trainer.predict(state, X), rtol=1e-6, atol=1e-6)
    assert np.array_equal(trainer.predict(state, batches(X, pad=True).prefetch(2).skip(1)), found[SIZE:])
    with rng.scope(0):
        flat = kaun.Trainer(model=layers.linear(3, 3) >> layers.fn(jnp.ravel), optimizer=optax.sgd(0.1))
        start = flat.init()
    with pytest.raises(ValueError, match=r"predict cuts filled rows off .* item 1 has 12 rows for 4 of x"):
        flat.predict(start, batches(X, pad=True))


# A run


def test_a_padded_run_is_resumed_at_any_item_to_the_same_bytes(tmp_path):
    trainer, state = trained()
    data = batches(shuffle=True, pad=True).with_loss(losses.cross_entropy_sparse).epochs(3)
    whole = trainer.fit(state, data)
    for stop in (2, 3, 7):
        runs = checkpoint.Directory(tmp_path / str(stop), every=1)

        def killed(step, loss, state, stop=stop):
            if step == stop:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            trainer.fit(state, data, report=killed, checkpoints=runs)
        quiet = lambda step, loss, state: None
        assert same(whole, trainer.fit(state, data, report=quiet, checkpoints=runs))
    unpadded = batches(shuffle=True).with_loss(losses.cross_entropy_sparse).epochs(3)
    with pytest.raises(kaun.errors.ResumeMismatch, match="pad"):
        trainer.fit(state, unpadded, checkpoints=checkpoint.Directory(tmp_path / "7", every=1))


# What it refuses


def fits(data):
    trainer, state = trained()
    return trainer.fit(state, data)


TAKES = r"write with_loss\(losses\.mse\), or take where="
REFUSED = {
    "a loss without where": (lambda d: d.with_loss(lambda o, y: o.mean()), rf"The loss <lambda> .* {TAKES}"),
    "where is bound": (lambda d: d.with_loss(functools.partial(losses.mse, where=None)), TAKES),
    "fit of pairs": (fits, rf"fit of a pipeline whose items have no with_loss does not know which rows.* {TAKES}"),
    "losses by map": (lambda d: list(d.map(lambda b: (b[0], jnp.mean))), rf"map\(f\) to items with a loss .* {TAKES}"),
    "fit of losses by map": (lambda d: fits(d.map(lambda b: (b[0], jnp.mean))), TAKES),
    "a scalar": (
        lambda d: fits(d.with_loss(lambda o, y, *, where: o.mean())),
        r"<lambda> .* of padded or weighted rows must return a losses\.Mean.*return losses\.mse\.parts",
    ),
    "batch": (
        lambda d: d.batch(2),
        r"batch\(n\) does not know which rows of a batch are filled.*Data\.batches\(arrays",
    ),
    "map_batch": (lambda d: d.map_batch(2, list), r"map_batch\(n, f\) does not know which rows of a batch are filled"),
    "bucket": (lambda d: d.bucket(len, [4], 2), r"bucket\(length, edges, batch_size\) does not know which rows"),
    "zip": (
        lambda d: Data.zip(d, d),
        r"Data\.zip\(\*sources\) does not know .* Data\.batches\(\(x, y, z\), batch_size",
    ),
    "a function that returns it": (
        lambda d: list(Data.from_iterable(lambda: d)),
        r"Data\.from_iterable\(.*\) does not know which rows .*Use the pipeline itself",
    ),
    "a scalar metric that takes weights": (
        lambda d: trained()[0].evaluate(trained()[1], d, {"mean": lambda p, t, *, weights: p.mean()}),
        r"metric `<lambda>` .* must return a losses\.Mean or a pair \(sum, count\), received float32\[\].*\(weights \* v",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_what_would_count_filled_rows(name):
    run, message = REFUSED[name]
    with pytest.raises(TypeError, match=message):
        run(batches(pad=True))


def test_it_refuses_to_fill_and_to_drop_the_last_batch():
    with pytest.raises(ValueError, match=r"expected one of pad=True.*and drop_last=True, .* received both"):
        Data.batches(X, 4, drop_last=True, pad=True)


def test_how_much_is_filled_and_how_it_prints():
    data = batches(pad=True).with_loss(losses.cross_entropy_sparse).epochs(2)
    assert data.padding == (10, 2, 0, 0) and batches().padding is None
    assert "batch_size=4, pad=True)" in repr(data)
    pairs = Data.folds((X, Y), 3, SIZE, pad=True)
    assert [v.padding.filled_rows for _, v in pairs] == [0, 1, 1]
    assert {len(item.item[1]) for _, v in pairs for item in with_rows(v)} == {SIZE}
    assert [sum(len(y) for _, y in v) for _, v in pairs] == [4, 3, 3]
