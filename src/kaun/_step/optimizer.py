"""A fresh optimizer state that fits the parameters, and one update of them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from kaun import tree
from kaun._messages import locate

__all__ = [
    "Optimizer", "apply_update", "check_optimizer", "check_params", "init_optimizer", "learning_rate", "rates",
    "state_nodes",
]  # fmt: skip


class Optimizer(Protocol):
    """Any object with optax's ``init`` and ``update``."""

    @property
    def init(self) -> Callable[[Any], Any]: ...
    @property
    def update(self) -> Callable[..., tuple[Any, Any]]: ...


def check_optimizer(optimizer: Any) -> None:
    """Check the argument ``optimizer``.

    Raises:
        TypeError: If it has no ``init`` or no ``update``.
    """
    missing = [n for n in ("init", "update") if not callable(getattr(optimizer, n, None))]
    if missing:
        called = ", did you forget to call it?" if callable(optimizer) else "."
        raise TypeError(
            "Trainer(optimizer=...) expected an object with init and update, as optax's have, received "
            f"{optimizer!r}, which has no {' and no '.join(missing)}{called} Write optimizer=optax.adam(1e-3)."
        )


def check_params(params: Any, model: str) -> None:
    """Check that there are parameters, and that they can be differentiated.

    Raises:
        ValueError: If there are none.
        TypeError: If one is not floating.
    """
    leaves, _ = tree.flatten(params)
    if not leaves:
        raise ValueError(
            f"The model {model} has no parameters, so there is nothing to train. Add a layer that "
            "has some, such as layers.linear(...), or call model.apply(vars, x) without a trainer."
        )
    for path, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"Parameter {path!r} is {tree.describe(leaf)}, and only floating arrays can be differentiated. Put it "
                "into the layer's state: Vars(params=..., state={...}, dtype=dtype)."
            )


def init_optimizer(optimizer: Optimizer, params: Any) -> Any:
    """Return a fresh optimizer state, after a check by shapes that its updates fit the parameters.

    Raises:
        TypeError: If they do not.
    """
    extra = {"value": jnp.zeros(()), "grad": params, "value_fn": optax.tree.sum}
    try:
        with _as_optax_expects():
            opt_state = jax.tree_util.tree_map(tree.strong, optimizer.init(params))
            updates, _ = jax.eval_shape(lambda g, o: _updates(optimizer, g, o, g, extra), params, opt_state)
    except Exception as error:
        raise _misfit(optimizer) from error
    lines = tree.difference(params, updates)
    if lines:
        raise _misfit(optimizer, "Its updates differ from them:\n  " + "\n  ".join(lines[:10]) + "\n")
    return opt_state


def _misfit(optimizer: Optimizer, why: str = "") -> TypeError:
    return TypeError(
        f"The optimizer ({locate(optimizer.update)}) does not work on the model's plain tree of parameters. {why}"
        "An optimizer that needs its own form of parameters, such as optax.lookahead with its LookaheadParams, "
        "cannot be used in a Trainer; use the optimizer inside it (optax.sgd, optax.adam), or keep the slow weights "
        "with optax.ema or in a report."
    )


def apply_update(
    optimizer: Optimizer, gradient: Any, opt_state: Any, params: Any, value: Any, value_fn: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """Return the parameters after an update, and the optimizer's state.

    Args:
        optimizer: The optimizer.
        gradient: The gradient of the loss.
        opt_state: The optimizer's state before.
        params: The parameters that train.
        value: The loss, for optimizers that take extra arguments.
        value_fn: The loss as a function of the parameters, for the same optimizers.

    Raises:
        ValueError: If the state does not fit the parameters.
    """
    extra = {"value": value, "grad": gradient, "value_fn": value_fn}
    try:
        with _as_optax_expects():
            updates, opt_state = _updates(optimizer, gradient, opt_state, params, extra)
            return optax.apply_updates(params, updates), opt_state
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        with _as_optax_expects():
            lines = tree.difference(jax.eval_shape(optimizer.init, params), opt_state)
        if not lines:
            raise
        raise ValueError(
            "The optimizer's state does not fit the parameters that train, so it belongs to a trainer with another "
            "optimizer or another trainable (expected is a fresh one):\n  " + "\n  ".join(lines[:10]) + "\n"
            "Write state = trainer.make_state(state.vars)."
        ) from error


def state_nodes(opt_state: Any, *names: str) -> list[Any]:
    """Return the parts of an optimizer's state whose classes have these names; a part inside another is left out."""
    is_one = lambda node: type(node).__name__ in names
    return [node for node in jax.tree_util.tree_leaves(opt_state, is_leaf=is_one) if is_one(node)]


def learning_rate(opt_state: Any) -> Any:
    """Return the learning rate in an optimizer's state, where ``optax.inject_hyperparams`` put one; else None.

    None also where it put several: of those none is the learning rate of the step.
    """
    found: list[Any] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        names = [getattr(key, "name", getattr(key, "key", None)) for key in path[-2:]]
        if names == ["hyperparams", "learning_rate"] and leaf.ndim == 0:
            found.append(leaf)
    return found[0] if len(found) == 1 else None


def rates(before: Any, after: Any) -> dict[str, jax.Array]:
    """Return what a step tells of its update: ``learning_rate``, where it is known, and ``updates`` of MultiSteps.

    The rate is nan in a step of ``optax.MultiSteps`` that makes no update: the state has the rate of the update before.

    Args:
        before: The optimizer's state before the step.
        after: Its state after the step.
    """
    windows, scales = state_nodes(after, "MultiStepsState"), state_nodes(after, "ReduceLROnPlateauState")
    updates = {"updates": windows[0].gradient_step} if len(windows) == 1 else {}
    rate = learning_rate(after)
    if rate is None or len(windows) > 1 or len(scales) > 1:
        return updates
    rate = tree.host_scalar(rate)
    if scales:
        rate = rate * scales[0].scale.astype(rate.dtype)
    if windows and learning_rate(windows[0]) is not None:
        made = windows[0].gradient_step != state_nodes(before, "MultiStepsState")[0].gradient_step
        rate = jnp.where(made, rate, jnp.nan)
    return {"learning_rate": rate} | updates


def _updates(optimizer: Optimizer, gradient: Any, opt_state: Any, params: Any, extra: dict[str, Any]) -> Any:
    return optimizer.update(gradient, opt_state, params, **(extra if _takes_extra(optimizer) else {}))


@contextlib.contextmanager
def _as_optax_expects() -> Generator[None]:
    """Allow promotion inside: optax multiplies its counts with floats, so under strict promotion even adam raises."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _takes_extra(optimizer: Optimizer) -> bool:
    kinds = [p.kind for p in inspect.signature(optimizer.update).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds
