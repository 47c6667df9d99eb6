"""The stages of a ``Data`` pipeline: what runs when one is iterated. Nothing here knows ``Data``."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kaun import rng, tree
from kaun.errors import locate
from kaun.prefetch import settled
from kaun.runs import Runs, chained, mapped, read_rows, skipped, taken, within

Item = Callable[[int], Any]


class Node(NamedTuple):
    """What a pipeline does. Passes (epochs) and items count from 0; only a shuffle looks at the pass.

    open: ``open(epoch, start)`` iterates one pass from its item ``start`` on.
    length: the number of items of a pass, None where it is not known.
    seekable: ``start`` costs nothing and ``length`` is exact (what a foreign loader says of its length may be wrong).
    item: ``item(epoch)`` is the function from index to item that a shuffle needs, None for a stream.
    runs: iterates a pass several items at a time, see ``kaun.runs``; None where that gains nothing.
    """

    open: Callable[[int, int], Iterator[Any]]
    length: int | None
    seekable: bool
    item: Callable[[int], Item] | None
    runs: Runs | None = None


class Stage(NamedTuple):
    """One stage as it was asked for.

    text: as the pipeline prints it.
    given: its parameters by name; arrays, functions and keys as they are (``kaun.fingerprint`` looks at them).
    length: the number of items of a pass after it, None where it is not known.
    """

    text: str
    given: Mapping[str, Any]
    length: int | None

    @property
    def name(self) -> str:
        """The method of Data, ``"Data.map"``."""
        return "Data." + self.text.partition("(")[0].removeprefix("Data").removeprefix(".")


def indexed_by(n: int, item: Callable[[int], Item]) -> Node:
    return Node(lambda epoch, start: map(item(epoch), range(start, n)), n, True, item)


def item_of(base: Node, wrap: Callable[[Item], Item]) -> Callable[[int], Item] | None:
    """The ``item`` of a stage that makes its items of those of the same pass of ``base``."""
    item = base.item
    return None if item is None else lambda epoch: wrap(item(epoch))


def mapped_by(base: Node, f: Callable[[Any], Any], stage: str, *, keeps_arrays: bool = False) -> Node:
    """``keeps_arrays`` says that ``f`` looks at no array of an item, and hands all on."""
    call = noting_where(f, stage)

    def open(epoch: int, start: int) -> Iterator[Any]:
        return map(call, itertools.count(start), base.open(epoch, start))

    item = item_of(base, lambda get: lambda i: call(i, get(i)))
    return base._replace(open=open, item=item, runs=mapped(base.runs, call) if keeps_arrays else None)


def grouped_by(base: Node, n: int, f: Callable[[list[Any]], Any], drop_last: bool, stage: str) -> Node:
    call, total = noting_where(f, stage), base.length or 0

    def open(epoch: int, start: int) -> Iterator[Any]:
        source = base.open(epoch, start * n)
        for i in itertools.count(start):
            group = [settled(item) for item in itertools.islice(source, n)]
            if len(group) == n or (group and not drop_last):
                yield call(i, group)
            if len(group) < n:
                return

    def indices(i: int) -> range:
        return range(i * n, min(i * n + n, total))

    item = item_of(base, lambda get: lambda i: call(i, [settled(get(j)) for j in indices(i)]))
    return Node(open, None if base.length is None else group_count(base.length, n, drop_last), base.seekable, item)


def group_count(n: int, size: int, drop_last: bool) -> int:
    return n // size if drop_last else -(-n // size)


def over_passes(base: Node, n: int) -> Node:
    length = base.length

    def open(epoch: int, start: int) -> Iterator[Any]:
        if not base.seekable or length is None:
            whole = (base.open(epoch * n + e, 0) for e in range(n))
            return itertools.islice(itertools.chain.from_iterable(whole), start, None)
        if length == 0:
            return iter(())
        first, within = divmod(start, length)
        rest = (base.open(epoch * n + e, within if e == first else 0) for e in range(first, n))
        return itertools.chain.from_iterable(rest)

    if length is None:
        return base._replace(open=open, runs=None)
    item = None if base.item is None else functools.partial(_across_passes, base.item, n, length)
    return Node(open, n * length, base.seekable, item, chained(base.runs, n, length) if base.seekable else None)


def pass_of(base: Node, e: int) -> Node:
    get = base.item
    item = None if get is None else lambda epoch: get(e)
    return base._replace(open=lambda epoch, start: base.open(e, start), item=item, runs=within(base.runs, e))


def after_first(base: Node, n: int) -> Node:
    return base._replace(
        open=lambda epoch, start: base.open(epoch, start + n),
        length=None if base.length is None else max(0, base.length - n),
        item=item_of(base, lambda get: lambda i: get(i + n)),
        runs=skipped(base.runs, n),
    )


def first_of(base: Node, n: int) -> Node:
    return base._replace(
        open=lambda epoch, start: itertools.islice(base.open(epoch, start), max(0, n - start)),
        length=None if base.length is None else min(n, base.length),
        runs=taken(base.runs, n),
    )


def _across_passes(item: Callable[[int], Item], n: int, length: int, epoch: int) -> Item:
    # All passes stay open, each with its order, because a shuffle of them jumps between them.
    view = functools.cache(lambda e: item(epoch * n + e))

    def get(i: int) -> Any:
        e, j = divmod(i, length)
        return view(e)(j)

    return get


def noting_where(f: Callable[..., Any], stage: str) -> Callable[..., Any]:
    """``f`` called with (index, item), or with the index alone by a source; its exceptions say in which stage."""

    def call(i: int, *item: Any) -> Any:
        try:
            return f(*item) if item else f(i)
        except StopIteration as error:
            raise RuntimeError(
                f"StopIteration in {stage}, item {i}: it would end the pipeline there, without a word. A "
                "next(iterator) in your function ran out; use next(iterator, default), or give it as many items."
            ) from error
        except Exception as error:
            error.add_note(f"In the data pipeline's {stage}, item {i} (counted from 0).")
            raise

    return call


def rows_of(where: str, arrays: Any) -> tuple[int, Callable[[Any], Any]]:
    """The length of a tree of arrays along axis 0, and the function from an index, slice or index array to its rows."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(arrays)
    if not pairs:
        raise ValueError(f"{where} expected arrays, received none in {outline_of(arrays)}.")
    gets: list[Callable[[Any], Any]] = []
    for path, leaf in pairs:
        if not tree.is_array(leaf):
            raise TypeError(
                f"{where} expected NumPy or JAX arrays, received {tree.describe(leaf)}{_at(path)}. Convert it first, "
                "np.asarray(x); use Data.from_items for a list of items, Data.from_fn(n, f) for what is read by index."
            )
        if leaf.ndim == 0:
            raise ValueError(
                f"{where} expected arrays with a leading axis of items, received {tree.describe(leaf)}{_at(path)}. "
                "Give it one per item, np.full(n, value), or add it in map(f)."
            )
        gets.append(_reader(leaf))
    if len({len(leaf) for _, leaf in pairs}) > 1:
        lines = "".join(f"\n    {len(leaf)}{_at(path)}: {tree.describe(leaf)}" for path, leaf in pairs)
        raise ValueError(
            f"{where} expected arrays of one length along axis 0, received lengths{lines}\n"
            "Cut them to one, x[:n], or check that the axis of items comes first."
        )
    return len(pairs[0][1]), lambda index: treedef.unflatten([get(index) for get in gets])


