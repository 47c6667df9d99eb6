"""A plain function and its parameters as a layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kaun import tree
from kaun._messages import locate
from kaun.context import Context
from kaun.layers.core import Layer, Vars

__all__ = ["from_function"]

OFFERED = ("training", "ctx")


def from_function(apply: Callable[..., Any], params: Any, *, name: str | None = None) -> Layer[Any, Any]:
    """The layer that computes ``apply(params, x)`` and starts from ``params``.

    Arguments:
        apply: a pure function of parameters and input to the output. Where it has parameters of these names it also
            gets ``training``, a bool, and ``ctx``, the Context.
        params: its initial parameters, a pytree of floating arrays, best of nested dicts and lists; copied here.
            ``init(dtype=...)`` casts them to its dtype (float32 unless given).
        name: what ``repr`` and messages call it, default ``from_function(<name of apply>)``.

    Raises:
        TypeError: when ``apply`` is no function of two arguments, or a leaf of ``params`` is no array or number.

    >>> import jax.numpy as jnp
    >>> from kaun import layers
    >>> def line(params, x):
    ...     return params["slope"] * x + params["offset"]
    >>> model = layers.from_function(line, {"slope": jnp.array(2.0), "offset": jnp.array(1.0)})
    >>> model
    from_function(line)
    >>> model.apply(model.init(dtype=jnp.float32), jnp.arange(3.0))[0]
    Array([1., 3., 5.], dtype=float32)
    """
    if not callable(apply):
        raise TypeError(
            f"from_function expected a function (params, x) -> output, received {apply!r}. "
            "Write layers.from_function(lambda params, x: x @ params['w'], {'w': w})."
        )
    name = name or f"from_function({getattr(apply, '__name__', type(apply).__name__)})"
    extra = _extra(apply)
    initial = tree.map_with_path(_array, params)

    def init(*, dtype: Any) -> Vars:
        cast = lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a
        return Vars(params=jax.tree_util.tree_map(cast, initial), state={}, dtype=dtype)

    def forward(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        offered = {"training": training, "ctx": ctx}
        return apply(vars.params, x, **{word: offered[word] for word in extra}), vars

    return Layer(init=init, apply=forward, name=name)


def _array(path: str, leaf: Any) -> jax.Array:
    if not tree.is_array(leaf) and not isinstance(leaf, (int, float)):
        raise TypeError(
            f"from_function(params=...) expected a tree of arrays, and {path!r} is {tree.describe(leaf)}. Leave it out "
            "of the params: bind it with functools.partial, or read it in the function."
        )
    return tree.strong(leaf)


def _extra(apply: Callable[..., Any]) -> list[str]:
    """The names of OFFERED that a function takes, once it is clear that it takes params and x."""
    try:
        signature = inspect.signature(apply)
    except ValueError:  # written in C
        return []
    extra = [word for word in OFFERED if word in signature.parameters]
    try:
        signature.bind(None, None, **dict.fromkeys(extra))
    except TypeError as error:
        raise TypeError(
            f"from_function expected a function (params, x), to which training= and ctx= may be added, received "
            f"{locate(apply)} with the parameters {signature}: {error}. Write lambda params, x: f(...), with the other "
            "arguments bound there."
        ) from None
    return extra
