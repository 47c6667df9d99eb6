"""The path in the model of the layer that is being applied, for error messages; which layers are frozen or watched."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from kaun._messages import add_note, contextmanager, set_on

__all__ = [
    "Part", "WatchPart", "at", "frozen_layers", "here", "is_frozen", "origin", "path", "slices_of", "watched",
    "watched_parts", "watching", "watching_parts",
]  # fmt: skip


class Part(NamedTuple):
    """A module inside a layer that is a model of another library.

    Attributes:
        path: Its path in that model, in readable form.
        kind: The name of its class.
        collections: Whether paths of state begin with the name of a collection, as in Linen.
    """

    path: str
    kind: str
    collections: bool


Watch = Callable[[Any, Any, Callable[[], Any]], Any]
WatchPart = Callable[[Part], Callable[[Any], None]]

_path: ContextVar[tuple[str, ...]] = ContextVar("kaun_layer_path", default=())
_frozen: ContextVar[frozenset[int]] = ContextVar("kaun_frozen_leaves", default=frozenset())
_origins: ContextVar[Mapping[int, int]] = ContextVar("kaun_origins_of_slices", default=MappingProxyType({}))
_watch: ContextVar[Watch | None] = ContextVar("kaun_layer_watch", default=None)
_watch_part: ContextVar[WatchPart | None] = ContextVar("kaun_watch_of_parts", default=None)


@contextmanager
def at(key: str) -> Generator[None, None, None]:
    """Inside this context, error messages add ``key`` to the path in the model, and so do names in a profile."""
    token = _path.set((*_path.get(), key))
    try:
        with jax.named_scope(key):
            yield
    except Exception as err:
        path = ".".join(_path.get())
        if not hasattr(err, "kaun_layer"):  # the innermost layer is named
            set_on(err, "kaun_layer", path)
            if isinstance(err, RecursionError):
                add_note(
                    err,
                    f"The model nests {len(_path.get())} layers deep. A long chain is sequential([a, b, ...]), not "
                    "a >> b >> ..., which is one layer inside another for each >>.",
                )
            elif repr(path) not in str(err):
                add_note(err, f"In the model's layer {path!r}.")
        raise
    finally:
        _path.reset(token)


@contextmanager
def frozen_layers(leaves: Sequence[Any]) -> Generator[None, None, None]:
    """Inside this context, a layer whose parameters are all among these arrays is applied in evaluation mode."""
    token = _frozen.set(frozenset(map(id, leaves)))
    try:
        yield
    finally:
        _frozen.reset(token)


def is_frozen(params: Any) -> bool:
    """Whether there are parameters and all of them are among the arrays given to ``frozen_layers``."""
    # By identity, so that it also works in a container written by hand, which does not record paths.
    known = _frozen.get()
    leaves = jax.tree_util.tree_leaves(params) if known else []
    return bool(leaves) and all(origin(leaf) in known for leaf in leaves)


@contextmanager
def slices_of(stacked: Any, slices: Any) -> Generator[None, None, None]:
    """Inside this context, an array of ``slices`` counts as the array of ``stacked`` that a loop takes it from."""
    pairs = zip(*map(jax.tree_util.tree_leaves, (slices, stacked)), strict=True)
    token = _origins.set({**_origins.get(), **{id(part): origin(whole) for part, whole in pairs}})
    try:
        yield
    finally:
        _origins.reset(token)


def origin(leaf: Any) -> int:
    """The id of an array, or of the array of which it is a slice."""
    return _origins.get().get(id(leaf), id(leaf))


@contextmanager
def watched(watch: Watch) -> Generator[None, None, None]:
    """Inside this context, a layer is applied by ``watch(layer, vars, run)``, which returns what ``run()`` does."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def watching() -> Watch | None:
    """The function given to ``watched``, or None."""
    return _watch.get()


@contextmanager
def watched_parts(watch: WatchPart) -> Generator[None, None, None]:
    """Inside this context, ``watch(part)`` is called when a part begins to run, and what it returns with the output."""
    token = _watch_part.set(watch)
    try:
        yield
    finally:
        _watch_part.reset(token)


def watching_parts() -> WatchPart | None:
    """The function given to ``watched_parts``, or None."""
    return _watch_part.get()


def path() -> str:
    """The path in the model of the layer that is being applied; containers that do not call ``at`` add nothing."""
    return ".".join(_path.get())


def here(name: str) -> str:
    """A layer as error messages name it: its name and its path in the model."""
    head = name if "\n" not in name else name.split("(", 1)[0]
    path = ".".join(_path.get())
    return f"{head} at {path!r}" if path else head
