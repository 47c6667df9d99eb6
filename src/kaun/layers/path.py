"""Where in the model we are, and what arrives there: the checks of the layers, whose messages name the path."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from typing import Any

import jax

__all__ = ["at", "frozen_layers", "here", "is_frozen", "path", "watched", "watching"]

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
def frozen_layers(leaves: Sequence[Any]) -> Generator[None, None, None]:
    """Inside, a layer all of whose parameters are among these arrays is applied in evaluation mode."""
    token = _still.set(frozenset(map(id, leaves)))
    try:
        yield
    finally:
        _still.reset(token)


def is_frozen(params: Any) -> bool:
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
