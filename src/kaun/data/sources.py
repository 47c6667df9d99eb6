"""What makes a ``Data``: its class methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import jax
import numpy as np

from kaun._loss import Loss
from kaun.data import collate, combine, nodes
from kaun.data.arguments import (
    checked_batch_size,
    checked_count,
    checked_loader,
    checked_pipelines,
    checked_sequence,
    checked_weights,
    function_text,
)
from kaun.data.folds import FoldPart, fold_rows
from kaun.data.padding import RowOptions, row_batches_node
from kaun.data.placed import Placed
from kaun.data.rows import loses_rows
from kaun.data.shuffle import Draws, Orders
from kaun.data.types import Unknown

if TYPE_CHECKING:
    from kaun.data.pipeline import Data

__all__ = ["Sources"]

T = TypeVar("T", covariant=True)
U = TypeVar("U")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


class Sources(Placed[T]):
    """The part of ``Data`` that makes pipelines. ``Data`` is its only subclass."""

    __slots__ = ()

    @classmethod
    def from_items(cls, items: Sequence[U]) -> Data[U]:
        """The items of a sequence, read by index. A list is copied; any other sequence is used as it is.

        Raises:
            TypeError: If it has no length or no items by index, or is a Series or DataFrame of pandas.

        Examples:
            >>> from kaun import Data
            >>> list(Data.from_items("abc").skip(1))
            ['b', 'c']
        """
        held = checked_sequence("Data.from_items", items)
        stage = f"Data.from_items({len(held)} items)"
        return cls._source(nodes.items_node(held, stage), stage, items=held)

    @overload
    @classmethod
    def from_arrays(cls, a: Unknown, /) -> Data[Any]: ...
    @overload
    @classmethod
    def from_arrays(cls, a: jax.Array, /) -> Data[jax.Array]: ...
    @overload
    @classmethod
    def from_arrays(cls, a: Unknown, b: Unknown, /) -> Data[tuple[Any, Any]]: ...
    @overload
    @classmethod
    def from_arrays(cls, a: jax.Array, b: jax.Array, /) -> Data[tuple[jax.Array, jax.Array]]: ...
    @overload
    @classmethod
    def from_arrays(cls, a: Any, b: Any, /) -> Data[tuple[Any, Any]]: ...
    @overload
    @classmethod
    def from_arrays(cls, a: Any, b: Any, c: Any, /) -> Data[tuple[Any, Any, Any]]: ...
    @overload
    @classmethod
    def from_arrays(cls, a: Any, b: Any, c: Any, d: Any, /) -> Data[tuple[Any, Any, Any, Any]]: ...
    @overload
    @classmethod
    def from_arrays(cls, *arrays: Any) -> Data[Any]: ...
    @classmethod
    def from_arrays(cls, *arrays: Any) -> Data[Any]:
        """The rows of arrays along axis 0: tuples ``(x[i], y[i], ...)``, or plain ``x[i]`` of a single array.

        For batches ``Data.batches`` is the fast way: one operation for a batch, not one for each of its rows.

        Args:
            arrays: NumPy or JAX arrays, or trees of them, of one length. Rows of NumPy arrays are read-only views, of
                one-dimensional ones scalars. JAX arrays stay on their device.

        Raises:
            TypeError, ValueError: as ``batches``.

        Examples:
            >>> from kaun import Data
            >>> import numpy as np
            >>> for x, y in Data.from_arrays(np.array([[1, 2], [3, 4]]), np.array([0, 1])):
            ...     print(x, y)
            [1 2] 0
            [3 4] 1
        """
        whole: Any = arrays[0] if len(arrays) == 1 else arrays
        rows = collate.ArrayRows("Data.from_arrays", whole)
        stage = f"Data.from_arrays({collate.outline_of(whole)})"
        return cls._source(nodes.index_node(rows.length, lambda epoch: rows.take), stage, arrays=whole)

    @classmethod
    def from_fn(cls, n: int, f: Callable[[int], U]) -> Data[U]:
        """The items ``f(0)`` to ``f(n - 1)``, each computed when it is pulled.

        Raises:
            TypeError: If ``f`` is not callable.

        Examples:
            >>> from kaun import Data
            >>> list(Data.from_fn(4, lambda i: i * i))
            [0, 1, 4, 9]
        """
        n = checked_count("Data.from_fn(n, f)", "n", n, 0)
        stage = f"Data.from_fn({n}, {function_text('Data.from_fn', f, 'i')})"
        return cls._source(nodes.function_node(n, f, stage), stage, n=n, f=f)

    @overload
    @classmethod
    def repeat(cls, n: int, item: Unknown) -> Data[Any]: ...
    @overload
    @classmethod
    def repeat(cls, n: int, item: tuple[A, Loss]) -> Data[tuple[A, Loss]]: ...
    @overload
    @classmethod
    def repeat(cls, n: int, item: U) -> Data[U]: ...
    @classmethod
    def repeat(cls, n: int, item: Any) -> Data[Any]:
        """The same object ``n`` times.

        Examples:
            >>> from kaun import Data
            >>> list(Data.repeat(3, "same"))
            ['same', 'same', 'same']
        """
        n = checked_count("Data.repeat(n, item)", "n", n, 0)
        return cls._source(nodes.repeat_node(n, item), f"Data.repeat({n}, {collate.outline_of(item)})", n=n, item=item)

    @classmethod
    def from_iterable(cls, iterable: Iterable[U] | Callable[[], Iterable[U]]) -> Data[U]:
        """The items of any loader, or of the loader that a function without arguments returns in each pass.

        A stream: no items by index (so no ``shuffle``), ``skip`` pulls what it skips, ``len()`` is what the loader
        says. An iterator, for example a generator, can be iterated once.

        Raises:
            TypeError: If it is neither iterable nor callable, or is a Series or DataFrame of pandas.
            RuntimeError: in iteration, when an iterator is exhausted.

        Examples:
            >>> from kaun import Data
            >>> data = Data.from_iterable(lambda: (x * x for x in range(4)))
            >>> list(data), list(data.take(2))
            ([0, 1, 4, 9], [0, 1])
        """
        if isinstance(iterable, Sources):
            return cast("Data[U]", iterable)
        source = checked_loader("Data.from_iterable", iterable)
        name = type(source).__name__ if hasattr(source, "__iter__") else function_text("Data.from_iterable", source)
        stage = f"Data.from_iterable({name})"
        return cls._source(nodes.loader_node(source, stage), stage, source=source)

    # With pad=True the items of with_loss also have a context, which the type of the arrays does not show.
    @overload
    @classmethod
    def batches(
        cls, arrays: U, batch_size: int, shuffle: bool = False, drop_last: bool = False, *,
        pad: Literal[False] = False, sample_weights: Any = None,
    ) -> Data[U]: ...  # fmt: skip

    @overload
    @classmethod
    def batches(
        cls, arrays: Any, batch_size: int, shuffle: bool = False, drop_last: bool = False, *,
        pad: bool, sample_weights: Any = None,
    ) -> Data[Any]: ...  # fmt: skip

    @classmethod
    def batches(
        cls,
        arrays: Any,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        *,
        pad: bool = False,
        sample_weights: Any = None,
    ) -> Data[Any]:
        """The batches of arrays in memory: each is the same tree, with ``batch_size`` rows of every array.

        NumPy in, NumPy out: read-only views of the arrays when in order, new arrays when shuffled. JAX arrays stay on
        their device.

        Args:
            arrays: NumPy or JAX arrays of one length along axis 0, in any tree: a tuple, a dict, a single array.
            batch_size: The rows of a batch; the last one has what remains.
            shuffle: Whether rows come in a random order, another one in each epoch, as with ``Data.shuffle``. Default
                False. Draws one key from the RNG scope when called.
            drop_last: Whether a last batch that is not full is left out. Default False.
            pad: Whether a last batch that is not full is filled with copies of its last row, so that one program serves
                all batches. Filled rows count nowhere: ``with_loss`` masks them in the loss and adds the context name
                ``row_mask`` (bool [batch_size]), ``evaluate`` leaves them out, and ``predict`` and a loop over the
                items cut them off. Default False.
            sample_weights: The weight of each row in the loss and in metrics, numbers [rows], finite and at least 0.
                The loss and the metrics receive them as ``weights=``. Default: 1.

        Raises:
            TypeError: If a leaf is not an array, or the weights are not numbers.
            ValueError: If lengths differ, an array is a scalar, or there is none; with both ``pad`` and ``drop_last``;
                if a weight is negative or not finite, or all are 0.

        Examples:
            >>> from kaun import Data
            >>> import numpy as np
            >>> data = Data.batches({"x": np.zeros((5, 2)), "y": np.arange(5)}, batch_size=2)
            >>> [(batch["x"].shape, batch["y"].tolist()) for batch in data]
            [((2, 2), [0, 1]), ((2, 2), [2, 3]), ((1, 2), [4])]
        """
        size, drop_last = checked_batch_size("Data.batches", batch_size, shuffle), bool(drop_last)
        rows = collate.ArrayRows("Data.batches", arrays)
        orders = Orders("Data.batches(..., shuffle=True)", rows.length) if shuffle else None
        options = RowOptions.checked("Data.batches", pad, sample_weights, rows.length, drop_last=drop_last)
        node = row_batches_node(rows, size, options, orders or (lambda epoch: None), drop_last=drop_last)
        settings = f"batch_size={size}" + ", shuffle=True" * bool(shuffle) + ", drop_last=True" * drop_last
        text = f"Data.batches({collate.outline_of(arrays)}, {settings}{options.text})"
        given = {"arrays": arrays, "batch_size": size, "drop_last": drop_last, "key": orders and orders.key}
        return cls._source(node, text, **given, **options.given)

    @overload
    @classmethod
    def folds(
        cls, arrays: U, k: int, batch_size: int, shuffle: bool = False, *,
        pad: Literal[False] = False, sample_weights: Any = None,
    ) -> list[tuple[Data[U], Data[U]]]: ...  # fmt: skip

    @overload
    @classmethod
    def folds(
        cls, arrays: Any, k: int, batch_size: int, shuffle: bool = False, *, pad: bool, sample_weights: Any = None
    ) -> list[tuple[Data[Any], Data[Any]]]: ...

    @classmethod
    def folds(
        cls,
        arrays: Any,
        k: int,
        batch_size: int,
        shuffle: bool = False,
        *,
        pad: bool = False,
        sample_weights: Any = None,
    ) -> list[tuple[Data[Any], Data[Any]]]:
        """Pairs of a training and a validation pipeline of batches, for cross-validation: a list of ``k``.

        Each row is in one validation pipeline, and in the training pipelines of all other pairs. Folds differ by at
        most one row. The arrays are not copied.

        Args:
            arrays: NumPy or JAX arrays of one length along axis 0, in any tree, as for ``batches``.
            k: How many folds, from 2 to the number of rows.
            batch_size: The rows of a batch; the last one has what remains.
            shuffle: Whether rows are put into folds at random, and those of a training pipeline come in another random
                order in each epoch. Default False: folds are consecutive rows. Draws one key from the RNG scope.
            pad: As for ``batches``.
            sample_weights: As for ``batches``: each pipeline has those of its rows.

        Raises:
            TypeError: If a leaf is not an array, or the weights are not numbers.
            ValueError: as ``batches``, and when there are fewer rows than folds.
            RuntimeError: with ``shuffle``, inside compiled code.

        Examples:
            >>> import numpy as np
            >>> from kaun import Data
            >>> for train, valid in Data.folds(np.arange(5), k=2, batch_size=4):
            ...     print([batch.tolist() for batch in train], [batch.tolist() for batch in valid])
            [[3, 4]] [[0, 1, 2]]
            [[0, 1, 2]] [[3, 4]]
        """
        size = checked_batch_size("Data.folds", batch_size, shuffle)
        k = checked_count("Data.folds", "k", k, 2, "Write Data.folds(arrays, k=5, batch_size=64).")
        rows = collate.ArrayRows("Data.folds", arrays)
        options = RowOptions.checked("Data.folds", pad, sample_weights, rows.length)
        settings = f"k={k}, batch_size={size}" + ", shuffle=True" * bool(shuffle) + options.text
        text = f"Data.folds({collate.outline_of(arrays)}, {settings})"

        def batches(fold: int, i: int, part: FoldPart) -> Data[Any]:
            node = row_batches_node(rows, size, options, part.order, len(part.rows))
            given = {"arrays": arrays, "k": k, "batch_size": size, "rows": part.rows, "key": part.key, **options.given}
            return cls._source(node, f"{text}[{fold}][{i}]", fold=fold, part=("training", "validation")[i], **given)

        parts = enumerate(fold_rows(rows.length, k, shuffle))
        return [(batches(fold, 0, train), batches(fold, 1, valid)) for fold, (train, valid) in parts]

    @classmethod
    def concat(cls, *sources: Data[U]) -> Data[U]:
        """The items of each pipeline, one pipeline after the other.

        Pass ``e`` is pass ``e`` of each: a shuffle in a source reshuffles in each epoch.

        Raises:
            TypeError: If a source is not a ``Data``.
            ValueError: If there is none.

        Examples:
            >>> from kaun import Data
            >>> list(Data.concat(Data.from_items([1, 2]), Data.from_items([3])))
            [1, 2, 3]
        """
        checked_pipelines("Data.concat(*sources)", sources, Sources)
        return cls._combined(combine.concat_node([s._node for s in sources]), _text("concat", sources), sources)

    @overload
    @classmethod
    def zip(cls, a: Data[A], b: Data[B], /) -> Data[tuple[A, B]]: ...

    @overload
    @classmethod
    def zip(cls, a: Data[A], b: Data[B], c: Data[C], /) -> Data[tuple[A, B, C]]: ...

    @overload
    @classmethod
    def zip(cls, *sources: Data[U]) -> Data[tuple[U, ...]]: ...

    @classmethod
    def zip(cls, *sources: Data[Any]) -> Data[Any]:
        """Tuples of the items of each pipeline: item ``i`` holds item ``i`` of each.

        Pass ``e`` is pass ``e`` of each. Sources that are shuffled each have their own order: zip first, then shuffle.

        Raises:
            TypeError: If a source is not a ``Data``.
            ValueError: If there is none, or lengths differ; of streams in iteration.

        Examples:
            >>> from kaun import Data
            >>> list(Data.zip(Data.from_items([1, 2]), Data.from_items("ab")))
            [(1, 'a'), (2, 'b')]
        """
        checked_pipelines("Data.zip(*sources)", sources, Sources)
        if any(source._node.rows for source in sources):
            fix = "Zip the arrays in place of the pipelines: Data.batches((x, y, z), batch_size, pad=True)"
            raise loses_rows("Data.zip(*sources)", frozenset[str]().union(*(s._node.rows for s in sources)), fix)
        lengths = [s._node.length or 0 for s in sources if s._node.seekable]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"Data.zip(*sources) expected sources of the same length, received lengths "
                f"{', '.join(map(str, lengths))}. Take as many of each: source.take({min(lengths)})."
            )
        text = _text("zip", sources)
        return cls._combined(combine.zip_node([s._node for s in sources], text), text, sources)

    @classmethod
    def mix(cls, sources: Sequence[Data[U]], weights: Sequence[float] | np.ndarray[Any, Any]) -> Data[U]:
        """Items of several pipelines, the source of each drawn by weight. Draws one key from the RNG scope when called.

        The source of item ``i`` is a function of the key and ``i``, the same in each pass. The items of a source come
        in its order, and pass ``e`` has those of pass ``e``. A pass ends where the drawn source has no item left: give
        a small source more passes, ``Data.mix([large, small.epochs(10)], [0.5, 0.5])``.

        Args:
            sources: The pipelines.
            weights: A number for each source, finite and at least 0; they need not add up to 1.

        Raises:
            TypeError: If a source is not a ``Data``, or weights are not numbers.
            ValueError: If there is no source, not one weight for each, one is negative or not finite, or all are 0.
            RuntimeError: If it is called inside compiled code.

        Examples:
            >>> from kaun import Data, rng
            >>> with rng.scope(0):
            ...     data = Data.mix([Data.repeat(900, "a"), Data.repeat(900, "b")], weights=[0.7, 0.3])
            >>> items = list(data)
            >>> items == list(data), round(items.count("a") / len(items), 1)
            (True, 0.7)
        """
        held = tuple(sources)
        checked_pipelines("Data.mix(sources, weights)", held, Sources)
        checked = checked_weights("Data.mix(sources, weights)", weights, len(held), "source")
        draws = Draws("Data.mix(sources, weights)", checked)
        text = _text("mix", held, checked.tolist())
        node = combine.mix_node([s._node for s in held], draws)
        return cls._combined(node, text, held, weights=checked, key=draws.key)


def _text(verb: str, sources: Sequence[Data[Any]], weights: list[float] | None = None) -> str:
    """A pipeline of several as it prints."""
    inside = ", ".join(map(repr, sources))
    return f"Data.{verb}({inside})" if weights is None else f"Data.{verb}([{inside}], {weights})"
