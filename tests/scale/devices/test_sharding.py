"""Placements on a mesh of eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from kaun import layers, rng, sharding

MODEL = layers.sequential([layers.linear(16, 32), layers.batch_norm(32), layers.linear(32, 12)])


def test_a_mesh_has_all_devices():
    assert dict(sharding.mesh(data=-1).shape) == {"data": 8}
    mesh = sharding.mesh(data=-1, model=4)
    assert dict(mesh.shape) == {"data": 2, "model": 4} and set(mesh.devices.flat) == set(jax.devices())
    with pytest.raises(ValueError, match=r"sharding.mesh\(data=3, model=-1\) expected .* number of devices, 8"):
        sharding.mesh(data=3, model=-1)
    with pytest.raises(ValueError, match=r"expected .* devices, 8.*jax.make_mesh\(\(2,\), \(\"data\",\), devices"):
        sharding.mesh(data=4)


def test_an_axis_that_does_not_divide_names_path_axis_and_size():
    where = sharding.by_path({"2.weight": P("data", "model")}, sharding.mesh(data=1, model=8))
    message = r"axis 1 of '2.weight', shape \(32, 12\), has length 12, and the mesh axis 'model' has size 8, which does"
    with pytest.raises(ValueError, match=message):
        where.of(MODEL.init())
    where = sharding.by_path({"2.weight": P(None, ("data", "model"))}, sharding.mesh(data=2, model=4))
    with pytest.raises(ValueError, match="the mesh axis 'data' and 'model' has size 8, which does not divide it"):
        where.of(MODEL.init())


def specs_of(where, optimizer):
    vars = MODEL.init()
    state = {"vars": vars, "opt": optimizer.init(vars.params)}
    pairs = jax.tree_util.tree_flatten_with_path(where.of(state)["opt"])[0]
    return {jax.tree_util.keystr(path): leaf.spec for path, leaf in pairs}


def test_the_optimizer_lies_as_the_parameters_whose_path_ends_its_own():
    where = sharding.fsdp(min_size=256)
    for optimizer in (
        optax.adam(1e-3),
        optax.inject_hyperparams(optax.adamw)(1e-3),
        optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 4),
        optax.masked(optax.lion(1e-3), lambda params: jax.tree.map(lambda a: a.ndim == 2, params)),
        optax.contrib.schedule_free_sgd(0.1),
    ):
        specs = specs_of(where, optimizer)
        weights = {path: spec for path, spec in specs.items() if path.endswith("[0]['weight']")}
        assert weights and set(weights.values()) == {P(None, "data")}
        assert {spec for path, spec in specs.items() if not path.endswith("['weight']")} <= {P()}


def test_a_memory_of_parameters_lies_behind_its_leading_axis_and_other_arrays_by_their_shape():
    where = sharding.fsdp(min_size=256)
    memory = specs_of(where, optax.lbfgs(memory_size=3))
    assert {spec for path, spec in memory.items() if "memory" in path and path.endswith("[0]['weight']")} == {
        P(None, None, "data")
    }
    vector = specs_of(where, optax.flatten(optax.sgd(0.1, momentum=0.9)))
    size = sum(leaf.size for leaf in jax.tree.leaves(MODEL.init().params))
    assert set(vector.values()) == {P("data") if size % 8 == 0 else P()}
    named = sharding.by_path({"0.weight": P(None, "data")}, sharding.mesh(data=8))
    factored = specs_of(named, optax.adafactor(1e-3, min_dim_size_to_factor=4))
    assert set(factored.values()) == {P()}


def test_rows_are_spread_where_the_devices_divide_them():
    where = sharding.fsdp()
    x = sharding.put(np.arange(32.0).reshape(16, 2), where.spread)
    assert [shard.data.shape for shard in x.addressable_shards] == [(2, 2)] * 8
    np.testing.assert_array_equal(x, np.arange(32.0).reshape(16, 2))
    moved = sharding.put(x, where.replicated)
    assert moved.is_fully_replicated and sharding.put(moved, where.replicated) is moved
    on_one = jax.device_put(jnp.ones(8), jax.devices()[3])
    assert sharding.put(on_one, where.spread).sharding == where.spread
    with rng.scope(0):
        keys = jax.random.split(rng.next_key(), 8)
    spread = sharding.put(keys, where.spread)
    np.testing.assert_array_equal(jax.random.key_data(spread), jax.random.key_data(keys))
    assert len(spread.devices()) == 8
