"""Counts of classification: they add up, and the score of a sum is that of all rows. The scores are tests/metrics/test_functions.py's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import metrics
from kaun.metrics import counts

CLASSES = 3
PAIRS = st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1))
SIZES = st.sampled_from([1, 6])  # few, because each shape is compiled
RATIOS = {"precision": lambda tp, fp, fn: (tp, tp + fp), "f1": lambda tp, fp, fn: (2 * tp, 2 * tp + fp + fn)}


@given(SIZES, SIZES, st.data())
@settings(max_examples=60, deadline=None)
def test_counts_of_two_parts_add_up_to_those_of_the_whole(cut, more, data):
    p, t = np.array(data.draw(st.lists(PAIRS, min_size=cut + more, max_size=cut + more)), np.int32).T
    count = lambda a, b: counts.class_counts("f1", a, b, CLASSES)
    whole, parts = count(p, t), jax.tree.map(np.add, count(p[:cut], t[:cut]), count(p[cut:], t[cut:]))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    for name, of in RATIOS.items():
        for average in ("macro", "micro", "weighted"):
            score = counts.averaged(parts, average, of)
            assert type(score) is float and score == getattr(metrics, name)(p, t, average, num_classes=CLASSES)


def test_shares_count_what_is_right_and_what_cannot_be_counted():
    scores = np.array([[1, 0], [np.nan, 1], [0, 1]], np.float32)
    found = counts.class_share("accuracy", scores, np.array([0, 1, 0]))
    assert [int(v) for v in found] == [1, 3, 1]
    assert np.isnan(counts.share(found))
    assert counts.share(counts.Share(np.int64(2**40), np.int64(2**41), np.int64(0))) == 0.5
    found = counts.binary_share("binary_accuracy", np.array([0.2, 0.9], np.float32), np.array([0, 1]), 0.95)
    assert [int(v) for v in found] == [1, 2, 0] and counts.share(found) == 0.5


def test_traced_counts_give_traced_scores():
    scores, targets = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0])
    share = jax.jit(lambda s, t: counts.share(counts.class_share("accuracy", s, t)))
    assert share(scores, targets).dtype == jnp.float32 and float(share(scores, targets)) == 0.5
    assert np.isnan(share(scores, targets + 2))
    f1 = jax.jit(lambda s, t: counts.averaged(counts.class_counts("f1", s, t, None), "macro", RATIOS["f1"]))
    assert float(f1(scores, targets)) == pytest.approx(1 / 3)


def test_an_average_is_one_of_three():
    for average in ("macro", "micro", "weighted"):
        counts.check_average("f1", average)
    with pytest.raises(ValueError, match=r'f1 expected average="macro", "micro" or "weighted", received None'):
        counts.check_average("f1", None)
