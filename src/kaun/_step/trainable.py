"""Which parameters train, and what holds for frozen layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

from kaun import tree
from kaun._calls import shown
from kaun._messages import locate
from kaun.layers.core import Vars
from kaun.layers.path import frozen_layers

__all__ = ["Partition", "check_trainable", "trainable_part"]

Trainable = Callable[[str], Any]


def check_trainable(trainable: Any) -> None:
    """Check the argument ``trainable``.

    Raises:
        TypeError: If it is neither None nor a function.
    """
    if trainable is not None and not callable(trainable):
        raise TypeError(
            "Trainer(trainable=...) expected a function (path) -> bool that is True for parameters that train, "
            f'received {shown(trainable)}. Write trainable=lambda path: path.startswith("head.").'
        )


def trainable_part(trainable: Trainable | None, params: Any) -> Any:
    """Return the parameters with None in place of the frozen ones.

    Raises:
        ValueError: If all are frozen; the message lists the paths.
    """
    if trainable is None:
        return params
    part = tree.map_with_path(lambda path, leaf: leaf if trainable(path) else None, params)
    if not jax.tree_util.tree_leaves(part):
        paths = list(tree.flatten(params)[0])
        fix = f'trainable=lambda path: path.startswith("{paths[-1].rpartition(".")[0]}")'
        raise ValueError(tree.false_for_all("Trainer(trainable=...)", "parameters", locate(trainable), paths, fix))
    return part


class Partition:
    """A model's variables, split into those that train and the frozen ones.

    Args:
        trainable: True for the paths of the parameters that train; None for all.
        vars: The variables.
        cast: Applied to each frozen parameter once, before all forward passes of the step.

    Attributes:
        vars: The variables, with None in place of each frozen parameter.
    """

    def __init__(self, trainable: Trainable | None, vars: Vars, cast: Callable[[Any], Any]) -> None:
        self._whole = vars
        self.vars = vars.replace(params=trainable_part(trainable, vars.params))
        self._frozen = _join(lambda mine, leaf: leaf if mine is None else None, self.vars.params, vars.params)
        self._cast = jax.tree_util.tree_map(cast, self._frozen)

    def forward(self, params: Any) -> Vars:
        """Return all variables for a forward pass, with these as the parameters that train."""
        return self._whole.replace(params=_either(params, self._cast))

    def whole(self, params: Any) -> Any:
        """Return all parameters as they are kept, with these as those that train."""
        return _either(params, self._frozen)

    def joined(self, vars: Vars) -> Vars:
        """Return all variables after an update of those that train."""
        return vars.replace(params=self.whole(vars.params))

    def frozen_layers(self) -> AbstractContextManager[None]:
        """Return a context in which layers that are frozen as a whole run in evaluation mode."""
        return frozen_layers(jax.tree_util.tree_leaves(self._cast))

    def kept(self, state: Any) -> Any:
        """Return the layers' state after a step; layers that are frozen as a whole keep theirs."""
        frozen = tree.flatten(self._frozen)[0]
        if not frozen:
            return state
        paths = {path: path in frozen for path in tree.flatten(self._whole.params)[0]}
        return _with_paths(lambda path, old, new: old if _is_frozen(path, paths) else new, self._whole.state, state)


def _with_paths(f: Callable[[str, Any, Any], Any], before: Any, after: Any) -> Any:
    if jax.tree_util.tree_structure(before) != jax.tree_util.tree_structure(after):
        return after  # match_state refuses it
    return jax.tree_util.tree_map_with_path(lambda path, a, b: f(tree.path_name(path), a, b), before, after)


def _is_frozen(path: str, paths: dict[str, bool]) -> bool:
    """Return whether the innermost part of the model that has this leaf of state and parameters is all frozen."""
    while path:
        path = path.rpartition(".")[0]
        inside = [flag for name, flag in paths.items() if not path or name.startswith(f"{path}.")]
        if inside:
            return all(inside)
    return False


def _join(f: Callable[[Any, Any], Any], part: Any, whole: Any) -> Any:
    return jax.tree_util.tree_map(f, part, whole, is_leaf=lambda leaf: leaf is None)


def _either(part: Any, other: Any) -> Any:
    return _join(lambda a, b: b if a is None else a, part, other)
