"""A fresh optimizer state that fits the parameters, and one update of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from kaun import tree
from kaun._calls import shown
from kaun._messages import contextmanager, locate
from kaun._step.rate import find_rate
from kaun.averages.weights import AveragedWeights

__all__ = [
    "Optimizer",
    "apply_update",
    "check_optimizer",
    "check_params",
    "init_optimizer",
    "learning_rate",
    "rates",
    "state_nodes",
]

_EXTRA: tuple[str, ...] = ("value", "grad", "value_fn", "obj_fn", "grad_fn")
"""What ``update`` may take by name: the loss, its gradient, the loss as a function of the parameters (two names), and
its gradient as one."""


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
        called = ". Did you forget to call it?" if callable(optimizer) else "."
        raise TypeError(
            "Trainer(optimizer=...) expected an object with init and update, as optax's have, received "
            f"{shown(optimizer)}, which has no {' and no '.join(missing)}{called} Write optimizer=optax.adam(1e-3)."
        )


def check_params(params: Any, trained: Any, model: str) -> None:
    """Check that there are parameters, and that those that train can be differentiated.

    Args:
        params: All parameters.
        trained: Those that train.
        model: The model's name, for messages.

    Raises:
        ValueError: If there are none.
        TypeError: If one that trains is not floating.
    """
    if not jax.tree_util.tree_leaves(params):
        raise ValueError(
            f"The model {model} has no parameters, so there is nothing to train. Add a layer that "
            "has parameters, such as layers.linear(...), or call model.apply(vars, x) without a trainer."
        )
    for path, leaf in tree.flatten(trained)[0].items():
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"Parameter {path!r} is {tree.describe(leaf)}, and only real floating arrays train. Keep its real and "
                "its imaginary part as two parameters, and write jax.lax.complex(real, imag) in apply."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"Parameter {path!r} is {tree.describe(leaf)}, and only floating arrays can be differentiated. Put it "
                "into the layer's state: Vars(params=..., state={...}, dtype=dtype). Or freeze it: "
                f"Trainer(trainable=lambda path: path != {path!r})."
            )


def init_optimizer(optimizer: Optimizer, params: Any) -> Any:
    """Return a fresh optimizer state, after a check by shapes that its updates fit the parameters.

    Raises:
        TypeError: If they do not.
    """

    def updates_of(params: Any, opt_state: Any) -> Any:
        return _updates(optimizer, params, opt_state, params, optax.tree.sum(params), optax.tree.sum)

    try:
        with _as_optax_expects():
            opt_state = jax.tree_util.tree_map(tree.strong, optimizer.init(params))
            updates, after = jax.eval_shape(updates_of, params, opt_state)
    except Exception as error:
        raise _misfit(optimizer, f"It raises {type(error).__name__}: {error}\n{_about_frozen(params)}") from error
    lines = _mismatch(params, updates)
    if lines:
        raise _misfit(optimizer, f"Its updates differ from them:\n  {lines}\n")
    lines = _mismatch(opt_state, after)
    if lines:
        raise TypeError(
            f"The state of the optimizer ({locate(optimizer.update)}) has another form after an update than its init "
            f"gave it (expected is before, found after the update):\n  {lines}\nCompiled steps need one form. In the "
            "place of optax.monitor write optax.snapshot(name, f), or let the loss return (loss, {name: scalar})."
        )
    return opt_state


def _misfit(optimizer: Optimizer, why: str) -> TypeError:
    return TypeError(
        f"The optimizer ({locate(optimizer.update)}) does not work on the model's plain tree of parameters. {why}"
        "A Trainer calls optimizer.init(params) and optimizer.update(gradient, opt_state, params), with "
        f"{', '.join(_EXTRA)} by name where update takes them. An optimizer that needs other arguments, gradients of "
        "single examples, or its own form of parameters, such as optax.lookahead with its LookaheadParams, cannot be "
        "used in a Trainer; use the optimizer inside it (optax.sgd, optax.adam)."
    )


def _about_frozen(params: Any) -> str:
    if all(leaf is not None for leaf in jax.tree_util.tree_leaves(params, is_leaf=lambda leaf: leaf is None)):
        return ""
    return (
        "With Trainer(trainable=...) the frozen parameters are None in the tree that it receives. If it does not take "
        'None, leave trainable out, and freeze with optax.partition({"train": optimizer, "frozen": '
        "optax.set_to_zero()}, labels).\n"
    )


def _mismatch(expected: Any, found: Any) -> str:
    """Return in which paths and shapes two trees differ, in words. Floating leaves may be of any floating dtype."""
    structures = [jax.tree_util.tree_structure(each) for each in (expected, found)]

    def cast(a: Any, b: Any) -> Any:
        floating = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (a, b))
        return jax.ShapeDtypeStruct(b.shape, a.dtype) if floating else b

    if structures[0] == structures[1]:
        found = jax.tree_util.tree_map(cast, expected, found)
        structures = []
    return "\n  ".join([*tree.difference(expected, found)[:10]] or [*map(str, structures)])


def apply_update(
    optimizer: Optimizer, gradient: Any, opt_state: Any, params: Any, value: Any, value_fn: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """Return the parameters after an update, and the optimizer's state.

    Args:
        optimizer: The optimizer.
        gradient: The gradient of the loss.
        opt_state: The optimizer's state before, in which an average counts its updates.
        params: The parameters that train.
        value: The loss, for optimizers that take extra arguments.
        value_fn: The loss as a function of the parameters, for the same optimizers.

    Raises:
        ValueError: If the state does not fit the parameters.
    """
    if isinstance(opt_state, AveragedWeights):
        params, inner = apply_update(optimizer, gradient, opt_state.inner, params, value, value_fn)
        made = _made_update(opt_state.inner, inner)
        return params, opt_state._replace(updates=opt_state.updates + made, inner=inner)
    try:
        with _as_optax_expects():
            updates, opt_state = _updates(optimizer, gradient, opt_state, params, value, value_fn)
            return optax.apply_updates(params, updates), opt_state
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        with _as_optax_expects():
            lines = tree.difference(jax.eval_shape(optimizer.init, params), opt_state)
        if not lines:
            raise
        raise ValueError(
            "The optimizer's state does not fit the trainable parameters, so it belongs to a trainer with another "
            "optimizer or another trainable (expected is a new state of this optimizer):\n  "
            + "\n  ".join(lines[:10])
            + "\n"
            "Write state = trainer.make_state(state.vars)."
        ) from error


def _made_update(before: Any, after: Any) -> Any:
    """Return 1, or 0 for an item inside a window of ``optax.MultiSteps``."""
    windows = [state_nodes(state, "MultiStepsState") for state in (before, after)]
    if len(windows[0]) != 1:
        return 1
    return (windows[1][0].gradient_step != windows[0][0].gradient_step).astype(jnp.int32)


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


def rates(optimizer: Optimizer, before: Any, after: Any) -> dict[str, jax.Array]:
    """Return what a step tells of its update: ``learning_rate``, where it is known, and ``updates`` of MultiSteps.

    The rate is nan in a step of ``optax.MultiSteps`` that makes no update: the state has the rate of the update before.
    A rate that is the same in each step, ``find_rate(optimizer).fixed``, is left out.

    Args:
        optimizer: The optimizer.
        before: The optimizer's state before the step.
        after: Its state after the step.
    """
    windows, scales = state_nodes(after, "MultiStepsState"), state_nodes(after, "ReduceLROnPlateauState")
    updates = {"updates": windows[0].gradient_step} if len(windows) == 1 else {}
    given = learning_rate(after)
    rate = _found_rate(optimizer, before) if given is None else given
    if rate is None or len(windows) > 1 or len(scales) > 1:
        return updates
    rate = tree.host_scalar(rate)
    if scales:
        rate = rate * scales[0].scale.astype(rate.dtype)
    if windows and (given is None or learning_rate(windows[0]) is not None):
        made = windows[0].gradient_step != state_nodes(before, "MultiStepsState")[0].gradient_step
        rate = jnp.where(made, rate, jnp.nan)
    return {"learning_rate": rate} | updates


def _found_rate(optimizer: Optimizer, before: Any) -> Any:
    """Return the rate of a step by the closures of an optimizer, None if it is unknown or the same in each step."""
    found = find_rate(optimizer)
    if found is None or found.fixed is not None:
        return None
    if found.schedule is None:
        return jnp.float32(found.constant)
    counts = state_nodes(before, "ScaleByScheduleState")
    if len(counts) != 1:
        return None
    with _as_optax_expects():
        rate = jnp.asarray(found.schedule(counts[0].count))
    return rate if not rate.shape and tree.is_real(rate) else None


def _updates(
    optimizer: Optimizer, gradient: Any, opt_state: Any, params: Any, value: Any, value_fn: Callable[[Any], Any]
) -> Any:  # fmt: skip
    # Line searches refuse an argument that value_fn does not take, so it takes those of the other optimizers too.
    def loss_of(given: Any, obj_fn: Any = None, grad_fn: Any = None) -> Any:
        # A line search under x64, or of bfloat16 parameters, tries parameters of a wider dtype than the model's.
        return value_fn(jax.tree_util.tree_map(lambda p, old: jnp.asarray(p, old.dtype), given, params))

    def gradient_of(given: Any, step: int = 0) -> Any:
        return jax.grad(loss_of)(given)

    extra: dict[str, Any] = dict(zip(_EXTRA, (value, gradient, loss_of, loss_of, gradient_of), strict=True))
    return optimizer.update(gradient, opt_state, params, **{name: extra[name] for name in _extra_names(optimizer)})


@contextmanager
def _as_optax_expects() -> Generator[None]:
    """Allow promotion inside: optax multiplies its counts with floats, so under strict promotion even adam raises."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _extra_names(optimizer: Optimizer) -> list[str]:
    """Return which of the extra arguments ``update`` takes, beside gradient, state and parameters."""
    parameters = list(inspect.signature(optimizer.update).parameters.values())
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return list(_EXTRA)
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = [p for i, p in enumerate(parameters) if i > 2 or p.kind is inspect.Parameter.KEYWORD_ONLY]
    return [p.name for p in own if p.kind in by_name and p.name in _EXTRA]
