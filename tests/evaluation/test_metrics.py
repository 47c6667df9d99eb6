"""evaluate with weights, and with metrics that are arrays: scikit-learn's values however the data is cut."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

import kaun
from kaun import Layer, Vars, metrics, rng

CLASSES = 3
LABELS = {"labels": range(CLASSES)}
AVERAGED = {"average": "macro", "zero_division": 0, **LABELS}


@pytest.fixture(scope="module")
def identity():
    """A trainer whose model gives its input back."""
    init = lambda *, dtype: Vars(params={"unused": jnp.zeros(1, dtype)}, state={}, dtype=dtype)
    model = Layer(init=init, apply=lambda vars, x, *, training, ctx: (x, vars), name="identity")
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
        return trainer, trainer.init()


def weighted(metric, column=None, targets="ids"):
    counted = metrics.Counted.of(metric)
    pick = lambda p: p if column is None else p[:, column]
    return metrics.Counted(lambda p, y: counted.counts(pick(p), y[targets], weights=y["weights"]), counted.result)


WEIGHTED = {
    "accuracy": weighted(metrics.accuracy),
    "auc": weighted(metrics.auc, 1, "binary"),
    "average_precision": weighted(metrics.average_precision, 1, "binary"),
    "confusion_matrix": weighted(metrics.confusion_matrix),
    "f1": weighted(metrics.f1),
    "mean_absolute_error": weighted(metrics.mean_absolute_error, 0, "real"),
    "mean_iou": weighted(metrics.mean_iou),
    "r2": weighted(metrics.r2, 0, "real"),
    "rmse": weighted(metrics.rmse, 0, "real"),
    "top_k": weighted(metrics.top_k_accuracy(2)),
}


def expected(p, y):
    w, ids, real = y["weights"].astype(float), p.argmax(axis=-1), (y["real"].astype(float), p[:, 0].astype(float))
    return {
        "accuracy": sklearn.accuracy_score(y["ids"], ids, sample_weight=w),
        "auc": sklearn.roc_auc_score(y["binary"], p[:, 1], sample_weight=w),
        "average_precision": sklearn.average_precision_score(y["binary"], p[:, 1], sample_weight=w),
        "confusion_matrix": sklearn.confusion_matrix(y["ids"], ids, sample_weight=w, **LABELS),
        "f1": sklearn.f1_score(y["ids"], ids, sample_weight=w, **AVERAGED),
        "mean_absolute_error": sklearn.mean_absolute_error(*real, sample_weight=w),
        "mean_iou": sklearn.jaccard_score(y["ids"], ids, sample_weight=w, **AVERAGED),
        "r2": sklearn.r2_score(*real, sample_weight=w),
        "rmse": sklearn.root_mean_squared_error(*real, sample_weight=w),
        "top_k": sklearn.top_k_accuracy_score(y["ids"], p, k=2, sample_weight=w, **LABELS),
    }


@given(st.lists(st.sampled_from([2, 5]), min_size=1, max_size=90), st.integers(0, 999), st.sampled_from([0, 1000]))
@settings(max_examples=30, deadline=None)
def test_weighted_metrics_over_batches(identity, sizes, seed, mean):
    trainer, state = identity
    g, n = np.random.default_rng(seed), sum(sizes)
    p = (g.integers(0, 9, (n, CLASSES)) + mean).astype(np.float32)
    y = {
        "binary": g.integers(0, 2, n, np.int32),
        "ids": g.integers(0, CLASSES, n, np.int32),
        "real": (g.normal(size=n) + mean).astype(np.float32),
        "weights": g.random(n, np.float32) * (g.random(n) < 0.8),
    }
    y["binary"][:2], y["weights"][:2] = (0, 1), 1
    rows = [slice(*pair) for pair in itertools.pairwise(np.cumsum([0, *sizes]))]
    items = [(p[s], {name: values[s] for name, values in y.items()}) for s in rows]
    found = trainer.evaluate(state, items, WEIGHTED)
    for name, value in expected(p, y).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-14, err_msg=name)
        assert type(found[name]) is (np.ndarray if name == "confusion_matrix" else float)


def test_a_batch_may_weigh_nothing_but_not_all_of_them(identity):
    trainer, state = identity
    p, ids = np.eye(CLASSES, dtype=np.float32), np.arange(CLASSES, dtype=np.int32)
    on = {"f1": weighted(metrics.f1), "accuracy": weighted(metrics.accuracy)}
    item = lambda weight: (p, {"ids": ids, "weights": np.full(CLASSES, weight)})
    assert trainer.evaluate(state, [item(False), item(True)], on) == {"accuracy": 1.0, "f1": 1.0}
    with pytest.raises(ValueError, match="The weights add up to 0: there is nothing to average") as caught:
        trainer.evaluate(state, [item(False)], on)
    assert "In metric 'accuracy'." in caught.value.__notes__


def test_metrics_as_they_are_and_their_partials(identity):
    trainer, state = identity
    g = np.random.default_rng(0)
    p, ids = g.normal(size=(9, CLASSES)).astype(np.float32), g.integers(0, CLASSES, 9, np.int32)
    on = {"perplexity": metrics.perplexity, "matrix": metrics.confusion_matrix, "top": metrics.top_k_accuracy(2)}
    found = trainer.evaluate(state, [(p[:5], ids[:5]), (p[5:], ids[5:])], on)
    assert found["perplexity"] == pytest.approx(metrics.perplexity(p, ids), rel=1e-6)
    assert found["matrix"].dtype == np.int64 and (found["matrix"] == metrics.confusion_matrix(p, ids)).all()
    assert found["top"] == metrics.top_k_accuracy(2)(p, ids)
    by_ids = functools.partial(metrics.confusion_matrix, num_classes=CLASSES)
    found = trainer.evaluate(state, [(ids, ids)], {"matrix": by_ids})
    assert (found["matrix"] == np.diag(np.bincount(ids, minlength=CLASSES))).all()


def test_a_result_of_ones_own_may_be_an_array(identity):
    trainer, state = identity
    counted = metrics.Counted(lambda p, t: p.sum(axis=0), lambda sums: sums / 2)
    found = trainer.evaluate(state, [(np.ones((2, 3), np.float32), None)] * 2, {"halves": counted})
    assert found["halves"].dtype == np.float64 and found["halves"].tolist() == [2, 2, 2]


def test_columns_that_change_between_batches_are_refused(identity):
    trainer, state = identity
    items = [(a := np.ones((2, n), np.float32), a) for n in (3, 4)]
    for metric in (metrics.rmse, metrics.r2):
        with pytest.raises(
            ValueError,
            match=r"(?s)metric 'own': counts must have the same shapes .*expected float64\[3\], found float64\[4",
        ):
            trainer.evaluate(state, items, {"own": metric})
