"""A run begun on some devices is resumed on others: the program is the same one, and one warning says what changed."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kaun
from kaun import Data, layers, losses, rng, sharding
from kaun._engine.jaxpr import digest_program
from kaun._run.identity import run_facts
from kaun.checkpoint import Directory

X, Y = np.random.default_rng(0).normal(size=(2, 64, 4)).astype(np.float32)


class Killed(Exception):
    pass


def kill(step, loss, state):
    if step == 3:
        raise Killed


def rows_on(count):
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    return NamedSharding(mesh, PartitionSpec("data"))


@functools.cache
def run_on(count):
    """Trainer, state and data on so many devices. The model says where its rows lie, if there are several."""
    rows = rows_on(count)
    spread = (lambda x: lax.with_sharding_constraint(x, rows)) if count > 1 else lambda x: x
    with rng.scope(0):
        model = layers.sequential([layers.linear(4, 4), layers.fn(spread), layers.tanh(), layers.linear(4, 4)])
        trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.1))
        state = trainer.init()
        data = Data.batches((X, Y), 8, shuffle=True).with_loss(losses.mse)
    if count > 1:
        state = jax.device_put(state, NamedSharding(rows.mesh, PartitionSpec()))
    return trainer, state, data


@pytest.mark.parametrize(
    ("before", "after"),
    [(8, 2), (8, 1), pytest.param(2, 8, marks=pytest.mark.slow), pytest.param(1, 8, marks=pytest.mark.slow)],
)
def test_a_run_is_resumed_on_another_number_of_devices(tmp_path, before, after):
    """ "Its program differs" was the answer on two devices, and of one device of the same host nothing was said."""
    trainer, state, data = run_on(before)
    with pytest.raises(Killed):
        trainer.fit(state, data, report=kill, checkpoints=Directory(tmp_path))
    expected = trainer.fit(state, data)
    trainer, state, data = run_on(after)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        end = trainer.fit(state, data, checkpoints=Directory(tmp_path))
    words = {
        1: "on one device",
        2: "on a mesh of data=2, 15 arrays on all 2 devices",
        8: "on a mesh of data=8, 15 arrays on all 8 devices",
    }
    (warning,) = seen
    assert str(warning.message) == (
        f"A run is resumed under other conditions:\n  the state was {words[before]}; now it is {words[after]}\nIt "
        "continues from the same state. Its results may differ in their last bits from those of a run without "
        "interruption."
    )
    assert int(end.step) == int(expected.step) == 8
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), end.vars.params, expected.vars.params
    )
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(end.vars)} == {after}


def test_nothing_is_said_where_the_state_lies_as_before(tmp_path):
    trainer, state, data = run_on(8)
    with pytest.raises(Killed):
        trainer.fit(state, data, report=kill, checkpoints=Directory(tmp_path))
    trainer.fit(state, data, checkpoints=Directory(tmp_path))


def test_where_the_state_lies_is_a_fact_in_words():
    _, state, data = run_on(8)
    spread = lambda leaf: jax.device_put(leaf, rows_on(4)) if leaf.ndim == 2 else leaf
    moved = state.replace(vars=jax.tree.map(spread, state.vars))
    fact = run_facts(moved, data)["machine"]["the place of the state"]
    assert fact == "on a mesh of data=4 and data=8, 13 arrays on all 8 devices, 2 arrays spread over data"
    fact = run_facts(state, data, sharding.fsdp(min_size=1))["machine"]["the place of the state"]
    assert fact == "on a mesh of data=8, 15 arrays on all 8 devices"  # 8 divides no axis
    fact = run_facts(run_on(1)[1], data, sharding.fsdp(rows_on(4).mesh, min_size=16))["machine"][
        "the place of the state"
    ]
    assert fact == "on a mesh of data=4, 9 arrays on all 4 devices, 6 arrays spread over data"


def test_the_digest_of_a_program_has_no_placements():
    """In inner functions, loops, branches and rules of derivatives, and with a mesh of explicit axes around it."""

    def program(count, kind):
        mesh = jax.make_mesh((count,), ("data",), axis_types=(kind,), devices=jax.devices()[:count])
        place = lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("data")))
        place = place if count and kind is AxisType.Auto else lambda x: x

        @jax.custom_vjp
        def ruled(x):
            return place(x) * x

        ruled.defvjp(lambda x: (ruled(x), x), lambda x, g: (place(g) * x,))

        def f(x):
            x = jax.jit(lambda x: place(x * 2) + 1)(place(x))
            x, _ = lax.scan(lambda carry, _: (place(jnp.sin(carry)), None), x, length=3)
            x = lax.cond(x.sum() > 0, lambda x: place(x * 3), lambda x: x, x)
            return place(jax.checkpoint(lambda x: place(x) * x)(x)).sum(), jax.nn.relu(ruled(x))

        x = jnp.ones((8, 4))
        if kind is AxisType.Auto:
            return jax.make_jaxpr(f)(x)
        with jax.set_mesh(mesh):
            return jax.make_jaxpr(f)(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))

    two, eight = (program(count, AxisType.Auto) for count in (2, 8))
    explicit = [program(count, AxisType.Explicit) for count in (2, 8)]
    assert str(two) != str(eight) and str(explicit[0]) != str(explicit[1])
    plain = jax.make_jaxpr(lambda x: x)(jnp.ones((8, 4)))
    assert digest_program(two) == digest_program(eight)
    assert digest_program(explicit[0]) == digest_program(explicit[1])
    assert digest_program(two) != digest_program(plain)
