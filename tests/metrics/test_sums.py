"""Sums that are exact, and values that are fetched some later."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun.metrics.sums import DelayedReader, ExactMean, is_real_scalar


@given(st.integers(2, 9), st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_values_are_handed_on_once_in_order_and_never_more_than_a_window_wait(window, count, more):
    taken = []
    lagging = DelayedReader(window, taken.extend)
    for k in range(count):
        lagging.push({"k": jnp.int32(k)})
        assert window // 2 - 1 <= k + 1 - len(taken) < window or k + 1 < window
    lagging.flush()
    assert [int(t["k"]) for t in taken] == list(range(count))
    lagging.flush()
    assert len(taken) == count


@given(st.lists(st.tuples(st.floats(-1e30, 1e30), st.integers(1, 10**6)), min_size=1, max_size=50))
@settings(max_examples=60, deadline=None)
def test_a_total_is_the_exact_mean(pairs):
    added, taken = ExactMean(16), ExactMean(16)
    for pair in pairs:
        added.add(*pair)
        taken.take([pair])
    expected = sum(Fraction(v) for v, _ in pairs) / sum(c for _, c in pairs)
    assert added.mean("") == taken.mean("") == pytest.approx(float(expected), rel=1e-15, abs=1e-300)
    assert added.added == len(pairs)


def test_counts_of_nothing():
    with pytest.raises(ValueError, match=r"^The counts add up to 0: there is nothing to average"):
        ExactMean(4).mean("")
    with pytest.raises(ValueError, match=r"^The counts of 'f1' add up to 0"):
        ExactMean(4).mean("f1")


def test_what_is_a_real_scalar():
    yes = [1, 2.0, True, np.float32(1), np.array(1), jnp.bfloat16(1), jnp.bool_(True), np.int8(3)]
    no = [None, "1", 1j, [1.0], np.ones(1), jnp.ones((1, 1)), jnp.complex64(1), np.array("a")]
    assert all(map(is_real_scalar, yes)) and not any(map(is_real_scalar, no))
