"""Generators of random numbers that data draws from: their state would have to be saved, and cannot be set.

Those that the functions of a pipeline capture are found by a walk; the global ones are watched while the first items
are made.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

import numpy as np

from kaun import rng, tree
from kaun._loss import attributes_of, code_info, is_library, methods_of, reads_by_name
from kaun._messages import warn
from kaun.checkpoint import Directory
from kaun.data import (
    Data,
    every_stage_of,
    is_generator,
    is_tensor,
    loaders_of,
    opened_loaders,
    parts_that_make_items,
)

__all__ = ["captured_generators", "check_draws", "find_generators", "global_states", "refuse_draws"]

T = TypeVar("T")

_WATCHED = 3  # items during which the global generators are watched
_MOST_OBJECTS = 2000
_MOST_ITEMS = 16
_MAKE_ITEMS = frozenset(["Data.filter", "Data.from_fn", "Data.map", "Data.map_batch", "Data.random_map"])
# By these names code reads other attributes than those that it names.
_UNNAMED = frozenset(["super", "getattr", "vars", "__dict__", "__getattribute__"])
_SKIPPED = frozenset(["jax", "jaxlib", "kaun", "optax", "pyarrow"])  # packages whose objects hold none


def captured_generators(data: Any) -> list[str]:
    """Where the functions that make the items of data hold a generator, in words."""
    found: list[str] = []
    for stage in every_stage_of(data):
        if stage.name in _MAKE_ITEMS:
            found += [f"{stage.text} reads {path}" for path, _, _ in find_generators(stage.given["f"])]
        elif stage.name == "Data.from_items":
            items = stage.given["items"]
            named = _makes_items(items)
            found += [f"{stage.text} reads {path}" for path, _, _ in find_generators(items, named=named)]
    for source in loaders_of(data):
        for part in parts_that_make_items(source):
            generators = find_generators(part, named=_makes_items(part))
            found += [f"the loader's {type(part).__name__} reads {path}" for path, _, _ in generators]
        if hasattr(source, "__iter__"):  # a function that makes a loader is called again: its facts have the states
            found += [f"the loader's function reads {path}" for path, _, inside in find_generators(source) if inside]
    return list(dict.fromkeys(found))


def _makes_items(source: Any) -> bool:
    """Whether the code of a user's class alone makes the items of an object, from attributes that it names."""
    method = getattr(type(source), "__getitem__", None)
    if not isinstance(method, types.FunctionType) or is_library(method.__module__):
        return False
    return all(_UNNAMED.isdisjoint(each.__code__.co_names) for each in methods_of(type(source)))


def find_generators(root: Any, *, named: bool = False) -> list[tuple[str, Any, bool]]:
    """The generators in a value: where, the generator, and whether a function captures it.

    Functions are followed through what they read, a user's objects in them through the attributes that code names, all
    other objects through all attributes. Only the first items of a container are looked at.

    Args:
        root: The value.
        named: Whether it is an object of a user's class, of which only the attributes count that code names. What only
            ``__init__`` names, as a generator that made a split, is not drawn from any more.
    """
    names: set[str] = set()
    while True:
        known = len(names)
        found = list(_walk(root, named, names))
        if len(names) == known:  # no code was met late that names more attributes of what was followed before
            return found


def _walk(root: Any, named: bool, names: set[str]) -> Iterator[tuple[str, Any, bool]]:
    seen: dict[int, Any] = {}
    waiting: list[tuple[str, Any, bool]] = [("", root, named)]
    while waiting and len(seen) < _MOST_OBJECTS:
        path, value, inside = waiting.pop(0)
        if id(value) in seen or value is None or isinstance(value, (str, bytes, int, float, complex, type, Data)):
            continue
        seen[id(value)] = value
        if is_generator(value):
            yield f"`{path or 'itself'}` ({type(value).__name__})", value, inside
        elif not (tree.is_array(value) or is_tensor(value)):
            inside = inside or isinstance(value, (types.FunctionType, types.MethodType, functools.partial))
            for name, part in _parts(value, names, inside):
                # A library's base class may read all attributes of an object in general.
                if not (named and value is root) or name in names or isinstance(part, types.FunctionType):
                    waiting.append((f"{path}.{name}" if path and name else path or name, part, inside))


