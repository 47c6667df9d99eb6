"""A loader of which one run knows its position: its pass, its items in that pass, its state where it has one."""

from __future__ import annotations

import base64
import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from kaun._messages import quoted
from kaun.data import convert, libraries
from kaun.data.torch_batches import SkippedBatches

__all__ = ["SKIPPED", "Check", "ResumableLoader", "after_skipped"]

Check = Callable[[int, Any, bool], bool]
"""``check(count, item, final)``: whether the last item that a run had taken is the same when it is made again.

``count`` is the number of items up to it; ``item`` is None where there are fewer. It raises where ``final`` is True and
the item is another one.
"""

_LONGEST_STATE = 1 << 20


class _Skipped:
    def __repr__(self) -> str:
        return "SKIPPED"


SKIPPED = _Skipped()
"""What a loader and the stages after it yield in place of an item that was taken before the run was resumed."""


class ResumableLoader:
    """A loader, or a function that makes one, of which one run knows its position.

    An iterator with ``get_state()`` and ``set_state(state)`` (grain), or a loader with ``state_dict()`` and
    ``load_state_dict(state)`` (torchdata, streams of Hugging Face), is set to a known position at once. From any
    other ``n`` items are taken first; a map-style ``DataLoader`` of PyTorch gives them without reading their rows.

    Args:
        source: The loader or function.
        position: What ``position()`` of another one returned.
        n: How many items were taken, where no position is known.
        check: Called with the ``n``-th item when it is made again.

    Attributes:
        source: The loader or function.
        passes: The number of the current pass, counted from 0.
        taken: How many items of that pass were taken.
        skipping: Whether the items that are taken now are only counted.
        unread: Whether some of them were not even read.

    Raises:
        ValueError: If ``position()`` cannot have returned the position.
    """

    source: Any
    passes: int
    taken: int
    skipping: bool
    unread: bool

    def __init__(
        self,
        source: Any,
        position: Mapping[str, Any] | None = None,
        n: int = 0,
        check: Check | None = None,
    ) -> None:
        self.source, self._n, self._check, self.skipping, self.unread = source, n, check, False, False
        self.passes, self.taken, self._state = (0, 0, None) if position is None else _read(position)
        self._epoch: int | None = None
        self._ended = False
        self._reads_all = False
        self._generators: list[tuple[Any, Any]] = []  # those of PyTorch, and their states before items were skipped
        self._made: Any = None
        self._iterator: Any = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the loader for the next pass, where it has one."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        n, self._n = self._n, 0
        items = after_skipped(self._open, n, self, self._check) if n and self._state is None else self._open()
        # islice, because it has no close(): closing these items must not close the user's own iterator.
        return itertools.islice(items, None)

    def _open(self) -> Iterator[Any]:
        state, self._state = self._state, None
        self.passes += self._made is not None
        self.taken = self.taken if state is not None else 0
        self._made = made = self._make()
        libraries.refuse_forks(made, f"data ({type(made).__name__})")
        if self._epoch is not None:
            libraries.set_epoch(made, self._epoch)
        if not self._generators:
            self._generators = [(each, each.get_state()) for each in libraries.torch_generators(made)]
        return self._pull(made) if state is None else self._restored(made, state)

    def restart(self) -> None:
        """Begin again, and read all items from now on."""
        for generator, state in self._generators:
            generator.set_state(state)
        self.passes, self.taken, self.unread, self._reads_all = 0, 0, False, True
        self._made = None

    def _make(self) -> Any:
        source = self.source
        makes = callable(source) and not hasattr(source, "__iter__") and not hasattr(source, "__getitem__")
        return source() if makes else source

    def _restored(self, made: Any, state: Mapping[str, Any]) -> Iterator[Any]:
        """The rest of the pass after a position."""
        if "state_dict" not in state:
            self._iterator = iter(made)
            self._iterator.set_state(_decoded(state))
            return self._each()
        saved = _unpacked(json.loads(state["state_dict"]))
        if libraries.is_huggingface_stream(made):  # it would begin each pass at the state that was loaded
            self._made = made = copy.copy(made)
        if saved["loader"] is None:  # the pass was at its end
            self._iterator = iter(())
        else:
            made.load_state_dict(saved["loader"])
            self._iterator = iter(made)
        # torchdata restores the order of this pass, and not the generator from which that of the next one is drawn.
        for generator, at in zip(libraries.torch_generators(made), saved["generators"], strict=True):
            generator.set_state(at)
        return self._each()

    def _pull(self, made: Any) -> Iterator[Any]:
        batches = SkippedBatches.of(made) if self.skipping and not self._reads_all else None
        if batches is not None:
            for _ in batches.indices:
                self.taken, self.unread = self.taken + 1, True
                yield SKIPPED
                if not self.skipping:
                    break
            else:
                return
            made = batches.rest()
        self._iterator = iter(made)
        yield from self._each()

    def _each(self) -> Iterator[Any]:
        self._ended = False
        for item in self._iterator:
            self.taken += 1
            yield SKIPPED if self.skipping else item
        self._ended = True

    def __len__(self) -> int:
        return max(0, len(self.source) - self._n)

    def position(self) -> dict[str, Any] | None:
        """The position after the items taken so far, as JSON; None if the loader has none, or none is taken."""
        state = None
        if hasattr(self._iterator, "get_state") and hasattr(self._iterator, "set_state"):
            state = _encoded(self._iterator.get_state())
        elif self._iterator is not None and libraries.has_exact_state(self._made):
            generators = [generator.get_state() for generator in libraries.torch_generators(self._made)]
            loader = None if self._ended else self._made.state_dict()
            state = _packed_text({"loader": loader, "generators": generators})
        return None if state is None else {"pass": self.passes, "taken": self.taken, "state": state}


