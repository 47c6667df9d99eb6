"""Sums that are exact, and values that are read some items late."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun.metrics.parts import RowValues
from kaun.metrics.sums import (
    BatchMean,
    Counts,
    CountSums,
    DelayedReader,
    ExactMean,
    MetricSums,
    Ratio,
    add_results,
    run_ahead,
)


@given(st.integers(2, 9), st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_values_are_handed_on_once_in_order_and_never_more_than_a_window_wait(window, count, more):
    taken = []
    reader = DelayedReader(window, taken.extend)
    for k in range(count):
        reader.push({"k": jnp.int32(k)})
        assert window // 2 - 1 <= k + 1 - len(taken) < window or k + 1 < window
    reader.flush()
    assert [int(t["k"]) for t in taken] == list(range(count))
    reader.flush()
    assert len(taken) == count


@pytest.mark.parametrize("count", [0, 1, 15, 16, 100])
def test_a_pass_computes_ahead_of_what_it_reads(count):
    computed, taken = [], []

    def compute(item, number):
        computed.append(number)
        assert len(computed) - len(taken) <= 16
        return item, number

    assert run_ahead("abcdefghij" * (count // 10) + "klmnop"[: count % 10], compute, taken.extend) == count
    assert [number for _, number in taken] == computed == list(range(1, count + 1))


def test_a_pass_that_fails_reads_nothing_more():
    taken = []
    with pytest.raises(ZeroDivisionError):
        run_ahead([3, 2, 1, 0], lambda item, number: 1 / item, taken.extend)
    assert taken == []


@given(st.lists(st.tuples(st.floats(-1e30, 1e30), st.integers(1, 10**6)), min_size=1, max_size=50))
@settings(max_examples=60, deadline=None)
def test_a_total_is_the_exact_mean(pairs):
    together, alone = ExactMean(""), ExactMean("")
    together.add(Ratio([value for value, _ in pairs], [count for _, count in pairs]))
    for value, count in pairs:
        alone.add(Ratio([value], [count]))
    expected = sum(Fraction(v) for v, _ in pairs) / sum(c for _, c in pairs)
    assert together.result() == alone.result() == pytest.approx(float(expected), rel=1e-15, abs=1e-300)


def test_counts_of_nothing():
    for name, text in (
        ("", r"^The counts add up to 0: there is nothing to average"),
        ("f1", r"^The counts of 'f1' add"),
    ):
        with pytest.raises(ValueError, match=text):
            ExactMean(name).result()


def test_sums_by_name():
    sums = MetricSums()
    sums.add("mean", BatchMean(np.float32([0.1, 0.5]), np.int32([3, 1])))
    sums.add("mean", Ratio(np.float32([0.5]), np.int32([1])))
    sums.add("counts", Counts({"a": np.ones((3, 2), np.int32), "b": np.float32([0.1, 0.1, 0.1])}))
    sums.add("counts", Counts({"a": np.ones((1, 2), np.int32), "b": np.float32([0.1])}))
    assert sums["mean"] == pytest.approx((3 * float(np.float32(0.1)) + 1) / 5, rel=1e-16)
    assert sums["counts"]["a"].tolist() == [4, 4] and sums["counts"]["a"].dtype == np.int64
    assert math.isclose(sums["counts"]["b"], 4 * float(np.float32(0.1)), rel_tol=1e-15)
    with pytest.raises(
        ValueError, match=r"(?s)metric 'counts': counts must have the same shapes .*\n  a: .*\n.*classes\."
    ):
        sums.add("counts", Counts({"a": np.ones((1, 3), np.int32), "b": np.float32([0.1])}))


def test_rows_are_kept_in_order_and_copied_few_times():
    """Merged one batch after another, a thousand batches would copy the first one a thousand times."""
    sums, rows = CountSums("auc"), np.arange(1000, dtype=np.float32)
    for row in rows:
        sums.add(Counts({"auc": RowValues((row[None, None],), None), "n": np.ones(1, np.int32)}))
        assert len(sums._groups) <= 10
    found = sums.result()
    np.testing.assert_array_equal(found["auc"].columns[0], rows)
    assert found["n"] == 1000 and found["auc"].columns[0].dtype == np.float32


def test_scalars_are_read_in_one_call(monkeypatch):
    calls, real = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: calls.append(len(x)) or real(x))
    sums = MetricSums()
    add_results(sums, [{"a": Ratio(jnp.float32(1), 1)}, {"a": Ratio(2, 1), "b": Ratio(jnp.bfloat16(3), jnp.int8(2))}])
    assert calls == [2] and (sums["a"], sums["b"]) == (1.5, 1.5)
