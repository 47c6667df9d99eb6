"""Data: a lazy pipeline of items that is a value, so that iterating it twice gives the same items."""

from __future__ import annotations

import atexit
import contextvars
import functools
import itertools
import operator
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kaun import lift, rng, tree
from kaun.errors import locate

__all__ = ["Data"]

T = TypeVar("T", covariant=True)
U = TypeVar("U")


class Data(Generic[T]):
    """A lazy pipeline of items: immutable, iterated anew by each ``for``, with ``len()`` where that is known.

    Made by the class methods, refined by the others, each of which gives a new pipeline. Functions given to a stage
    run when their item is asked for, one item at a time, and must be pure: a pipeline is a value only if they are.
    Random numbers come from a key folded with the item's index (``from_fn``). An exception of such a function passes
    unchanged, with a note that names the stage and the item.

    Raises:
        TypeError: when called (use a class method), and by every method for a count that is not an int.
        ValueError: by every method for a count below 0, or below 1 where that makes no sense.

    >>> from kaun import Data
    >>> data = Data.from_items([1, 2, 3, 4, 5]).map(lambda x: x * 10).skip(1)
    >>> list(data), len(data)
    ([20, 30, 40, 50], 4)
    """

    __slots__ = ("__weakref__", "_node", "_stages")
    _node: _Node
    _stages: tuple[str, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "Data is made by its class methods: Data.batches((x, y), batch_size=64) for arrays, Data.from_items(items) "
            "for a list, Data.from_iterable(loader) for a loader."
        )

    @classmethod
    def from_items(cls, items: Sequence[U]) -> Data[U]:
        """The items of a sequence, reached by index. A list is copied; any other sequence is used as it is.

        Raises:
            TypeError: when it has no length or no items by index.

        >>> list(Data.from_items("abc").skip(1))
        ['b', 'c']
        """
        held: Any = tuple(items) if isinstance(items, list) else items
        if isinstance(held, Mapping) or not (hasattr(held, "__len__") and hasattr(held, "__getitem__")):
            raise TypeError(
                "Data.from_items expected a sequence (a list, or anything with len() and [i]), received "
                f"{type(items).__name__}. Use Data.from_items(list(items)), or Data.from_iterable(loader) for a loader."
            )
        stage = f"Data.from_items({len(held)} items)"
        get = held.__getitem__ if type(held) in (tuple, range) else _noting(held.__getitem__, stage)
        return cls._made(_indexed(len(held), lambda epoch: get), stage)

    @classmethod
    def from_arrays(cls, *arrays: Any) -> Data[Any]:
        """The rows of arrays along axis 0: tuples ``(x[i], y[i], ...)``, or plain ``x[i]`` of a single array.

        Arguments:
            arrays: NumPy or JAX arrays, or trees of them, of one length. Rows of NumPy arrays are read-only views, of
                one-dimensional ones scalars. JAX arrays stay on their device.

        For batches ``Data.batches`` is the fast way: one operation for a batch, not one for each of its rows.

        Raises:
            TypeError, ValueError: as ``batches``.

        >>> import numpy as np
        >>> for x, y in Data.from_arrays(np.array([[1, 2], [3, 4]]), np.array([0, 1])):
        ...     print(x, y)
        [1 2] 0
        [3 4] 1
        """
        whole: Any = arrays[0] if len(arrays) == 1 else arrays
        n, take = _rows("Data.from_arrays", whole)
        return cls._made(_indexed(n, lambda epoch: take), f"Data.from_arrays({_outline(whole)})")

    @classmethod
    def from_fn(cls, n: int, f: Callable[[int], U]) -> Data[U]:
        """The items ``f(0)`` to ``f(n - 1)``, each computed when it is asked for.

        Raises:
            TypeError: when ``f`` is not callable.

        >>> list(Data.from_fn(4, lambda i: i * i))
        [0, 1, 4, 9]
        """
        n = _count("Data.from_fn(n, f)", "n", n, 0)
        stage = f"Data.from_fn({n}, {_name('Data.from_fn', f)})"
        get = _noting(f, stage)
        return cls._made(_indexed(n, lambda epoch: get), stage)

    @classmethod
    def repeat(cls, n: int, item: U) -> Data[U]:
        """The very same item ``n`` times.

        >>> list(Data.repeat(3, "same"))
        ['same', 'same', 'same']
        """
        n = _count("Data.repeat(n, item)", "n", n, 0)
        node = _Node(lambda epoch, start: itertools.repeat(item, n - start), n, True, lambda epoch: lambda i: item)
        return cls._made(node, f"Data.repeat({n}, {_outline(item)})")

    @classmethod
    def from_iterable(cls, iterable: Iterable[U] | Callable[[], Iterable[U]]) -> Data[U]:
        """The items of any loader, or of what a function without arguments returns, asked anew in each pass.

        A stream: no items by index (so no ``shuffle``), ``skip`` pulls what it skips, ``len()`` is what the loader
        says. An iterator (a generator, say) can be iterated once.

        Raises:
            TypeError: when it is neither iterable nor callable.
            RuntimeError: in iteration, when an iterator is used up.

        >>> data = Data.from_iterable(lambda: (x * x for x in range(4)))
        >>> list(data), list(data.take(2))
        ([0, 1, 4, 9], [0, 1])
        """
        if isinstance(iterable, Data):
            return cast("Data[U]", iterable)
        source: Any = iterable
        if isinstance(source, Mapping) or not (hasattr(source, "__iter__") or callable(source)):
            raise TypeError(
                "Data.from_iterable expected a loader, or a function without arguments that returns one, received "
                f"{type(source).__name__}. Use Data.batches for a dict of arrays, Data.repeat(n, item) for one item."
            )
        name = type(source).__name__ if hasattr(source, "__iter__") else _name("Data.from_iterable", source)
        stage = f"Data.from_iterable({name})"
        return cls._made(_Node(_stream(source, stage), _claimed_length(source), False, None), stage)

    @classmethod
    def batches(cls, arrays: U, batch_size: int, shuffle: bool = False, drop_last: bool = False) -> Data[U]:
        """The batches of arrays in memory: each is the same tree, with ``batch_size`` rows of every array.

        Arguments:
            arrays: NumPy or JAX arrays of one length along axis 0, in any tree: a tuple, a dict, a single array.
            batch_size: the rows of a batch; the last one has what remains.
            shuffle: whether rows come in a random order, as with ``Data.shuffle``: another one in each epoch, from a
                key drawn from the RNG scope here and now.
            drop_last: whether a last batch that is not full is left out.

        NumPy in, NumPy out: read-only views of the arrays when in order, fresh arrays when shuffled. JAX arrays stay
        on their device.

        Raises:
            TypeError: when a leaf is not an array.
            ValueError: when lengths differ, an array is a scalar, or there is none.

        >>> import numpy as np
        >>> data = Data.batches({"x": np.zeros((5, 2)), "y": np.arange(5)}, batch_size=2)
        >>> [(batch["x"].shape, batch["y"].tolist()) for batch in data]
        [((2, 2), [0, 1]), ((2, 2), [2, 3]), ((1, 2), [4])]
        """
        size = _count("Data.batches", "batch_size", batch_size, 1)
        n, take = _rows("Data.batches", arrays)
        order = _orders("Data.batches(..., shuffle=True)", n) if shuffle else None

        def item(epoch: int) -> Item:
            if order is None:
                return lambda i: take(slice(i * size, min(i * size + size, n)))
            rows = order(epoch)
            return lambda i: take(rows[i * size : i * size + size])

        settings = f"batch_size={size}" + ", shuffle=True" * bool(shuffle) + ", drop_last=True" * bool(drop_last)
        return cls._made(_indexed(_groups(n, size, drop_last), item), f"Data.batches({_outline(arrays)}, {settings})")

    @staticmethod
    def stack(items: Iterable[Any]) -> Any:
        """The tree of NumPy arrays that stack, along a new axis 0, the numbers and arrays of equal trees.

        Python numbers take NumPy's dtypes (int64, float64), which JAX canonicalizes later. JAX arrays are fetched.

        Raises:
            ValueError: when there are no items, or they differ in structure, in a shape or in a dtype.
            TypeError: when a leaf is neither a number nor an array of numbers.

        >>> Data.stack([{"x": 1.0, "y": 0}, {"x": 2.0, "y": 1}])
        {'x': array([1., 2.]), 'y': array([0, 1])}
        """
        return _stack(list(items))

    def map(self, f: Callable[[T], U]) -> Data[U]:
        """The items ``f(item)``.

        Raises:
            TypeError: when ``f`` is not callable.

        >>> list(Data.from_items([1, 2]).map(lambda x: -x))
        [-1, -2]
        """
        stage = f".map({_name('map', f)})"
        return self._then(_mapped(self._node, f, stage), stage)

    def batch(self, n: int, drop_last: bool = False) -> Data[Any]:
        """Each ``n`` consecutive items collated by ``Data.stack``; the last group may be smaller, or is dropped.

        Raises:
            TypeError, ValueError: in iteration, as ``Data.stack``.

        >>> [b.tolist() for b in Data.from_items([1, 2, 3, 4, 5]).batch(2)]
        [[1, 2], [3, 4], [5]]
        """
        n = _count("batch(n)", "n", n, 1)
        stage = f".batch({n}{', drop_last=True' * bool(drop_last)})"
        return self._then(_grouped(self._node, n, _stack, drop_last, stage), stage)

    def map_batch(self, n: int, f: Callable[[list[Any]], U], drop_last: bool = False) -> Data[U]:
        """The items ``f([...])`` of each list of ``n`` consecutive items; the last may be shorter, or is dropped.

        Raises:
            TypeError: when ``f`` is not callable.

        >>> list(Data.from_items([1, 2, 3, 4, 5]).map_batch(2, sum, drop_last=True))
        [3, 7]
        """
        n = _count("map_batch(n, f)", "n", n, 1)
        stage = f".map_batch({n}, {_name('map_batch', f)}{', drop_last=True' * bool(drop_last)})"
        return self._then(_grouped(self._node, n, f, drop_last, stage), stage)

    def with_loss(self, f: Callable[[Any, Any], Any]) -> Data[Any]:
        """The items that ``fit`` takes: ``(x, y)`` become ``(x, output -> f(output, y))``, ``(x, y, ctx)`` keep ctx.

        Arguments:
            f: the loss, ``f(output, y)`` to a scalar: ``losses.mse``, or any function.

        Raises:
            TypeError: when ``f`` is not callable; in iteration, when an item is neither such a pair nor such a triple.

        >>> data = Data.from_items([(1.0, 3.0)]).with_loss(lambda output, y: abs(output - y))
        >>> [loss(x) for x, loss in data]
        [2.0]
        """
        stage = f".with_loss({_name('with_loss', f)})"
        return self._then(_mapped(self._node, functools.partial(_with_loss, f), stage), stage)

    def shuffle(self) -> Data[T]:
        """The items in a random order, another one in each epoch. Draws one key from the RNG scope, here and now.

        The order of pass ``e`` is NumPy's ``RandomState(PCG64(SeedSequence([*key words, e]))).permutation(n)``: a
        function of key and pass, the same on every machine. Without ``epochs`` it is pass 0, the same each time.

        Raises:
            TypeError: when the items have no index, after ``from_iterable`` or ``prefetch``.
            RuntimeError: inside compiled code.

        >>> from kaun import rng
        >>> with rng.scope(0):
        ...     data = Data.from_items([1, 2, 3, 4]).shuffle()
        >>> list(data) == list(data), sorted(data)
        (True, [1, 2, 3, 4])
        """
        base, n = self._node.item, self._node.length
        if base is None or n is None:
            raise TypeError(
                f"shuffle() needs items by index, which this stream does not have: {self!r}. Shuffle before prefetch; "
                "collect a small stream first, Data.from_items(list(data)).shuffle(); or let the loader shuffle."
            )
        order = _orders("shuffle()", n)

        def item(epoch: int) -> Item:
            get, rows = base(epoch), order(epoch)
            return lambda i: get(int(rows[i]))

        return self._then(_indexed(n, item), ".shuffle()")

    def epochs(self, n: int) -> Data[T]:
        """The items of ``n`` passes, one after the other: ``epoch(0)``, ``epoch(1)``, ... Each shuffle reshuffles.

        Applied again it goes on counting: ``data.epochs(2).epochs(3)`` is passes 0 to 5.

        >>> list(Data.from_items([1, 2]).epochs(3))
        [1, 2, 1, 2, 1, 2]
        """
        n = _count("epochs(n)", "n", n, 0)
        return self._then(_passes(self._node, n), f".epochs({n})")

    def epoch(self, e: int) -> Data[T]:
        """Pass ``e`` alone, counted from 0, in its own order; ``epochs`` after it repeats that very pass.

        >>> data = Data.from_items([1, 2, 3]).shuffle()
        >>> list(data.epochs(2)) == list(data.epoch(0)) + list(data.epoch(1))
        True
        """
        e, base = _count("epoch(e)", "e", e, 0), self._node
        get = base.item
        item = None if get is None else lambda epoch: get(e)
        return self._then(base._replace(open=lambda epoch, start: base.open(e, start), item=item), f".epoch({e})")

    def skip(self, n: int) -> Data[T]:
        """The items after the first ``n``, at no cost unless it is a stream. After ``epochs`` ``n`` may span passes.

        >>> list(Data.from_items([1, 2, 3]).epochs(2).skip(4))
        [2, 3]
        """
        n, base = _count("skip(n)", "n", n, 0), self._node
        node = base._replace(
            open=lambda epoch, start: base.open(epoch, start + n),
            length=None if base.length is None else max(0, base.length - n),
            item=_item(base, lambda get: lambda i: get(i + n)),
        )
        return self._then(node, f".skip({n})")

    def take(self, n: int) -> Data[T]:
        """The first ``n`` items, or all where there are fewer. Nothing after them is pulled.

        >>> list(Data.from_items([1, 2, 3]).take(2).epochs(2))
        [1, 2, 1, 2]
        """
        n, base = _count("take(n)", "n", n, 0), self._node
        node = base._replace(
            open=lambda epoch, start: itertools.islice(base.open(epoch, start), max(0, n - start)),
            length=None if base.length is None else min(n, base.length),
        )
        return self._then(node, f".take({n})")

    def prefetch(self, n: int) -> Data[T]:
        """The same items, made by a thread that stays up to ``n`` items ahead of the one taken last.

        The thread ends with the iteration: at the last item, an exception, or when the iterator is closed or dropped
        (it finishes an item in work). An exception of the source arrives in its place, with its own traceback. NumPy
        arrays are copied and losses taken apart before the next item is pulled, so a loader may reuse its buffers.
        The thread sees the consumer's context variables; JAX's own ``with jax...`` settings do not reach other
        threads, ``jax.config.update`` does.

        >>> list(Data.from_fn(4, lambda i: i * i).prefetch(2))
        [0, 1, 4, 9]
        """
        n, base = _count("prefetch(n)", "n", n, 1), self._node

        def open(epoch: int, start: int) -> Iterator[Any]:
            return _ahead(functools.partial(base.open, epoch, start), n)

        return self._then(base._replace(open=open, item=None), f".prefetch({n})")

    def __iter__(self) -> Iterator[T]:
        # A generator, so that whoever iterates can close() it: that ends the threads of prefetch there and then.
        yield from self._node.open(0, 0)

    def __len__(self) -> int:
        if self._node.length is None:
            raise TypeError(
                f"len() of this pipeline is not known, its source does not tell: {self!r}. Give it a source with a "
                "length, Data.from_items(list(source)), or count as you iterate."
            )
        return self._node.length

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Data is immutable: each method gives a new pipeline, data = data.map(f), not .{name} =.")

    def __repr__(self) -> str:
        line = "".join(self._stages)
        return line if len(line) <= 100 else "\n  ".join(self._stages)

    def _then(self, node: _Node, stage: str) -> Data[Any]:
        return self._made(node, *self._stages, stage)

    @staticmethod
    def _made(node: _Node, *stages: str) -> Data[Any]:
        data: Data[Any] = object.__new__(Data)
        object.__setattr__(data, "_node", node)
        object.__setattr__(data, "_stages", stages)
        return data


