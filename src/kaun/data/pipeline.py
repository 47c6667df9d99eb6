"""Data: a lazy pipeline of items that is a value, so that iterating it twice gives the same items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, cast

import jax

from kaun.data import arguments, collate, nodes
from kaun.data.arguments import checked_batch_size, checked_count, checked_loader, checked_sequence, function_text
from kaun.data.items import loss_attacher
from kaun.data.nodes import Node, StageSpec
from kaun.data.passes import as_generator, watch_of
from kaun.data.shuffle import Orders, draw_key

__all__ = ["Data", "make_data"]

T = TypeVar("T", covariant=True)
U = TypeVar("U")


class Data(Generic[T]):
    """A lazy pipeline of items: immutable, iterated from the start by each ``for``, with ``len()`` where it is known.

    The class methods make one; each other method returns a new one. Functions given to a stage run when their item is
    pulled, one item at a time, and must be pure: a pipeline is a value only if they are. Random numbers come from the
    keys of ``random_map``. An exception of such a function is not changed; a note on it names the stage and the item.

    Raises:
        TypeError: If ``Data`` is called (use a class method), or a count that a method receives is not an int.
        ValueError: If a count that a method receives is below 0, or below 1 where 0 has no meaning.

    Examples:
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
        """The items of a sequence, read by index. A list is copied; any other sequence is used as it is.

        Raises:
            TypeError: If it has no length or no items by index, or is a Series or DataFrame of pandas.

        Examples:
            >>> list(Data.from_items("abc").skip(1))
            ['b', 'c']
        """
        held = checked_sequence("Data.from_items", items)
        stage = f"Data.from_items({len(held)} items)"
        return _source(nodes.items_node(held, stage), stage, items=held)

    @classmethod
    def from_arrays(cls, *arrays: Any) -> Data[Any]:
        """The rows of arrays along axis 0: tuples ``(x[i], y[i], ...)``, or plain ``x[i]`` of a single array.

        For batches ``Data.batches`` is the fast way: one operation for a batch, not one for each of its rows.

        Args:
            arrays: NumPy or JAX arrays, or trees of them, of one length. Rows of NumPy arrays are read-only views, of
                one-dimensional ones scalars. JAX arrays stay on their device.

        Raises:
            TypeError, ValueError: As ``batches``.

        Examples:
            >>> import numpy as np
            >>> for x, y in Data.from_arrays(np.array([[1, 2], [3, 4]]), np.array([0, 1])):
            ...     print(x, y)
            [1 2] 0
            [3 4] 1
        """
        whole: Any = arrays[0] if len(arrays) == 1 else arrays
        rows = collate.ArrayRows("Data.from_arrays", whole)
        stage = f"Data.from_arrays({collate.outline_of(whole)})"
        return _source(nodes.index_node(rows.length, lambda epoch: rows.take), stage, arrays=whole)

    @classmethod
    def from_fn(cls, n: int, f: Callable[[int], U]) -> Data[U]:
        """The items ``f(0)`` to ``f(n - 1)``, each computed when it is pulled.

        Raises:
            TypeError: If ``f`` is not callable.

        Examples:
            >>> list(Data.from_fn(4, lambda i: i * i))
            [0, 1, 4, 9]
        """
        n = checked_count("Data.from_fn(n, f)", "n", n, 0)
        stage = f"Data.from_fn({n}, {function_text('Data.from_fn', f)})"
        return _source(nodes.function_node(n, f, stage), stage, n=n, f=f)

    @classmethod
    def repeat(cls, n: int, item: U) -> Data[U]:
        """The same object ``n`` times.

        Examples:
            >>> list(Data.repeat(3, "same"))
            ['same', 'same', 'same']
        """
        n = checked_count("Data.repeat(n, item)", "n", n, 0)
        return _source(nodes.repeat_node(n, item), f"Data.repeat({n}, {collate.outline_of(item)})", n=n, item=item)

    @classmethod
    def from_iterable(cls, iterable: Iterable[U] | Callable[[], Iterable[U]]) -> Data[U]:
        """The items of any loader, or of the loader that a function without arguments returns in each pass.

        A stream: no items by index (so no ``shuffle``), ``skip`` pulls what it skips, ``len()`` is what the loader
        says. An iterator, for example a generator, can be iterated once.

        Raises:
            TypeError: If it is neither iterable nor callable, or is a Series or DataFrame of pandas.
            RuntimeError: If, in iteration, an iterator is exhausted.

        Examples:
            >>> data = Data.from_iterable(lambda: (x * x for x in range(4)))
            >>> list(data), list(data.take(2))
            ([0, 1, 4, 9], [0, 1])
        """
        if isinstance(iterable, Data):
            return cast("Data[U]", iterable)
        source = checked_loader("Data.from_iterable", iterable)
        name = type(source).__name__ if hasattr(source, "__iter__") else function_text("Data.from_iterable", source)
        stage = f"Data.from_iterable({name})"
        return _source(nodes.loader_node(source, stage), stage, source=source)

    @classmethod
    def batches(cls, arrays: U, batch_size: int, shuffle: bool = False, drop_last: bool = False) -> Data[U]:
        """The batches of arrays in memory: each is the same tree, with ``batch_size`` rows of every array.

        NumPy in, NumPy out: read-only views of the arrays when in order, new arrays when shuffled. JAX arrays stay on
        their device.

        Args:
            arrays: NumPy or JAX arrays of one length along axis 0, in any tree: a tuple, a dict, a single array.
            batch_size: The rows of a batch; the last one has what remains.
            shuffle: Whether rows come in a random order, another one in each epoch, as with ``Data.shuffle``. Default
                False. Draws one key from the RNG scope when called.
            drop_last: Whether a last batch that is not full is left out. Default False.

        Raises:
            TypeError: If a leaf is not an array.
            ValueError: If lengths differ, an array is a scalar, or there is none.

        Examples:
            >>> import numpy as np
            >>> data = Data.batches({"x": np.zeros((5, 2)), "y": np.arange(5)}, batch_size=2)
            >>> [(batch["x"].shape, batch["y"].tolist()) for batch in data]
            [((2, 2), [0, 1]), ((2, 2), [2, 3]), ((1, 2), [4])]
        """
        size, drop_last = checked_batch_size("Data.batches", batch_size), bool(drop_last)
        rows = collate.ArrayRows("Data.batches", arrays)
        orders = Orders("Data.batches(..., shuffle=True)", rows.length) if shuffle else None
        node = nodes.batches_node(rows, size, drop_last, orders or (lambda epoch: None))
        settings = f"batch_size={size}" + ", shuffle=True" * bool(shuffle) + ", drop_last=True" * drop_last
        text = f"Data.batches({collate.outline_of(arrays)}, {settings})"
        return _source(node, text, arrays=arrays, batch_size=size, drop_last=drop_last, key=orders and orders.key)

    @staticmethod
    def stack(items: Iterable[Any]) -> Any:
        """The tree of NumPy arrays that stack, along a new axis 0, the numbers and arrays of equal trees.

        Python numbers take NumPy's dtypes (int64, float64), which JAX canonicalizes later. JAX arrays are fetched.

        Raises:
            ValueError: If there are no items, or they differ in structure, in a shape or in a dtype.
            TypeError: If a leaf is neither a number nor an array of numbers.

        Examples:
            >>> Data.stack([{"x": 1.0, "y": 0}, {"x": 2.0, "y": 1}])
            {'x': array([1., 2.]), 'y': array([0, 1])}
        """
        return collate.stack_all(list(items))

    def map(self, f: Callable[[T], U]) -> Data[U]:
        """The items ``f(item)``: ``f`` is called once for each item, in order.

        Raises:
            TypeError: If ``f`` is not callable.

        Examples:
            >>> list(Data.from_items([1, 2]).map(lambda x: -x))
            [-1, -2]
        """
        stage = f".map({function_text('map', f)})"
        return self._then(nodes.map_node(self._node, f, stage), stage, f=f)

    def random_map(self, f: Callable[[jax.Array, T], U]) -> Data[U]:
        """The items ``f(key, item)``, each with its own random key: the way to augment data.

        The key of item ``i`` of pass ``e`` is ``fold_in(fold_in(k, e), i)``, for a key ``k`` drawn from the RNG scope
        here. Another iteration, process or resumed run gives the same items; each pass gives other items.

        Args:
            f: A function of a typed JAX key of shape () and an item, a row before ``batch`` and a batch after it. In
                NumPy draw from ``np.random.default_rng(np.asarray(jax.random.key_data(key)))``.

        Raises:
            TypeError: If ``f`` is not callable.
            RuntimeError: If it is called inside compiled code.

        Examples:
            >>> import jax
            >>> from kaun import rng
            >>> with rng.scope(0):
            ...     noisy = Data.from_items([0.0, 0.0]).random_map(lambda key, x: x + float(jax.random.normal(key)))
            >>> list(noisy) == list(noisy), list(noisy.epoch(0)) == list(noisy.epoch(1))
            (True, False)
        """
        stage = f".random_map({function_text('random_map', f)})"
        key = draw_key("random_map(f)")
        return self._then(nodes.random_map_node(self._node, f, key, stage), stage, f=f, key=key)

    def batch(self, n: int, drop_last: bool = False) -> Data[Any]:
        """Each ``n`` consecutive items collated by ``Data.stack``; the last group may be smaller, or is dropped.

        Raises:
            TypeError, ValueError: In iteration, as ``Data.stack``.

        Examples:
            >>> [b.tolist() for b in Data.from_items([1, 2, 3, 4, 5]).batch(2)]
            [[1, 2], [3, 4], [5]]
        """
        n, drop_last = checked_count("batch(n)", "n", n, 1), bool(drop_last)
        stage = f".batch({n}{', drop_last=True' * drop_last})"
        node = nodes.group_node(self._node, n, collate.stack_all, drop_last, stage)
        return self._then(node, stage, n=n, drop_last=drop_last)

    def map_batch(self, n: int, f: Callable[[list[Any]], U], drop_last: bool = False) -> Data[U]:
        """The items ``f([...])`` of each list of ``n`` consecutive items; the last may be shorter, or is dropped.

        Raises:
            TypeError: If ``f`` is not callable.

        Examples:
            >>> list(Data.from_items([1, 2, 3, 4, 5]).map_batch(2, sum, drop_last=True))
            [3, 7]
        """
        n, drop_last = checked_count("map_batch(n, f)", "n", n, 1), bool(drop_last)
        stage = f".map_batch({n}, {function_text('map_batch', f)}{', drop_last=True' * drop_last})"
        return self._then(nodes.group_node(self._node, n, f, drop_last, stage), stage, n=n, f=f, drop_last=drop_last)

    def with_loss(self, f: Callable[[Any, Any], Any]) -> Data[Any]:
        """The items that ``fit`` takes: ``(x, y)`` become ``(x, output -> f(output, y))``, ``(x, y, ctx)`` keep ctx.

        Args:
            f: The loss, ``f(output, y)``. For a loss of ``kaun.losses``, also in a ``functools.partial``, its ``parts``
                are used, which give a ``losses.Mean``.

        Raises:
            TypeError: If ``f`` is not callable; in iteration, if an item is neither such a pair nor such a triple.

        Examples:
            >>> data = Data.from_items([(1.0, 3.0)]).with_loss(lambda output, y: abs(output - y))
            >>> [loss(x) for x, loss in data]
            [2.0]
        """
        stage = f".with_loss({function_text('with_loss', f)})"
        node = nodes.map_node(self._node, loss_attacher(f), stage, keeps_arrays=True)
        return self._then(node, stage, f=f)

    def shuffle(self) -> Data[T]:
        """The items in a random order, another one in each epoch. Draws one key from the RNG scope when called.

        The order of pass ``e`` is NumPy's ``RandomState(PCG64(SeedSequence([*key words, e]))).permutation(n)``: a
        function of key and pass, the same on every machine. Without ``epochs`` it is pass 0, the same each time.

        Raises:
            TypeError: If the items have no index, after ``from_iterable`` or ``prefetch``.
            RuntimeError: If it is called inside compiled code.

        Examples:
            >>> from kaun import rng
            >>> with rng.scope(0):
            ...     data = Data.from_items([1, 2, 3, 4]).shuffle()
            >>> list(data) == list(data), sorted(data)
            (True, [1, 2, 3, 4])
        """
        base, n = self._node.by_index, self._node.length
        if base is None or n is None:
            raise arguments.no_index(repr(self))
        orders = Orders("shuffle()", n)
        return self._then(nodes.shuffle_node(base, n, orders), ".shuffle()", key=orders.key)

    def epochs(self, n: int) -> Data[T]:
        """The items of ``n`` passes, one after the other: ``epoch(0)``, ``epoch(1)``, ... Each shuffle reshuffles.

        Applied twice it continues counting: ``data.epochs(2).epochs(3)`` is passes 0 to 5. Before pass ``e`` of a
        loader, ``set_epoch(e)`` of the loader, its sampler or its data set is called.

        Examples:
            >>> list(Data.from_items([1, 2]).epochs(3))
            [1, 2, 1, 2, 1, 2]
        """
        n = checked_count("epochs(n)", "n", n, 0)
        return self._then(nodes.epochs_node(self._node, n), f".epochs({n})", n=n)

    def epoch(self, e: int) -> Data[T]:
        """Pass ``e`` alone, counted from 0, in its own order; ``epochs`` after it repeats that same pass.

        Examples:
            >>> data = Data.from_items([1, 2, 3]).shuffle()
            >>> list(data.epochs(2)) == list(data.epoch(0)) + list(data.epoch(1))
            True
        """
        e = checked_count("epoch(e)", "e", e, 0)
        return self._then(nodes.pass_node(self._node, e), f".epoch({e})", e=e)

    def skip(self, n: int) -> Data[T]:
        """The items after the first ``n``, at no cost unless it is a stream. After ``epochs`` ``n`` may span passes.

        Examples:
            >>> list(Data.from_items([1, 2, 3]).epochs(2).skip(4))
            [2, 3]
        """
        n = checked_count("skip(n)", "n", n, 0)
        return self._then(nodes.skip_node(self._node, n), f".skip({n})", n=n)

    def take(self, n: int) -> Data[T]:
        """The first ``n`` items, or all where there are fewer. Nothing after them is pulled.

        Examples:
            >>> list(Data.from_items([1, 2, 3]).take(2).epochs(2))
            [1, 2, 1, 2]
        """
        n = checked_count("take(n)", "n", n, 0)
        return self._then(nodes.take_node(self._node, n), f".take({n})", n=n)

    def prefetch(self, n: int) -> Data[T]:
        """The same items, made by a thread that stays up to ``n`` items ahead of the one taken last.

        The thread ends with the iteration: at the last item, at an exception, or when the iterator is closed or
        dropped (it finishes the item it is making). An exception of the source is raised at its item, with its own
        traceback. NumPy arrays are copied and losses captured before the next item is pulled, so a loader may reuse
        its buffers. The thread sees the consumer's context variables; JAX's own ``with jax...`` settings do not reach
        other threads, ``jax.config.update`` does.

        Examples:
            >>> list(Data.from_fn(4, lambda i: i * i).prefetch(2))
            [0, 1, 4, 9]
        """
        n = checked_count("prefetch(n)", "n", n, 1)
        return self._then(nodes.prefetch_node(self._node, n), f".prefetch({n})", n=n)

    def __iter__(self) -> Iterator[T]:
        # Always a generator, so that whoever iterates can close() it and with it the threads of prefetch. One that the
        # last stage makes is used without a frame around it: fit pulls an item for each step.
        node, first = self._node, watch_of(self._stages)
        return node.open(None, 0, first) if node.takes_first else as_generator(node.open, first)

    def __len__(self) -> int:
        if self._node.length is None:
            raise arguments.no_length(repr(self))
        return self._node.length

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Data is immutable; each method returns a new one, data = data.map(f), not .{name} =.")

    def __copy__(self) -> Data[T]:
        return self  # immutable, like a str

    def __deepcopy__(self, memo: Any) -> Data[T]:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise arguments.not_picklable(repr(self))

    def __repr__(self) -> str:
        texts = [stage.text for stage in self._stages]
        return "".join(texts) if sum(map(len, texts)) <= 100 else "\n  ".join(texts)

    def _then(self, node: Node, text: str, **given: Any) -> Data[Any]:
        return make_data(node, *self._stages, StageSpec(text, given, node.length))


def make_data(node: Node, *stages: StageSpec) -> Data[Any]:
    """A pipeline of a node; ``stages`` say what the user wrote, the source first."""
    data: Data[Any] = object.__new__(Data)
    object.__setattr__(data, "_node", node)
    object.__setattr__(data, "_stages", stages)
    return data


def _source(node: Node, text: str, **given: Any) -> Data[Any]:
    return make_data(node, StageSpec(text, given, node.length))
