"""What must be the same in all processes of a fit: key and step of the state, the stages of the data, and its items."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from kaun import tree
from kaun._engine import StepInputs
from kaun._report import numbers_of
from kaun._run.identity import unscoped_run
from kaun._run.position import makes_items
from kaun.data import every_stage_of, has_exact_length, known_length
from kaun.state import TrainState

__all__ = ["begin_facts", "check_begin", "check_items", "checksums", "refuse_unscoped"]

_COMPARED = {
    "key": "the run's key is",
    "step": "state.step is",
    "done": "the step of the checkpoint from which the run is resumed is",
    "data": "the stages of the data are",
    "saves": "whether fit has checkpoints= is",
    "jax": "the version of JAX is",
}
_MOST_NAMES = 64


def refuse_unscoped(state: TrainState, data: Iterable[Any]) -> None:
    """Refuse keys that each process has drawn for itself.

    Raises:
        ValueError: If there are some.
    """
    if keyed := unscoped_run(state, data):
        raise ValueError(
            f"A fit in {jax.process_count()} processes needs the same keys in all of them: {' and '.join(keyed)} drew "
            "a key outside an rng scope, where each process draws another one. Make trainer, state and data in a "
            "scope:\n    with rng.scope(42):\n        state = trainer.init()\n"
            "        train = Data.batches(..., shuffle=True)"
        )


def begin_facts(state: TrainState, data: Iterable[Any], report: Any, done: int, *, saves: bool) -> dict[str, Any]:
    """What a process begins a fit with.

    Args:
        state: The state, from the checkpoint where the run is resumed.
        data: All items of the run.
        report: The report of this process.
        done: How many steps were taken before.
        saves: Whether there is a directory for checkpoints.
    """
    total = known_length(data)
    certain = total is not None and has_exact_length(data) and not makes_items(data)
    return {
        "key": _key(state.key), "step": int(state.step), "done": done, "data": _stages(data), "saves": saves,
        "jax": jax.__version__,
        "asks": report is not None or saves, "numbers": {} if report is None else numbers_of(report),
        "total": total if certain else None,
    }  # fmt: skip


def differences(first: Mapping[str, Any], found: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """In words, what the processes begin with that is not as in the first of them."""
    return [
        f"{words} {_short(fact[name])} in process {process}, and {_short(first[name])} in process {min(found)}"
        for process, fact in found.items()
        for name, words in _COMPARED.items()
        if fact[name] != first[name]
    ]


def check_begin(lines: list[str]) -> None:
    """Refuse a fit that the processes begin differently.

    Raises:
        ValueError: If there are differences.
    """
    if lines:
        listed = "".join(f"\n  {line}" for line in lines[:20])
        raise ValueError(
            f"The processes of this fit do not begin it alike:{listed}\nEach process runs the same script: the same "
            "seed (rng.scope), the same state and the same pipeline, of which it takes the rows of its devices; with "
            "data.local(s) it reads these alone. Where each process holds arrays of its own, write\n"
            "    Data.from_iterable(lambda: Data.batches((x, y), batch_size=64)).assemble(s).with_loss(loss)"
        )


def checksums(inputs: StepInputs, values: list[Any]) -> dict[str, tuple[str, int]]:
    """Type and checksum of each array of an item by name; of an array spread over processes its type alone."""
    pairs = list(zip(inputs.names(), values, strict=True))[:_MOST_NAMES]
    return {name: (tree.describe(value), _checksum(value)) for name, value in pairs}


def different_items(found: Mapping[int, Mapping[str, Any]]) -> str:
    """In words, how the item of one process differs from that of the first; empty where all are the same."""
    number = min(found)
    for process, items in found.items():
        for name, fact in items.items():
            first = found[number].get(name)
            if first is None or first[0] != fact[0]:
                return f"{name} is {fact[0]} in process {process}, and {first and first[0]} in process {number}"
            if first != fact:
                return f"the {fact[0]} of {name} has other values in process {process} than in process {number}"
    return ""


def check_items(difference: str, step: int) -> None:
    """Refuse items that differ between the processes.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"The items of this fit differ between its processes: at step {step}, {difference}. Every process makes the "
        "same items, and puts the rows of its own devices there. If each one should read only its own rows, write\n"
        "    Data.batches((x, y), batch_size=1024).local(s).assemble(s).with_loss(loss)\n"
        "with s = trainer.sharding; for a loader that is already split by process, .assemble(s) alone. Random numbers "
        "in the data come from a key: data.random_map(f)."
    )


def _checksum(value: Any) -> int:
    if isinstance(value, jax.Array):
        if not (value.is_fully_addressable or value.is_fully_replicated):
            return 0
        value = jax.random.key_data(value) if tree.is_key(value) else value
    elif not tree.is_array(value):
        return zlib.crc32(repr(value).encode())
    return zlib.crc32(np.ascontiguousarray(value).tobytes())


def _key(key: Any) -> str:
    return np.asarray(jax.random.key_data(key)).tobytes().hex()


def _stages(data: Any) -> list[str]:
    """The stages with their plain arguments, keys and ends of arrays; functions are compared by the items they make."""
    return [
        f"{stage.name}({', '.join(f'{name}={_plain(value)}' for name, value in stage.given.items())})"
        for stage in every_stage_of(data)
    ]


def _plain(value: Any) -> str:
    if tree.is_key(value):
        return f"key 0x{_key(value)}"
    if isinstance(value, (tuple, dict, np.ndarray)):
        leaves = jax.tree_util.tree_leaves(value)
        return ", ".join(map(_ends, leaves)) if all(map(tree.is_array, leaves)) else "..."
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else "..."


def _ends(array: Any) -> str:
    """An array in words, with a checksum of its first and last row: with ``local`` no process reads all of them."""
    if not isinstance(array, np.ndarray) or not array.size or array.dtype.hasobject:
        return tree.describe(array)
    return f"{tree.describe(array)} {zlib.crc32(array[-1:].tobytes(), zlib.crc32(array[:1].tobytes())):08x}"


def _short(value: Any) -> str:
    text = " > ".join(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 300 else f"{text[:300]}..."
