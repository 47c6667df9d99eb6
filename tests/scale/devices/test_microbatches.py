"""Microbatches of a batch that is spread over devices: each part lies on all of them."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kaun
from kaun import layers, losses, rng
from kaun._engine import StepInputs, find_step

WIDTH = 32


@functools.cache
def compiled(microbatches, rows, *, spread):
    """One step as XLA compiles it for each device."""
    with rng.scope(0):
        model = layers.sequential([layers.linear(WIDTH, WIDTH), layers.gelu(), layers.linear(WIDTH, WIDTH)])
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1), microbatches=microbatches)
        state = trainer.init()
    x = y = jnp.ones((rows, WIDTH))
    if spread:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        x = y = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    inputs = StepInputs(x, lambda out: losses.mse(out, y), None)
    leaves, structure = jax.tree.flatten((state.vars, state.opt_state, state.step))
    traced = find_step(trainer._programs, structure, leaves, state.key, inputs, True)
    return traced.step.lower(leaves, state.key, inputs.leaves).compile()


@pytest.mark.parametrize("microbatches", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_no_part_is_gathered_and_the_work_is_shared(microbatches):
    """Of consecutive rows each part lay on a few devices: three all-gathers, and 2.5 times the work on each device."""
    rows = 512
    one, eight = (compiled(microbatches, rows, spread=spread) for spread in (False, True))
    assert "all-gather" not in eight.as_text() and "all-to-all" not in eight.as_text()
    # The body of the loop counts once. The update is of all parameters on each device.
    update = 4 * 2 * WIDTH * (WIDTH + 1)
    assert eight.cost_analysis()["flops"] <= 1.3 / 8 * one.cost_analysis()["flops"] + update
