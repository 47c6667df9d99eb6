"""Every metric with weights, over any cut into batches: scikit-learn's value for all rows at once, to 1e-12."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from kaun import metrics

CLASSES, SIZES = 4, (1, 8)  # few sizes of batches, because each shape is compiled
LABELS = {"labels": range(CLASSES)}
AVERAGED = {"average": "macro", "zero_division": 0, **LABELS}
f1_by_support = functools.partial(metrics.f1, average="weighted")


def of_ids(reference, **settings):
    return lambda t, p, w: reference(t, p.argmax(axis=-1), sample_weight=w, **settings)


# The metric, and scikit-learn's value of targets, predictions and weights in float64.
CLASSIFICATION = {
    "accuracy": (metrics.accuracy, of_ids(sklearn.accuracy_score)),
    "confusion_matrix": (metrics.confusion_matrix, of_ids(sklearn.confusion_matrix, **LABELS)),
    "f1": (f1_by_support, of_ids(sklearn.f1_score, **{**AVERAGED, "average": "weighted"})),
    "mean_iou": (metrics.mean_iou, of_ids(sklearn.jaccard_score, **AVERAGED)),
    "precision": (metrics.precision, of_ids(sklearn.precision_score, **AVERAGED)),
    "recall": (metrics.recall, of_ids(sklearn.recall_score, **AVERAGED)),
    "top_k_accuracy": (
        metrics.top_k_accuracy(2),
        lambda t, p, w: sklearn.top_k_accuracy_score(t, p, k=2, sample_weight=w, **LABELS),
    ),
}
BINARY = {
    "auc": (metrics.auc, lambda t, p, w: sklearn.roc_auc_score(t, p, sample_weight=w)),
    "average_precision": (
        metrics.average_precision,
        lambda t, p, w: sklearn.average_precision_score(t, p, sample_weight=w),
    ),
    "binary_accuracy": (metrics.binary_accuracy, lambda t, p, w: sklearn.accuracy_score(t, p > 0.5, sample_weight=w)),
}
REGRESSION = {
    "mean_absolute_error": (
        metrics.mean_absolute_error,
        lambda t, p, w: sklearn.mean_absolute_error(t, p, sample_weight=w),
    ),
    "r2": (metrics.r2, lambda t, p, w: sklearn.r2_score(t, p, sample_weight=w)),
    "rmse": (metrics.rmse, lambda t, p, w: sklearn.root_mean_squared_error(t, p, sample_weight=w)),
}


@st.composite
def batches(draw):
    """Bounds of batches, a random generator, and weights of the rows: none, floats of any scale, bools or integers."""
    left, bounds = draw(st.sampled_from([8, 25])), [0]
    while left:
        size = draw(st.sampled_from([size for size in SIZES if size <= left]))
        bounds.append(bounds[-1] + size)
        left -= size
    g, n = np.random.default_rng(draw(st.integers(0, 999))), bounds[-1]
    kind = draw(st.sampled_from(["none", "floats", "bools", "integers"]))
    if kind == "none":
        return bounds, g, None
    scale = np.float32(10.0 ** draw(st.integers(-20, 6)))
    weights = {
        "floats": g.random(n, np.float32) * scale,
        "bools": g.random(n) < 0.7,
        "integers": g.integers(0, 3 if scale < 1 else 2**30, n, np.int32),
    }[kind]
    weights[:2] = 1
    return bounds, g, weights


def over_batches(metric, p, t, w, bounds):
    counted = metrics.Counted.of(metric)
    weights = lambda i, j: None if w is None else w[i:j]
    parts = [counted.parts(p[i:j], t[i:j], weights=weights(i, j)) for i, j in itertools.pairwise(bounds)]
    return functools.reduce(lambda a, b: a + b, parts).result()


def compare(table, p, t, w, bounds):
    wide = lambda a: a.astype(np.float64) if a is not None and a.dtype.kind == "f" else a
    for name, (metric, reference) in table.items():
        expected = reference(wide(t), wide(p), wide(w))
        together = [metric(p, t, weights=w)] if len(p) in SIZES else []
        for found in (over_batches(metric, p, t, w, bounds), *together):
            assert type(found) is (np.ndarray if name == "confusion_matrix" else float)
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14, err_msg=name)


@given(batches())
@settings(max_examples=25, deadline=None)
def test_classification(cut):
    bounds, g, weights = cut
    scores = g.integers(0, 9, (bounds[-1], CLASSES)).astype(np.float32)  # some are equal
    compare(CLASSIFICATION, scores, g.integers(0, CLASSES, bounds[-1]), weights, bounds)


@given(batches())
@settings(max_examples=25, deadline=None)
def test_binary_scores(cut):
    bounds, g, weights = cut
    scores, targets = g.integers(0, 9, bounds[-1]).astype(np.float32) / 8, g.integers(0, 2, bounds[-1])
    targets[:2] = 0, 1
    compare(BINARY, scores, targets, weights, bounds)


@given(batches(), st.sampled_from([(), (3,)]), st.integers(-6, 7), st.integers(-3, 6))
@settings(max_examples=40, deadline=None)
def test_regression(cut, columns, mean, deviation):
    """Whether the mean is small or large against the deviations, up to where float32 has no digits left for these."""
    bounds, g, weights = cut
    noise = lambda: g.normal(size=(bounds[-1], *columns)) * 10.0**deviation
    targets = (10.0**mean + noise()).astype(np.float32)
    targets[0] = np.nextafter(targets[1], np.float32(np.inf))  # never all equal
    compare(REGRESSION, (targets + noise()).astype(np.float32), targets, weights, bounds)


def test_float64_arrays_of_numpy_keep_their_digits():
    g = np.random.default_rng(0)
    targets, weights = 1e9 + g.normal(size=50), g.random(50)
    predictions = targets + 1e-3 * g.normal(size=50)
    compare(REGRESSION, predictions, targets, weights, [0, 20, 50])
    targets = g.integers(0, 2, 50)
    compare(
        {k: BINARY[k] for k in ("auc", "average_precision")}, 1 + 1e-12 * predictions, targets, weights, [0, 20, 50]
    )


@pytest.mark.parametrize("dtype", [np.int32, pytest.param(bool, marks=pytest.mark.slow)])
def test_compiled_metrics_are_the_same_to_float32(dtype):
    """All in one program; integers and bools as weights too, under strict promotion of dtypes."""
    g = np.random.default_rng(0)
    scores, ids = g.random((12, CLASSES), np.float32), g.integers(0, CLASSES, 12).astype(np.int32)
    binary, real = (ids > 1).astype(np.float32), g.normal(size=12).astype(np.float32)

    @jax.jit
    def compiled(weights):
        found = {n: m(scores, ids, weights=weights) for n, (m, _) in CLASSIFICATION.items()}
        found |= {n: m(scores[:, 0], binary, weights=weights) for n, (m, _) in BINARY.items()}
        return found | {n: m(scores[:, 0], real, weights=weights) for n, (m, _) in REGRESSION.items()}

    weights = (g.integers(0, 3, 12)).astype(dtype)
    for name, found in compiled(weights).items():
        table = {**CLASSIFICATION, **BINARY, **REGRESSION}
        p = scores if name in CLASSIFICATION else scores[:, 0]
        t = ids if name in CLASSIFICATION else binary if name in BINARY else real
        expected = table[name][0](p, t, weights=weights)
        assert isinstance(found, jax.Array) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=3e-6, err_msg=name)
    if dtype is not bool:
        wrong = compiled(np.where(np.arange(12) == 3, -1, weights).astype(dtype))
        assert all(np.isnan(found).all() for found in wrong.values()), "a negative weight is seen"


PERPLEXITY = {
    "perplexity": (
        metrics.perplexity,
        lambda t, p, w: np.exp(
            sklearn.log_loss(
                t, np.exp(p) / np.exp(p).sum(axis=1, keepdims=True), sample_weight=w, labels=range(CLASSES)
            )
        ),
    )
}


@given(batches())
@settings(max_examples=20, deadline=None)
def test_perplexity_is_the_exponential_of_the_log_loss(cut):
    bounds, g, weights = cut
    logits = g.normal(size=(bounds[-1], CLASSES)).astype(np.float32)
    compare(PERPLEXITY, logits, g.integers(0, CLASSES, bounds[-1]), weights, bounds)


def test_perplexity_of_any_shape_and_compiled():
    g = np.random.default_rng(0)
    logits, targets = g.normal(size=(4, 5, CLASSES)).astype(np.float32), g.integers(0, CLASSES, (4, 5))
    found, weights = metrics.perplexity(logits, targets), g.random((4, 5), np.float32)
    assert found == metrics.perplexity(logits.reshape(20, CLASSES), targets.reshape(20))
    assert metrics.perplexity(logits[0, 0], targets[0, 0]) == metrics.perplexity(logits[0, :1], targets[0, :1])
    compiled = jax.jit(metrics.perplexity)(logits, targets, weights=weights)
    assert float(compiled) == pytest.approx(metrics.perplexity(logits, targets, weights=weights), rel=1e-6)
    assert metrics.perplexity(np.float16([[0, 0]]), np.array([1])) == pytest.approx(2, rel=1e-14)
    many = np.zeros((3, 2**20), np.float32)
    assert metrics.perplexity(many, np.array([0, 5, 9])) == pytest.approx(2**20, rel=1e-12)