# How the stages work. Nothing below knows Data.

Item = Callable[[int], Any]


class _Node(NamedTuple):
    """What a pipeline does. Passes (epochs) and items count from 0; only a shuffle looks at the pass.

    open: ``open(epoch, start)`` iterates one pass from its item ``start`` on.
    length: the number of items of a pass, None where it is not known.
    seekable: ``start`` costs nothing and ``length`` is exact (what a foreign loader says of its length may be wrong).
    item: ``item(epoch)`` is the function from index to item that a shuffle needs, None for a stream.
    """

    open: Callable[[int, int], Iterator[Any]]
    length: int | None
    seekable: bool
    item: Callable[[int], Item] | None


def _indexed(n: int, item: Callable[[int], Item]) -> _Node:
    return _Node(lambda epoch, start: map(item(epoch), range(start, n)), n, True, item)


def _item(base: _Node, wrap: Callable[[Item], Item]) -> Callable[[int], Item] | None:
    """The ``item`` of a stage that makes its items of those of the same pass of ``base``."""
    item = base.item
    return None if item is None else lambda epoch: wrap(item(epoch))


def _mapped(base: _Node, f: Callable[[Any], Any], stage: str) -> _Node:
    call = _noting(f, stage)

    def open(epoch: int, start: int) -> Iterator[Any]:
        return map(call, itertools.count(start), base.open(epoch, start))

    return base._replace(open=open, item=_item(base, lambda get: lambda i: call(i, get(i))))