def after_skipped(
    open: Callable[[], Iterator[Any]], n: int, loader: ResumableLoader, check: Check | None
) -> Iterator[Any]:
    """The items after the first ``n``, which are taken again.

    Args:
        open: Iterates all items.
        n: How many were taken before, at least 1.
        loader: The loader under them, whose items before the ``n``-th are only counted.
        check: Called with the last of them, see ``Check``.
    """
    items = open()
    count, last = _skipped(items, n, loader)
    # Workers whose transforms are random have drawn no numbers for the batches that were not read.
    if loader.unread and check is not None and not check(count, last, False):
        loader.restart()
        items = open()
        count, last = _skipped(items, n, loader)
    if check is not None:
        check(count, last, True)
    del last
    yield from items


def _skipped(items: Iterator[Any], n: int, loader: ResumableLoader) -> tuple[int, Any]:
    """Take ``n`` items, and return how many there are and the last of them, None where there are fewer."""
    loader.skipping = True
    count = sum(1 for _ in itertools.islice(items, n - 1))
    loader.skipping = False
    last = next(items, SKIPPED)
    return (count, None) if last is SKIPPED else (count + 1, last)


def _encoded(state: Any) -> dict[str, Any] | None:
    if isinstance(state, bytes):
        # The default repr of an object is another one in each process; grain compares that of the source.
        return None if b" at 0x" in state else {"base64": base64.b64encode(state).decode()}
    try:
        text = json.dumps(state, allow_nan=False)
    except (TypeError, ValueError):
        return None
    return None if " at 0x" in text else {"json": json.loads(text)}


def _decoded(state: Mapping[str, Any]) -> Any:
    return base64.b64decode(state["base64"]) if "base64" in state else state["json"]


def _packed_text(state: Any) -> dict[str, Any] | None:
    """A state dict as JSON text: it may be deep, and hold tensors, which a generator of PyTorch has as its state."""
    try:
        text = json.dumps(_packed(state))
    except TypeError:
        return None
    return {"state_dict": text} if len(text) <= _LONGEST_STATE else None


def _packed(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {"dict": [[_packed(k), _packed(v)] for k, v in cast("dict[Any, Any]", value).items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_packed(v) for v in cast("list[Any]", value)]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    array = convert.as_arrays(value)
    if not isinstance(array, (np.ndarray, np.generic)) or array.dtype.hasobject:
        raise TypeError(f"{type(value).__name__} in the state of a loader")
    kind = "array" if array is value else "tensor"
    return {kind: [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]}


def _unpacked(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = cast("dict[str, Any]", value).items()
    match kind, inner:
        case "dict", _:
            return {_unpacked(k): _unpacked(v) for k, v in inner}
        case (("list" | "tuple"), _):
            found = [_unpacked(v) for v in inner]
            return tuple(found) if kind == "tuple" else found
        case "bytes", _:
            return base64.b64decode(inner)
        case _:
            dtype, shape, raw = inner
            array = np.frombuffer(base64.b64decode(raw), np.dtype(dtype)).reshape(shape).copy()
            return convert.as_tensor(array) if kind == "tensor" else array


def _read(position: Any) -> tuple[int, int, Mapping[str, Any]]:
    """The number of the pass, the items taken in it, and the state, of a position."""
    match position:
        case {
            "pass": int() as passes, "state": {"json": _} | {"base64": str()} | {"state_dict": str()} as state
        } if passes >= 0:  # fmt: skip
            return passes, int(position.get("taken", 0)), state  # older checkpoints do not have `taken`
        case _:
            raise ValueError(
                "ResumableLoader expected a position that ResumableLoader.position() returned, received "
                f"{quoted(position)}. The checkpoint was written by another version, or is damaged."
            )
