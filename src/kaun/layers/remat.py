"""Layers whose activations are computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from kaun import rng
from kaun._calls import public, shown
from kaun.context import Context
from kaun.layers.core import Layer, Vars, block_text, must_be_layer

__all__ = ["remat"]

In = TypeVar("In")
Out = TypeVar("Out")


@public
def remat(inner: Layer[In, Out], policy: Callable[..., Any] | None = None) -> Layer[In, Out]:
    """Make the layer that computes ``inner`` again in the backward pass, to save memory (Chen et al., 2016).

    It is ``jax.checkpoint`` around ``inner``: of its activations only the input is kept for the gradient, at the cost
    of a second forward pass. Loss, gradients, dropout masks, state, and the paths of parameters are those of ``inner``,
    so that weights can be moved from one to the other; only rounding may differ, where XLA fuses the operations in
    another way. ``jax.checkpoint`` itself cannot be used around a layer that draws random numbers.

    Args:
        inner: The layer, usually a block of a deep model. Its input and output are those of ``remat``.
        policy: What is kept all the same: one of ``jax.checkpoint_policies``, such as ``dots_saveable`` (the results of
            matrix products). Default: nothing.

    Raises:
        TypeError: If ``inner`` is not a ``Layer``, or ``policy`` is not a function.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> def block():
        ...     inner = layers.sequential([layers.linear(8, 8), layers.gelu(), layers.dropout(0.1)])
        ...     return layers.residual(layers.remat(inner))
        >>> model = layers.sequential([block() for _ in range(4)])
        >>> variables = model.init(dtype=jnp.float32)
        >>> variables.params[3]["inner"][0]["weight"].shape
        (8, 8)
    """
    must_be_layer("remat", inner)
    if policy is not None and (not callable(policy) or isinstance(policy, Layer)):
        raise TypeError(
            "remat(policy=...) expected None or a function of jax.checkpoint_policies, received "
            f"{shown(policy)}. Write "
            "policy=jax.checkpoint_policies.dots_saveable."
        )

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        scope, after = rng.carry_scope(), vars
        before = jax.tree_util.tree_leaves(vars.state)

        # All values are captured and none is an argument: frozen parameters are known by the identity of their arrays.
        def run() -> tuple[Any, list[Any]]:
            nonlocal after
            with scope():
                y, after = inner.apply(vars, x, training=training, ctx=ctx)
            return y, [leaf for leaf in jax.tree_util.tree_leaves(after.state) if not is_old(leaf)]

        # Also by identity: microbatches allows a state whose arrays stay the same ones.
        is_old = lambda leaf: any(leaf is old for old in before)
        y, changed = jax.checkpoint(run, policy=policy)()
        new = iter(changed)
        state = jax.tree_util.tree_map(lambda leaf: leaf if is_old(leaf) else next(new), after.state)
        return y, vars.replace(state=state)

    return Layer(init=inner.init, apply=apply, name=block_text("remat", [inner]))
