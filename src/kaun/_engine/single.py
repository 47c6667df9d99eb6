"""One step: found traced or traced now, and run on its own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax

from kaun._engine.cache import ProgramCache
from kaun._engine.explicit import explicit_mesh, run_explicit
from kaun._engine.inputs import StepInputs
from kaun._engine.packing import on_one_device
from kaun._engine.placing import Placing, place_carry
from kaun._engine.program import TracedStep, count_on_device, trace_step
from kaun._jax import any_traced

__all__ = ["find_step", "run_step"]


def find_step(
    programs: ProgramCache, structure: Any, leaves: Any, key: jax.Array, inputs: StepInputs, training: bool,
    wanted: Mapping[str, int] | None = None,
) -> TracedStep:  # fmt: skip
    """Return the traced step for some inputs, traced where the cache has none: the user's own code runs here."""
    wanted = wanted or {}
    where = ("train", structure, training, inputs.key, jax.sharding.get_abstract_mesh(), *sorted(wanted.items()))
    found = programs.get(where)
    if found is None:
        train_step = functools.partial(programs.train_step, wanted=wanted) if wanted else programs.train_step
        step = train_step, programs.on_nonfinite, programs.discards
        made = trace_step(*step, structure, leaves, key, inputs, training)
        made.wanted, made.row_axis = wanted, programs.row_axis
        if programs.sharding is not None:
            made.placing = Placing(programs.sharding, structure, leaves, inputs)
        found = programs.add(where, made)
    return found


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
    program, count, item = traced.program(entry, (False,) * len(inputs.leaves)), count_on_device(1), inputs.owned()
    if traced.placing is not None and not any_traced((*leaves, key, *item)):
        count, item = traced.placing.put_everywhere(count), traced.placing.put_item(item)
    loss, leaves = programs.call(program, entry, inputs, training, (leaves, key, count, item), traced)
    return loss, jax.tree_util.tree_unflatten(structure, leaves)
