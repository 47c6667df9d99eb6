"""What a run is, in facts that go into its checkpoints, and how the facts of two processes differ.

A fact is JSON. Arrays count by shape, dtype and content; functions by name, code and what they capture; a loader by its
type and length.
"""

from __future__ import annotations

import collections
import functools
import os
import platform
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import NamedSharding

from kaun import rng, tree
from kaun._loss import FrozenLoss, function_reads
from kaun._messages import plain, warn
from kaun._run import digest
from kaun._run.digest import Digester
from kaun._run.generators import find_generators
from kaun._run.hyperparameters import hyperparameters
from kaun.checkpoint import BEST, Best, Directory, with_another_optimizer
from kaun.data import Item, ResumableLoader, every_stage_of, key_text, known_length, loader_facts, stages_of
from kaun.errors import ResumeMismatch
from kaun.layers.core import Layer
from kaun.sharding import Sharding
from kaun.state import TrainState, count_steps

__all__ = [
    "HYPERPARAMETERS", "check_facts", "describe_data", "digest_item", "refuse_difference", "run_facts", "unscoped",
    "unscoped_run", "warn_of_machine",
]  # fmt: skip

Fact = dict[str, Any]

_MOST_LEAVES = 1000
_LISTED = 50
HYPERPARAMETERS = "hyperparameters"
_MACHINE = {
    "jax": "the version of JAX was {}, is {}", "python": "the version of Python was {}, is {}",
    "backend": "the backend was {}, is {}", "devices": "the number of devices was {}, is {}",
    "cores": "the number of cores was {}, is {}", "processes": "the number of processes was {}, is {}",
    "the place of the state": "the state was {}; now it is {}",
}  # fmt: skip
_HEX = re.compile(r"-?(inf|0x[0-9a-f.]{1,40}p[+-]?[0-9]{1,4})|nan")  # float.hex()
_AFFINITY = hasattr(os, "sched_getaffinity")


# A run


def run_facts(state: TrainState, data: Any, sharding: Sharding | None = None) -> dict[str, Any]:
    """The facts of a run.

    Args:
        state: The state at its start.
        data: All its items.
        sharding: Where the trainer puts the state, None if that stays where it is.

    Returns:
        ``key``, ``start``, ``hyperparameters`` and ``data``, which must be the same in the process that resumes it, and
        ``machine``, of which a difference is a warning.
    """
    return {
        "key": key_text(state.key),
        "start": count_steps(state),
        HYPERPARAMETERS: hyperparameters(state),
        "data": describe_data(data),
        "machine": {
            "jax": jax.__version__, "python": platform.python_version(), "backend": jax.default_backend(),
            "devices": jax.device_count(), "cores": len(os.sched_getaffinity(0)) if _AFFINITY else os.cpu_count(),
            "processes": jax.process_count(), "the place of the state": _place(state, sharding),
        },
    }  # fmt: skip


def _place(state: TrainState, sharding: Sharding | None) -> str:
    """Where a state lies: ``on a mesh of data=8, 3 arrays on all 8 devices, 2 arrays spread over data``."""
    where = state if sharding is None else sharding.of(state)
    arrays = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=w if isinstance(w, NamedSharding) else a.sharding)
        for a, w in zip(jax.tree_util.tree_leaves(state), jax.tree_util.tree_leaves(where), strict=True)
        if isinstance(a, jax.Array)
    ]
    several = [leaf.sharding for leaf in arrays if leaf.sharding.num_devices > 1]
    if not several:
        return "on one device"
    sizes = [s.mesh.shape if isinstance(s, NamedSharding) else {"devices": s.num_devices} for s in several]
    meshes = sorted({", ".join(f"{axis}={size}" for axis, size in each.items()) for each in sizes})
    counts = collections.Counter(tree.placement(a) if a.sharding.num_devices > 1 else "on one device" for a in arrays)
    listed = [f"{count} {'arrays' if count > 1 else 'array'} {words}" for words, count in sorted(counts.items())]
    return ", ".join([f"on a mesh of {' and '.join(meshes)}", *listed])


def check_facts(directory: Directory, step: int, facts: Mapping[str, Any]) -> None:
    """Check the form of a checkpoint's facts: their sum says that nothing was damaged, not who wrote them.

    Args:
        directory: The directory that holds the run.
        step: The step of the checkpoint.
        facts: Its facts.

    Raises:
        ResumeMismatch: If they are not facts that ``CheckpointSaver`` writes.
    """
    pending, ended = facts.get("again"), facts.get("ended")
    forms = {
        "key": isinstance(facts.get("key"), str),
        "start": type(facts.get("start")) is int,
        "data": _are_stages(facts.get("data")),
        "machine": _is_table(facts.get("machine"), (str, int, type(None))) and "jax" in facts["machine"],
        "programs": _is_table(facts.get("programs"), str),
        "report": isinstance(facts.get("report"), dict),
        "ended": isinstance(ended, str) and ended in ("", "data", "stopped"),
        "again": "again" in facts and (pending is None or (isinstance(pending, str) and bool(_HEX.fullmatch(pending)))),
        "place": "place" in facts and isinstance(facts["place"], (dict, type(None))),
        "last": isinstance(facts.get("last"), (str, type(None))),
        "draws": _is_table(facts.get("draws", {}), str),
        HYPERPARAMETERS: _is_table(facts.get(HYPERPARAMETERS, {}), (str, list)),
        BEST: _is_best(facts),
    }
    wrong = [name for name, is_right in forms.items() if not is_right]
    if wrong:
        raise ResumeMismatch(
            f"{str(directory.path)!r}: the checkpoint of step {step} is intact, but its facts ({', '.join(wrong)}) are "
            "not those of a run of kaun: another program wrote or changed it. Directory.load and checkpoint.load read "
            "its state; to train, use another directory: "
            f"checkpoint.Directory({str(directory.path)!r}).child('second')."
        )


