"""Data: a lazy pipeline of items that is a value, so that iterating it twice gives the same items."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import jax

from kaun import tree
from kaun.data import collate, loaders, nodes, prefetch
from kaun.data.chunks import Chunk, Limit, of_batch, of_item, of_rows, one_by_one
from kaun.data.nodes import Item, Node, StageSpec
from kaun.data.shuffle import Orders

__all__ = ["Data", "chunks_of", "replayed", "stages_of"]

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
    _node: Node
    _stages: tuple[StageSpec, ...]

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
        get = held.__getitem__ if type(held) in (tuple, range) else nodes.noting_where(held.__getitem__, stage)
        return cls._made(nodes.indexed_by(len(held), lambda epoch: get), stage, items=held)

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
        n, take = collate.rows_of("Data.from_arrays", whole)
        stage = f"Data.from_arrays({collate.outline_of(whole)})"
        return cls._made(nodes.indexed_by(n, lambda epoch: take), stage, arrays=whole)

    @classmethod
    def from_fn(cls, n: int, f: Callable[[int], U]) -> Data[U]:
        """The items ``f(0)`` to ``f(n - 1)``, each computed when it is asked for.

        Raises:
            TypeError: when ``f`` is not callable.

        >>> list(Data.from_fn(4, lambda i: i * i))
        [0, 1, 4, 9]
        """
        n = nodes.checked_count("Data.from_fn(n, f)", "n", n, 0)
        stage = f"Data.from_fn({n}, {nodes.name_of('Data.from_fn', f)})"
        get = nodes.noting_where(f, stage)
        return cls._made(nodes.indexed_by(n, lambda epoch: get), stage, n=n, f=f)

    @classmethod
    def repeat(cls, n: int, item: U) -> Data[U]:
        """The very same item ``n`` times.

        >>> list(Data.repeat(3, "same"))
        ['same', 'same', 'same']
        """
        n = nodes.checked_count("Data.repeat(n, item)", "n", n, 0)
        opened = lambda epoch, start: itertools.repeat(item, n - start)
        node = Node(opened, n, True, lambda epoch: lambda i: item, of_item(item, n))
        return cls._made(node, f"Data.repeat({n}, {collate.outline_of(item)})", n=n, item=item)

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
        name = type(source).__name__ if hasattr(source, "__iter__") else nodes.name_of("Data.from_iterable", source)
        stage = f"Data.from_iterable({name})"
        node = Node(loaders.open_loader(source, stage), loaders.loader_length(source), False, None)
        return cls._made(node, stage, source=source)

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
        if getattr(batch_size, "ndim", 0) > 0:
            raise TypeError(
                f"Data.batches expected batch_size to be an int, received {tree.describe(batch_size)}. The arrays are "
                "one argument: Data.batches((x, y), batch_size=64)."
            )
        size = nodes.checked_count("Data.batches", "batch_size", batch_size, 1)
        n, take = collate.rows_of("Data.batches", arrays)
        orders = Orders("Data.batches(..., shuffle=True)", n) if shuffle else None
        order = orders or (lambda epoch: None)

        def item(epoch: int) -> Item:
            rows = order(epoch)
            return lambda i: take(of_batch(rows, i, size, n))

        settings = f"batch_size={size}" + ", shuffle=True" * bool(shuffle) + ", drop_last=True" * bool(drop_last)
        length = nodes.group_count(n, size, drop_last)
        runs = of_rows(jax.tree_util.tree_leaves(arrays), take, order, size, length)
        made = nodes.indexed_by(length, item)._replace(runs=runs)
        given = {"batch_size": size, "drop_last": bool(drop_last), "key": orders and orders.key}
        return cls._made(made, f"Data.batches({collate.outline_of(arrays)}, {settings})", arrays=arrays, **given)

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
        return collate.stack_all(list(items))

    def map(self, f: Callable[[T], U]) -> Data[U]:
        """The items ``f(item)``.

        Raises:
            TypeError: when ``f`` is not callable.

        >>> list(Data.from_items([1, 2]).map(lambda x: -x))
        [-1, -2]
        """
        stage = f".map({nodes.name_of('map', f)})"
        return self._then(nodes.mapped_by(self._node, f, stage), stage, f=f)

    def batch(self, n: int, drop_last: bool = False) -> Data[Any]:
        """Each ``n`` consecutive items collated by ``Data.stack``; the last group may be smaller, or is dropped.

        Raises:
            TypeError, ValueError: in iteration, as ``Data.stack``.

        >>> [b.tolist() for b in Data.from_items([1, 2, 3, 4, 5]).batch(2)]
        [[1, 2], [3, 4], [5]]
        """
        n = nodes.checked_count("batch(n)", "n", n, 1)
        stage = f".batch({n}{', drop_last=True' * bool(drop_last)})"
        node = nodes.grouped_by(self._node, n, collate.stack_all, drop_last, stage)
        return self._then(node, stage, n=n, drop_last=bool(drop_last))

    def map_batch(self, n: int, f: Callable[[list[Any]], U], drop_last: bool = False) -> Data[U]:
        """The items ``f([...])`` of each list of ``n`` consecutive items; the last may be shorter, or is dropped.

        Raises:
            TypeError: when ``f`` is not callable.

        >>> list(Data.from_items([1, 2, 3, 4, 5]).map_batch(2, sum, drop_last=True))
        [3, 7]
        """
        n = nodes.checked_count("map_batch(n, f)", "n", n, 1)
        stage = f".map_batch({n}, {nodes.name_of('map_batch', f)}{', drop_last=True' * bool(drop_last)})"
        node = nodes.grouped_by(self._node, n, f, drop_last, stage)
        return self._then(node, stage, n=n, f=f, drop_last=bool(drop_last))

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
        stage = f".with_loss({nodes.name_of('with_loss', f)})"
        made = nodes.mapped_by(self._node, functools.partial(nodes.loss_of, f), stage, keeps_arrays=True)
        return self._then(made, stage, f=f)

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
        orders = Orders("shuffle()", n)

        def item(epoch: int) -> Item:
            get, rows = base(epoch), orders(epoch)
            return lambda i: get(int(rows[i]))

        return self._then(nodes.indexed_by(n, item), ".shuffle()", key=orders.key)

    def epochs(self, n: int) -> Data[T]:
        """The items of ``n`` passes, one after the other: ``epoch(0)``, ``epoch(1)``, ... Each shuffle reshuffles.

        Applied again it goes on counting: ``data.epochs(2).epochs(3)`` is passes 0 to 5.

        >>> list(Data.from_items([1, 2]).epochs(3))
        [1, 2, 1, 2, 1, 2]
        """
        n = nodes.checked_count("epochs(n)", "n", n, 0)
        return self._then(nodes.over_passes(self._node, n), f".epochs({n})", n=n)

    def epoch(self, e: int) -> Data[T]:
        """Pass ``e`` alone, counted from 0, in its own order; ``epochs`` after it repeats that very pass.

        >>> data = Data.from_items([1, 2, 3]).shuffle()
        >>> list(data.epochs(2)) == list(data.epoch(0)) + list(data.epoch(1))
        True
        """
        e = nodes.checked_count("epoch(e)", "e", e, 0)
        return self._then(nodes.pass_of(self._node, e), f".epoch({e})", e=e)

    def skip(self, n: int) -> Data[T]:
        """The items after the first ``n``, at no cost unless it is a stream. After ``epochs`` ``n`` may span passes.

        >>> list(Data.from_items([1, 2, 3]).epochs(2).skip(4))
        [2, 3]
        """
        n = nodes.checked_count("skip(n)", "n", n, 0)
        return self._then(nodes.after_first(self._node, n), f".skip({n})", n=n)

    def take(self, n: int) -> Data[T]:
        """The first ``n`` items, or all where there are fewer. Nothing after them is pulled.

        >>> list(Data.from_items([1, 2, 3]).take(2).epochs(2))
        [1, 2, 1, 2]
        """
        n = nodes.checked_count("take(n)", "n", n, 0)
        return self._then(nodes.first_of(self._node, n), f".take({n})", n=n)

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
        n, base = nodes.checked_count("prefetch(n)", "n", n, 1), self._node
        ahead = lambda epoch, start: prefetch.prefetched(functools.partial(base.open, epoch, start), n)
        return self._then(base._replace(open=ahead, item=None, runs=None), f".prefetch({n})", n=n)

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
        texts = [stage.text for stage in self._stages]
        return "".join(texts) if sum(map(len, texts)) <= 100 else "\n  ".join(texts)

    def _then(self, node: Node, text: str, **given: Any) -> Data[Any]:
        return _data(node, *self._stages, StageSpec(text, given, node.length))

    @staticmethod
    def _made(node: Node, text: str, **given: Any) -> Data[Any]:
        return _data(node, StageSpec(text, given, node.length))


def _data(node: Node, *chain: StageSpec) -> Data[Any]:
    data: Data[Any] = object.__new__(Data)
    object.__setattr__(data, "_node", node)
    object.__setattr__(data, "_stages", chain)
    return data


def stages_of(data: Any) -> tuple[StageSpec, ...]:
    """The stages of a pipeline, its source first; none of what is no ``Data``."""
    return data._stages if isinstance(data, Data) else ()  # pyright: ignore[reportPrivateUsage]


def replayed(first: StageSpec, rest: Iterable[tuple[str, Mapping[str, Any]]]) -> Data[Any]:
    """A ``from_iterable`` and what comes after it made anew: methods by name, with their arguments."""
    data = _data(Node(loaders.open_loader(first.given["source"], first.text), first.length, False, None), first)
    for name, given in rest:
        data = getattr(data, name)(**given)
    return data


def chunks_of(data: Iterable[Any], iterator: Iterator[Any], most: Limit) -> Iterator[Chunk]:
    """The items of ``data`` as ``fit`` takes them: several at a time where a pipeline knows how, else one by one."""
    node = data._node if isinstance(data, Data) else None  # pyright: ignore[reportPrivateUsage]
    return one_by_one(iterator) if node is None or node.runs is None else node.runs(0, 0, most)
