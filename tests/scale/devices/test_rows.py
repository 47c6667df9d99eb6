"""Which rows lie on which device, beside JAX's own answer; and pipelines whose batches lie on eight devices."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from kaun import Data, rng, sharding
from kaun.data.pieces import blocks_of
from kaun.sharding import Sharding

few = settings(max_examples=40, deadline=None)
X = np.arange(46.0, dtype=np.float32).reshape(23, 2)
S = sharding.data_parallel()
AXES = [(), ("a",), ("b",), ("a", "b"), ("b", "c"), ("c", "a"), ("a", "b", "c"), ("c", "b", "a")]


@few
@given(
    st.sampled_from(sorted(set(itertools.permutations((2, 4, 1))) | {(2, 2, 2), (1, 1, 3)})),
    st.sampled_from(AXES),
    st.permutations(range(8)),
    st.sets(st.integers(0, 7), min_size=1),
    st.integers(0, 5),
)
def test_rows_go_by_device_as_in_jax(shape, axes, order, own, times):
    devices = np.array(jax.devices())[order][: np.prod(shape)].reshape(shape)
    s = Sharding(Mesh(devices, ("a", "b", "c")), axes)
    mine = [device for device in devices.flat if device.id in own]
    blocks = blocks_of(s, mine)
    n = times * blocks.parts
    expected = sorted({i for d in mine for i in range(n)[s.spread.devices_indices_map((n,))[d][0]]}) if n else []
    if mine:
        piece = blocks.piece(n)
        assert np.arange(n)[piece.here].tolist() == expected and piece.rows == len(expected)
        assert blocks.total(piece.rows) == n
        for device in mine:
            at = s.spread.devices_indices_map((n,))[device][0]
            assert np.array_equal(np.array(expected)[piece.positions(at)], np.arange(n)[at])


@pytest.mark.parametrize("rows", [("data",), ("model",), ("data", "model"), ()])
def test_batches_lie_over_the_rows_and_ragged_ones_everywhere(rows):
    s = Sharding(sharding.mesh(data=2, model=4), rows)
    with rng.scope(0):
        data = Data.batches((X, np.arange(23)), 8, shuffle=True).epochs(2)
    placed = data.local(s).assemble(s)
    for (x, i), (batch, index) in zip(data, placed, strict=True):
        assert np.array_equal(batch, x) and np.array_equal(index, i)
        assert batch.sharding == index.sharding == (s.spread if len(x) == 8 else s.replicated)


def test_arrays_that_are_no_rows_lie_everywhere():
    item = {
        "x": X[:8],
        "scale": np.ones(3),
        "key": jax.random.key(0),
        "on one": jax.device_put(X[:8], jax.devices()[3]),
    }
    (found,) = Data.from_items([item]).assemble(S).prefetch(1)
    assert found["x"].sharding == found["on one"].sharding == S.spread
    assert found["scale"].sharding == found["key"].sharding == S.replicated


def test_local_and_assemble_have_one_sharding():
    other = Sharding(sharding.mesh(data=2, model=4), ("data",))
    with pytest.raises(ValueError, match=r"assemble\(s\) expected the sharding of local\(s\).*Give both the same s"):
        list(Data.batches(X, 8).local(S).assemble(other))
