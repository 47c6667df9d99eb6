"""Optimizers whose parameters to evaluate are not those that they train at."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from kaun._jax import is_traced
from kaun._messages import warn
from kaun._step.optimizer import state_nodes
from kaun.averages.rules import FromOptimizer
from kaun.averages.weights import find_average

__all__ = ["EvaluatedParams"]


class _Kind(NamedTuple):
    """A class of optimizer states.

    Attributes:
        name: Its name.
        are: What the parameters of such a state are, for the message.
        field: Its field that has one array for each parameter, None if the parameters are those to evaluate.
        counter: Its field that counts steps.
        start: The value of ``counter`` at which the parameters are those to evaluate.
        whole: The code of the parameters to evaluate, from a state named ``part``.
        one: The code of one of them, from a parameter ``p`` and an array ``a`` of ``field``.
    """

    name: str
    are: str
    field: str
    counter: str
    start: int
    whole: str
    one: str


_KINDS = (
    _Kind(
        name="ScheduleFreeState",
        are="the training iterate of optax.contrib.schedule_free, and not the average, which is to be evaluated",
        field="z",
        counter="step_count",
        start=1,
        whole="optax.contrib.schedule_free_eval_params(part, state.vars.params)",
        one="(p - (1 - part.b1) * a) / part.b1",
    ),
    _Kind(
        name="SAMState",
        are=(
            "perturbed: optax.contrib.sam is between two of its outer steps. Evaluate after a multiple of sync_period "
            "steps, or use sam(..., opaque_mode=True), or evaluate the outer parameters"
        ),
        field="cache",
        counter="steps_since_sync",
        start=0,
        whole="part.cache",
        one="a",
    ),
)


class EvaluatedParams:
    """Warns, once, where the parameters of a trainer's states are not those that its optimizer evaluates."""

    def __init__(self) -> None:
        self._settled = False

    def check(self, state: Any) -> None:
        """Warn if the parameters of a ``TrainState`` are not those to evaluate, unless it has no optimizer state."""
        if self._settled or state.is_averaged or state.opt_state is None:
            return
        opt_state = state.opt_state
        average = find_average(opt_state)
        found = [(kind, node) for kind in _KINDS for node in state_nodes(opt_state, kind.name)]
        found = [(kind, node) for kind, node in found if getattr(node, kind.field) is not None]
        self._settled = not found  # the states of one trainer all have the same classes
        for kind, node in found:
            if _has_moved(getattr(node, kind.counter), kind.start):
                self._settled = True
                code = _code(kind, [node for each, node in found if each is kind])
                fix = (
                    f"Write\n{code}\n"
                    "    evaluated = state.replace(vars=state.vars.replace(params=params), opt_state=None)\n"
                    "and use `evaluated` in place of the state. In a new run write Trainer(..., "
                    "average=averages.from_optimizer(f)), where f(opt_state, params) returns these params, and use "
                    "state.averaged."
                )
                if average is not None and isinstance(average.rule, FromOptimizer):
                    fix = "Use state.averaged in its place, and in validate write of=lambda s: s.averaged."
                warn(
                    f"The parameters of this state are {kind.are}. predict, evaluate, export and validate use the "
                    f"parameters of the state. {fix} This warning is given once."
                )
                return


def _has_moved(count: Any, start: int) -> bool:
    return is_traced(count) or bool((np.asarray(count) != start).any())


def _code(kind: _Kind, nodes: list[Any]) -> str:
    """Return the code that makes the parameters to evaluate."""
    absent = lambda leaf: leaf is None or isinstance(leaf, optax.MaskedNode)
    arrays = jax.tree_util.tree_leaves([getattr(node, kind.field) for node in nodes], is_leaf=absent)
    if len(nodes) == 1 and not any(map(absent, arrays)):
        return f'    part = optax.tree.get(state.opt_state, "{kind.name}")\n    params = {kind.whole}'
    return (
        "    params = state.vars.params\n"
        f'    for _, part in optax.tree.get_all_with_path(state.opt_state, "{kind.name}"):\n'
        f"        merge = lambda p, a: {kind.one} if isinstance(a, jax.Array) else p\n"
        f"        params = jax.tree.map(merge, params, part.{kind.field})"
    )
