"""What reports keep over a restart, as JSON and a flat dict of arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun.state import TrainState

__all__ = ["pack_snapshot", "unpack_snapshot"]

_ARRAY, _STATE = "array:", "state:"


def pack_snapshot(snapshot: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """A snapshot as JSON, with the names of arrays in the place of these, and the arrays.

    Arguments:
        snapshot: a dict of dicts, lists, JSON values, arrays and TrainStates.

    Raises:
        TypeError: for anything else.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}

    def put(path: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): put(f"{path}/{name}" if path else str(name), v) for name, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [put(f"{path}/{i}", v) for i, v in enumerate(value)]
        if isinstance(value, TrainState):
            for name, leaf in tree.flatten(value)[0].items():
                arrays[f"{path}/{name}"] = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
            return _STATE + path
        if isinstance(value, (jax.Array, np.ndarray)):
            arrays[path] = np.asarray(value)
            return _ARRAY + path
        if isinstance(value, str):
            return f"text:{value}"
        if isinstance(value, float):
            return f"float:{float(value).hex()}"  # JSON has no nan and no inf
        if value is None or isinstance(value, (bool, int)):
            return value
        raise TypeError(
            f"snapshot() of a report returned {tree.describe(value)} at {path!r}; a checkpoint holds dicts, lists, "
            "numbers, strings, arrays and TrainStates. Keep what can be made of these again."
        )

    return put("", snapshot), arrays


def unpack_snapshot(told: Any, arrays: Mapping[str, Any], like: TrainState) -> Any:
    """The snapshot that ``packed`` was given.

    Arguments:
        told: the JSON.
        arrays: by the names in it.
        like: a state of the same structure, shapes and dtypes as those in it.

    Raises:
        ValueError: when arrays are missing, or do not fit ``like``.
    """
    if isinstance(told, Mapping):
        return {name: unpack_snapshot(value, arrays, like) for name, value in told.items()}
    if isinstance(told, list):
        return [unpack_snapshot(value, arrays, like) for value in told]
    if not isinstance(told, str):
        return told
    kind, _, rest = told.partition(":")
    if kind == "float":
        return float.fromhex(rest)
    if kind == "array":
        return _named(arrays, rest)
    return _state(arrays, rest, like) if kind == "state" else rest


def _named(arrays: Mapping[str, Any], name: str) -> Any:
    if name not in arrays:
        raise ValueError(f"the checkpoint names an array {name!r} of a report and does not hold it")
    return np.array(arrays[name])


def _state(arrays: Mapping[str, Any], path: str, like: TrainState) -> TrainState:
    leaves, structure = tree.flatten(like)
    made: list[Any] = []
    for name, leaf in leaves.items():
        array = _named(arrays, f"{path}/{name}")
        wanted = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            raise ValueError(
                f"the state that a report kept has {tree.describe(array)} at {name!r}, where the run has "
                f"{tree.describe(wanted)}"
            )
        made.append(jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array)
    return jax.tree_util.tree_map(jnp.asarray, structure.unflatten(made))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
