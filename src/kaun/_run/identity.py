"""What a run is, in facts that go into its checkpoints, and how the facts of two processes differ.

A fact is JSON. Arrays count by shape, dtype and content; functions by name, code and what they capture; a loader by its
type and length.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from kaun import rng, tree
from kaun._loss import FrozenLoss, function_reads
from kaun._messages import warn
from kaun._run import digest
from kaun._run.digest import Digester
from kaun._run.generators import find_generators
from kaun.checkpoint import Directory
from kaun.data import Item, ResumableLoader, known_length, loader_facts, stages_of
from kaun.errors import ResumeMismatch
from kaun.state import TrainState

__all__ = [
    "describe_data", "differences", "digest_item", "refuse_difference", "run_facts", "unscoped", "warn_of_machine",
]  # fmt: skip

Fact = dict[str, Any]

_MOST_LEAVES = 1000
_CODE = re.compile(r"(python\d+\.\d+):\w+")
_CHANGE_NO_ITEM = frozenset(["Data.prefetch"])
_ITEM_BY_ITEM = frozenset(["Data.map", "Data.random_map", "Data.with_loss"])  # they make one item of each
_COUNTS = frozenset(["Data.epochs", "Data.take"])
_AFFINITY = hasattr(os, "sched_getaffinity")


# A run


def run_facts(state: TrainState, data: Any) -> dict[str, Any]:
    """The facts of a run.

    Args:
        state: the state at its start.
        data: all its items.

    Returns:
        ``key``, ``start`` and ``data``, which must be the same in the process that resumes it, and ``machine``, of
        which a difference is a warning.
    """
    return {
        "key": np.asarray(jax.random.key_data(state.key)).tobytes().hex(),
        "start": int(state.step),
        "data": describe_data(data),
        "machine": {
            "jax": jax.__version__, "python": platform.python_version(), "backend": jax.default_backend(),
            "devices": jax.device_count(), "cores": len(os.sched_getaffinity(0)) if _AFFINITY else os.cpu_count(),
        },
    }  # fmt: skip


def refuse_difference(directory: Directory, what: str, step: int, lines: list[str]) -> None:
    """Refuse to resume a run that differs, or warn where the directory accepts that.

    Args:
        directory: the directory that holds the run.
        what: what differs, as ``Directory(accept=)`` names it.
        step: the step of the checkpoint.
        lines: one for each difference.

    Raises:
        ResumeMismatch: unless the directory accepts it.
    """
    listed = "".join(f"\n  {line}" for line in lines)
    where = f"{str(directory.path)!r} holds another run, at step {step}. Its {what} differ{'s' * (what != 'reports')}:"
    if what not in directory.accept:
        raise ResumeMismatch(
            f"{where}{listed}\nTo resume, make them equal again. To start another run, use another directory, "
            f'checkpoints=runs.child("other"). To resume anyway, write Directory(..., accept={{"{what}"}}).'
        )
    warn(f"{where}{listed}\nThe run is resumed, because accept= contains {what!r}.")


def warn_of_machine(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn where a run is resumed with another version, backend or number of devices or cores."""
    changed = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        warn(
            f"A run is resumed, although {'; '.join(changed)}. It continues from the same state, but its results may "
            "differ in their last bits from those of a run without interruption."
        )


# Data


def describe_data(data: Iterable[Any]) -> list[Fact]:
    """The facts of each stage of a pipeline, its source first; of any other iterable one fact.

    Returns:
        Dicts of JSON values: ``stage`` ("Data.batches"), ``length`` (items of a pass after it, or None), and its
        parameters by name.

    Examples:
        >>> from kaun import Data
        >>> from kaun._run import identity
        >>> identity.describe_data(Data.from_items(range(6)).take(4))[1]
        {'stage': 'Data.take', 'length': 4, 'n': 4}
    """
    found = stages_of(data)
    if found:
        return [{"stage": s.name, "length": s.length, **_given(s.given)} for s in found]
    return [{"stage": type(data).__name__, "length": known_length(data), **_source(data)}]


def unscoped(data: Iterable[Any]) -> list[str]:
    """The stages, as they print, whose key was drawn outside of any rng scope in this process."""
    return [s.text for s in stages_of(data) if s.given.get("key") is not None and rng.unscoped(s.given["key"])]


def digest_item(item: Any) -> str:
    """The digest of an item that a loader or a function made: of its arrays, and those in the closure of its loss."""
    if Item.is_training_item(item):
        x, loss, *ctx = cast("Sequence[Any]", item)
        item = (x, _labels(loss), *ctx)
    return Digester(item).digest(item)[0]


def _labels(loss: Any) -> Any:
    if isinstance(loss, FrozenLoss):
        return loss.arrays
    if isinstance(loss, functools.partial):
        return [_labels(part) for part in (loss.func, *loss.args, *loss.keywords.values())]
    if isinstance(loss, types.FunctionType):
        reads = function_reads(loss)  # not the globals, which may change during a run
        held = [value for pairs in (reads.cells, reads.defaults, reads.keywords) for _, value in pairs]
        return [_labels(value) if callable(value) else value for value in held]
    return None if callable(loss) else loss


