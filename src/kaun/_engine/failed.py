"""FailedStep: a step that is not finite, with all that it was computed from, and the exception for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from kaun import rng
from kaun._engine.explicit import to_automatic
from kaun._engine.inputs import StepInputs
from kaun._engine.members import NOT_FINITE
from kaun._engine.packing import Packing, unpack
from kaun._engine.placing import wait_on_cpu
from kaun._engine.results import PendingDispatch
from kaun._loss import rebuild_loss
from kaun._step import Settings, refused_values, spoiled_leaves
from kaun.errors import NonFiniteLoss
from kaun.sharding import Sharding

__all__ = ["FailedStep", "error_of", "last_member_error", "state_before"]


class FailedStep(NamedTuple):
    """A step of ``fit`` that is not finite. Only the exception for it holds one: it keeps a state and a batch alive.

    Attributes:
        carry: The carry before the step.
        key: The run's key.
        inputs: Its item.
        calls_the_host: Whether it calls Python or foreign code, which may have effects.
    """

    carry: Any
    key: jax.Array
    inputs: StepInputs
    calls_the_host: bool = False

    @classmethod
    def of(cls, carry: Any, key: jax.Array, inputs: StepInputs, calls_the_host: bool) -> FailedStep:
        """Return the step on the mesh on which it ran: its inputs are on automatic axes."""
        leaves, structure = jax.tree_util.tree_flatten((carry, key))
        carry, key = jax.tree_util.tree_unflatten(structure, to_automatic(leaves))
        return cls(carry, key, inputs, calls_the_host)

    def refused(self, settings: Settings) -> ValueError | None:
        """Return the error of a layer or loss of kaun that refuses the values of the item, None if all take them.

        A step that calls the host is not run once more for that: None.
        """
        if self.calls_the_host:
            return None
        x, arrays, ctx = self.inputs.split(self.inputs.leaves)

        def loss(output: Any) -> Any:
            with rng.scope(rng.next_key()):
                return rebuild_loss(self.inputs.loss_key, arrays)(output)

        return refused_values(settings, self.carry, self.key, x, ctx, loss)


def state_before(
    dispatch: PendingDispatch, i: int, after: list[Any], packing: Packing | None, sharding: Sharding | None
) -> tuple[list[Any], np.ndarray[Any, Any]]:
    """Return the state before a step that is not finite, and which leaves but the last the step makes not finite.

    Args:
        dispatch: What ran the step.
        i: Which of its steps it is.
        after: The state after it.
        packing: How these states are packed, None if they are not.
        sharding: Where they lie.
    """
    wait_on_cpu(sharding, after)
    before = dispatch.again(i)
    where: Any = {} if sharding is None else {"out_shardings": sharding.replicated}
    states = [unpack(packing, held) if packing else held for held in (before, after)]
    return before, np.asarray(jax.jit(spoiled_leaves, **where)(*[leaves[:-1] for leaves in states]))


def error_of(
    settings: Settings,
    make: Callable[[int, float, Any, ValueError | None], NonFiniteLoss],
    step: int,
    loss: float,
    status: Any,
    failed: FailedStep,
) -> NonFiniteLoss:
    """Return the exception for a step that is not finite; what refuses the values of its item is the cause.

    Args:
        settings: The trainer's settings.
        make: Makes the exception of the three numbers below and what refuses the item's values.
        step: The number of the step in its fit.
        loss: Its loss.
        status: Its status after the first number (``StepResults``).
        failed: The step.
    """
    refused = failed.refused(settings)
    error = make(step, loss, status, refused)
    error.kaun_step, error.__cause__ = failed, refused
    return error


def last_member_error(
    settings: Settings, step: int, loss: float, codes: Any, failed: FailedStep, *, row_axis: int
) -> NonFiniteLoss:
    """Return the exception for a step after which no member of an ensemble is left: about the last one of them.

    Args:
        settings: The trainer's settings.
        step: The number of the step in its fit.
        loss: Its loss, the mean over the last members.
        codes: What each member did in it (``kaun._engine.members``).
        failed: The step of all members.
        row_axis: 1 where the items have an axis of members.
    """
    i = int(np.flatnonzero(codes == NOT_FINITE)[0])
    vars, members, steps = failed.carry
    leaves = [leaf[i] if row_axis and np.ndim(leaf) else leaf for leaf in failed.inputs.leaves]
    carry = jax.tree_util.tree_map(lambda leaf: leaf[i], (vars, members.inner, steps))
    own = FailedStep(carry, failed.key[i], failed.inputs.with_leaves(leaves), failed.calls_the_host)
    refused = own.refused(settings)
    advice = "Try smaller learning rates; look at that item's input and labels."
    if refused is not None:
        advice = f"Run outside of the compiled step, it is refused: {refused}"
    error = NonFiniteLoss(
        f"No member of the ensemble is finite any more. At step {step} the last one, member {i}, had the loss {loss:g};"
        " loss, gradient or update are not finite. The state before that step is this exception's kaun_state; its "
        f"`step` says when each member ended. {advice} For the operation, its line, its layer and the rows of the "
        f"batch of member {i}, write\n    print(kaun.explain(trainer, err))\n"
        'To discard such steps and continue, write Trainer(..., on_nonfinite="skip").',
        step, loss, (),
    )  # fmt: skip
    error.kaun_step, error.__cause__ = own, refused
    return error