def _parts(value: Any, names: set[str], inside: bool) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    if isinstance(value, types.FunctionType):
        names |= code_info(value).names
        yield from reads_by_name(value)
    elif isinstance(value, types.MethodType):
        yield from (("", value.__func__), ("self", value.__self__))
    elif isinstance(value, functools.partial):
        yield from (("", part) for part in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, types.BuiltinFunctionType):
        yield value.__name__, None if isinstance(value.__self__, types.ModuleType) else value.__self__
    elif isinstance(value, Mapping):
        yield from ((str(k), v) for k, v in itertools.islice(cast("Mapping[Any, Any]", value).items(), _MOST_ITEMS))
    elif isinstance(value, (list, tuple)):
        yield from (("", part) for part in cast("list[Any]", value)[:_MOST_ITEMS])
    elif isinstance(value, types.ModuleType):
        yield from [] if is_library(value.__name__) else vars(value).items()
    elif (inner := getattr(value, "__wrapped__", None) if callable(value) else None) is not None:
        yield "", inner
    elif kind.__module__.partition(".")[0] not in _SKIPPED:
        if inside and not is_library(kind.__module__):
            names.update(*(code_info(method).names for method in methods_of(kind)))
            yield from attributes_of(value, frozenset(names))
        else:
            yield from list(getattr(value, "__dict__", {}).items())


# Global generators


def global_states() -> dict[str, str]:
    """The states of the generators that belong to no object, by name, as digests."""
    kind, words, *rest = np.random.get_state()
    states = {
        "NumPy's global generator (np.random)": (kind, np.asarray(words).tobytes(), rest),
        "Python's global generator (random)": random.getstate(),
        **{f"rng.next_key(), {where}": count for where, count in rng.counts().items()},
    }
    found = {name: hashlib.sha256(repr(state).encode()).hexdigest() for name, state in states.items()}
    state = _torch_state()
    return found if state is None else {**found, _TORCH: _torch_digest(state)}


_TORCH = "PyTorch's global generator (torch)"
_UNSCOPED = "rng.next_key(), outside of any rng.scope"


def check_draws(items: Iterator[T], data: Any, directory: Directory, record: dict[str, str]) -> Iterator[T]:
    """The same items; the global generators are watched while the first are made.

    What is drawn for the first item of a loader may be the order of its pass. That is the same when the loader is read
    again from the same state of the generator, which goes into ``record``. Where loaders are sources among others, the
    generators are watched until each has been opened.

    Args:
        items: The items of a run.
        data: The data that makes them.
        directory: The directory of the run.
        record: Receives the states at the start, by the names of the generators.

    Raises:
        ValueError: If items cannot be made again, unless the directory accepts other data.
    """
    loaders, is_one_of_several = loaders_of(data), any(stage.sources for stage in every_stage_of(data))
    at_start, opened_before = global_states(), opened_loaders.count
    warned: set[str] = set()
    for k in itertools.count():
        opened = opened_loaders.count
        if k >= _WATCHED and not (is_one_of_several and opened - opened_before < len(loaders)):
            break
        before, torch_state = global_states(), _torch_state()
        item = next(items, None)
        drawn = _draws_between(before, torch_state)
        opens = bool(loaders) and (k == 0 or (is_one_of_several and opened_loaders.count > opened))
        if opens:
            record |= {name: at_start[name] for name in drawn if name != _UNSCOPED}
        if refused := [name for name in drawn if (not opens or name not in record) and name not in warned]:
            refuse_draws(directory, [f"making an item of {data!r} draws from {name}" for name in refused])
            warned.update(refused)
        if item is None:
            return
        yield item
        del item
    yield from items


def refuse_draws(directory: Directory, lines: list[str]) -> None:
    """Refuse data whose items would be others in a resumed run, or warn where the directory accepts other data.

    Raises:
        ValueError: If it does not accept that.
    """
    text = (
        f"fit(checkpoints=...) cannot be resumed with the same items, because {'; '.join(lines)}. The state of that "
        "generator is not saved. Draw the numbers from a key for each item, a function of its epoch and index:\n"
        "    train = data.random_map(lambda key, item: augment(key, item))"
    )
    if "data" not in directory.accept:
        raise ValueError(
            f'{text}\nTo run anyway, with other numbers after a restart, write Directory(..., accept={{"data"}}).'
        )
    warn(f"{text}\nThe run continues, because accept= contains 'data'.")


def _draws_between(before: Mapping[str, str], torch_state: Any) -> list[str]:
    """The names of the global generators that were drawn from since ``before``.

    Args:
        before: The states then.
        torch_state: That of PyTorch's generator then, None if it was not imported. The one number that opening a
            ``DataLoader`` draws, to seed its workers, does not count.
    """
    drawn = [name for name, state in global_states().items() if before.get(name, state) != state]
    if torch_state is not None and _TORCH in drawn:
        torch: Any = sys.modules["torch"]
        generator = torch.Generator()
        generator.set_state(torch_state)
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        if _torch_digest(generator.get_state()) == _torch_digest(torch.get_rng_state()):
            drawn.remove(_TORCH)
    return drawn


def _torch_state() -> Any:
    torch: Any = sys.modules.get("torch")
    return None if torch is None else torch.get_rng_state()


def _torch_digest(state: Any) -> str:
    return hashlib.sha256(state.numpy().tobytes()).hexdigest()
