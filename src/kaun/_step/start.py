"""A fresh state. With ``Trainer(sharding=)`` it is made in pieces: no device ever has more than its part.

The bytes are those of a state made without a sharding, where each operation runs on its own. Here all of them are one
program, so there are barriers between them: XLA would fuse and reorder them, which changes last bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kaun import rng
from kaun._jax import Operation, any_traced, constants_in, evaluate
from kaun._processes import failures_told, meet
from kaun._step.settings import Carry, Settings
from kaun._step.step import init_carry
from kaun.layers.core import Vars
from kaun.sharding.core import Sharding, processes_of, put, refuse_set_mesh

__all__ = ["fresh_carry", "fresh_key", "fresh_state", "placed_key"]

# The bytes of arrays that the traced init contains. More of them belong to a model that existed before, and would be
# compiled into the program.
_MOST_CONSTANTS = 1 << 16


def fresh_state(settings: Settings, dtype: Any) -> tuple[Carry, jax.Array]:
    """Return the carry of a fresh state and its run key, with all keys from the RNG scope.

    Args:
        settings: The trainer's settings.
        dtype: The dtype of the weights, as ``init`` was given it.
    """
    dtype = settings.dtype_of_params(dtype)
    if settings.sharding is None or _is_traced():
        return init_carry(settings, settings.model.init(dtype=dtype)), rng.next_key()
    refuse_set_mesh()
    lent = rng.LentScope()
    _refuse_unscoped(settings.sharding, "init", scoped=lent.scoped)
    made = lent.inside(lambda: (init_carry(settings, settings.model.init(dtype=dtype)), rng.next_key()))
    with failures_told("init", processes_of(settings.sharding, ())):
        found = _in_pieces("init", settings.sharding, made, lent.key, jnp.uint32(lent.first))
        if found is None:
            vars, key = lent.inside(lambda: (settings.model.init(dtype=dtype), rng.next_key()))(lent.key, lent.first)
            found = fresh_carry(settings, vars, "init"), placed_key(settings, key)
    lent.give_back()
    return found


def fresh_carry(settings: Settings, vars: Vars, entry: str = "make_state") -> Carry:
    """Return ``init_carry`` of some variables, placed as the sharding says."""
    if settings.sharding is None or _is_traced():
        return init_carry(settings, vars)
    refuse_set_mesh()
    with failures_told(entry, processes := processes_of(settings.sharding, ())):
        found = _in_pieces(entry, settings.sharding, functools.partial(init_carry, settings), vars)
        if found is None:  # the error is that of init_carry, if there is one
            found = init_carry(settings, vars)
            meet(entry, processes, {})
            found = jax.tree_util.tree_map(put, found, settings.sharding.of(found))
    return found


def fresh_key(settings: Settings) -> jax.Array:
    """Return a run key from the RNG scope, where the state lies."""
    key = rng.next_key()
    if settings.sharding is not None and not any_traced([key]):
        _refuse_unscoped(settings.sharding, "make_state", scoped=not rng.unscoped(key))
    return placed_key(settings, key)


def _refuse_unscoped(sharding: Sharding, entry: str, *, scoped: bool) -> None:
    """Refuse keys that each of several processes has drawn for itself."""
    count = len(processes_of(sharding, ()))
    if count > 1 and not scoped:
        raise ValueError(
            f"{entry} makes a state in {count} processes, and drew its keys outside an rng scope, where each process "
            "draws others. Write\n    with rng.scope(42):\n        state = trainer.init()"
        )


def placed_key(settings: Settings, key: jax.Array) -> jax.Array:
    """Return a run key where the state lies; a traced one as it is."""
    return key if settings.sharding is None or any_traced([key]) else put(key, settings.sharding.replicated)


def _is_traced() -> bool:
    return any_traced([jnp.zeros(())])


def _in_pieces(entry: str, sharding: Sharding, make: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``make`` returns, each array made where it will lie; None where JAX cannot trace it.

    Other processes make their parts, so they meet before in ``entry``, whether JAX can trace it or not.
    """
    try:
        closed, shapes = jax.make_jaxpr(make, return_shape=True)(*arguments)
    except Exception:
        return None
    if sum(getattr(constant, "nbytes", 0) for constant in constants_in(closed)) > _MOST_CONSTANTS:
        return None
    where = sharding.of(shapes)
    meet(entry, processes_of(sharding, ()), {})
    if arguments and isinstance(arguments[0], Vars):
        arguments = jax.tree_util.tree_map(put, arguments, (where[0],))
    leaves = jax.tree_util.tree_leaves(arguments)
    alone = jax.jit(functools.partial(_run_alone, closed), out_shardings=jax.tree_util.tree_leaves(where))
    return jax.tree_util.tree_structure(shapes).unflatten(alone(_literals(closed, *leaves), *leaves))


def _literals(closed: Any, *arguments: Any) -> list[jax.Array]:
    """Return the numbers that are written in a traced program, in the order in which they are read."""
    found: list[jax.Array] = []

    def note(value: Any) -> Any:
        if not isinstance(value, jax.Array):
            with jax.ensure_compile_time_eval():
                value = jnp.asarray(value)
            found.append(value)
        return value

    jax.eval_shape(lambda *given: next(evaluate(closed, given, note, Operation.run)), *arguments)
    return found


def _run_alone(closed: Any, literals: list[jax.Array], *arguments: Any) -> list[Any]:
    """Run a traced program with each operation on its own, as outside of a compiled function.

    Its numbers are arguments: XLA replaces a division by what is made of constants by a product, through barriers too.
    """
    given = iter(literals)
    constant = lambda value: lax.optimization_barrier(value) if isinstance(value, jax.Array) else next(given)
    (found,) = evaluate(closed, arguments, constant, _run_operation)
    return found


def _run_operation(operation: Operation, values: list[Any]) -> list[Any]:
    return list(lax.optimization_barrier(tuple(operation.run(values))))
