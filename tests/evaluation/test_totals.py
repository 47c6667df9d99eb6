"""Metrics as sums over batches, without a trainer; with one they are in tests/evaluation/test_passes.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import losses, metrics
from kaun.evaluation import totals
from kaun.evaluation.totals import MetricTotals, PackedMetrics
from kaun.metrics import BatchMean, Counts, Ratio

P, T = jnp.ones((4, 3)), jnp.zeros(4, jnp.int32)


def of_one_batch(parts):
    packed = PackedMetrics.of(parts)
    return PackedMetrics(packed.form, [np.asarray(vector)[None] for vector in packed.vectors])


def test_what_a_metric_returns_becomes_a_part_that_adds_up():
    assert totals.part_of("m", 2.0, P, T) == BatchMean(2.0, 4)
    assert totals.part_of("m", (3, 2), P, T) == Ratio(3, 2)
    assert totals.part_of("m", 2.0, P, None) == BatchMean(2.0, 4)
    counts = Counts({"a": jnp.ones(2)})
    assert totals.part_of("m", counts, P, T) is counts
    with pytest.raises(TypeError, match=r"m must return a real scalar or a pair .* received float32\[4, 3\]"):
        totals.part_of("m", P, P, T)
    with pytest.raises(TypeError, match=r"m must count in real numbers, received complex64\[\]\. Return arrays"):
        totals.part_of("m", Counts(jnp.complex64(1)), P, T)
    with pytest.raises(
        ValueError,
        match=r"m returns a scalar, .* the targets do not all have one length .*\(0: int32\[4\], 1: float32\[3\]\)",
    ):
        totals.part_of("m", 2.0, P, (T, jnp.ones(3)))
    with pytest.raises(ValueError, match=r"the predictions do not all have one length .*\(no arrays\)"):
        totals.part_of("m", 2.0, None, ())


def test_library_metrics_and_their_partials_give_counts_and_others_stay():
    for metric in (metrics.accuracy, metrics.f1, functools.partial(functools.partial(metrics.recall, average="micro"))):
        assert isinstance(totals.with_counts(metric)(P, T), Counts)
    for metric in (max, lambda p, t: losses.mse(p, t), functools.partial(metrics.f1, P)):
        assert totals.with_counts(metric) is metric
    assert totals.with_counts(losses.mse) is losses.mse.parts
    bound = totals.with_counts(functools.partial(losses.huber, delta=0.5))
    assert (bound.func, bound.args, bound.keywords) == (losses.huber.parts, (), {"delta": 0.5})


def test_means_and_ratios_mix_and_nothing_is_rounded():
    totals_of_all = MetricTotals({"b": max, "a": max})
    totals_of_all.take(of_one_batch({"a": BatchMean(np.float32(0.1), 3), "b": Ratio(np.float32(2**60), 1)}))
    totals_of_all.take(of_one_batch({"a": Ratio(np.float32(0.5), np.int32(1)), "b": Ratio(np.float32(-(2**60)), 1)}))
    totals_of_all.take(of_one_batch({"a": BatchMean(jnp.bfloat16(0.5), 1), "b": Ratio(True, jnp.int8(2))}))
    found = totals_of_all.results()
    assert found["a"] == pytest.approx((3 * float(np.float32(0.1)) + 1) / 5, rel=1e-16)
    assert list(found) == ["b", "a"] and found["b"] == 0.25


PARTS = st.lists(
    st.tuples(st.floats(-1e6, 1e6, width=32), st.integers(1, 99), st.lists(st.integers(0, 9), min_size=1, max_size=3)),
    min_size=1,
    max_size=40,
)


@given(PARTS)
@settings(max_examples=30, deadline=None)
def test_packing_loses_nothing(parts):
    """Each batch alone, stacked with those of its form, is what went in."""
    made = [
        {"m": BatchMean(np.float32(v), n), "c": Counts({"k": np.array(k, np.int32), "b": v > 0})} for v, n, k in parts
    ]
    packed = [of_one_batch(p) for p in made]
    for given_, found in zip(made, packed, strict=True):
        same = [p for p in packed if p.form == found.form]
        stacked = PackedMetrics.stacked(found.form, same)
        index = next(i for i, p in enumerate(same) if p is found)
        one = jax.tree.map(lambda a: a[index], stacked)
        assert jax.tree.structure(one) == jax.tree.structure(given_)
        jax.tree.map(np.testing.assert_array_equal, one, given_)


@pytest.mark.parametrize("n", [1, 40, 200])
def test_counts_are_summed_in_int64_and_float64(n):
    seen = []
    counted = metrics.Counted(lambda p, t: None, lambda sums: seen.append(sums) or 1.5)
    totals_of_all = MetricTotals({"m": counted})
    for _ in range(n):
        totals_of_all.take(
            of_one_batch({"m": Counts((jnp.int32(2**31 - 1), jnp.array([True, False]), jnp.float32(0.1)))})
        )
    assert totals_of_all.results() == {"m": 1.5}
    ((big, flags, small),) = seen
    assert int(big) == n * (2**31 - 1) and flags.tolist() == [n, 0]
    assert float(small) == pytest.approx(n * float(np.float32(0.1)), rel=1e-14)


def test_what_waits_on_the_host_is_bounded_in_bytes_too():
    totals_of_all = MetricTotals({"m": metrics.Counted(lambda p, t: None, lambda sums: float(sums.sum()))})
    batch = of_one_batch({"m": Counts(np.ones(2**17, np.float32))})
    for _ in range(40):
        totals_of_all.take(batch)
        assert sum(v.nbytes for b in totals_of_all._host for v in b.vectors) <= 2**20
    assert totals_of_all.results() == {"m": 40 * 2.0**17}


def test_check_metrics_sorts_and_refuses():
    assert list(totals.check_metrics("here", {"b": max, "a": min})) == ["a", "b"]
    with pytest.raises(TypeError, match="here expected metrics as a dict"):
        totals.check_metrics("here", max)
