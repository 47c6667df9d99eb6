"""Which rows lie on which device, beside JAX's own answer; and pipelines whose batches lie on eight devices."""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import kaun
from kaun import Data, layers, losses, rng, sharding
from kaun.data import RowGather
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


# Training on them

PAIRS = (np.sin(np.arange(88.0, dtype=np.float32)).reshape(44, 2), np.cos(np.arange(44.0, dtype=np.float32))[:, None])


@functools.cache
def trained():
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(2, 4) >> layers.linear(4, 1), optimizer=optax.adam(0.01), sharding=S)
        return trainer, trainer.init()


def spread(pairs):
    """The arrays over the devices, which divide 40 of their rows."""
    return jax.device_put(tuple(a[:40] for a in pairs), S.spread)


@pytest.mark.parametrize(
    "options", [{"pad": True, "sample_weights": np.arange(40) % 3}, pytest.param({}, marks=pytest.mark.slow)]
)
def test_fit_has_the_same_bytes_wherever_its_batches_come_from(options):
    trainer, state = trained()

    def fit(arrays, place=lambda data: data):
        with rng.scope(1):
            data = Data.batches(arrays, 16, shuffle=True, **options)
        return trainer.fit(state, place(data).with_loss(losses.mse).epochs(3))

    host = tuple(a[:40] for a in PAIRS)
    expected = fit(host)
    found = [
        fit(host, lambda data: data.prefetch(2)),
        fit(host, lambda data: data.local(S).assemble(S).prefetch(2)),
        fit(spread(PAIRS)),
        fit(jax.device_put(host, jax.devices()[5])),
        fit(spread(PAIRS), lambda data: data.map(lambda b: b)),
    ]
    for other in found:
        assert all(map(np.array_equal, jax.tree.leaves(other.vars), jax.tree.leaves(expected.vars)))
    assert int(expected.step) == 9


def test_batches_of_arrays_over_a_mesh_stay_there_alone_and_in_blocks():
    x, _ = spread(PAIRS)
    assert [batch.sharding for batch in Data.batches(x, 16)] == [S.spread] * 3
    assert [batch.sharding.spec for batch in Data.batches(x, 15)] == [P(), P(), P()]
    order = np.arange(40)[::-1]
    block = RowGather(x, order, 8).on_device(1, 3, 4)
    assert block.sharding.spec == P(None, "data")
    assert np.array_equal(block[:3], np.asarray(x)[order[8:32]].reshape(3, 8, 2))