def _reader(array: Any) -> Callable[[Any], Any]:
    if isinstance(array, jax.Array):
        return functools.partial(read_rows, array)
    view = array.view()
    view.flags.writeable = False  # a batch is a window on the user's array: no one writes through it by accident
    return view.__getitem__


class Orders:
    """The order of ``n`` items in each pass: a function of the key, drawn here and now, and the pass.

    Attributes:
        key: the key.
    """

    def __init__(self, where: str, n: int) -> None:
        self.key = rng.next_key()
        if isinstance(self.key, Tracer):
            raise RuntimeError(
                f"{where} was called inside compiled code, where keys have no values yet. Build the pipeline outside "
                "and pass its batches in."
            )
        self._n = n
        self._words = [int(word) for word in np.asarray(jax.random.key_data(self.key)).ravel()]

    def __call__(self, epoch: int) -> Any:
        # RandomState, whose numbers NumPy has frozen, and not Generator, whose numbers a new version may change: a run
        # resumed after an upgrade must go on in the same order.
        seed = np.random.SeedSequence([*self._words, epoch])
        return np.random.RandomState(np.random.PCG64(seed)).permutation(self._n)


def stack_all(items: list[Any]) -> Any:
    if not items:
        raise ValueError("Data.stack expected at least one item, received none.")
    pairs, treedef = jax.tree_util.tree_flatten_with_path(items[0])
    columns: list[list[Any]] = []
    for k, item in enumerate(items):
        leaves, found = jax.tree_util.tree_flatten(item)
        if found != treedef:
            raise ValueError(
                f"Data.stack expected items of one structure, received {outline_of(items[0])} at item 0 and "
                f"{outline_of(item)} at item {k}. Make them alike, data.map(f), or collate them with map_batch(n, f)."
            )
        columns.append([_as_numbers(path, k, leaf) for (path, _), leaf in zip(pairs, leaves, strict=True)])
    stacked: list[Any] = []
    for (path, _), column in zip(pairs, zip(*columns, strict=True), strict=True):
        first = column[0]
        for k, array in enumerate(column):
            if array.shape != first.shape or array.dtype != first.dtype:
                raise ValueError(
                    f"Data.stack expected arrays of one shape and dtype{_at(path)}, received {tree.describe(first)} in "
                    f"item 0 and {tree.describe(array)} in item {k}. Pad or convert them, data.map(f), or collate them "
                    "with map_batch(n, f)."
                )
        stacked.append(np.stack(column))
    return treedef.unflatten(stacked)


