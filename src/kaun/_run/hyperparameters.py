"""The hyperparameters that an optimizer keeps in its state, as a fact of a run.

They are values of the state and not of the program, so a run that is resumed continues with those of its checkpoint.
Other ones given for it, as in a sweep whose rates were changed, are another run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kaun import tree
from kaun._run.digest import Digester
from kaun.state import TrainState

__all__ = ["changed_hyperparameters", "hyperparameters"]

_MOST = 4096  # numbers of one that are listed
_TOLERANCE = 1e-6  # relative: jnp.geomspace differs in the last bits between machines


def hyperparameters(state: TrainState) -> dict[str, Any]:
    """Return the hyperparameters of ``optax.inject_hyperparams`` in a state, as lists of numbers as text, by path."""
    pairs = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    return {f"opt_state.{tree.path_name(path)}": _fact(leaf) for path, leaf in pairs if _is_one(path)}


def _is_one(path: tuple[Any, ...]) -> bool:
    return any(isinstance(key, jax.tree_util.GetAttrKey) and key.name == "hyperparams" for key in path)


def _fact(leaf: Any) -> list[str] | str:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    values = np.asarray(leaf)
    return Digester().describe(values) if values.size > _MOST else [str(value) for value in values.ravel()]


def changed_hyperparameters(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one line for each hyperparameter that was another one at the start of a run."""
    lines: list[str] = []
    for path, old in before.items():
        new = now.get(path, old)
        if isinstance(old, str) or isinstance(new, str):
            lines += [] if old == new else [f"{path} was {_short(old)}, is {_short(new)}{_WHY}"]
            continue
        different = [i for i, pair in enumerate(zip(old, new, strict=False)) if not _same(*pair)]
        if different:
            i, member = different[0], f"[{different[0]}]" if len(old) > 1 else ""
            more = f", and {len(different) - 1} more of {len(old)} differ" if len(different) > 1 else ""
            lines.append(f"{path}{member} was {old[i]}, is {new[i]}{more}{_WHY}")
    return lines


_WHY = ". It is a value of the state, and a resumed run continues with that of its checkpoint"


def _short(fact: Any) -> str:
    return fact.partition(" sha256:")[0] if isinstance(fact, str) else f"{len(fact)} numbers"


def _same(old: str, new: str) -> bool:
    try:
        return old == new or bool(np.isclose(float(old), float(new), rtol=_TOLERANCE, atol=0, equal_nan=True))
    except (TypeError, ValueError):  # not a number: of another dtype, or from a file
        return False