def _grouped(base: _Node, n: int, f: Callable[[list[Any]], Any], drop_last: bool, stage: str) -> _Node:
    call, total = _noting(f, stage), base.length or 0

    def open(epoch: int, start: int) -> Iterator[Any]:
        source = base.open(epoch, start * n)
        for i in itertools.count(start):
            group = [_settled(item) for item in itertools.islice(source, n)]
            if len(group) == n or (group and not drop_last):
                yield call(i, group)
            if len(group) < n:
                return

    def indices(i: int) -> range:
        return range(i * n, min(i * n + n, total))

    item = _item(base, lambda get: lambda i: call(i, [_settled(get(j)) for j in indices(i)]))
    return _Node(open, None if base.length is None else _groups(base.length, n, drop_last), base.seekable, item)


def _groups(n: int, size: int, drop_last: bool) -> int:
    return n // size if drop_last else -(-n // size)


def _passes(base: _Node, n: int) -> _Node:
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
        return base._replace(open=open)
    item = None if base.item is None else functools.partial(_across_passes, base.item, n, length)
    return _Node(open, n * length, base.seekable, item)


def _across_passes(item: Callable[[int], Item], n: int, length: int, epoch: int) -> Item:
    # All passes stay open, each with its order, because a shuffle of them jumps between them.
    view = functools.cache(lambda e: item(epoch * n + e))

    def get(i: int) -> Any:
        e, j = divmod(i, length)
        return view(e)(j)

    return get


