"""A layer applied many times in a loop, each time with its own parameters: ``repeat``."""

from __future__ import annotations

import textwrap
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from kaun import rng, tree
from kaun._calls import public
from kaun._messages import contextmanager
from kaun.context import Context
from kaun.layers.arguments import flag, size
from kaun.layers.core import Layer, Vars, must_be_layer
from kaun.layers.path import here, slices_of

__all__ = ["one_copy", "repeat"]

Same = TypeVar("Same")

_one_copy: ContextVar[bool] = ContextVar("kaun_one_copy", default=False)


@public
def repeat(layer: Layer[Same, Same], n: int, remat: bool = False) -> Layer[Same, Same]:
    """Make the layer that applies ``n`` copies of ``layer`` one after the other, in a loop (``jax.lax.scan``).

    It computes what ``sequential([layer] * n)`` does, up to rounding, but is compiled once and not ``n`` times. Paths
    are those of ``layer``; each array of parameters and of state has one more axis in front, of length ``n``, and
    ``init`` makes the values of ``sequential([layer] * n)``, stacked. Each copy draws its own dropout masks and has its
    own state. Parameters are frozen by path, so in all copies or in none.

    Args:
        layer: The layer, for example a block of a transformer. Its output has the shape and dtype of its input.
        n: The number of copies.
        remat: Whether each copy is computed again in the backward pass, as by ``layers.remat``, which saves most of the
            memory for activations. Default: False.

    Raises:
        TypeError: If ``layer`` is not a ``Layer``, or ``n`` is not an int.
        ValueError: If ``n`` is below 1; when applied, if the layer changes the shape or dtype of its input, or the
            structure of its state, or the variables belong to another number of copies.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> block = layers.residual(layers.sequential([layers.layer_norm(8), layers.linear(8, 8), layers.gelu()]))
        >>> model = layers.repeat(block, 12)
        >>> variables = model.init(dtype=jnp.float32)
        >>> variables.params["inner"][1]["weight"].shape
        (12, 8, 8)
        >>> model.apply(variables, jnp.ones((2, 8)))[0].shape
        (2, 8)
    """
    must_be_layer("repeat", layer)
    n, remat = size("repeat", "n", n), flag("repeat", "remat", remat)

    def init(*, dtype: Any) -> Vars:
        if _one_copy.get():
            return layer.init(dtype=dtype)
        made = [layer.init(dtype=dtype) for _ in range(n)]
        return jax.tree_util.tree_map(lambda *leaves: jnp.stack(leaves), *made)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        _must_be_stacked(n, vars)
        x = jax.tree_util.tree_map(tree.strong, x)
        scope, after = rng.loop_scope(), vars.state
        changed: list[bool] = []

        def body(x: Any, given: tuple[jax.Array, Vars]) -> tuple[Any, list[Any]]:
            nonlocal after
            i, mine = given
            with scope(i), slices_of(vars, mine):
                y, moved = layer.apply(mine, x, training=training, ctx=ctx)
            _must_keep(layer, x, y)
            _must_keep(layer, mine.state, moved.state)
            after = moved.state
            # By identity: what does not change stays the same array, as microbatches and frozen layers expect.
            pairs = zip(*map(jax.tree_util.tree_leaves, (mine.state, moved.state)), strict=True)
            changed[:] = [new is not old for old, new in pairs]
            return y, [leaf for leaf, new in zip(jax.tree_util.tree_leaves(moved.state), changed, strict=True) if new]

        run = jax.checkpoint(body, prevent_cse=False, policy=None if remat else _is_computed)
        y, states = jax.lax.scan(run, x, (jnp.arange(n), vars))
        new, leaves = iter(states), jax.tree_util.tree_leaves(vars.state)
        leaves = [next(new) if moved else leaf for leaf, moved in zip(leaves, changed, strict=True)]
        return y, vars.replace(state=jax.tree_util.tree_structure(after).unflatten(leaves))

    options = f"  {n},\n" + ("  remat=True,\n" if remat else "")
    return Layer(init=init, apply=apply, name=f"repeat(\n{textwrap.indent(layer.name, '  ')},\n{options})")


@contextmanager
def one_copy() -> Generator[None, None, None]:
    """Inside this context, ``init`` of ``repeat`` makes the variables of one copy, without an axis of copies."""
    token = _one_copy.set(True)
    try:
        yield
    finally:
        _one_copy.reset(token)


def _is_computed(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a value is kept for the backward pass, and not made again."""
    # A loop writes what is kept into memory, also parts and copies of arrays that it has: a step of four residual
    # blocks, convolution, batch norm and relu, took 3.5 times as long with them as without.
    return primitive.name not in ("concatenate", "pad", "reshape", "slice")


def _must_be_stacked(n: int, vars: Vars) -> None:
    for path, leaf in tree.flatten(vars)[0].items():
        if leaf.shape[:1] != (n,):
            raise ValueError(
                f"{here('repeat')} has {n} copies, and expected a first axis of {n} in each array of its variables, "
                f"received {tree.describe(leaf)} at {path!r}: it belongs to another model. Stack the arrays of single "
                "layers, jnp.stack([...])."
            )


def _must_keep(layer: Layer[Any, Any], before: Any, after: Any) -> None:
    lines = tree.difference(before, after)
    if lines:
        raise ValueError(
            f"{here(layer.name)} under repeat gets its own output as input, and its state again, so both must keep "
            f"shapes and dtypes:\n  "
            + "\n  ".join(lines[:5])
            + "\nPut layers that change them before or after it, layers.sequential([first, layers.repeat(layer, n)])."
        )
