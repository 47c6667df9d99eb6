"""States of all members of an ensemble: made under keys of their own, and their hyperparameters set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kaun import rng, tree
from kaun._step import state_nodes
from kaun.state import Members, TrainState

__all__ = ["make_states"]

_INJECTED = ("InjectHyperparamsState", "InjectStatefulHyperparamsState")


def make_states(
    make: Callable[[Any], TrainState], size: int, given: Any, axes: Any, hyperparameters: Mapping[str, Any]
) -> TrainState:
    """Return the states of all members: that of member i is what ``make`` returns under its scope, byte for byte.

    One key is drawn from the RNG scope. Member i has a scope on a function of that key and i, whatever ``size`` is.

    Args:
        make: Returns the state of one member, of its own ``given``.
        size: The number of members.
        given: A pytree of arrays.
        axes: The axis of the members in each of its arrays, None for one that they share.
        hyperparameters: Those to set in the optimizer, arrays [members] or scalars by name.
    """
    key = rng.next_key()
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(size))

    def one(key: jax.Array, given: Any) -> TrainState:
        with rng.scope(key):
            return make(given)

    try:
        # One operation at a time, as for one member: a compiled program may round otherwise.
        state = jax.vmap(one, (0, axes))(keys, given)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):  # an init that uses NumPy
        own = lambda i: jax.tree_util.tree_map(lambda a, axis: a if axis is None else a[i], given, axes)
        each = [one(keys[i], own(i)) for i in range(size)]
        state = jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *each)
    rng.remember_unscoped(state.key)  # a fit with checkpoints refuses them
    inner = _with_hyperparameters(state.opt_state, size, hyperparameters)
    none = jnp.zeros(size, bool)
    return state.replace(opt_state=Members(none, none, inner))


def _with_hyperparameters(opt_state: Any, size: int, given: Mapping[str, Any]) -> Any:
    """Return the optimizer's states with these hyperparameters.

    Raises:
        TypeError: If the optimizer has none that can be set.
        ValueError: If it has none of this name, or several, or a schedule sets it; or for a wrong shape.
    """
    if not given:
        return opt_state
    names = sorted({name for node in state_nodes(opt_state, *_INJECTED) for name in node.hyperparams})
    if not names:
        first = next(iter(given))
        raise TypeError(
            f"init({first}=...) sets a hyperparameter in the state of the optimizer, and this one keeps none there. "
            f"Write the trainer's optimizer as optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)."
        )
    for name, value in given.items():
        holders = [node for node in state_nodes(opt_state, *_INJECTED) if name in node.hyperparams]
        if not holders:
            raise ValueError(
                f"init({name}=...): the optimizer has no hyperparameter {name!r}; it has {', '.join(map(repr, names))}."
            )
        _check_holders(name, holders)
        opt_state = _replaced(opt_state, holders[0], name, _checked(name, value, size, holders[0].hyperparams[name]))
    return opt_state


def _check_holders(name: str, holders: list[Any]) -> None:
    if len(holders) > 1:
        raise ValueError(
            f"init({name}=...): {len(holders)} parts of the optimizer have a hyperparameter {name!r}, and it is not "
            "known which one is meant. Inject it in one of them, "
            f'optax.inject_hyperparams(optax.adam, static_args="{name}") in the others.'
        )
    if name in getattr(holders[0], "hyperparams_states", {}):
        raise ValueError(
            f"init({name}=...): a schedule sets {name!r} in each step, so a value given here would be lost. Inject a "
            f"number, optax.inject_hyperparams(optax.adam)({name}=1e-3)."
        )


def _checked(name: str, value: Any, size: int, old: jax.Array) -> jax.Array:
    try:
        array: Any = jnp.asarray(value)
    except (TypeError, ValueError):  # of a string, a schedule, None
        array = value
    if not tree.is_real(array) or array.dtype == jnp.bool_ or array.shape not in ((), (size,)):
        raise ValueError(
            f"init({name}=...) expected one number for each of {size} members, an array [{size}], or one for all, "
            f"received {tree.describe(array)}. Write {name}=jnp.geomspace(1e-4, 1e-1, {size})."
        )
    if jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(old.dtype, jnp.floating):
        raise ValueError(
            f"init({name}=...): the optimizer was made with {name} as an int, and received {tree.describe(array)}, "
            f"which would be rounded. Make it with a float, {name}=1.0."
        )
    return jnp.broadcast_to(array.astype(old.dtype), old.shape)


def _replaced(opt_state: Any, holder: Any, name: str, value: jax.Array) -> Any:
    def put(node: Any) -> Any:
        return node._replace(hyperparams={**node.hyperparams, name: value}) if node is holder else node

    return jax.tree_util.tree_map(put, opt_state, is_leaf=lambda node: node is holder)
