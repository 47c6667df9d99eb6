"""Parts of metrics: pytrees that know their metric, and add up."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import metrics
from kaun.metrics import CountedParts, parts

SCORES = np.float32([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
IDS = np.array([0, 1, 1, 0])
f1 = metrics.Counted.of(metrics.f1)


def test_parts_add_up_and_know_their_metric():
    one, two = f1.parts(SCORES[:1], IDS[:1]), f1.parts(SCORES[1:], IDS[1:])
    assert isinstance(one, CountedParts) and one.counted is f1
    assert (one + two).result() == metrics.f1(SCORES, IDS)
    weights = np.float32([1, 2, 0, 3])
    one, two = (f1.parts(SCORES[s], IDS[s], weights=weights[s]) for s in (slice(3), slice(3, 4)))
    assert (one + two).result() == metrics.f1(SCORES, IDS, weights=weights)
    assert f1(SCORES, IDS, weights=weights) == metrics.f1(SCORES, IDS, weights=weights)


def test_sums_of_parts_are_wide():
    counted = metrics.Counted(lambda p, t: {"n": jnp.int32(2**31 - 1), "x": jnp.float32(0.1)}, lambda s: s)
    total = functools.reduce(lambda a, b: a + b, [counted.parts(None, None)] * 3)
    assert total.counts["n"] == 3 * (2**31 - 1) and total.counts["n"].dtype == np.int64
    assert total.counts["x"].dtype == np.float64 and total.result() == total.counts


def test_parts_are_pytrees_that_a_compiled_function_may_return():
    weights = np.float32([1, 2, 0, 3])

    @jax.jit
    def compiled(p, t, w):
        auc = metrics.Counted.of(metrics.auc).parts(p[:, 1], t, weights=w)
        return f1.parts(p, t), f1.parts(p, t, weights=w) + f1.parts(p, t, weights=w), auc + auc

    plain, weighted, auc = compiled(SCORES, IDS, weights)
    assert plain.counted == f1 and jax.tree.structure(plain) == jax.tree.structure(f1.parts(SCORES, IDS))
    assert jax.tree.map(jnp.add, plain, plain).result() == metrics.f1(SCORES, IDS) == plain.result()
    assert weighted.result() == metrics.f1(SCORES, IDS, weights=weights)
    assert auc.result() == metrics.auc(SCORES[:, 1], IDS, weights=weights)
    inside = jax.jit(lambda p, t: f1.parts(p, t).result())(SCORES, IDS)
    assert float(inside) == pytest.approx(metrics.f1(SCORES, IDS), rel=1e-6)


def test_a_metric_is_equal_to_itself_made_again():
    """Otherwise each new partial would be another structure, and compiled again."""
    weighted = lambda: metrics.Counted.of(functools.partial(metrics.f1, average="weighted"))
    assert weighted() == weighted() and hash(weighted()) == hash(weighted())
    assert weighted() != f1 and f1 != metrics.Counted.of(metrics.recall) and f1 != metrics.f1
    top = lambda k: metrics.Counted.of(metrics.top_k_accuracy(k))
    assert top(2) == top(np.int64(2)) != top(1)
    own = metrics.Counted(lambda p, t: t.size, float)
    assert own == metrics.Counted(own.counts, float) != metrics.Counted(lambda p, t: t.size, float)


def test_parts_of_several_metrics_do_not_add_up():
    recall = metrics.Counted.of(metrics.recall).parts(SCORES, IDS)
    with pytest.raises(ValueError, match=r"^parts of one metric add up, received those of Counted\(.*Make the Counted"):
        f1.parts(SCORES, IDS) + recall
    wide = f1.parts(np.eye(3, dtype=np.float32), np.arange(3))
    with pytest.raises(
        ValueError,
        match=r"(?s)^parts must have counts of the same shapes to add up; in the second\n  tp: expected int64\[2\], found int64\[3\]",
    ):
        f1.parts(SCORES, IDS) + wide
    with pytest.raises(TypeError, match="unsupported operand"):
        recall + 1


def test_rows_are_kept_in_their_dtypes():
    """What the docs say of the memory of auc: 5 bytes a row, 9 with weights."""
    auc = metrics.Counted.of(metrics.auc)
    scores, targets = np.zeros(1000, np.float32), np.arange(1000) % 2
    for weights, expected in ((None, 5), (np.ones(1000, np.float32), 9)):
        kept = (auc.parts(scores, targets, weights=weights) + auc.parts(scores, targets, weights=weights)).counts
        assert isinstance(kept, parts.RowValues)
        assert sum(column.nbytes for column in kept.columns) == 2000 * expected


def test_evaluate_takes_parts():
    weights = np.float32([1, 2, 0, 3])
    auc, matrix = metrics.Counted.of(metrics.auc), metrics.Counted.of(metrics.confusion_matrix)
    cuts = [slice(3), slice(3, 4)]
    found = metrics.evaluate(lambda s: auc.parts(SCORES[s, 1], IDS[s], weights=weights[s]), cuts)
    assert type(found) is float and found == metrics.auc(SCORES[:, 1], IDS, weights=weights)
    named = metrics.evaluate_many(lambda s: {"n": (4, 1), "matrix": matrix.parts(SCORES[s], IDS[s])}, cuts)
    assert named["n"] == 4 and named["matrix"].tolist() == [[1, 1], [1, 1]]


def test_evaluate_wants_the_parts_of_one_metric():
    recall = metrics.Counted.of(metrics.recall)
    with pytest.raises(
        ValueError,
        match=r"evaluate: `<lambda>` \(.*\) must return the parts of one metric for every item; those of item 2 are of",
    ):
        metrics.evaluate(lambda c: c.parts(SCORES, IDS), [f1, recall])
    with pytest.raises(ValueError, match=r"the parts of one metric for 'a' for every item; those of item 2"):
        metrics.evaluate_many(lambda c: {"a": c.parts(SCORES, IDS) if c else 1.0}, [f1, None])
    with pytest.raises(TypeError, match=r"evaluate: .* received a value that JAX is tracing, int32\[2\]"):
        jax.jit(lambda p: metrics.evaluate(lambda c: c.parts(p, IDS), [f1]))(SCORES)
    with pytest.raises(ValueError, match="The weights add up to 0") as caught:
        metrics.evaluate(lambda c: c.parts(SCORES, IDS, weights=np.zeros(4)), [f1])
    assert any(note.startswith("In evaluate: `<lambda>`") for note in caught.value.__notes__)


# What is special about single metrics.


def test_r2_loses_nothing_where_the_mean_is_large():
    """Sums of squares in float64 would leave four digits, and deviations from a mean in float32 none."""
    targets = (1e7 + np.arange(64)).astype(np.float32)
    predictions = targets + np.float32(1)
    counted = metrics.Counted.of(metrics.r2)
    single = [counted.parts(predictions[i : i + 1], targets[i : i + 1]) for i in range(64)]
    for rows in (single, single[::-1]):
        found = functools.reduce(lambda a, b: a + b, rows).result()
        assert found == pytest.approx(1 - 64 / (64 * (64**2 - 1) / 12), rel=1e-14)


def test_r2_of_equal_targets_and_of_one_row():
    same = np.float32([2.1, 2.1, 2.1])
    assert metrics.r2(same, same) == 1.0
    assert metrics.r2(same + 1, same) == 0.0
    assert math.isnan(metrics.r2(same[:1], same[:1]))
    assert math.isnan(metrics.r2(np.float32([np.nan, 1]), np.float32([1, 1])))
    assert metrics.r2(np.stack([same, same], 1), np.stack([same, np.arange(3, dtype=np.float32)], 1)) < 1


def test_errors_take_integers_as_targets_and_refuse_complex_ones():
    assert metrics.rmse(np.float32([1, 3]), np.array([1, 1])) == math.sqrt(2)
    assert metrics.mean_absolute_error(np.float32([1, 0.5]), np.array([True, False])) == 0.25
    for metric in (metrics.rmse, metrics.mean_absolute_error, metrics.r2):
        with pytest.raises(
            TypeError, match=rf"^{metric.__name__} expected targets that are real numbers, received complex64\[2\]"
        ):
            metric(np.float32([1, 3]), np.ones(2, np.complex64))
        with pytest.raises(TypeError, match=rf"{metric.__name__} expected floating predictions, received int"):
            metric(np.array([1, 3]), np.float32([1, 3]))
        with pytest.raises(ValueError, match=rf"{metric.__name__} expected equal shapes"):
            metric(np.ones((2, 1), np.float32), np.ones(2, np.float32))
        with pytest.raises(ValueError, match=rf"{metric.__name__} expected at least one element"):
            metric(np.ones(0, np.float32), np.ones(0, np.float32))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_errors_of_any_scale(scale):
    """Their squares are outside of what float32 holds."""
    p, t = np.float32([scale, 3 * scale]), np.float32([0, 0])
    assert metrics.rmse(p, t) == pytest.approx(scale * math.sqrt(5), rel=1e-6)


def test_areas_without_both_classes():
    scores = np.float32([0.1, 0.2])
    assert math.isnan(metrics.auc(scores, np.array([0, 0]))) and math.isnan(metrics.auc(scores, np.array([1, 1])))
    assert metrics.average_precision(scores, np.array([0, 0])) == 0.0
    assert metrics.average_precision(scores, np.array([1, 1])) == 1.0
    assert metrics.auc(np.zeros(4, np.float32), np.array([0, 1, 1, 0])) == 0.5
    assert metrics.auc(np.float32([-np.inf, np.inf]), np.array([0, 1])) == 1.0


@pytest.mark.parametrize("metric", [metrics.auc, metrics.average_precision])
def test_areas_of_what_cannot_be_ranked(metric):
    scores, targets = np.float32([0.1, np.nan, 0.3]), np.array([0, 1, 1])
    assert math.isnan(metric(scores, targets)) and np.isnan(jax.jit(metric)(scores, targets))
    assert np.isnan(jax.jit(metric)(scores[[0, 2]], np.array([0, 2]))), "a target that is neither 0 nor 1"
    with pytest.raises(ValueError, match=rf"{metric.__name__} expected targets in 0 and 1, received targets\[1\] = 2"):
        metric(scores, np.array([0, 2, 1]))
    with pytest.raises(ValueError, match=rf"{metric.__name__} expected equal shapes"):
        metric(SCORES, IDS)


def test_a_confusion_matrix_has_targets_along_axis_0():
    found = metrics.confusion_matrix(np.array([1, 1, 2]), np.array([0, 0, 2]), num_classes=3)
    assert found.dtype == np.int64 and found.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]
    broken = SCORES.copy()
    broken[0] = np.nan
    for weights in (None, np.ones(4, np.float32)):
        assert np.isnan(metrics.confusion_matrix(broken, IDS, weights=weights)).all()
    assert np.isnan(jax.jit(metrics.confusion_matrix)(SCORES, IDS + 2)).all()


def test_the_k_of_top_k_accuracy():
    for k in (True, 1.0, "1"):
        with pytest.raises(TypeError, match=rf"^top_k_accuracy expected an int, received {type(k).__name__}\. Write"):
            metrics.top_k_accuracy(k)
    with pytest.raises(ValueError, match=r"^top_k_accuracy expected k of at least 1, received 0\."):
        metrics.top_k_accuracy(0)
    with pytest.raises(
        ValueError,
        match=r"^top_k_accuracy expected at least 3 classes, received predictions float32\[4, 2\]: each row would be right\. Write top_k_accuracy\(1\)\.",
    ):
        metrics.top_k_accuracy(3)(SCORES, IDS)
    assert metrics.top_k_accuracy(2)(SCORES, IDS) == 1.0
    assert metrics.top_k_accuracy(1)(SCORES, IDS) == metrics.accuracy(SCORES, IDS)
    with pytest.raises(TypeError, match=r"^top_k_accuracy expected floating predictions"):
        metrics.top_k_accuracy(1)(IDS, IDS)
    broken = SCORES.copy()
    broken[0] = np.nan
    assert math.isnan(metrics.top_k_accuracy(1)(broken, IDS))


def test_a_perplexity_may_be_infinite_but_not_wrong():
    logits = np.float32([[0, 2000], [0, 0]])
    assert metrics.perplexity(logits, np.array([0, 0])) == math.inf
    assert np.isnan(jax.jit(metrics.perplexity)(logits, np.array([0, 2])))
    with pytest.raises(ValueError, match=r"perplexity expected targets in 0 to 1, received targets\[1\] = 2"):
        metrics.perplexity(logits, np.array([0, 2]))
