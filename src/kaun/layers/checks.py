"""Where in the model we are, and what arrives there: the checks of the layers, whose messages name the path."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree

__all__ = ["at", "float_input", "here", "int_input", "is_still", "path", "still", "watched", "watching"]

Watch = Callable[[Any, Any, Callable[[], Any]], Any]

_path: ContextVar[tuple[str, ...]] = ContextVar("kaun_layer_path", default=())
_still: ContextVar[frozenset[int]] = ContextVar("kaun_still_leaves", default=frozenset())
_watch: ContextVar[Watch | None] = ContextVar("kaun_layer_watch", default=None)


@contextlib.contextmanager
def at(key: str) -> Generator[None, None, None]:
    """Inside, error messages say that we are below ``key`` in the model."""
    token = _path.set((*_path.get(), key))
    try:
        yield
    except Exception as err:
        path = ".".join(_path.get())
        if not hasattr(err, "kaun_layer"):  # the innermost layer is the one to name
            err.kaun_layer = path  # pyright: ignore[reportAttributeAccessIssue]
            if repr(path) not in str(err):
                err.add_note(f"In the model's layer {path!r}.")
        raise
    finally:
        _path.reset(token)


@contextlib.contextmanager
def still(leaves: Sequence[Any]) -> Generator[None, None, None]:
    """Inside, a layer all of whose parameters are among these arrays is applied in evaluation mode."""
    token = _still.set(frozenset(map(id, leaves)))
    try:
        yield
    finally:
        _still.reset(token)


def is_still(params: Any) -> bool:
    """Whether these are parameters, and all among the arrays given to ``still``."""
    # By identity: it holds in a container that was written by hand, too, which knows nothing of paths.
    known = _still.get()
    leaves = jax.tree_util.tree_leaves(params) if known else []
    return bool(leaves) and all(id(leaf) in known for leaf in leaves)


@contextlib.contextmanager
def watched(watch: Watch) -> Generator[None, None, None]:
    """Inside, each layer is applied by ``watch(layer, vars, run)``, which gives what ``run()`` gives."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def watching() -> Watch | None:
    """Who watches layers being applied, None for nobody."""
    return _watch.get()


def path() -> str:
    """The path in the model of the layer that is being applied, as far as the containers around it said."""
    return ".".join(_path.get())


def here(name: str) -> str:
    """A layer as error messages name it: what it is and its path in the model."""
    head = name if "\n" not in name else name.split("(", 1)[0]
    path = ".".join(_path.get())
    return f"{head} at {path!r}" if path else head


def float_input(
    name: str, x: Any, dtype: Any = None, *, features: int | None = None, ndim: int | None = None, layout: str = "..."
) -> jax.Array:
    """``x`` as a JAX array, checked for a layer that works on floats.

    Arguments:
        name: the layer, for messages.
        x: what came. NumPy arrays are canonicalized as JAX does (float64 becomes float32 without x64).
        dtype: the model's dtype (``vars.dtype``); None takes any floating one.
        features: the size that the last axis must have; None takes any.
        ndim: the number of axes; None takes any from 1.
        layout: the axes before the last, for messages: ``"batch, height, width"``.

    Raises:
        TypeError: not an array, or of another dtype.
        ValueError: another shape.
    """
    x = _as_jax(name, x)
    last = features if features is not None else "channels"
    expected = f"{jnp.dtype(dtype).name if dtype is not None else 'float'}[{layout}, {last}]"
    received = f"received {tree.describe(x)}"
    if not jnp.issubdtype(x.dtype, jnp.floating):
        fix = f"x.astype(jnp.{jnp.dtype(dtype).name if dtype is not None else 'float32'})"
        raise TypeError(
            f"{here(name)} expected {expected}, {received}: it works on floats. Convert the input, {fix}, or put "
            "layers.embedding(...) first if these are indices."
        )
    if dtype is not None and x.dtype != dtype:
        raise TypeError(
            f"{here(name)} expected {expected}, {received}: the model is {jnp.dtype(dtype).name}. Convert the input, "
            f"x.astype(jnp.{jnp.dtype(dtype).name}), or make the model with init(dtype=jnp.{x.dtype.name})."
        )
    if (ndim is not None and x.ndim != ndim) or x.ndim == 0:
        wanted = ndim or "one or more"
        raise ValueError(f"{here(name)} expected {expected}, {received}: {x.ndim} axes instead of {wanted}.")
    if features is not None and x.shape[-1] != features:
        raise ValueError(
            f"{here(name)} expected {expected}, {received}: the last axis is {x.shape[-1]}, not {features}. "
            f"Make the layer {x.shape[-1]} wide, or the one before it {features}."
        )
    return x


def int_input(name: str, x: Any, *, layout: str = "...") -> jax.Array:
    """``x`` as a JAX array, checked for a layer that works on indices.

    Raises:
        TypeError: not an array, or not of an integer dtype.
    """
    x = _as_jax(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(
            f"{here(name)} expected int[{layout}], received {tree.describe(x)}: it works on indices. "
            "Convert the input, x.astype(jnp.int32)."
        )
    return x


def _as_jax(name: str, x: Any) -> jax.Array:
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, (np.ndarray, np.generic, float, int)):
        return jnp.asarray(x)
    raise TypeError(
        f"{here(name)} expected an array, received {type(x).__name__}. Pass a NumPy or JAX array, or write a layer "
        "that takes a tree: Layer(init=..., apply=...)."
    )
