"""Plain functions as layers: without parameters (``fn``) and with them (``from_function``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kaun import tree
from kaun._calls import public, shown
from kaun._messages import locate
from kaun.context import Context
from kaun.layers.core import Layer, Vars

__all__ = ["fn", "from_function", "stateless"]

OFFERED = ("training", "ctx")


@public
def fn(f: Callable[[Any], Any], *, name: str | None = None) -> Layer[Any, Any]:
    """Make a layer without variables from a pure function of one argument.

    Args:
        f: A pure function of the input, which is an array or a pytree of arrays.
        name: The name that ``repr`` shows. Default: ``fn(<name of f>)``.

    Raises:
        TypeError: If ``f`` is not callable.

    Examples:
        >>> import jax.numpy as jnp
        >>> from kaun import layers
        >>> model = layers.linear(2, 4) >> layers.fn(jnp.sin)
    """
    if isinstance(f, Layer):
        raise TypeError(f"fn expected a function of one argument, received the layer {shown(f)}. Use it as it is.")
    if not callable(f):
        raise TypeError(f"fn expected a function of one argument, received {shown(f)}.")
    return stateless(name or f"fn({getattr(f, '__name__', type(f).__name__)})", f)


def stateless(name: str, f: Callable[..., Any]) -> Layer[Any, Any]:
    """Make a layer without variables from a function of the input."""

    def init(*, dtype: Any) -> Vars:
        return Vars(params={}, state={}, dtype=dtype)

    def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
        return f(x), vars

    return Layer(init=init, apply=apply, name=name)


@public
def from_function(apply: Callable[[Any, Any], Any], params: Any, *, name: str | None = None) -> Layer[Any, Any]:
    """Make the layer that computes ``apply(params, x)``, with initial parameters.

    Args:
        apply: A pure function of the parameters and the input that returns the output. If it has arguments of these
            names, it also receives ``training``, a bool, and ``ctx``, the Context.
        params: The initial parameters, a pytree of floating arrays, best of nested dicts and lists. They are copied;
            ``init(dtype=...)`` casts them to its dtype (float32 by default).
        name: The name in ``repr`` and in error messages. Default: ``from_function(<name of apply>)``.

    Raises:
        TypeError: If ``apply`` is not a function of two arguments, or a leaf of ``params`` is not an array or number.

    Examples:
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
            f"from_function expected a function (params, x) -> output, received {shown(apply)}. "
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
            f"from_function(params=...) expected a tree of arrays, received {tree.describe(leaf)} at {path!r}. Take it "
            "out of the params: bind it with functools.partial, or read it in the function."
        )
    return tree.strong(leaf)


def _extra(apply: Callable[..., Any]) -> list[str]:
    """The names of OFFERED that a function takes; a function that does not take params and x is refused."""
    try:
        signature = inspect.signature(apply)
    except ValueError:  # written in C
        return []
    extra = [word for word in OFFERED if word in signature.parameters]
    try:
        signature.bind(None, None, **dict.fromkeys(extra))
    except TypeError as error:
        raise TypeError(
            f"from_function expected a function (params, x), which may also take training= and ctx=, received "
            f"{locate(apply)} with the arguments {signature}: {error}. Write lambda params, x: f(...), and pass the "
            "other arguments there."
        ) from None
    return extra
