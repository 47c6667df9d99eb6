"""BlockBuffer: items of one kind stacked for one dispatch. What differs is stacked, what is the same passed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._engine.inputs import StepInputs, is_host, is_number
from kaun._kernels import aligned_empty
from kaun.data import RowGather

__all__ = ["BUFFERS", "BlockBuffer", "capacity_of", "next_limit"]

# The stacked items of one dispatch: enough of small ones to hide what a dispatch costs, few enough to stay in a cache.
_MOST_BYTES = 4 << 20
_MOST_ITEMS = 128
_LARGE = _MOST_BYTES // 4  # larger leaves are never stacked
_FEW = 16
# Seconds that one dispatch should take at most: Python handles Ctrl-C between dispatches alone. For a tenth of that a
# third of nanoGPT's CPU time was the kernel's: glibc gives the program's temporaries back after each dispatch.
_LONGEST = 0.5
# Dispatches that may still read their buffers: the newest two (``StepLoop`` waits for earlier ones), and the next one.
BUFFERS = 3


def capacity_of(inputs: StepInputs) -> int:
    """Return how many items of this kind one dispatch may hold."""
    size = sum(n for n in map(_bytes, inputs.leaves) if n <= _LARGE)
    return max(1, min(_MOST_ITEMS, _MOST_BYTES // max(size, 1)))


def next_limit(limit: int, seconds: float, steps: int) -> int:
    """Return how many steps a dispatch should have at most, after one with some steps took some seconds.

    The clock decides how many steps share a dispatch, which changes no bit of them.
    """
    if seconds > _LONGEST:
        return max(1, limit // 4)
    if seconds >= _LONGEST / 2 or steps * 4 < limit:
        return limit
    return min(limit * (4 if seconds < _LONGEST / 4 else 2), _MOST_ITEMS)


class _Column(Protocol):
    """One leaf of the items of a block.

    Attributes:
        alone: Whether it cannot be stacked, so that all items of a block must have one value.
        selective: Whether ``takes`` may be False.
        varies: Whether the items so far have more than one value.
        row: The buffer into which ``add`` copies a value itself; None if ``put`` has to handle it.
    """

    alone: bool
    selective: bool
    varies: bool
    row: Any

    def takes(self, value: Any) -> bool:
        """Return whether a block that has items can take this value."""
        ...

    def put(self, slot: int, value: Any) -> None:
        """Take the value of the item in a slot."""
        ...

    def fill(self, rows: RowGather, start: int, count: int) -> None:
        """Take the values of ``count`` items of a chunk, from its number ``start`` on."""
        ...

    def shared(self) -> Any:
        """Return the one value of all items."""
        ...

    def single(self, value: Any) -> Any:
        """Return the value of an item that is the only one of its block, in memory that its owner does not write to."""
        ...

    def stacked(self, count: int) -> Any:
        """Return the values of ``count`` items along a leading axis as long as the capacity."""
        ...


class _Host:
    """A NumPy array, copied when it comes: its owner may write to it again, and XLA reads it later."""

    def __init__(self, value: Any, capacity: int) -> None:
        self.varies = False
        self.alone = self.selective = capacity == 1
        dtype = jax.dtypes.canonicalize_dtype(value.dtype)
        self._same_dtype = dtype == value.dtype
        self._buffers = [aligned_empty((capacity, *value.shape), dtype) for _ in range(BUFFERS)]
        self._turn = 0
        self._first: Any = None
        self.row: Any = None

    def takes(self, value: Any) -> bool:
        return not self.alone or self._is_first(value)

    def put(self, slot: int, value: Any) -> None:
        if slot == 0:
            self._turn = (self._turn + 1) % BUFFERS
            self._first, self.varies, self.row = value, False, None
        buffer = self._buffers[self._turn]
        if slot and not self.varies:
            # One object in every item, such as weights of the classes, is not stacked, unless it was written to.
            if self._is_first(value):
                return
            self.varies = True
            buffer[1:slot] = buffer[0]
            self.row = buffer if self._same_dtype else None
        if self._same_dtype:
            buffer[slot] = value
        else:
            with np.errstate(over="ignore"):  # float64 beyond float32 is inf, as jnp.asarray makes it
                buffer[slot] = value

    def fill(self, rows: RowGather, start: int, count: int) -> None:
        self._turn = (self._turn + 1) % BUFFERS
        self._first, self.varies, self.row = None, count > 1, None
        rows.into(self._buffers[self._turn][:count], start)

    def _is_first(self, value: Any) -> bool:
        return value is self._first and self._same_dtype and _same_bytes(self._buffers[self._turn][0], value)

    def shared(self) -> Any:
        return self._buffers[self._turn][0]

    def single(self, value: Any) -> Any:
        self.put(0, value)
        return self._buffers[self._turn][0]

    def stacked(self, count: int) -> Any:
        buffer = self._buffers[self._turn]
        if not self.varies:
            buffer[1:count] = buffer[0]
        return buffer


class _Device:
    """A JAX array, which cannot change.

    Without a sharding arrays on several devices are not stacked: that would move them.
    """

    selective = True
    row = None

    def __init__(self, value: Any, capacity: int, *, placed: bool) -> None:
        self.varies = False
        self._capacity = capacity
        # A stack does not keep a weak type.
        self.alone = capacity == 1 or tree.is_weak(value) or (len(value.devices()) > 1 and not placed)
        self._values: list[Any] = []
        self._stack: Any = None

    def takes(self, value: Any) -> bool:
        if not self._values or value is self._values[0]:
            return True
        if self.alone:
            return False
        return value.sharding == self._values[0].sharding

    def put(self, slot: int, value: Any) -> None:
        if slot == 0:
            self._values, self.varies, self._stack = [], False, None
        self._values.append(value)
        self.varies = self.varies or value is not self._values[0]

    def fill(self, rows: RowGather, start: int, count: int) -> None:
        stack = rows.on_device(start, count, self._capacity)
        if self.alone:
            self._values, self.varies = [stack[0]], False
        else:
            self._stack, self.varies = stack, True

    def shared(self) -> Any:
        return self._values[0]

    def single(self, value: Any) -> Any:
        return value

    def stacked(self, count: int) -> Any:
        return _stack(self._values, self._capacity) if self._stack is None else self._stack


class _Number:
    """A Python number: of a weak type, which a stack would lose, so another value ends the block."""

    alone = selective = True
    row = None
    varies = False

    def __init__(self) -> None:
        self._value: Any = None

    def takes(self, value: Any) -> bool:
        return repr(value) == repr(self._value)  # by its bits: -0.0 is not 0.0, and nan equals itself

    def put(self, slot: int, value: Any) -> None:
        self._value = value

    def fill(self, rows: RowGather, start: int, count: int) -> None:
        raise NotImplementedError

    def shared(self) -> Any:
        return self._value

    def single(self, value: Any) -> Any:
        return value

    def stacked(self, count: int) -> Any:
        raise NotImplementedError


class BlockBuffer:
    """Buffers where the items of one kind are collected; used again for the next block of that kind.

    Args:
        inputs: The first item, for its kind.
        capacity: The most items of a block.
        placed: Whether what a block gives is put on devices before its steps run.

    Attributes:
        capacity: As the argument.
        count: How many items the block has.
    """

    def __init__(self, inputs: StepInputs, capacity: int, *, placed: bool = False) -> None:
        self.capacity = capacity
        self.count = 0
        self._key = inputs.key
        self._padded = inputs.row_mask is not None
        self._columns: list[_Column] = [_column(a, capacity, placed) for a in inputs.leaves]
        self._on_device = all(isinstance(c, _Device) for c in self._columns)
        self._selective = [(i, c) for i, c in enumerate(self._columns) if c.selective]

    def add(self, inputs: StepInputs) -> bool:
        """Copy an item into the block; return False, and do nothing, where the block cannot take it."""
        # Run for each item: a call of a function costs 0.1 us, so the usual cases are decided here.
        if inputs.key != self._key:
            return False
        slot, leaves = self.count, inputs.leaves
        if slot:
            for i, column in self._selective:
                if not column.takes(leaves[i]):
                    return False
        for column, leaf in zip(self._columns, leaves, strict=True):
            if slot and column.row is not None:
                column.row[slot] = leaf
            else:
                column.put(slot, leaf)
        self.count = slot + 1
        return True

    def alone(
        self, inputs: StepInputs, pattern: Sequence[bool], sources: Mapping[int, RowGather]
    ) -> tuple[list[Any], list[Any]] | None:
        """Return the leaves of an item that is a block for itself, as ``arguments`` does; None where it cannot be one.

        Args:
            inputs: The item.
            pattern: Which leaves are stacked, as in the newest block.
            sources: The rows of the item, as those of a chunk.
        """
        if self.count or inputs.key != self._key or self._padded:
            return None
        if sources:
            self.fill(inputs, sources, 0, 1)
            return self.arguments(pattern)
        if self._on_device and True not in pattern:
            return inputs.leaves, []
        columns = zip(self._columns, inputs.leaves, strict=True)
        if not any(pattern):
            return [column.single(leaf) for column, leaf in columns], []
        for column, leaf in columns:
            column.put(0, leaf)
        return self.arguments(pattern)

    def room(self, sources: Mapping[int, RowGather], inputs: StepInputs) -> int:
        """Return how many items of a chunk one block can take."""
        columns = zip(self._columns, inputs.leaves, strict=True)
        return 1 if any(c.alone and id(a) in sources for c, a in columns) else self.capacity

    def fill(self, inputs: StepInputs, sources: Mapping[int, RowGather], start: int, count: int) -> None:
        """Make the block of ``count`` items of a chunk, from its number ``start`` on."""
        for column, leaf in zip(self._columns, inputs.leaves, strict=True):
            rows = sources.get(id(leaf))
            if rows is None or (count == 1 == start + 1 and isinstance(column, _Device)):  # the item has its own rows
                column.put(0, leaf)
            else:
                column.fill(rows, start, count)
        self.count = count

    @property
    def varying(self) -> tuple[bool, ...]:
        """For each leaf whether it differs between the items; the arrays of a padded batch count as different.

        Batches of different buckets alternate, so that blocks of one item and larger blocks occur: one program serves
        both.
        """
        if self._padded and self.count == 1:
            return tuple([isinstance(c, _Host) and not c.alone for c in self._columns])
        return tuple([c.varies for c in self._columns])

    def arguments(self, pattern: Sequence[bool]) -> tuple[list[Any], list[Any]]:
        """Return the leaves of the block, those passed once and those that the pattern stacks; it is empty then."""
        pairs = list(zip(self._columns, pattern, strict=True))
        count, self.count = self.count, 0
        return [c.shared() for c, many in pairs if not many], [c.stacked(count) for c, many in pairs if many]


def _column(leaf: Any, capacity: int, placed: bool) -> _Column:
    if is_number(leaf):
        return _Number()
    room = capacity if _bytes(leaf) <= _LARGE else 1
    return _Host(leaf, room) if is_host(leaf) else _Device(leaf, room, placed=placed)


def _bytes(leaf: Any) -> int:
    return int(getattr(leaf, "nbytes", 0))


def _same_bytes(a: Any, b: Any) -> bool:
    """Return whether two arrays of one shape and dtype hold the same bits."""
    if a.size <= _MOST_ITEMS:
        return a.tobytes() == b.tobytes()
    return np.array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))


def _stack(values: Sequence[Any], capacity: int) -> Any:
    """Return the stack of some arrays, filled with the last one up to the capacity: one program for any count."""
    values = [*values, *[values[-1]] * (capacity - len(values))]
    if capacity <= _FEW:
        return _stacked(*values)
    # In groups: JAX takes long to look up the program for a call with hundreds of arguments.
    groups = [_stacked(*values[i : i + _FEW]) for i in range(0, capacity // _FEW * _FEW, _FEW)]
    rest = values[capacity // _FEW * _FEW :]
    return _joined(*groups, *([_stacked(*rest)] if rest else []))


@jax.jit
def _stacked(*values: Any) -> Any:
    return jnp.stack(values)


@jax.jit
def _joined(*groups: Any) -> Any:
    return jnp.concatenate(groups)
