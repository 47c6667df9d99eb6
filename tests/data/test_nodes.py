"""The nodes under Data: positions, passes and orders without the class (which test_pipeline.py tries as a whole)."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaun import rng
from kaun.data import arguments, nodes, shuffle


@given(st.integers(0, 12), st.integers(0, 4), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_passes_open_at_any_position(n, passes, start):
    base = nodes.index_node(n, lambda epoch: lambda i: (epoch, i))
    whole = list(itertools.product(range(passes), range(n)))
    node = nodes.epochs_node(base, passes)
    assert node.length == len(whole)
    assert list(node.open(0, start)) == whole[start:]


@given(st.integers(1, 40), st.integers(1, 9), st.booleans())
@settings(max_examples=60, deadline=None)
def test_groups_cover_the_items(n, size, drop):
    base = nodes.index_node(n, lambda epoch: lambda i: i)
    node = nodes.group_node(base, size, list, drop, "batch")
    found = list(node.open(0, 0))
    assert len(found) == node.length == nodes.group_count(n, size, drop)
    assert [i for group in found for i in group] == list(range(len(found) * size if drop else n))[:n]


@given(st.integers(1, 50), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_orders_are_permutations_that_depend_on_key_and_pass_alone(n, epoch):
    with rng.scope(3):
        first = shuffle.Orders("shuffle()", n)
    with rng.scope(3):
        again = shuffle.Orders("shuffle()", n)
    assert sorted(first(epoch)) == list(range(n))
    assert np.array_equal(first(epoch), again(epoch))


def test_counts_are_checked():
    assert arguments.checked_count("take(n)", "n", np.int64(3), 0) == 3
    for bad in (True, 1.5, "3"):
        with pytest.raises(TypeError, match="take"):
            arguments.checked_count("take(n)", "n", bad, 0)
    with pytest.raises(ValueError, match="take"):
        arguments.checked_count("take(n)", "n", -1, 0)