def _given(given: Mapping[str, Any]) -> Fact:
    known: Mapping[str, Callable[[Any], Any]] = {
        "arrays": _tree, "item": _item, "items": _items, "f": _function, "key": _key,
    }  # fmt: skip
    found: Fact = {}
    for name, value in given.items():
        if name == "source":
            found |= _source(value)
        elif name in known:
            found[name] = known[name](value)
        else:
            found[name] = value
    return found


def _key(key: Any) -> str | None:
    return None if key is None else " ".join(f"0x{int(word):08x}" for word in np.ravel(jax.random.key_data(key)))


def _tree(value: Any) -> Fact | str:
    pairs, treedef = jax.tree_util.tree_flatten_with_path(value)
    digester = Digester(value)
    if len(pairs) > _MOST_LEAVES:
        return digester.describe(value)
    found: Fact = {tree.path_name(path): digester.describe(leaf) for path, leaf in pairs}
    if list(found) == [""]:
        return found
    # All of the tree but its leaves: tuple or list, names of empty parts of a dict.
    return {**found, "(structure)": Digester().describe(treedef.unflatten([0] * len(pairs)))}


def _item(item: Any) -> Fact | str:
    if not Item.is_training_item(item):
        return _tree(item)
    x, loss, *ctx = cast("Sequence[Any]", item)
    return {"x": _tree(x), "loss": _function(loss), **({"ctx": _tree(ctx[0])} if ctx else {})}


def _items(items: Any) -> Fact | str:
    """A sequence by its content, or by its type and length as a loader where it may read from a disk."""
    plain = isinstance(items, (list, tuple, range, str, bytes)) or tree.is_array(items)
    return Digester(items).describe(items) if plain else _source(items)


def _source(source: Any) -> Fact:
    """A list by its items; any other loader by type and length; a function that makes a loader as a function."""
    if isinstance(source, ResumableLoader):
        return _source(source.source)
    if isinstance(source, (list, tuple, range)):
        return {"items": _items(source)}
    if not hasattr(source, "__iter__") and callable(source):
        return {"f": _function(source)}
    found: Fact = {"type": type(source).__qualname__, "len": known_length(source), **loader_facts(source)}
    states = {
        path: Digester().digest(generator)[0] for path, generator, inside in find_generators(source) if not inside
    }
    found |= {"generators": states} if states else {}
    return {**found, "arrays": _tree(found["arrays"])} if "arrays" in found else found


def _function(f: Any) -> Fact:
    """A function by its name, its own code, and what it reads, by name."""
    digester = Digester(f)
    found: list[tuple[str, Any]] = []
    while True:
        if isinstance(f, functools.partial):
            found += [(f"argument {i}", a) for i, a in enumerate(f.args)] + list(f.keywords.items())
            f = f.func
        elif isinstance(f, types.MethodType):
            found.append(("self", f.__self__))
            f = f.__func__
        elif isinstance(getattr(f, "__wrapped__", None), types.FunctionType):
            f = f.__wrapped__
        else:
            break
    fact: Fact = {"function": getattr(f, "__qualname__", type(f).__qualname__)}
    if isinstance(f, types.FunctionType):
        fact["code"] = f"{digest.PYTHON}:{digester.code(f)}"
        found += digester.reads(f)
    elif isinstance(f, (type, types.BuiltinFunctionType)):
        fact["content"] = digester.describe(f)
    else:
        found += digest.names_of_object(digester, f)
        fact["content"] = digester.describe(f)
    fact["reads"] = {name: digester.describe(value) for name, value in found}
    return fact


# Differences of data


def differences(saved: Sequence[Fact], now: Sequence[Fact], done: int, *, exact: bool = True) -> list[str]:
    """One line for each difference between the data of a checkpoint and the data of now; none for the same data.

    The count of the last ``epochs(n)``, ``take(n)`` or ``repeat(n)`` may differ, and such a stage may be added or
    removed at the end, as long as ``done`` items are there: the items up to then are the same. The number in
    ``prefetch(n)`` changes no item. Code is compared within one version of Python.

    Args:
        saved: the facts in the checkpoint.
        now: the facts of the data given to resume with.
        done: how many items the run has taken.
        exact: whether there are as many items as the data of now says; a loader may say another number.

    Examples:
        >>> from kaun import Data
        >>> from kaun._run import identity
        >>> old, new = (identity.describe_data(Data.from_items(range(9)).batch(n).epochs(2)) for n in (2, 3))
        >>> identity.differences(old, new, 1)
        ['Data.batch: n was 2, is 3']
    """
    before, current = ([fact for fact in facts if fact["stage"] not in _CHANGE_NO_ITEM] for facts in (saved, now))
    open_before, open_current = _without_last_count(before), _without_last_count(current)
    pairs = [(before, current), (before, open_current), (open_before, current), (open_before, open_current)]
    if all(_lines(*pair) for pair in pairs):
        same_end = [f["stage"] for f in open_before] == [f["stage"] for f in open_current]
        return _lines(*(pairs[3] if same_end else pairs[0]))
    length = current[-1]["length"]
    if exact and length is not None and length < done:
        last = next((f["stage"] for f in reversed(current) if f["stage"] not in _ITEM_BY_ITEM), "the data")
        return [f"{last}: there are {length} items now, and the run has taken {done} already"]
    return []


