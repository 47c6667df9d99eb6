"""Optimizers whose parameters to evaluate are not those that they train at."""

from __future__ import annotations

from typing import Any

import jax
import optax

from kaun._jax import is_traced
from kaun._messages import warn
from kaun._step.optimizer import state_nodes

__all__ = ["EvaluatedParams"]

# For each class of state: what the state's parameters are, a field with one number for each parameter, the number of
# steps at which they are those to evaluate, and the code of those: of a whole tree, and of one parameter p that has a
# number a in that field.
_KINDS = {
    "ScheduleFreeState": (
        "the training iterate of optax.contrib.schedule_free, and not its average, which is to be evaluated",
        "z", "step_count", 1,
        "optax.contrib.schedule_free_eval_params(part, state.vars.params)",
        "(p - (1 - part.b1) * a) / part.b1",
    ),
    "SAMState": (
        "perturbed: optax.contrib.sam is between two of its outer steps. Evaluate after a multiple of sync_period steps, "
        "or use sam(..., opaque_mode=True), or evaluate its outer parameters",
        "cache", "steps_since_sync", 0, "part.cache", "a",
    ),
}  # fmt: skip


class EvaluatedParams:
    """Warns where the parameters of a trainer's states are not those that its optimizer means to be evaluated; once."""

    def __init__(self) -> None:
        self._settled = False

    def check(self, opt_state: Any) -> None:
        """Warn if the parameters that belong to this optimizer state are not those to evaluate. None has none."""
        if self._settled or opt_state is None:
            return
        found = {name: state_nodes(opt_state, name) for name in _KINDS}
        # A SAM with opaque_mode=True keeps no parameters: it makes all of its steps in one.
        found = {name: [node for node in nodes if getattr(node, _KINDS[name][1]) is not None]
                 for name, nodes in found.items()}  # fmt: skip
        self._settled = not any(found.values())  # the states of one trainer all have the same classes
        for name, nodes in found.items():
            if any(_has_moved(getattr(node, _KINDS[name][2]), _KINDS[name][3]) for node in nodes):
                self._settled = True
                warn(
                    f"The parameters of this state are {_KINDS[name][0]}. predict, evaluate, export and validate use "
                    f"those of the state. Write\n{_code(name, nodes)}\n    evaluated = state.replace("
                    "vars=state.vars.replace(params=params), opt_state=None)\nand predict with `evaluated`. "
                    "This is said once."
                )


def _has_moved(count: Any, start: int) -> bool:
    return is_traced(count) or int(count) != start


def _code(name: str, nodes: list[Any]) -> str:
    """Return the code that makes the parameters to evaluate."""
    _, field, _, _, whole, one = _KINDS[name]
    absent = lambda leaf: leaf is None or isinstance(leaf, optax.MaskedNode)
    if len(nodes) == 1 and not any(map(absent, jax.tree_util.tree_leaves(getattr(nodes[0], field), is_leaf=absent))):
        return f'    part = optax.tree.get(state.opt_state, "{name}")\n    params = {whole}'
    return (
        "    params = state.vars.params\n"
        f'    for _, part in optax.tree.get_all_with_path(state.opt_state, "{name}"):\n'
        f"        merge = lambda p, a: {one} if isinstance(a, jax.Array) else p\n"
        f"        params = jax.tree.map(merge, params, part.{field})"
    )
