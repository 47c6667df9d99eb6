"""Packing: leaves into vectors and back, bit for bit, under a rule that looks at sizes only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import layers, rng
from kaun._engine import options
from kaun._engine.packing import MemberPacking, Packing, _unpacked, packing_of, unpack
from kaun._jax import signatures_of

dtypes = st.sampled_from(["float32", "int32", "bfloat16", "bool", "uint8"])
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def kinds(leaves):
    return [(a.shape, a.dtype) for a in leaves]


@given(st.lists(st.tuples(dtypes, shapes), min_size=1, max_size=8), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_what_is_packed_is_unpacked(forms, seed):
    g = np.random.default_rng(seed)
    leaves = [jnp.asarray(g.integers(0, 9, shape), dtype) for dtype, shape in forms]
    packing = Packing(kinds(leaves))
    vectors = packing.pack([np.asarray(leaf) for leaf in leaves])
    assert all(type(v) is np.ndarray for v in vectors)
    assert len(vectors) == len({dtype for dtype, _ in forms}) and all(v.ndim == 1 for v in vectors)
    for held in (vectors, [jnp.asarray(v) for v in vectors]):  # as before the first step, and as after it
        back = unpack(packing, held)
        assert [(a.dtype, a.shape, a.tobytes()) for a in back] == [(a.dtype, a.shape, a.tobytes()) for a in leaves]


def test_a_program_that_unpacks_is_compiled_once_the_host_has_done_it_often():
    leaves = [jnp.arange(3.0), jnp.int32(7), jnp.ones((2, 5), jnp.bfloat16)]
    packing, compiled = Packing(kinds(leaves)), []
    for vectors in (packing.pack(leaves), jax.device_put(packing.pack(leaves), jax.devices()[0])):
        for _ in range(6):
            before = signatures_of(_unpacked)
            back = unpack(packing, vectors)
            compiled.append(signatures_of(_unpacked) - before)
            assert [a.tobytes() for a in back] == [a.tobytes() for a in leaves]
            assert {(a.committed, a.weak_type) for a in back} == {(vectors[0].committed, False)}
    assert compiled == [0] * 8 + [1, 0, 0, 0]


def test_a_first_fit_of_a_small_state_compiles_one_program():
    with rng.scope(0):
        model = layers.linear(3, 7) >> layers.linear(7, 1)
        trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.1))
        state = trainer.init()
    names, data = [], [(np.ones((5, 3), np.float32), lambda out: (out**2).mean())]
    options._accepts_tiny_options()  # asked once in a process, by compiling an empty program
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: names.append(name))
    try:
        after = trainer.fit(state, data)
    finally:
        jax.monitoring.clear_event_listeners()
    assert packing_of(jax.tree.leaves((state.vars, state.opt_state, state.step))) is not None
    assert names.count("/jax/core/compile/backend_compile_duration") == 1 and int(after.step) == 1


def test_layouts_are_values():
    a, b = [jnp.ones(2), jnp.int32(1)], [jnp.zeros(2), jnp.int32(7)]
    assert Packing(kinds(a)) == Packing(kinds(b)) and hash(Packing(kinds(a))) == hash(Packing(kinds(b)))
    assert Packing(kinds(a)) != Packing(kinds([jnp.ones(3), jnp.int32(1)])) and Packing(kinds(a)) != 3


@pytest.mark.parametrize(
    ("leaves", "packed"),
    [
        ([jnp.ones(2)] * 4, True),
        ([jnp.ones(2)] * 3, False),
        ([jnp.ones(1 << 13)] * 2 + [jnp.ones(1)] * 2, False),
        ([jnp.ones(2)] * 3 + [jax.random.key(0)], False),
    ],
)
def test_what_is_packed_at_all(leaves, packed):
    assert (packing_of(leaves) is not None) is packed


def test_members_are_packed_along_their_axis_if_they_are_small():
    g = np.random.default_rng(0)
    shapes = [((3, 2, 4), np.float32), ((3,), bool), ((3, 1), np.float32), ((3,), np.int32), ((3, 5), np.int32)]
    leaves = [g.integers(0, 2, shape).astype(dtype) for shape, dtype in shapes]
    packing = MemberPacking.of(leaves)
    matrices = packing.pack(leaves)
    assert [(m.shape, m.dtype.name) for m in matrices] == [((9, 3), "float32"), ((1, 3), "bool"), ((6, 3), "int32")]
    np.testing.assert_array_equal(matrices[2][1:, 2], leaves[4][2])
    for found, leaf in zip(packing.unpack(matrices), leaves, strict=True):
        np.testing.assert_array_equal(found, leaf)
    assert MemberPacking.of([np.zeros((3, 255)), np.zeros(3)]) and MemberPacking.of([np.zeros((3, 257))]) is None
    assert MemberPacking.of([jax.random.split(jax.random.key(0), 3)]) is None
