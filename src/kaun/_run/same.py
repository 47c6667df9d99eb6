"""What must be the same in all processes of a fit: key and step of the state, the stages of the data, and its items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from kaun import tree
from kaun._report import numbers_of
from kaun._run.identity import unscoped_run
from kaun._run.position import makes_items
from kaun.data import has_exact_length, key_text, known_length, stages_in_words
from kaun.state import TrainState

__all__ = ["begin_facts", "check_begin", "check_items", "refuse_unscoped"]

_COMPARED = {
    "key": "the run's key is",
    "step": "state.step is",
    "done": "the step of the checkpoint from which the run is resumed is",
    "data": "the stages of the data are",
    "saves": "whether fit has checkpoints= is",
    "jax": "the version of JAX is",
}


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
        "key": key_text(state.key), "step": np.asarray(tree.readable(state.step)).tolist(), "done": done,
        "data": stages_in_words(data),
        "saves": saves, "jax": jax.__version__,
        "asks": report is not None or saves, "numbers": {} if report is None else numbers_of(report),
        "total": total if certain else None,
    }  # fmt: skip


def differences(first: Mapping[str, Any], found: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """In words, what the processes begin with that is not as in the first of them, and with it where each begins it."""
    lines = [
        f"{words} {_short(fact[name])} in process {process}, and {_short(first[name])} in process {min(found)}"
        for process, fact in found.items()
        for name, words in _COMPARED.items()
        if fact[name] != first[name]
    ]
    return lines + [f"process {process} is in {fact['call']}" for process, fact in found.items() if lines]


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


def _short(value: Any) -> str:
    text = " > ".join(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 300 else f"{text[:300]}..."
