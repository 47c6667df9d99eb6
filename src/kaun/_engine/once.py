"""One step as ``Trainer.step`` takes it: the program of the loop, for a single item."""

from __future__ import annotations

import functools
from typing import Any

import jax

from kaun._engine.cache import ProgramCache
from kaun._engine.explicit import explicit_mesh, run_explicit
from kaun._engine.inputs import StepInputs
from kaun._engine.packing import on_one_device
from kaun._engine.placing import place_carry
from kaun._engine.program import count_on_device, find_step
from kaun._jax import any_traced

__all__ = ["run_step"]


def run_step(
    programs: ProgramCache, carry: Any, key: jax.Array, inputs: StepInputs, training: bool
) -> tuple[jax.Array, Any]:
    """Return the loss of one step and the carry after it; what was given stays as it is."""
    leaves, structure = jax.tree_util.tree_flatten(carry)
    leaves, key = place_carry(programs.sharding, structure, leaves, key)
    mesh = explicit_mesh(leaves) or (inputs.mesh if programs.sharding is None else None)
    if mesh is not None:
        return run_explicit(functools.partial(run_step, programs, training=training), carry, key, inputs, mesh)
    traced = find_step(programs, structure, leaves, key, inputs, training)
    entry = "step" if on_one_device(leaves) else "step unpacked"
    program, item = traced.program(entry, (False,) * len(inputs.leaves)), inputs.owned()
    placing = None if traced.placing is None or any_traced((*leaves, key, *item)) else traced.placing
    count, item = count_on_device(1, placing), item if placing is None else placing.put_item(item)
    loss, leaves, _ = programs.call(program, entry, inputs, training, (leaves, key, count, item), traced)
    return loss, jax.tree_util.tree_unflatten(structure, leaves)
