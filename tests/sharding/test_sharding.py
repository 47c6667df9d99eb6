"""Sharding and its makers on one device: values, rules, messages. What needs several is in tests/scale/devices."""

import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import kaun
from kaun import layers, rng, sharding
from kaun.sharding.rules import ByPath, Fsdp, everywhere

MESH = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])  # of explicit axes
PARAMS = layers.sequential([layers.linear(4, 6), layers.linear(6, 2)])


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1024, 64), P("data")),
        ((64, 1024), P(None, "data")),
        ((1024, 1024), P("data")),  # the first of two
        ((2047, 64), P(None, "data")),  # the longest one that 8 divides
        ((2047, 65), P()),
        ((511, 128), P()),  # one row less than min_size
        ((512, 128), P("data")),
        ((), P()),
    ],
)
def test_fsdp_spreads_the_longest_axis_that_divides_of_large_arrays(shape, spec):
    assert Fsdp("data", 8, 65536)("any", shape) == spec


def test_the_first_pattern_counts_and_the_last_entries_fit_fewer_axes():
    rule = ByPath((("*.q.*", P(None, "model")), ("0.*", P("model"))), Fsdp("data", 2, 4))
    assert rule("0.q.weight", (4, 8)) == P(None, "model")
    assert rule("0.q.bias", (8,)) == P("model")  # as the last axis of its weight
    assert rule("0.q.scale", ()) == P()
    assert rule("0.k.weight", (4, 8)) == P("model")
    assert rule("1.weight", (4, 8)) == P(None, "data")
    assert rule("", (4, 8)) == P(None, "data")  # not a parameter: only its shape counts


def test_shardings_are_values():
    assert sharding.data_parallel(MESH) == sharding.data_parallel(MESH) != sharding.fsdp(MESH, axis="data")

    def made(size, spec):
        return sharding.by_path({"*": spec}, MESH, otherwise=sharding.fsdp(MESH, axis="data", min_size=size))

    assert made(1, P("model")) == made(1, P("model"))
    assert len({made(1, P("model")), made(1, P("model")), made(2, P("model")), made(1, P())}) == 3
    with pytest.raises(AttributeError):
        made(1, P()).rows = ()


def test_a_pattern_that_matches_no_parameter_lists_the_paths():
    where = sharding.by_path({"0.weigth": P()}, MESH)
    message = (
        "sharding.by_path: the pattern '0.weigth' matches no parameter of the model. The paths are\n  '0.bias'\n"
        "  '0.weight'\n  '1.bias'\n  '1.weight'\nA * stands for any characters"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        where.of(PARAMS.init())
    outer = sharding.by_path({"0.*": P()}, MESH, otherwise=where)
    with pytest.raises(ValueError, match=r"'0.weigth' matches no parameter"):
        outer.of(PARAMS.init())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sharding.data_parallel("data"), TypeError, "expected a jax.sharding.Mesh, received 'data'"),
        (lambda: sharding.data_parallel(MESH, rows="batch"), ValueError, "no axis 'batch'; its axes are 'data', 'mod"),
        (lambda: sharding.fsdp(MESH), ValueError, r"the axes 'data', 'model', .* Write fsdp\(mesh, axis='model'\)"),
        (lambda: sharding.fsdp(MESH, axis="shard"), ValueError, r"no axis 'shard'.*sharding.mesh\(shard=-1\)"),
        (lambda: sharding.by_path({}, MESH), TypeError, "expected a dict of patterns and specs, received {}"),
        (lambda: sharding.by_path({"*": "model"}, MESH), TypeError, r"PartitionSpec for '\*', received 'model'"),
        (lambda: sharding.by_path({"*": P("tensor")}, MESH), ValueError, "the mesh has no axis 'tensor'"),
        (
            lambda: sharding.by_path({"*": P()}, MESH, otherwise=sharding.data_parallel()),
            ValueError,
            r"otherwise is a sharding on another mesh, .*otherwise=sharding.fsdp\(mesh",
        ),
        (lambda: sharding.Sharding(MESH, (), "fsdp"), TypeError, r"Sharding\(rule=...\) expected a function .* 'fsdp'"),
        (lambda: sharding.Sharding(MESH, gather="shard"), ValueError, "the mesh has no axis 'shard'"),
        (lambda: sharding.mesh(data=3), ValueError, r"sharding.mesh\(data=3\) expected sizes that multiply to the num"),
        (lambda: sharding.mesh(data=-1, model=-1), ValueError, "or one -1 that takes what the others leave"),
        (lambda: sharding.mesh(data="all"), ValueError, r"sharding.mesh\(data='all'\)"),
        (lambda: sharding.mesh(), ValueError, r"sharding.mesh\(\)"),
    ],
)
def test_wrong_arguments_are_refused_with_the_fix(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_put_places_any_leaf_and_leaves_what_lies_right():
    where = sharding.data_parallel(MESH).replicated
    with rng.scope(0):
        key = rng.next_key()
    for leaf in (np.arange(3.0), 2.5, key, jax.numpy.ones(2)):
        placed = sharding.put(leaf, where)
        assert placed.sharding == where and placed.committed and sharding.put(placed, where) is placed
        assert kaun.tree.is_key(leaf) == kaun.tree.is_key(placed)
    assert sharding.put(np.arange(3.0), where).dtype == np.float32
    assert everywhere("", (3,)) == P()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sharding.by_path({"0.*": P("model")}, MESH, otherwise=sharding.fsdp),
            r"by_path\(otherwise=...\) expected a kaun.sharding.Sharding, received .*fsdp.* Did you forget to call it\?",
        ),
        (
            lambda: kaun.Trainer(model=PARAMS, optimizer=optax.sgd(0.1), sharding=MESH),
            r"received Mesh. Write sharding.data_parallel\(mesh\), or sharding.fsdp\(mesh\)",
        ),
        (lambda: sharding.fsdp(min_size="64"), r"fsdp\(min_size=...\) expected a number of elements.* received '64'"),
        (lambda: sharding.data_parallel(MESH, rows=("data", "data")), "rows names the mesh axis 'data' twice"),
        (
            lambda: sharding.by_path({"0.weight": P("model", "model")}, MESH).of(PARAMS.init()),
            r"the spec P\('model', 'model'\) of '0.weight' names the mesh axis 'model' twice",
        ),
    ],
)
def test_wrong_arguments_are_refused_with_the_call_to_write(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