def _is_best(facts: Mapping[str, Any]) -> bool:
    try:
        Best.of(facts)
    except ValueError:
        return False
    return True


def _is_table(value: Any, kinds: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, kinds) for v in cast("Fact", value).values())


def _are_stages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(stage, dict)
        and isinstance(cast("Fact", stage).get("stage"), str)
        and isinstance(cast("Fact", stage).get("length", False), (int, type(None)))
        and _are_functions(stage)
        and all(map(_are_stages, cast("list[Any]", stage.get("sources", []))))
        for stage in cast("list[Any]", value)
    )


def _are_functions(value: Any) -> bool:
    """Whether every function in a fact has the form that ``_function`` gives it."""
    if isinstance(value, list):
        return all(map(_are_functions, cast("list[Any]", value)))
    if not isinstance(value, dict):
        return True
    fact = cast("Fact", value)
    of_function = isinstance(fact.get("function", ""), str) and isinstance(fact.get("reads", {}), dict)
    return of_function and ("function" in fact) == ("reads" in fact) and all(map(_are_functions, fact.values()))


def refuse_difference(directory: Directory, what: str, step: int, lines: list[str]) -> None:
    """Refuse to resume a run that differs, or warn where the directory accepts that.

    Args:
        directory: The directory that holds the run.
        what: What differs, as ``Directory(accept=)`` names it.
        step: The step of the checkpoint.
        lines: One for each difference.

    Raises:
        ResumeMismatch: If the directory does not accept it.
    """
    more = [f"... and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    listed = "".join(f"\n  {plain(line, 1000)}" for line in [*lines[:_LISTED], *more])
    where = f"{str(directory.path)!r} holds another run, at step {step}. Its {what} differ{'s' * (what != 'reports')}:"
    if what not in directory.accept:
        optimizer = f"\n{with_another_optimizer(directory.path)}" if what == "program" else ""
        raise ResumeMismatch(
            f"{where}{listed}\nTo resume, make them equal again. To start another run, use another directory, "
            f'checkpoints=runs.child("other"). To resume anyway, write Directory(..., accept={{"{what}"}}).{optimizer}'
        )
    warn(f"{where}{listed}\nThe run is resumed, because accept= contains {what!r}.")


def warn_of_machine(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn where a run is resumed with another version, backend, number of devices or cores, or place of its state."""
    known = [name for name in now if name in before]  # a checkpoint of an older kaun has fewer
    changed = [_MACHINE[name].format(before[name], now[name]) for name in known if before[name] != now[name]]
    if changed:
        listed = "".join(f"\n  {plain(line, 1000)}" for line in changed)
        warn(
            f"A run is resumed under other conditions:{listed}\nIt continues from the same state. Its results may "
            "differ in their last bits from those of a run without interruption."
        )


# Data


def describe_data(data: Iterable[Any]) -> list[Fact]:
    """The facts of each stage of a pipeline, its source first; of any other iterable one fact.

    Returns:
        Dicts of JSON values: ``stage`` ("Data.batches"), ``length`` (items of a pass after it, or None), and its
        parameters by name; of a stage over several pipelines ``sources``, the facts of each.

    Examples:
        >>> from kaun import Data
        >>> from kaun._run import identity
        >>> identity.describe_data(Data.from_items(range(6)).take(4))[1]
        {'stage': 'Data.take', 'length': 4, 'n': 4}
    """
    found = stages_of(data)
    if found:
        return _stage_facts(found)
    return [{"stage": type(data).__name__, "length": known_length(data), **_source(data)}]


def _stage_facts(stages: Sequence[Any]) -> list[Fact]:
    # Where rows lie is no part of what they are: a run begun on one process continues on two.
    named = (s for s in stages if s.name not in ("Data.assemble", "Data.local"))
    return [{"stage": s.name, "length": s.length, **_given(s.given)} for s in named]


def unscoped(data: Iterable[Any]) -> list[str]:
    """The stages, as they print, whose key was drawn outside of any rng scope in this process."""
    return [s.text for s in every_stage_of(data) if s.given.get("key") is not None and rng.unscoped(s.given["key"])]


def unscoped_run(state: TrainState, data: Iterable[Any]) -> list[str]:
    """The state, in words, and the stages of which that is so."""
    keyed = ["the state (trainer.init or trainer.make_state)"] if rng.unscoped(state.key) else []
    return keyed + unscoped(data)


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
        return [_labels(value) if callable(value) and not isinstance(value, Layer) else value for value in held]
    return None if callable(loss) else loss


def _given(given: Mapping[str, Any]) -> Fact:
    known: Mapping[str, Callable[[Any], Any]] = {
        "arrays": _tree, "item": _item, "items": _items, "f": _function, "key": _key, "weights": _tree, "rows": _tree,
        "sample_weights": _tree, "lengths": _tree,
        "sources": lambda sources: list(map(_stage_facts, sources)),
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
    in_memory = isinstance(items, (list, tuple, range, str, bytes)) or tree.is_array(items)
    return Digester(items).describe(items) if in_memory else _source(items)


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
