"""Steps that are not finite: the values of ``on_nonfinite``, the test of loss and gradient, and the exception."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kaun import tree
from kaun._step.watch import check_names
from kaun.averages.weights import without_weights
from kaun.errors import NonFiniteLoss

__all__ = ["MODES", "both_finite", "check_mode", "error_for", "flush_error", "match_state", "state_paths"]

T = TypeVar("T")

MODES = ("raise", "skip", "ignore")
_EXPLAIN = (
    "For the operation, its line, its layer and the rows of the batch, write\n    print(kaun.explain(trainer, err))"
)
NAMED = 5  # paths, in the message


def check_mode(mode: Any) -> None:
    """Check the argument ``on_nonfinite``.

    Raises:
        ValueError: If it is not one of the modes.
    """
    if mode not in MODES:
        raise ValueError(f"Trainer(on_nonfinite=...) expected {', '.join(map(repr, MODES))}, received {mode!r}.")


def both_finite(value: jax.Array, norm: jax.Array) -> jax.Array:
    """Return whether a loss and the norm of its gradient are finite.

    By their sum, which costs a tiny step one operation less. A norm is at most the square root of the largest number,
    so added to a loss near that number it changes the sum by less than rounding does.
    """
    wide = max(value.dtype, norm.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    return jnp.isfinite(value.astype(wide) + norm.astype(wide))


def match_state(before: T, after: T) -> T:
    """Return the state after a step with the structure, shapes and dtypes of the state before it.

    Raises:
        TypeError: If they differ in more than weak types.
    """
    changed = tree.difference(before, after)
    if changed or jax.tree_util.tree_structure(before) != jax.tree_util.tree_structure(after):
        listed = "\n  ".join(changed[:10]) or f"{jax.tree_util.tree_structure(after)}"
        raise TypeError(
            "A step must return a state with the structure, shapes and dtypes of the state it was given, but the "
            f"model's or the optimizer's state changed (expected is before, found after the step):\n  {listed}\n"
            "Keep the dtype in apply or update with new.astype(old.dtype)."
        )
    strong = lambda new, old: lax.convert_element_type(new, old.dtype) if tree.is_weak(new) else new
    return jax.tree_util.tree_map(strong, after, before)


def error_for(
    trained: Any, vars: Any, opt_state: Any, *, penalized: bool = False
) -> Callable[[int, float, Any, ValueError | None], NonFiniteLoss]:
    """Return what makes the exception for a step that is not finite, of its number, loss, status and refused values.

    The status is ``checks_of`` its gradient and update; where the step does not itself discard, ``spoiled_leaves`` of
    variables and optimizer state follow.

    Args:
        trained: The parameters that train.
        vars: All variables; of these trees only the paths are kept.
        opt_state: The optimizer's own state.
        penalized: Whether the trainer has a penalty.
    """
    paths = tuple(tree.flatten(trained)[0])
    checked = check_names({"params": trained, "state": vars.state, "opt_state": without_weights(opt_state)})
    leaves = tuple(state_paths(vars, opt_state))
    return functools.partial(_nonfinite_error, paths, tuple(checked), leaves, ", and at the penalty" * penalized)


def state_paths(vars: Any, opt_state: Any) -> list[str]:
    """Return the paths of the leaves of a state: ``"params.weight"``, ``"opt_state.0.count"``."""
    found = jax.tree_util.tree_flatten_with_path((vars, {"opt_state": opt_state}))[0]
    return [tree.path_name(path[1:]) for path, _ in found]


def _nonfinite_error(
    paths: tuple[str, ...],
    checked: tuple[str, ...],
    leaves: tuple[str, ...],
    more: str,
    step: int,
    loss: float,
    status: Any,
    refused: ValueError | None,
) -> NonFiniteLoss:
    nonfinite = tuple(path for path, square in zip(paths, status, strict=False) if not square < np.inf)
    exact = len(status) > len(checked)
    names, flags = (leaves, status[len(checked) :]) if exact else (checked, np.isneginf(status))
    spoiled = tuple(name for name, flag in zip(names, flags, strict=True) if flag)
    if np.isfinite(loss) and not nonfinite and spoiled:
        what = f"The update of step {step}"
        return NonFiniteLoss(_about_update(what, loss, spoiled, exact, _EXPLAIN), step, loss, (), spoiled)
    counted = f"{len(nonfinite)} of {len(paths)} parameters"
    where = (
        f"the gradient is not finite for {_listed(nonfinite)} ({counted})" if nonfinite else "the gradient is finite"
    )
    advice = (
        "Try a smaller learning rate, or optax.chain(optax.clip_by_global_norm(1.0), optimizer); look at that item's "
        f"input and labels{more}."
    )
    if refused is not None:
        advice = f"Run outside of the compiled step, it is refused: {refused}"
    text = (
        f"The loss is {loss:g} at step {step}; {where}. The state before that step is this exception's kaun_state. "
        f"{advice} {_EXPLAIN}\n"
        'To discard such steps and continue, write Trainer(..., on_nonfinite="skip").'
    )
    return NonFiniteLoss(text, step, loss, nonfinite)


def flush_error(trained: Any, vars: Any, window: Any, step: int, checks: Any) -> NonFiniteLoss:
    """Return the exception for the update of an open window that is not finite.

    Args:
        trained: The parameters that train.
        vars: All variables.
        window: The ``Window``.
        step: How many steps the state had.
        checks: ``checks_of`` the update.
    """
    names = check_names({"params": trained, "state": vars.state, "opt_state": without_weights(window)})
    spoiled = tuple(name for name, flag in zip(names, ~np.isfinite(checks), strict=True) if flag)
    loss = float(window.loss) / (float(window.weight) or 1.0)
    what = f"The update that flush makes of the open window after step {step}"
    last = 'To end the window without this update, flush it with a trainer that has on_nonfinite="skip".'
    text = _about_update(what, loss, spoiled, False, last)
    bad = tuple(path for path, square in zip(tree.flatten(trained)[0], checks, strict=False) if not square < np.inf)
    if bad:  # the gradients of the items are finite
        spoiled = ()
        text = (
            f"The gradient of the penalty is not finite for {_listed(bad)} in the update that flush makes of the open "
            f"window after step {step}. The state before it is this exception's kaun_state. Look at "
            f"jax.grad(penalty)(err.kaun_state.vars.params). {last}"
        )
    error = NonFiniteLoss(text, step, loss, bad, spoiled)
    error.kaun_flush = True
    return error


def _about_update(what: str, loss: float, spoiled: tuple[str, ...], exact: bool, last: str) -> str:
    causes: list[str] = []
    if any(path.startswith("params.") for path in spoiled):
        causes.append(
            "a learning rate that is nan or infinite at this step (call the schedule with this count), or a division "
            "by zero in the optimizer (an eps of 0: write optax.adam(1e-3, eps=1e-8))"
        )
    if not exact or any(path.startswith("opt_state") for path in spoiled):
        causes.append(
            "a value in the optimizer's state that is too large for its dtype, such as the square of a gradient (write "
            "optax.chain(optax.clip_by_global_norm(1.0), optimizer))"
        )
    if any(path.startswith("state.") for path in spoiled):
        causes.append("a running statistic that is too large for its dtype (scale that layer's input)")
    # One look for a parameter and what mirrors it: of a large state, looking at each would compile half as long again.
    mirrored = ", or the optimizer state for it,"
    if exact or not any(path.startswith("params.") for path in spoiled):
        mirrored = ""
    return (
        f"{what} makes {_listed(spoiled)}{mirrored} not finite. "
        f"Loss ({loss:g}) and gradient are finite. The state before that step is this exception's kaun_state. "
        f"Look for {'; or for '.join(causes)}. {last}"
    )


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(map(repr, paths[:NAMED])) + more
