"""Weights of the metrics: what they mean, and which are refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import metrics

SCORES = np.float32([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1], [0.4, 0.5, 0.1]])
CALLS = {
    "accuracy": (metrics.accuracy, SCORES, np.array([0, 1, 1, 2])),
    "auc": (metrics.auc, SCORES[:, 0], np.array([1, 0, 1, 0])),
    "average_precision": (metrics.average_precision, SCORES[:, 0], np.array([1, 0, 1, 0])),
    "binary_accuracy": (metrics.binary_accuracy, SCORES[:, 0], np.array([1, 0, 1, 0])),
    "confusion_matrix": (metrics.confusion_matrix, SCORES, np.array([0, 1, 1, 2])),
    "f1": (metrics.f1, SCORES, np.array([0, 1, 1, 2])),
    "mean_absolute_error": (metrics.mean_absolute_error, SCORES[:, 0], np.float32([1, 2, 4, 0])),
    "mean_iou": (metrics.mean_iou, SCORES, np.array([0, 1, 1, 2])),
    "perplexity": (metrics.perplexity, SCORES, np.array([0, 1, 1, 2])),
    "precision": (metrics.precision, SCORES, np.array([0, 1, 1, 2])),
    "r2": (metrics.r2, SCORES[:, 0], np.float32([1, 2, 4, 0])),
    "recall": (metrics.recall, SCORES, np.array([0, 1, 1, 2])),
    "rmse": (metrics.rmse, SCORES[:, 0], np.float32([1, 2, 4, 0])),
    "top_k_accuracy": (metrics.top_k_accuracy(2), SCORES, np.array([0, 1, 1, 2])),
}
every_metric = pytest.mark.parametrize("name", CALLS)
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)


def test_every_metric_is_here():
    others = {"Counted", "Tracker", "evaluate", "evaluate_many"}
    assert set(CALLS) == set(metrics.__all__) - others


@every_metric
@pytest.mark.parametrize("dtype", [bool, np.int8, np.float32, np.float64, jnp.bfloat16])
def test_a_row_of_weight_0_counts_nothing_whatever_it_holds(name, dtype):
    """Padding with label -1 and predictions that are NaN, as masks leave it out."""
    metric, p, t = CALLS[name]
    bad_p, bad_t = np.concatenate([p, np.full_like(p[:2], np.nan)]), np.concatenate([t, [-1, 100]]).astype(t.dtype)
    weights = np.array([1, 1, 1, 1, 0, 0]).astype(dtype)
    close(metric(bad_p, bad_t, weights=weights), metric(p, t))
    close(metric(jnp.asarray(bad_p), jnp.asarray(bad_t), weights=jnp.asarray(weights.astype(np.float32))), metric(p, t))


@every_metric
def test_a_weight_of_two_is_the_row_twice(name):
    metric, p, t = CALLS[name]
    again = np.array([0, 0, 1, 2, 2, 3])
    for weights in (np.array([2, 1, 2, 1]), np.float32([0.5, 0.25, 0.5, 0.25])):
        unit = weights.sum() / 6 if name == "confusion_matrix" else 1
        close(metric(p, t, weights=weights), metric(p[again], t[again]) * unit)


@every_metric
def test_weights_that_are_all_0_leave_nothing_to_average(name):
    metric, p, t = CALLS[name]
    for weights in (np.zeros(4, np.float32), np.zeros(4, bool), jnp.zeros(4, jnp.int32)):
        with pytest.raises(ValueError, match=r"^The weights add up to 0: there is nothing to average\. Give at least"):
            metric(p, t, weights=weights)


@every_metric
def test_weights_are_finite_and_not_negative(name):
    metric, p, t = CALLS[name]
    for bad, shown in ((-1, r"-1\.0"), (np.nan, "nan"), (np.inf, "inf")):
        with pytest.raises(
            ValueError,
            match=rf"^{name} expected weights to be finite and not negative, received weights\[2\] = {shown} \(1 of 4 are not\)\.",
        ):
            metric(p, t, weights=np.array([1, 1, bad, 1], np.float32))


@every_metric
def test_weights_are_arrays_of_real_numbers_for_rows_or_elements(name):
    metric, p, t = CALLS[name]
    with pytest.raises(TypeError, match=rf"^{name} expected an array for weights, received list\. Write jnp\.asarray"):
        metric(p, t, weights=[1, 1, 1, 1])
    with pytest.raises(TypeError, match=rf"^{name} expected weights that are real numbers, received complex64\[4\]\."):
        metric(p, t, weights=np.ones(4, np.complex64))
    for shape in ((), (3,), (4, 1), (1,)):
        with pytest.raises(
            ValueError,
            match=rf"^{name} expected a weight for each element \[4\], received weights float32\[.*\]\. Weights are broadcast",
        ):
            metric(p, t, weights=np.ones(shape, np.float32))


def test_weights_of_rows_are_those_of_their_elements():
    targets, weights = np.array([[0, 1], [1, 2]]), np.float32([1, 3])
    scores = SCORES.reshape(2, 2, 3)
    for metric in (metrics.accuracy, metrics.f1, metrics.perplexity, metrics.mean_iou):
        close(
            metric(scores, targets, weights=weights), metric(scores, targets, weights=weights.repeat(2).reshape(2, 2))
        )
    with pytest.raises(
        ValueError, match=r"each element \[2, 2\] or one for each row \[2\], received weights float32\[4\]"
    ):
        metrics.accuracy(scores, targets, weights=np.ones(4, np.float32))


def test_weights_of_elements_make_a_mean_for_each_column():
    p, t = np.float32([[1, 2], [3, 4]]), np.float32([[0, 0], [0, 0]])
    weights = np.float32([[1, 0], [3, 2]])
    assert metrics.mean_absolute_error(p, t, weights=weights) == ((1 + 9) / 4 + 4) / 2
    with pytest.raises(ValueError, match="The weights add up to 0"):
        metrics.rmse(p, t, weights=np.float32([[1, 0], [3, 0]]))


def test_large_integers_as_weights_do_not_overflow():
    """A sum in int32 would be negative here."""
    weights = np.full(4, 2**30, np.int32)
    assert metrics.accuracy(SCORES, CALLS["accuracy"][2], weights=weights) == 0.5
    found = metrics.confusion_matrix(SCORES, CALLS["accuracy"][2], weights=weights)
    assert found.dtype == np.int64 and found.sum() == 2**32
    compiled = jax.jit(metrics.accuracy)(SCORES, CALLS["accuracy"][2], weights=weights)
    assert compiled == 0.5


def test_scalars_have_scalar_weights():
    for weights in (np.float32(2), np.array(True)):
        assert metrics.accuracy(SCORES[0], np.array(0), weights=weights) == 1.0
        assert metrics.rmse(np.float32(3), np.float32(1), weights=weights) == 2.0
    assert math.isnan(metrics.auc(np.float32(3), np.array(1), weights=np.float32(1)))