def _without_last_count(facts: list[Fact]) -> list[Fact]:
    """The facts without the last count that may differ."""
    for i in reversed(range(len(facts))):
        name = facts[i]["stage"]
        if name == "Data.repeat":
            return [*facts[:i], {**facts[i], "n": None}, *facts[i + 1 :]]
        if name in _COUNTS:
            return [*facts[:i], *facts[i + 1 :]]
        if name not in _ITEM_BY_ITEM:
            break
    return facts


def _lines(before: list[Fact], current: list[Fact]) -> list[str]:
    """The differences, stage by stage up to the first that is another one."""
    names, found = [f["stage"] for f in before], [f["stage"] for f in current]
    lines: list[str] = []
    for i, (old, new) in enumerate(zip(before, current, strict=False)):
        if old["stage"] != new["stage"]:
            break
        where = old["stage"] if names.count(old["stage"]) == 1 else f"{old['stage']} (stage {i + 1})"
        for name in dict.fromkeys([*old, *new]):
            # Another seed is another state too; older checkpoints have no states.
            known = name == "length" or (
                name == "generators" and (name not in old or old.get("seed") != new.get("seed"))
            )
            lines += [] if known else _changes(where, name, old.get(name), new.get(name))
    if names != found:
        lines.append(f"the stages were {', '.join(names)}; they are {', '.join(found)}")
    return lines


def _changes(where: str, name: str, a: Any, b: Any) -> list[str]:
    """The differences of one parameter, or of the parts of it."""
    if _is_same(a, b):
        return []
    if isinstance(a, dict) and isinstance(b, dict):
        old, new = cast("Fact", a), cast("Fact", b)
        if "function" in old and "function" in new:
            return _changes_of_function(where, old, new)
        lines: list[str] = []
        for part in dict.fromkeys([*old, *new]):
            inner = part if name == "item" and part else f"{name} at {part!r}" if part else name
            lines += _changes(where, inner, old.get(part), new.get(part))
        return lines
    if name == "key":
        why = "another seed, or keys drawn in another order under rng.scope" if a and b else "shuffled or not"
        kind = "key" if where.startswith("Data.random_map") else "shuffle key"
        return [f"{where}: the {kind} was {_describe(a)}, is {_describe(b)} ({why})"]
    if name.startswith("generators at "):
        return [
            f"{where}: the random generator {name.removeprefix('generators at ')[1:-1]} has another state: it is not "
            "seeded, or was drawn from since. Make it again from a seed before each fit"
        ]
    return [f"{where}: {_change(name, a, b)}"]


def _changes_of_function(where: str, a: Fact, b: Fact) -> list[str]:
    f = a["function"]
    if f != b["function"]:
        return [f"{where}: the function was {f}, is {b['function']}"]
    lines = [] if _is_same(a.get("code"), b.get("code")) else [f"{where}: the code of {f} has changed"]
    for name in dict.fromkeys([*a["reads"], *b["reads"]]):
        lines += _changes(where, f"`{name}`, which {f} reads,", a["reads"].get(name), b["reads"].get(name))
    return lines or [f"{where}: {f} has changed"]


def _is_same(a: Any, b: Any) -> bool:
    """Whether two facts are equal, but for code where the versions of Python differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        old, new = cast("Fact", a), cast("Fact", b)
        return all(_is_same(old.get(k), new.get(k)) for k in {*old, *new})
    if isinstance(a, str) and isinstance(b, str):
        one, other = _CODE.search(a), _CODE.search(b)
        if one and other and one[1] != other[1]:
            return _CODE.sub("", a) == _CODE.sub("", b)
    return type(a) is type(b) and a == b


def _change(name: str, a: Any, b: Any) -> str:
    old, new = _describe(a), _describe(b)
    if old != new:
        return f"{name} was {old}, is {new}"
    inside = isinstance(a, str) and isinstance(b, str) and _CODE.sub("", a) == _CODE.sub("", b)
    return f"the {'code' if inside else 'content'} of {name} has changed ({old})"


def _describe(value: Any) -> str:
    """A fact in words, without the digests in it."""
    if isinstance(value, dict):
        return str(cast("Fact", value).get("function", f"a tree of {len(value)} parts"))
    if isinstance(value, str):
        return _CODE.sub("", value).partition(" sha256:")[0].strip()
    return "nothing" if value is None else str(value)
