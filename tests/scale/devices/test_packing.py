"""Whether a state is packed is decided by where its leaves lie, not by how many devices the process has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import kaun
from kaun import layers, losses, rng
from kaun._engine.packing import packing_of

X, Y = np.ones((8, 3), np.float32), np.zeros((8, 2), np.float32)
DATA = kaun.Data.repeat(3, (X, lambda out: losses.mse(out, Y)))


def on_mesh(count):
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    return NamedSharding(mesh, PartitionSpec())


@functools.cache
def made():
    with rng.scope(0):
        model = layers.sequential([layers.linear(3, 4), layers.tanh(), layers.linear(4, 2)])
        trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.1))
        return trainer, trainer.init()


def content(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.vars, state.opt_state, state.step))]


def leaves_of(state):
    return jax.tree.leaves((state.vars, state.opt_state, state.step))


@pytest.mark.filterwarnings("ignore:.*every device does all the work")
@pytest.mark.parametrize(
    ("where", "packed"),
    [(lambda: None, True), (lambda: SingleDeviceSharding(jax.devices()[3]), True), (lambda: on_mesh(8), False)],
    ids=["anywhere", "on device 3", "on a mesh"],
)
def test_a_state_on_one_of_many_devices_is_packed(where, packed):
    """With eight devices no state was packed: 50 us a step with a report instead of 33 us."""
    trainer, plain = made()
    state = plain if where() is None else jax.device_put(plain, where())
    assert (packing_of(leaves_of(state)) is not None) is packed
    fitted, folded = trainer.fit(state, DATA), state
    for x, loss in DATA:
        folded = trainer.step(folded, x, loss=loss)[1]
    assert content(fitted) == content(folded)
    devices = {device for leaf in leaves_of(fitted) for device in leaf.devices()}
    assert devices == {device for leaf in leaves_of(folded) for device in leaf.devices()}
    assert devices == {device for leaf in leaves_of(state) for device in leaf.devices()}
    assert {leaf.committed for leaf in leaves_of(fitted)} == {leaf.committed for leaf in leaves_of(folded)}


def test_a_mesh_of_one_device_is_one_device():
    leaves = [jax.device_put(jnp.ones(2), on_mesh(1))] * 4
    assert packing_of(leaves) is not None


def test_a_state_on_different_devices_is_refused_where_it_would_be_moved():
    trainer, state = made()
    moved = state.replace(opt_state=jax.device_put(state.opt_state, jax.devices()[1]))
    moved = moved.replace(vars=jax.device_put(state.vars, jax.devices()[2]))
    with pytest.raises(
        ValueError, match=r"lie on different devices, .* and .*\. Move them to one, state = jax\.device_put"
    ):
        trainer.fit(moved, DATA)