def _noting(f: Callable[..., Any], stage: str) -> Callable[..., Any]:
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


def _claimed_length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:  # has none; torch's DataLoader has __len__ and raises this
        return None


def _stream(source: Any, stage: str) -> Callable[[int, int], Iterator[Any]]:
    once = [source] if hasattr(source, "__next__") else None
    had_items = False

    def loader() -> Any:
        if once is None:
            return source if hasattr(source, "__iter__") else source()
        try:
            return once.pop()  # atomic: of two threads one gets it
        except IndexError:
            raise RuntimeError(
                f"{stage} is used up: an iterator can be iterated once. Pass a list, Data.from_items(list(iterator)), "
                "or a function that makes a fresh one, Data.from_iterable(lambda: make_iterator())."
            ) from None

    def open(epoch: int, start: int) -> Iterator[Any]:
        nonlocal had_items
        count = 0
        made = loader()
        if not hasattr(made, "__iter__"):
            raise TypeError(f"{stage} expected a function that returns an iterable, received {type(made).__name__}.")
        try:
            # Not `yield from`, which would close the user's own generator together with this one.
            for item in made:
                had_items, count = True, count + 1
                if count > start:
                    yield item
        except Exception as error:
            error.add_note(f"In the data pipeline's {stage}, item {count} (counted from 0).")
            raise
        if had_items and not count:
            raise RuntimeError(
                f"{stage} came out empty, though it had items in an earlier pass: it hands out the same used-up "
                "iterator again. Pass a function that makes a fresh one, Data.from_iterable(lambda: make_iterator())."
            )

    return open


