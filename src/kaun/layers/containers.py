"""Layers that contain others and apply them in order: ``sequential``, and ``residual``, which adds the input."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, cast, overload

import jax.numpy as jnp

from kaun import tree
from kaun._calls import explained, public, shown
from kaun.context import Context
from kaun.layers.core import Float, Int, Layer, Vars, below, block_text, keys_text, must_be_layer, short_name
from kaun.layers.path import at, here

__all__ = ["must_be_key", "must_fit", "parts_text", "residual", "sequential"]


# They overlap: a list without an embedding fits both, and the first one that fits is taken.
@overload
def sequential(  # pyright: ignore[reportOverlappingOverload]
    layers: Sequence[Layer[Float, Float]] | Mapping[str, Layer[Float, Float]],
) -> Layer[Float, Float]: ...
@overload
def sequential(
    layers: Sequence[Layer[Int, Float] | Layer[Float, Float]] | Mapping[str, Layer[Int, Float] | Layer[Float, Float]],
) -> Layer[Int, Float]: ...
@overload
def sequential(layers: Sequence[Layer[Any, Any]] | Mapping[str, Layer[Any, Any]]) -> Layer[Any, Any]: ...
@explained("layers.sequential")
def sequential(layers: Any) -> Layer[Any, Any]:
    """Make the layer that applies each of ``layers`` in order.

    The first may be an ``embedding``; then the type checker knows that the model takes integers. The type of a list
    does not show the positions of its elements, so an embedding in another place is found when the layer is applied.

    Args:
        layers: A list of layers, or a dict of layers by name. The path of a parameter begins with the position of its
            layer, ``0.weight``, or with its name, ``hidden.weight``.

    Raises:
        TypeError: If ``layers`` is neither a list nor a dict, an element is not a ``Layer``, or a name not a string.
        ValueError: If there are no layers, or a name is empty or contains a dot.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> model = layers.sequential([layers.linear(2, 4), layers.tanh(), layers.linear(4, 1)])
        >>> model
        sequential([
          linear(2, 4),
          tanh(),
          linear(4, 1),
        ])
        >>> model = layers.sequential({"hidden": layers.linear(2, 4), "out": layers.linear(4, 1)})
        >>> sorted(model.init(dtype=jnp.float32).params)
        ['hidden', 'out']
    """
    if isinstance(layers, Layer):
        raise TypeError(f"sequential expected a list of layers, received {shown(layers)}. Write sequential([...]).")
    named = isinstance(layers, Mapping)
    children: dict[Any, Any] = dict(cast("Mapping[Any, Any]", layers) if named else enumerate(layers))
    if not children:
        raise ValueError(f"sequential expected at least one layer, received an empty {'dict' if named else 'list'}.")
    for key, child in children.items():
        must_be_layer("sequential", child)
        if named:
            must_be_key("sequential", key)
    joined = lambda parts: parts if named else list(parts.values())

    def init(*, dtype: Any) -> Vars:
        made = {key: child.init(dtype=dtype) for key, child in children.items()}
        params, state = ({key: getattr(m, kind) for key, m in made.items()} for kind in ("params", "state"))
        return Vars(params=joined(params), state=joined(state), dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        must_fit("sequential", len(children), vars)
        state: dict[Any, Any] = {}
        for key, child in children.items():
            with at(str(key)):
                x, after = child.apply(below(vars, key), x, training=training, ctx=ctx)
            state[key] = after.state
        return x, vars.replace(state=joined(state))

    return Layer(init=init, apply=apply, name=f"sequential({parts_text(joined(children))})")


@public
def residual(inner: Layer[Float, Float]) -> Layer[Float, Float]:
    """Make the layer ``x + inner(x)``.

    Args:
        inner: A layer. Its parameters are ``inner``.

    Raises:
        TypeError: If ``inner`` is not a ``Layer``.
        ValueError: If, when applied, ``inner`` changes the shape or the dtype.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from kaun import layers
        >>> block = layers.residual(layers.linear(3, 3, weight_init=jax.nn.initializers.zeros))
        >>> block.apply(block.init(dtype=jnp.float32), jnp.ones((1, 3)))[0]
        Array([[1., 1., 1.]], dtype=float32)
    """
    must_be_layer("residual", inner)

    def init(*, dtype: Any) -> Vars:
        made = inner.init(dtype=dtype)
        return Vars(params={"inner": made.params}, state={"inner": made.state}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        with at("inner"):
            y, after = inner.apply(below(vars, "inner"), x, training=training, ctx=ctx)
        if jnp.shape(y) != jnp.shape(x) or jnp.result_type(y) != jnp.result_type(x):
            raise ValueError(
                f"{here('residual')} adds its input {tree.describe(x)} to its inner layer's output "
                f"{tree.describe(y)}: shapes and dtypes must be equal. Change "
                f"{short_name(inner)} so that it keeps both."
            )
        return x + y, vars.replace(state={"inner": after.state})

    return Layer(init=init, apply=apply, name=block_text("residual", [inner]))


def must_be_key(where: str, key: Any) -> None:
    """Check a name that becomes part of the paths of parameters.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it is empty or contains a dot, with which paths join names.
    """
    if not isinstance(key, str):
        raise TypeError(f"{where} expected names of layers as strings, received {key!r}. Write 'layer_{key}'.")
    if not key or "." in key:
        fix = repr(key.replace(".", "_") or "layer")
        raise ValueError(
            f"{where} expected names of layers without dots, because paths join names with dots, received {key!r}. "
            f"Write {fix}."
        )


def must_fit(name: str, count: int, vars: Vars) -> None:
    """Raise ValueError if variables do not have this number of parts."""
    lengths = [len(part) if hasattr(part, "__len__") else None for part in (vars.params, vars.state)]
    if lengths != [count, count]:
        raise ValueError(
            f"{here(name)} has {count} layers, received variables with params {keys_text(vars.params)} and state "
            f"{keys_text(vars.state)}: they belong to another model."
        )


def parts_text(part: Any) -> str:
    """The text of a layer, or of lists and dicts of layers as Python source, each part on its own lines."""
    if isinstance(part, Layer):
        return part.name
    if isinstance(part, dict):
        lines = [f'"{key}": {parts_text(inner)}' for key, inner in cast("dict[Any, Any]", part).items()]
    else:
        lines = [parts_text(inner) for inner in part]
    left, right = "{}" if isinstance(part, dict) else "[]"
    inside = "".join(textwrap.indent(line, "  ") + ",\n" for line in lines)
    return f"{left}\n{inside}{right}" if lines else left + right
