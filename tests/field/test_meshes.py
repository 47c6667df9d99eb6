"""State and batches on a mesh as ``jax.make_mesh`` makes it: its axes are explicit, and types contain placements."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import kaun
from kaun import Data, checkpoint, layers, losses, metrics, reports, rng
from kaun._engine import StepLoop
from kaun.data.chunks import one_by_one


class World:
    """A classifier with an embedding, its state in replica on a mesh, and rows that are spread over the mesh."""

    def __init__(self, width):
        self.mesh = jax.make_mesh((len(jax.devices()),), ("data",))
        assert jax.sharding.AxisType.Explicit in self.mesh.axis_types
        parts = [layers.embedding(10, width), layers.batch_norm(width), layers.linear(width, 3)]
        with rng.scope(0):
            self.trainer = kaun.Trainer(model=layers.sequential(parts), optimizer=optax.sgd(0.1, momentum=0.9))
            self.plain = self.trainer.init()
            self.state = jax.device_put(self.plain, NamedSharding(self.mesh, PartitionSpec()))
            rows = NamedSharding(self.mesh, PartitionSpec("data"))
            self.x, self.y = (jax.device_put(jnp.arange(40) * k % n, rows) for k, n in ((3, 10), (1, 3)))
            self.batches = Data.batches((self.x, self.y), 8, shuffle=True)
        self.train = self.batches.with_loss(losses.cross_entropy_sparse)
        self.loss = loss_of(self.y)


def loss_of(y):
    return lambda output: losses.cross_entropy_sparse(output, y)


def placements(state):
    return [leaf.sharding for leaf in jax.tree.leaves(state)]


def content(state):
    leaves = [jax.random.key_data(a) if kaun.tree.is_key(a) else a for a in jax.tree.leaves(state)]
    return [np.asarray(leaf).tobytes() for leaf in leaves]


SMALL, LARGE = 4, 40_000  # of more than 1 MiB: its memory is overwritten


@pytest.fixture(scope="module")
def small():
    return World(SMALL)


@functools.cache
def large_world():
    return World(LARGE)


@pytest.fixture(scope="module")
def world(request, small):
    return small if request.param == SMALL else large_world()


def short_with(width):
    """Both sizes; the other one is part of the long form, or of that on four devices."""
    widths = [pytest.param(each, marks=[] if each == width else pytest.mark.slow) for each in (SMALL, LARGE)]
    return pytest.mark.parametrize("world", widths, indirect=True, scope="module")


@short_with(SMALL)
def test_step_takes_and_returns_explicit_arrays(world):
    """`trainer.step(state, x, loss=loss)` died with a ShardingTypeError about dynamic_update_slice."""
    before = content(world.state)
    loss, state = world.trainer.step(world.state, world.x, loss=world.loss)
    assert content(world.state) == before
    assert placements(state) == placements(world.state)
    jnp.add(state.vars.params[0]["weight"], world.state.vars.params[0]["weight"])  # of other types JAX refuses it
    jnp.add(loss, state.vars.params[2]["bias"])
    expected, _ = world.trainer.step(world.plain, np.asarray(world.x), loss=loss_of(np.asarray(world.y)))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@short_with(LARGE)
def test_fit_is_the_fold_of_step(world):
    """`trainer.fit(state, batches)`: the same bytes as single steps, and every state stays where it was placed."""
    seen = []
    report = reports.every(2, lambda step, loss, state: seen.append(state))
    fitted = world.trainer.fit(world.state, world.train, report=report)
    folded = world.state
    for x, loss in world.train:
        folded = world.trainer.step(folded, x, loss=loss)[1]
    assert content(fitted) == content(folded)
    assert content(world.trainer.fit(world.state, world.train)) == content(folded)
    assert [int(state.step) for state in seen] == [2, 4]
    assert all(placements(state) == placements(world.state) for state in (fitted, *seen))


@pytest.mark.filterwarnings("ignore:.*every device does all the work")
def test_only_the_state_or_only_the_batch_is_on_the_mesh(small):
    """Parameters from `init()` and a batch on a mesh, or the reverse: what comes back fits what was given."""
    data = Data.repeat(3, (small.x, small.loss))
    state = small.trainer.fit(small.plain, data)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves((state.vars, state.opt_state))} == {small.mesh}
    state = small.trainer.fit(small.state, Data.repeat(3, (np.asarray(small.x), loss_of(np.asarray(small.y)))))
    assert placements(state) == placements(small.state)


def test_predict_and_evaluate_take_explicit_arrays(small):
    """`predict` of an embedding failed: a gather from explicit axes is an error without `out_sharding=`."""
    output = small.trainer.predict(small.state, small.x)
    assert output.sharding.mesh == small.mesh
    np.testing.assert_allclose(output, small.trainer.predict(small.plain, np.asarray(small.x)), atol=1e-6)
    jnp.multiply(output[:, 0], small.y.astype(jnp.float32))
    found = small.trainer.evaluate(small.state, small.batches, {"accuracy": metrics.accuracy})
    assert found["accuracy"] == metrics.accuracy(np.asarray(output), np.asarray(small.y))


@short_with(LARGE)
def test_a_run_on_a_mesh_is_resumed_on_it(world, tmp_path):
    """Interrupted after step 3 and started again: the same bytes as without the interruption, placed as before."""

    def fail(step, loss, state):
        raise RuntimeError(f"at step {step}")

    runs = checkpoint.Directory(tmp_path, every=2)
    with pytest.raises(RuntimeError, match="at step 3") as caught:
        world.trainer.fit(world.state, world.train, report=reports.every(3, fail), checkpoints=runs)
    assert placements(caught.value.kaun_state) == placements(world.state)
    resumed = world.trainer.fit(world.state, world.train, checkpoints=runs)
    assert content(resumed) == content(world.trainer.fit(world.state, world.train))
    assert placements(resumed) == placements(world.state)


def test_the_state_that_is_left_when_a_program_fails_is_explicit():
    """The newest state is lost with the memory of a failed program: the one that the user holds, as it was placed."""
    world = large_world()
    carry = world.state.vars, world.state.opt_state, world.state.step
    loop = StepLoop(world.trainer._programs, carry, world.state.key, None)
    loop.push(one_by_one(iter([(world.x, world.loss)])), 1, 1)
    loop.flush()
    for array in loop._carry[1]:
        array.delete()
    assert loop.recover() == "held"
    found = loop.carry()
    assert content(found) == content(carry)
    assert placements(found) == placements(carry)


@pytest.mark.filterwarnings("ignore:.*every device does all the work")
@pytest.mark.parametrize("placed", ["state", pytest.param("batch", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_is_explained(small, placed):
    """Labels of -100 on a mesh: `kaun.explain(trainer, error)` mixed arrays on two meshes, and JAX refused them."""
    y = jnp.where(jnp.arange(40) == 5, -100, np.asarray(small.y))
    x, state = (np.asarray(small.x), small.state) if placed == "state" else (small.x, small.plain)
    y = jax.device_put(y, small.y.sharding) if placed == "batch" else y
    with pytest.raises(kaun.errors.NonFiniteLoss, match=r"received indices\[5\] = -100") as caught:
        small.trainer.fit(state, [(x, loss_of(y))])
    assert kaun.explain(small.trainer, caught.value).rows == (5,)


def test_step_inside_a_jitted_function(small):
    """`jax.jit` of a function that calls `step`, with the arrays of the mesh as arguments."""

    @jax.jit
    def advance(state, x, y):
        return small.trainer.step(state, x, loss=loss_of(y))

    loss, state = advance(small.state, small.x, small.y)
    expected, _ = small.trainer.step(small.state, small.x, loss=small.loss)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves((state.vars, state.opt_state))} == {small.mesh}


def test_rows_of_an_explicit_array_lie_as_the_array_does(small):
    """`Data.batches` of an array on a mesh: a gather from it was an error; the rows are those of NumPy."""
    with rng.scope(0):
        expected = Data.batches((np.asarray(small.x), np.asarray(small.y)), 8, shuffle=True)
    with rng.scope(0):
        found = Data.batches((small.x, small.y), 8, shuffle=True)
    for (x, y), (expected_x, expected_y) in zip(found, expected, strict=True):
        assert x.sharding.is_equivalent_to(small.x.sharding, 1)
        np.testing.assert_array_equal(x, expected_x)
        np.testing.assert_array_equal(y, expected_y)
    assert next(iter(Data.batches(small.x, 7))).shape == (7,)  # a number of rows that the devices do not divide


def test_under_set_mesh_a_model_may_be_written_for_explicit_axes(small):
    """`jax.set_mesh` is how users choose explicit axes: there the model sees them, and may name placements."""
    seen = []

    def forward(x):
        seen.append(jax.typeof(x).sharding.spec)
        return x * jnp.sum(x, keepdims=True)

    with rng.scope(0):
        model = layers.sequential([layers.linear(2, 1), layers.fn(forward)])
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
        state = jax.device_put(trainer.init(), NamedSharding(small.mesh, PartitionSpec()))
    x = jax.device_put(jnp.ones((8, 2)), NamedSharding(small.mesh, PartitionSpec("data")))
    with jax.set_mesh(small.mesh):
        fitted = trainer.fit(state, Data.repeat(3, (x, lambda output: (output**2).mean())))
    assert {spec[0] for spec in seen} == {"data"}
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(fitted.vars)} == {small.mesh}


def test_nothing_made_under_set_mesh_is_used_outside_of_it(small):
    """A first experiment under `jax.set_mesh`, and then a plain one with the same trainer and the same shapes."""
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
        state = trainer.init()
    data = Data.repeat(77, (np.ones((8, 2), np.float32), lambda output: (output**2).mean()))
    with jax.set_mesh(small.mesh):
        on_mesh = trainer.fit(jax.device_put(state, NamedSharding(small.mesh, PartitionSpec())), data)
    other = kaun.Trainer(model=trainer.model, optimizer=trainer.optimizer)
    for plain in (trainer.fit(state, data), other.fit(state, data)):
        jax.tree.map(np.testing.assert_array_equal, plain.vars.params, on_mesh.vars.params)


SHORT = "not 40000 and (fold or rows)"


@pytest.mark.skipif(len(jax.devices()) > 1, reason="is this test's own process")
@pytest.mark.slow  # the short form is tests/scale/devices, on meshes of eight devices with explicit axes
@pytest.mark.parametrize("chosen", [SHORT, "not devices"])
def test_the_same_on_four_devices(chosen):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", __file__, "-k", chosen]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **flags}, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{2 if chosen == SHORT else 15} passed" in done.stdout