def _rows(where: str, arrays: Any) -> tuple[int, Callable[[Any], Any]]:
    """The length of a tree of arrays along axis 0, and the function from an index, slice or index array to its rows."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(arrays)
    if not pairs:
        raise ValueError(f"{where} expected arrays, received none in {_outline(arrays)}.")
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
        return functools.partial(_read_jax, array)
    view = array.view()
    view.flags.writeable = False  # a batch is a window on the user's array: no one writes through it by accident
    return view.__getitem__


def _read_jax(array: jax.Array, index: Any) -> jax.Array:
    # Always by index array: slicing with the numbers themselves would compile anew for each batch.
    return _gather(array, np.arange(index.start, index.stop) if isinstance(index, slice) else index)


_gather = jax.jit(lambda array, index: array.at[index].get(mode="promise_in_bounds"))


def _orders(where: str, n: int) -> Callable[[int], Any]:
    """The function from a pass to its order of ``n`` items. Draws the key."""
    key = rng.next_key()
    if isinstance(key, Tracer):
        raise RuntimeError(
            f"{where} was called inside compiled code, where keys have no values yet. Build the pipeline outside and "
            "pass its batches in."
        )
    words = [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]

    def order(epoch: int) -> Any:
        # RandomState, whose numbers NumPy has frozen, and not Generator, whose numbers a new version may change: a run
        # resumed after an upgrade must go on in the same order.
        seed = np.random.SeedSequence([*words, epoch])
        return np.random.RandomState(np.random.PCG64(seed)).permutation(n)

    return order


def _stack(items: list[Any]) -> Any:
    if not items:
        raise ValueError("Data.stack expected at least one item, received none.")
    pairs, treedef = jax.tree_util.tree_flatten_with_path(items[0])
    columns: list[list[Any]] = []
    for k, item in enumerate(items):
        leaves, found = jax.tree_util.tree_flatten(item)
        if found != treedef:
            raise ValueError(
                f"Data.stack expected items of one structure, received {_outline(items[0])} at item 0 and "
                f"{_outline(item)} at item {k}. Make them alike, data.map(f), or collate them with map_batch(n, f)."
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
        raise TypeError(
            f"Data.stack expected numbers and arrays of numbers, received {tree.describe(leaf)}{_at(path)} of item "
            f"{k}. Leave it out, data.map(f), or collate the items with map_batch(n, f)."
        )
    return array


def _with_loss(f: Callable[[Any, Any], Any], item: Any) -> Any:
    if not (isinstance(item, (tuple, list)) and len(item) in (2, 3)):
        raise TypeError(
            f"with_loss expected items (x, y) or (x, y, Context(...)), received {_outline(item)}. Make them such "
            'first: data.map(lambda item: (item["x"], item["y"])).with_loss(f).'
        )
    x, y, *ctx = item
    if callable(y):
        raise TypeError(
            f"with_loss expected labels y in items (x, y), received the function {_name('with_loss', y)}: these items "
            "have their loss already. Leave with_loss out."
        )
    if ctx and not isinstance(ctx[0], Mapping):
        raise TypeError(
            f"with_loss expected a Context as third of an item (x, y, ctx), received {_outline(ctx[0])}. Name it, "
            "data.map(lambda b: (b[0], b[1], Context(weights=b[2]))), or make it part of y."
        )
    return x, _loss(f, y), *ctx


def _loss(f: Callable[[Any, Any], Any], y: Any) -> Callable[[Any], Any]:
    # A plain function with f and y in its cells: all batches share its code, so that it compiles once.
    def loss(output: Any) -> Any:
        return f(output, y)

    return loss


def _settled(item: Any) -> Any:
    """The item as it is now, for a stage that pulls the next one before this one is used.

    A generator may fill the same buffer again, and all closures that it yields share one cell.
    """
    if isinstance(item, tuple) and len(item) in (2, 3) and callable(item[1]):
        return _kept(item[0]), lift.freeze(item[1]), *map(_kept, item[2:])
    return _kept(item)


def _kept(value: Any) -> Any:
    kind = type(value)
    # The common containers by hand: faster than a pytree, and keys of any kind in their own order.
    if kind is tuple or kind is list:
        return kind([_kept(v) for v in value])
    if kind is dict:
        return {k: _kept(v) for k, v in value.items()}
    return jax.tree_util.tree_map(tree.snapshot, value)


def _ahead(open: Callable[[], Iterator[Any]], n: int) -> Iterator[Any]:
    """The items of ``open()``, pulled by a thread. A slot is a pull that the thread may still make."""
    ready: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    slots, stopped = threading.Semaphore(n), threading.Event()
    run = contextvars.copy_context().run
    # The thread must not refer to this generator, or dropping it would not end it. Daemon for a source that hangs.
    thread = threading.Thread(target=run, args=(_pull, open, ready, slots, stopped), name="kaun prefetch", daemon=True)

    def end() -> None:
        stopped.set()
        slots.release()
        # Wait, so that the next pass over the same loader does not meet this thread in it; not for ever, it may hang.
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout=2.0)

    # An iterator may still be referred to when Python exits, and a thread inside JAX would then abort the process.
    atexit.register(end)
    try:
        thread.start()
        while True:
            match ready.get():
                case (item,):
                    slots.release()
                    yield item
                case (_, error):
                    try:
                        raise error
                    finally:
                        del error  # its traceback holds this frame
                case _:
                    return
    finally:
        atexit.unregister(end)
        end()


def _pull(open: Callable[[], Iterator[Any]], ready: Any, slots: threading.Semaphore, stopped: threading.Event) -> None:
    """The thread's side: sends ``(item,)`` for each item, then ``()``, or ``(None, error)``."""
    try:
        slots.acquire()
        if not stopped.is_set():
            for item in open():
                ready.put((_settled(item),))
                slots.acquire()
                if stopped.is_set():
                    return
        ready.put(())
    except BaseException as error:
        ready.put((None, error))


def _count(where: str, name: str, value: Any, least: int) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{where} expected an int for {name}, received {value!r}. Write {name}=int(...).")
    if number < least:
        raise ValueError(f"{where} expected {name} to be at least {least}, received {value!r}.")
    return number


def _name(where: str, f: Any) -> str:
    if not callable(f):
        raise TypeError(f"{where} expected a function, received {f!r}. Pass the function itself, {where}(f), not f(x).")
    return locate(f).replace("`", "")


def _outline(value: Any) -> str:
    """A tree in a few characters, arrays by dtype and shape."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_outline(v)}" for k, v in cast("dict[Any, Any]", value).items()) + "}"
    if isinstance(value, (tuple, list)):
        left, right = "()" if isinstance(value, tuple) else "[]"
        return left + ", ".join(_outline(v) for v in cast("Sequence[Any]", value)) + right
    return tree.describe(value)


def _at(path: Sequence[Any]) -> str:
    return f" at {tree.path_name(path)!r}" if path else ""
