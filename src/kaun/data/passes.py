"""Where the passes of a pipeline end, and which one is iterated: a loop over epochs in Python repeats one pass."""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kaun.data.items import Item
from kaun.data.nodes import SAME_ITEMS, StageSpec, every_stage

__all__ = ["PassLength", "as_generator", "newest_pass", "pass_length", "random_passes", "watch_of"]

_ONE_TO_ONE = frozenset(["Data.map", "Data.random_map", "Data.with_loss"]) | SAME_ITEMS

Passes = tuple[Any, ...]
"""What decides the items of a random pipeline: its stages, its keys, and which arrays it reads."""


class PassLength(NamedTuple):
    """How a pipeline of several passes is cut into them.

    Attributes:
        items: The number of items of a pass.
        skipped: The number of items that were left out at the start of the first pass.
    """

    items: int
    skipped: int


def pass_length(stages: Sequence[StageSpec]) -> PassLength | None:
    """Return where the passes of a pipeline with ``epochs(n)`` end; None for others, and where it is not known."""
    length, skipped, cut = None, 0, False
    for before, stage in itertools.pairwise(stages):
        if stage.name == "Data.epochs":
            if length is None or cut:  # else it continues counting the passes
                length, skipped, cut = before.length, 0, False
        elif stage.name in ("Data.skip", "Data.take"):
            skipped += stage.given["n"] if stage.name == "Data.skip" else 0
            cut = True
        elif stage.name not in _ONE_TO_ONE:
            length = None
    return PassLength(length, skipped) if length else None


def random_passes(stages: Sequence[StageSpec]) -> tuple[Passes, range] | None:
    """What decides the items of a pipeline and the numbers of its passes; None if nothing in it is random."""
    if watch_of(stages) is None:
        return None
    every = list(every_stage(stages))
    keys = [s.given["key"] for s in every if s.given.get("key") is not None]
    counts = [s for s in stages if s.name in ("Data.epochs", "Data.epoch")]
    numbers = range(1)
    if len(counts) == 1:
        ((name, count),) = counts[0].given.items()
        numbers = range(count) if name == "n" else range(count, count + 1)
    counted = {id(s) for s in counts if len(counts) == 1}
    texts = [s.text for s in every if s.name not in SAME_ITEMS and id(s) not in counted]
    arrays = [_memory(leaf) for s in every for leaf in jax.tree_util.tree_leaves(s.given.get("arrays"))]
    return (*texts, *(np.asarray(jax.random.key_data(key)).tobytes() for key in keys), *arrays), numbers


def _memory(array: Any) -> Any:
    """Which array it is; views of one array are the same."""
    return array.ctypes.data if isinstance(array, np.ndarray) else id(array)


class _NewestPass:
    """The first item of the random pass that was opened last, for ``Trainer.step`` to look for.

    Attributes:
        loss: A weak reference to the loss of that item, None where there is none. It calls nothing when the loss is
            gone: a KeyboardInterrupt in such a call would be lost.
        stages: Those of the pipeline.
    """

    def __init__(self) -> None:
        self.loss: weakref.ref[Any] | None = None
        self.stages: Sequence[StageSpec] = ()

    def open(self, stages: Sequence[StageSpec], item: Any) -> None:
        """Look for this item from now on."""
        if Item.is_training_item(item):
            try:
                self.loss, self.stages = weakref.ref(item[1]), stages
            except TypeError:  # a bound method of C code, for example
                self.loss = None

    def take(self) -> Sequence[StageSpec]:
        """The stages of the pipeline; the item is not looked for any more."""
        self.loss = None
        return self.stages


newest_pass: _NewestPass = _NewestPass()


def watch_of(stages: Sequence[StageSpec]) -> Callable[[Any], None] | None:
    """What to call with the first item of a pass, None where its items are the same in each pass."""
    for stage in stages:
        given = stage.given
        # Which source a mix draws is the same in each pass.
        if any(map(watch_of, given["sources"])) if "sources" in given else given.get("key") is not None:
            return functools.partial(newest_pass.open, stages)
    return None


def as_generator(open: Callable[..., Iterator[Any]], first: Callable[[Any], None] | None) -> Iterator[Any]:
    """The items of ``open(None, 0)`` as a generator; ``first`` is called with the first."""
    return open(None, 0) if first is None and inspect.isgeneratorfunction(open) else _each_item(open, first)


def _each_item(open: Callable[..., Iterator[Any]], first: Callable[[Any], None] | None) -> Iterator[Any]:
    items = open(None, 0)
    if first is not None:
        for item in items:
            first(item)
            yield item
            del item
            break
    yield from items
