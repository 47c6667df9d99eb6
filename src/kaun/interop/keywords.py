"""Shared by the adapters: optional packages, the keyword arguments of a model's call, dtypes, and nested paths."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from kaun import tree
from kaun._calls import shown
from kaun.context import Context
from kaun.layers.path import here

__all__ = [
    "SWITCHES", "Keywords", "cast_floats", "check_method", "check_structure", "key_path", "leaves_by_path", "nested",
    "origins", "pick", "plain", "zeros",
]  # fmt: skip

SWITCHES = {
    "training": True, "train": True, "is_training": True,
    "deterministic": False, "use_running_average": False, "inference": False,
}  # fmt: skip
"""The names that models use for the argument of training or evaluation mode, and the value of each in training."""


@dataclasses.dataclass(frozen=True)
class Keywords:
    """The arguments of a model's call other than its input, by name: whether each is required."""

    required: Mapping[str, bool]

    @classmethod
    def of(cls, function: Callable[..., Any], given: int) -> Keywords:
        """The arguments of a function without the first ``given``."""
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except ValueError:  # written in C
            return cls({})
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        rest = [p for i, p in enumerate(parameters) if p.kind in by_name and not (i < given and p.kind == by_name[0])]
        return cls({p.name: p.default is inspect.Parameter.empty for p in rest})

    def values(self, *, training: bool, ctx: Context, without: Iterable[str] = ()) -> dict[str, Any]:
        """The values to pass: the mode, and those of the Context for which the call has an argument.

        Raises:
            MissingContext: If an argument without a default is neither the mode nor in the Context.
        """
        named = {name: needed for name, needed in self.required.items() if name not in without}
        switches = {name: SWITCHES[name] is training for name in named if name in SWITCHES}
        found = {name: ctx[name] for name, needed in named.items() if name not in SWITCHES and (needed or name in ctx)}
        return switches | found

    def counts_filled_rows(self, *, training: bool, ctx: Context) -> bool:
        """Whether statistics of this call would include filled rows, because it does not take ``row_mask``."""
        return training and "row_mask" in ctx and "row_mask" not in self.required


def origins(value: Any) -> list[str]:
    """The names of the modules of a value's class and of its bases."""
    bases: tuple[type, ...] = type(value).__mro__
    return [base.__module__ for base in bases]


def check_method(method: Any, where: str) -> Any:
    """Check an argument ``method=``: None, a name, or a function of the module and the input.

    Raises:
        TypeError: If it is anything else.
    """
    if method is not None and not isinstance(method, str) and not callable(method):
        raise TypeError(
            f"{where}(method=...) expected the name of a method or a function (module, x), received {shown(method)}. "
            'Write method="encode", or method=lambda module, x: module.encode(x).'
        )
    return method


def cast_floats(values: Any, dtype: Any) -> Any:
    """The pytree as JAX arrays, with floating leaves cast to ``dtype``."""

    def one(leaf: Any) -> jax.Array:
        array = tree.strong(leaf)
        return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return jax.tree_util.tree_map(one, values)


def nested(values: Mapping[tuple[Any, ...], Any]) -> dict[Any, Any]:
    """Nested dicts with these values at these paths."""
    made: dict[Any, Any] = {}
    for path, value in values.items():
        inner = made
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return made


def key_path(path: Iterable[Any]) -> tuple[Any, ...]:
    """A path of JAX's keys as plain keys, positions and names of attributes."""
    return tuple(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in path)


def leaves_by_path(values: Any) -> dict[tuple[Any, ...], Any]:
    """The leaves of a tree by their paths; of nested dicts the inverse of ``nested``."""
    return {key_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(values)[0]}


def pick(values: Any, path: Iterable[Any]) -> Any:
    """The value at a path of nested dicts."""
    for key in path:
        values = values[key]
    return values


def plain(values: Any) -> Any:
    """The tree with each mapping converted to a dict."""
    if isinstance(values, Mapping):
        return {key: plain(value) for key, value in cast("Mapping[Any, Any]", values).items()}
    return values


def check_structure(name: str, before: Any, after: Any, fix: str, *, filled: bool = False) -> Any:
    """The state after a call, with floating leaves cast to the dtypes that they had before.

    Args:
        name: The name of the layer.
        before: The state before.
        after: The state after.
        fix: What to write where the structure has changed.
        filled: Whether changes would include filled rows of a padded batch, see ``Keywords.counts_filled_rows``.

    Raises:
        ValueError: If the call added or removed leaves or changed a shape, and the message ends with ``fix``; or if it
            changed a floating leaf and ``filled`` is true.
    """
    old, structure = tree.flatten(before)
    floating = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
    new = {
        path: leaf.astype(old[path].dtype) if path in old and floating(leaf) and floating(old[path]) else leaf
        for path, leaf in tree.flatten(after)[0].items()
    }
    lines = tree.difference(old, new)
    if lines:
        raise ValueError(
            f"{here(name)} changed the structure of its state in a call:\n  " + "\n  ".join(lines[:10]) + f"\n{fix}"
        )
    given = tree.flatten(after)[0]
    changed = [path for path, leaf in given.items() if floating(leaf) and leaf is not old[path]] if filled else []
    if changed:
        raise ValueError(
            f"{here(name)} changes its state {', '.join(map(repr, changed[:5]))} in training and would count the "
            "filled rows of a padded batch, because its call does not take row_mask. Give the call an argument "
            "row_mask (bool [batch]) and leave out the rows that are False, in Flax nn.BatchNorm(...)(x, "
            "mask=row_mask[:, None]), or train on Data.batches(..., drop_last=True)."
        )
    return jax.tree_util.tree_unflatten(structure, [new[path] for path in old])


def zeros(sample: Any) -> Any:
    """The sample input with zeros in place of each ``jax.ShapeDtypeStruct``."""
    shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    make = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype) if shape(leaf) else leaf
    return jax.tree_util.tree_map(make, sample, is_leaf=shape)
