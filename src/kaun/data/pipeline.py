"""Data: a lazy pipeline of items that is a value, so that iterating it twice gives the same items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, overload

import jax
import numpy as np

from kaun._calls import explained_methods
from kaun._loss import Loss
from kaun.context import Context
from kaun.data import arguments, buckets, collate, combine, nodes
from kaun.data.arguments import checked_count, checked_weights, function_text
from kaun.data.items import loss_attacher, loss_text
from kaun.data.local import stacked_rows
from kaun.data.nodes import Node, StageSpec, every_stage
from kaun.data.rows import Padding, loses_rows, own_rows, row_loss_attacher
from kaun.data.shuffle import Draws, Orders, draw_key
from kaun.data.sources import Sources
from kaun.data.types import LossOfLabels, Unknown

__all__ = ["Data", "make_data"]

T = TypeVar("T", covariant=True)
U = TypeVar("U")
X = TypeVar("X")


@explained_methods
class Data(Sources[T]):
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

    __slots__ = ()

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

    @overload  # a result that is Any stays so
    def map(self, f: Callable[[T], Unknown]) -> Data[Any]: ...
    @overload
    def map(self, f: Callable[[T], tuple[X, Unknown]]) -> Data[tuple[X, Any]]: ...
    @overload
    def map(self, f: Callable[[T], tuple[X, Loss]]) -> Data[tuple[X, Loss]]: ...
    @overload
    def map(self, f: Callable[[T], U]) -> Data[U]: ...
    def map(self, f: Callable[[T], Any]) -> Data[Any]:
        """The items ``f(item)``: ``f`` is called once for each item, in order.

        Raises:
            TypeError: If ``f`` is not callable.

        Examples:
            >>> list(Data.from_items([1, 2]).map(lambda x: -x))
            [-1, -2]
        """
        stage = f".map({function_text('map', f, 'item')})"
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
        stage = f".random_map({function_text('random_map', f, 'key, item')})"
        self._refuse_pieces("random_map(f)", "Random numbers of a part of a batch would be others with more processes")
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
        self._refuse_rows("batch(n)")
        stage = f".batch({n}{', drop_last=True' * drop_last})"
        node = nodes.group_node(self._node, n, collate.stack_all, drop_last, stage)
        return self._then(stacked_rows(node, self._node, n, stage), stage, n=n, drop_last=drop_last)

    def map_batch(self, n: int, f: Callable[[list[Any]], U], drop_last: bool = False) -> Data[U]:
        """The items ``f([...])`` of each list of ``n`` consecutive items; the last may be shorter, or is dropped.

        Raises:
            TypeError: If ``f`` is not callable.

        Examples:
            >>> list(Data.from_items([1, 2, 3, 4, 5]).map_batch(2, sum, drop_last=True))
            [3, 7]
        """
        n, drop_last = checked_count("map_batch(n, f)", "n", n, 1), bool(drop_last)
        self._refuse_rows("map_batch(n, f)")
        stage = f".map_batch({n}, {function_text('map_batch', f, 'items')}{', drop_last=True' * drop_last})"
        return self._then(nodes.group_node(self._node, n, f, drop_last, stage), stage, n=n, f=f, drop_last=drop_last)

    def bucket(
        self, length: Callable[[T], int] | Sequence[int] | np.ndarray[Any, Any], edges: Sequence[int], batch_size: int
    ) -> Data[Any]:
        """Batches of rows of similar lengths, padded with zeros to the upper edge of their bucket.

        A row belongs to the first edge that is not below its length. A batch is complete when its last row arrives;
        batches that are not full come at the end of a pass, filled as by ``batches(..., pad=True)``. So there is one
        shape, and one compilation, for each edge. Shuffle before ``bucket``, so that each pass groups other rows.

        Items ``(x, y)`` become ``(x, y, ctx)`` with the context names ``attention_mask`` (bool [batch_size, edge], True
        where there is no padding) and ``row_mask`` (bool [batch_size]); ``predict`` uses that context also after
        ``map(lambda b: b[0])``, and its outputs come in the order of the batches. Labels that are padded are masked in
        the loss and in metrics.

        Args:
            length: A function from a row to its length, an int of at least 1; or the lengths of all rows in their
                order, integers [rows], where reading rows is slow. The function is called for every row when the
                pipeline is built, if rows have an index and come without ``random_map`` or ``sample``. With a function
                after a shuffle, and for a stream, ``skip`` and a resumed run compute the earlier rows again.
            edges: The longest row of each bucket, rising.
            batch_size: Rows of a batch.

        Returns:
            The batches. Arrays whose axis 0 has the length of the row are padded, the others are stacked as they are.

        Raises:
            TypeError: If an argument is of another kind.
            ValueError: If a row is longer than the last edge, edges do not rise, or there is not one length for each
                row; in iteration for a stream, or if rows cannot be stacked.

        Examples:
            >>> rows = [np.array([3, 1]), np.array([4]), np.array([1, 5, 9, 2])]
            >>> data = Data.from_items(rows).map(lambda tokens: (tokens, 0)).bucket(lambda row: len(row[0]), [2, 4], 2)
            >>> for x, y, ctx in data:
            ...     print(x.tolist(), ctx["row_mask"])
            [[3, 1], [4, 0]] [ True  True]
            [[1, 5, 9, 2], [1, 5, 9, 2]] [ True False]
        """
        size, checked = checked_count(buckets.WHERE, "batch_size", batch_size, 1), buckets.checked_edges(edges)
        self._refuse_rows(buckets.WHERE)
        keyed = [s for s in every_stage(self._stages) if s.given.get("key") is not None and s.name != "Data.mix"]
        same = all(stage.name not in ("Data.random_map", "Data.sample") for stage in keyed)
        given: dict[str, Any] = {"f": length}
        if not callable(length):
            n = self._node.length
            if self._node.by_index is None or n is None:
                raise arguments.no_index(buckets.WHERE, repr(self))
            if keyed and not all(stage.name == "Data.random_map" for stage in keyed):
                raise arguments.moved_lengths(keyed[0].text)
            given = {"lengths": buckets.checked_lengths(length, checked, n)}
        name = function_text("bucket", length) if callable(length) else collate.outline_of(given["lengths"])
        stage = f".bucket({name}, edges={list(checked)}, batch_size={size})"
        kinds = buckets.Buckets(checked, size)
        node = buckets.bucket_node(self._node, next(iter(given.values())), kinds, stage, same=same, fixed=not keyed)
        return self._then(node, stage, **given, edges=list(checked), batch_size=size)

    @property
    def padding(self) -> Padding | None:
        """The amount of padding in a pass of ``pad=True`` or ``bucket``, before ``skip``, ``take`` and ``epochs``.

        A named tuple of ``rows`` (of the data), ``filled_rows``, ``tokens`` (the sum of lengths) and ``filled_tokens``
        (both 0 without ``bucket``). None if nothing is filled, or the lengths are not known.

        Examples:
            >>> Data.batches(np.zeros((5, 2)), batch_size=4, pad=True).padding
            Padding(rows=5, filled_rows=3, tokens=0, filled_tokens=0)
        """
        return self._node.padding

    @overload
    def with_loss(self: Data[Unknown], f: LossOfLabels) -> Data[Any]: ...
    @overload
    def with_loss(self: Data[tuple[X, Any]], f: LossOfLabels) -> Data[tuple[X, Loss]]: ...
    @overload
    def with_loss(self: Data[tuple[X, Any, Context]], f: LossOfLabels) -> Data[tuple[X, Loss, Context]]: ...
    @overload
    def with_loss(self, f: LossOfLabels) -> Data[Any]: ...
    def with_loss(self: Data[Any], f: LossOfLabels) -> Data[Any]:
        """The items that ``fit`` takes: ``(x, y)`` become ``(x, output -> f(output, y))``, ``(x, y, ctx)`` keep ctx.

        Where rows are filled, by ``pad=True`` or ``bucket``, the loss is ``output -> f(output, y, where=row_mask)`` and
        the items are ``(x, loss, ctx)`` with ``row_mask`` in ctx. With ``sample_weights`` it is ``f(output, y, weights=
        weights)``, with the weights of these rows.

        Args:
            f: The loss, ``f(output, y)``. For a loss of ``kaun.losses``, also in a ``functools.partial``, its ``parts``
                are used, which give a ``losses.Mean``. Another function has to take ``where=`` and ``weights=``, if
                rows are filled or weighted, and to return a ``losses.Mean`` then.

        Raises:
            TypeError: If ``f`` is not callable, or does not take ``where=`` or ``weights=`` where they are needed; in
                iteration, if an item is neither such a pair nor such a triple.

        Examples:
            >>> data = Data.from_items([(1.0, 3.0)]).with_loss(lambda output, y: abs(output - y))
            >>> [loss(x) for x, loss in data]
            [2.0]
        """
        stage = f".with_loss({loss_text(f)})"
        attach = row_loss_attacher(f, self._node.rows) if self._node.rows else loss_attacher(f)
        node = nodes.map_node(self._node, attach, stage, keeps_arrays=True, takes_rows=True)
        return self._then(node, stage, f=f)

    def shuffle(self) -> Data[T]:
        """The items in a random order, another one in each epoch. Draws one key from the RNG scope when called.

        The order of pass ``e`` is NumPy's ``RandomState(PCG64(SeedSequence([*key words, e]))).permutation(n)``: a
        function of key and pass, the same on every machine. Without ``epochs`` it is pass 0, the same each time.

        Raises:
            TypeError: If the items have no index, after ``from_iterable``, ``filter`` or ``prefetch``.
            RuntimeError: If it is called inside compiled code.

        Examples:
            >>> from kaun import rng
            >>> with rng.scope(0):
            ...     data = Data.from_items([1, 2, 3, 4]).shuffle()
            >>> list(data) == list(data), sorted(data)
            (True, [1, 2, 3, 4])
        """
        n = self._node.length
        if self._node.by_index is None or n is None:
            raise arguments.no_index("shuffle()", repr(self))
        orders = Orders("shuffle()", n)
        return self._then(nodes.shuffle_node(self._node, n, orders), ".shuffle()", key=orders.key)

    def sample(self, weights: Sequence[float] | np.ndarray[Any, Any], n: int) -> Data[T]:
        """Draw ``n`` items by weight, with replacement; other ones in each epoch. Draws one key when called.

        The draws of pass ``e`` are a function of the key and ``e``. Use it to see rare items more often.

        Args:
            weights: A number for each item, finite and at least 0, in the order of the items; they need not add up
                to 1. Item ``i`` is ``weights[i] / sum(weights)`` of the draws on average.
            n: How many items a pass has.

        Raises:
            TypeError: If the items have no index, after ``from_iterable``, ``filter`` or ``prefetch``; when weights
                are not numbers.
            ValueError: If there is not one weight for each item, one is negative or not finite, or all are 0; after
                ``shuffle``, where the weights would belong to other items.
            RuntimeError: If it is called inside compiled code.

        Examples:
            >>> from kaun import rng
            >>> with rng.scope(0):
            ...     data = Data.from_items(["often", "never", "rare"]).sample([9, 0, 1], 1000)
            >>> [round(list(data).count(item) / 1000, 1) for item in ("often", "never", "rare")]
            [0.9, 0.0, 0.1]
        """
        length = self._node.length
        if self._node.by_index is None or length is None:
            raise arguments.no_index("sample(weights, n)", repr(self))
        for stage in every_stage(self._stages):
            if stage.given.get("key") is not None and stage.name not in ("Data.mix", "Data.random_map"):
                raise arguments.moved_weights(stage.text)
        n = checked_count("sample(weights, n)", "n", n, 0)
        checked = checked_weights("sample(weights, n)", weights, length, "item")
        draws = Draws("sample(weights, n)", checked)
        node = nodes.shuffle_node(self._node, n, lambda epoch: draws(epoch or 0, n))
        return self._then(node, f".sample({collate.outline_of(checked)}, {n})", weights=checked, n=n, key=draws.key)

    def filter(self, f: Callable[[T], Any]) -> Data[T]:
        """The items for which ``f(item)`` is true.

        Only ``f`` says how many they are: the pipeline has no index and no ``len()`` after it, and ``skip`` and a
        resumed run make the items before again. Where the rows to keep are known, choose them first: ``x[keep]``.

        Args:
            f: A pure function of an item; its result is taken as a bool.

        Raises:
            TypeError: If ``f`` is not callable.

        Examples:
            >>> list(Data.from_items([1, 2, 3, 4]).filter(lambda x: x % 2 == 0))
            [2, 4]
        """
        stage = f".filter({function_text('filter', f, 'item')})"
        self._refuse_pieces("filter(f)", "Processes would keep different batches")
        return self._then(combine.filter_node(self._node, f, stage), stage, f=f)

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

    def _refuse_rows(self, stage: str) -> None:
        """Refuse a stage that groups batches, if some of their rows are filled or have weights."""
        if "local" in self._node.rows:
            raise own_rows(stage, "Make batches of the wanted size before local(s): data.batch(64).local(s).")
        if self._node.rows:
            fix = "Make batches of the wanted size at once: Data.batches(arrays, batch_size, pad=True)"
            raise loses_rows(stage, self._node.rows, fix)


def make_data(node: Node, *stages: StageSpec) -> Data[Any]:
    """A pipeline of a node; ``stages`` say what the user wrote, the source first."""
    return Data._made(node, *stages)  # pyright: ignore[reportPrivateUsage]
