"""The update of an open window, as a separate program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from kaun._engine.cache import ProgramCache
from kaun._engine.explicit import explicit_mesh, explicit_sharding, to_automatic, to_explicit
from kaun._engine.inputs import StepInputs, as_arrays
from kaun._engine.placing import Placing, place_carry
from kaun._engine.program import Program
from kaun._jax import any_traced

__all__ = ["run_flush"]


def run_flush(
    programs: ProgramCache, flush: Callable[[Any, jax.Array], tuple[Any, Any]], carry: Any, key: jax.Array
) -> tuple[Any, Any]:
    """Return the carry after the update of its window, and the checks of that update.

    Args:
        programs: The cache of the trainer, which compiles it once.
        flush: ``flush(carry, key) -> (carry, checks)``, as ``kaun._step.flush_window`` after its settings.
        carry: The state, a pytree; it stays as it is.
        key: The run's key.
    """
    leaves, structure = jax.tree_util.tree_flatten(carry)
    leaves, key = place_carry(programs.sharding, structure, leaves, key)
    inputs, where = StepInputs((), None, None), ("flush", structure)
    placing = None if programs.sharding is None else Placing(programs.sharding, structure, leaves, inputs)

    def run(leaves: list[Any], key: jax.Array) -> tuple[list[Any], Any]:
        after, checks = flush(jax.tree_util.tree_unflatten(structure, as_arrays(leaves)), key)
        leaves = jax.tree_util.tree_leaves(after)
        return (leaves, checks) if placing is None else (placing.pin_carry(leaves), placing.pin_everywhere(checks))

    program = programs.get(where) or programs.add(where, Program(run))
    mesh = None if placing is not None or any_traced((*leaves, key)) else explicit_mesh(leaves)
    if mesh is None:
        leaves, checks = programs.call(program, "flush", inputs, True, (leaves, key))
    else:
        shardings = [explicit_sharding(leaf) for leaf in leaves]
        arguments = (to_automatic(leaves), *to_automatic([key]))
        leaves, checks = programs.call(program, "flush", inputs, True, arguments)
        leaves = to_explicit(leaves, shardings, mesh)
    return jax.tree_util.tree_unflatten(structure, leaves), checks
