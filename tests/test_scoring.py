"""Metrics as sums over batches, without a trainer; with one they are in tests/test_evaluation.py."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from kaun import losses, metrics, scoring
from kaun.scoring import Counts, Mean, Ratio, Scores

P, T = jnp.ones((4, 3)), jnp.zeros(4, jnp.int32)


def test_what_a_metric_returns_becomes_a_part_that_adds_up():
    assert scoring.part_of("m", 2.0, P, T) == Mean(2.0, 4)
    assert scoring.part_of("m", (3, 2), P, T) == Ratio(3, 2)
    assert scoring.part_of("m", 2.0, P, None) == Mean(2.0, 4)
    counts = Counts({"a": jnp.ones(2)})
    assert scoring.part_of("m", counts, P, T) is counts
    with pytest.raises(TypeError, match=r"m must return a real scalar or a pair .* received float32\[4, 3\]"):
        scoring.part_of("m", P, P, T)
    with pytest.raises(TypeError, match=r"m must count in real numbers, received complex64\[\]\. Return arrays"):
        scoring.part_of("m", Counts(jnp.complex64(1)), P, T)
    with pytest.raises(ValueError, match=r"m returns a scalar, .* the targets do not tell: .*\(0: int32\[4\], 1: float32\[3\]\)"):
        scoring.part_of("m", 2.0, P, (T, jnp.ones(3)))
    with pytest.raises(ValueError, match=r"the predictions do not tell: .*\(no arrays\)"):
        scoring.part_of("m", 2.0, None, ())


def test_library_metrics_and_their_partials_give_counts_and_others_stay():
    for metric in (metrics.accuracy, metrics.f1, functools.partial(functools.partial(metrics.recall, average="micro"))):
        assert isinstance(scoring.summed(metric)(P, T), Counts)
    for metric in (losses.mse, functools.partial(losses.huber, delta=0.5), functools.partial(metrics.f1, P)):
        assert scoring.summed(metric) is metric


def test_means_and_ratios_mix_and_wide_values_stay_exact():
    scores = Scores({"b": max, "a": max})
    scores.add({"a": Mean(np.float32(0.1), 3), "b": Ratio(2**53, 1)})
    scores.add({"a": Ratio(np.float32(0.5), np.int32(1)), "b": Ratio(1, 1)})
    found = scores.results()
    assert found["a"] == pytest.approx((3 * float(np.float32(0.1)) + 0.5) / 4, rel=1e-16)
    assert list(found) == ["b", "a"] and found["b"] == (2**53 + 1) / 2


def test_counts_are_summed_in_int64_and_float64():
    seen = []
    counted = metrics.Counted(lambda p, t: None, lambda sums: seen.append(sums) or 1.5)
    scores = Scores({"m": counted})
    for _ in range(40):
        scores.add({"m": Counts((jnp.int32(2**31 - 1), jnp.array([True, False]), jnp.float32(0.1)))})
    assert scores.results() == {"m": 1.5}
    (big, flags, small), = seen
    assert int(big) == 40 * (2**31 - 1) and flags.tolist() == [40, 0]
    assert float(small) == pytest.approx(40 * float(np.float32(0.1)), rel=1e-14)


def test_checked_sorts_and_refuses():
    assert list(scoring.checked("here", {"b": max, "a": min})) == ["a", "b"]
    with pytest.raises(TypeError, match="here expected metrics as a dict"):
        scoring.checked("here", max)