def _as_numbers(path: Any, k: int, leaf: Any) -> Any:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    array = None if is_key else np.asarray(leaf)
    if array is None or array.dtype.kind not in "biufcV" or array.dtype.fields is not None:
        is_of_objects = isinstance(leaf, np.ndarray) and leaf.dtype == object
        raise TypeError(
            f"Data.stack expected numbers and arrays of numbers, received {tree.describe(leaf)}{_at(path)} of item "
            f"{k}. {'Pad its parts to one shape' if is_of_objects else 'Leave it out'}, data.map(f), or collate the "
            "items with map_batch(n, f)."
        )
    return array


def loss_of(f: Callable[[Any, Any], Any], item: Any) -> Any:
    if not (isinstance(item, (tuple, list)) and len(item) in (2, 3)):
        raise TypeError(
            f"with_loss expected items (x, y) or (x, y, Context(...)), received {outline_of(item)}. Make them such "
            'first: data.map(lambda item: (item["x"], item["y"])).with_loss(f).'
        )
    x, y, *ctx = item
    if callable(y):
        raise TypeError(
            f"with_loss expected labels y in items (x, y), received the function {name_of('with_loss', y)}: these "
            "items have their loss already. Leave with_loss out."
        )
    if ctx and not isinstance(ctx[0], Mapping):
        raise TypeError(
            f"with_loss expected a Context as third of an item (x, y, ctx), received {outline_of(ctx[0])}. Name it, "
            "data.map(lambda b: (b[0], b[1], Context(weights=b[2]))), or make it part of y."
        )
    return x, _loss(f, y), *ctx


def _loss(f: Callable[[Any, Any], Any], y: Any) -> Callable[[Any], Any]:
    # A plain function with f and y in its cells: all batches share its code, so that it compiles once.
    def loss(output: Any) -> Any:
        return f(output, y)

    return loss


def checked_count(where: str, name: str, value: Any, least: int) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{where} expected an int for {name}, received {value!r}. Write {name}=int(...).")
    if number < least:
        raise ValueError(f"{where} expected {name} to be at least {least}, received {value!r}.")
    return number


def name_of(where: str, f: Any) -> str:
    if not callable(f):
        raise TypeError(f"{where} expected a function, received {f!r}. Pass the function itself, {where}(f), not f(x).")
    return locate(f).replace("`", "")


def outline_of(value: Any) -> str:
    """A tree in a few characters, arrays by dtype and shape."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {outline_of(v)}" for k, v in cast("dict[Any, Any]", value).items()) + "}"
    if isinstance(value, (tuple, list)):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return left + ", ".join(outline_of(v) for v in cast("Sequence[Any]", value)) + right
    return tree.describe(value)


def _at(path: Sequence[Any]) -> str:
    return f" at {tree.path_name(path)!r}" if path else ""
