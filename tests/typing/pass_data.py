"""The type of a pipeline's items flows through its stages."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np

from kaun import Context, Data, losses

Loss = Callable[[Any], Any]

Table = dict[str, np.ndarray[Any, Any]]

words = Data.from_items(["a", "bc", "def"])
assert_type(words, Data[str])
assert_type(words.map(len), Data[int])
assert_type(words.map(lambda w: (w, len(w))), Data[tuple[str, int]])
assert_type(words.shuffle().skip(1).take(1).prefetch(2), Data[str])
assert_type(words.epochs(3), Data[str])
assert_type(words.random_map(lambda key, word: (key, len(word))), Data[tuple[jax.Array, int]])
assert_type(words.epoch(1), Data[str])
assert_type(words.map_batch(2, len), Data[int])
assert_type(Data.from_fn(3, lambda i: i * 0.5), Data[float])
assert_type(Data.repeat(3, "x"), Data[str])
assert_type(Data.from_iterable(range(3)), Data[int])

lengths = words.map(len)
assert_type(Data.concat(words, words.shuffle()), Data[str])
assert_type(Data.mix([words, words], [0.5, 0.5]), Data[str])
assert_type(Data.zip(words, lengths), Data[tuple[str, int]])
assert_type(Data.zip(words, lengths, words), Data[tuple[str, int, str]])
assert_type(Data.zip(words, words, words, words), Data[tuple[str, ...]])
assert_type(words.filter(lambda word: word != "a"), Data[str])
assert_type(words.sample([1, 2, 3], 10), Data[str])
assert_type(words.sample(np.ones(3), 10), Data[str])
table: Table = {"x": np.zeros(4)}
assert_type(Data.folds(table, 2, 2), list[tuple[Data[Table], Data[Table]]])


def first(data: Data[str]) -> str:
    return next(iter(data))


assert_type(iter(words), Iterator[str])
size: int = len(words)

# Rows of JAX arrays are JAX arrays, and those of NumPy arrays may be scalars.
matrix = jnp.zeros((4, 2))
labels: jax.Array = jnp.zeros(4, jnp.int32)
unknown: Any = matrix
assert_type(Data.from_arrays(matrix), Data[jax.Array])
assert_type(Data.from_arrays(matrix, labels), Data[tuple[jax.Array, jax.Array]])
assert_type(Data.from_arrays(unknown), Data[Any])
assert_type(Data.from_arrays(unknown, unknown), Data[tuple[Any, Any]])
assert_type(Data.from_arrays(table), Data[Any])
assert_type(Data.from_arrays(matrix, table, labels), Data[tuple[Any, Any, Any]])
assert_type(Data.from_arrays(matrix, labels, matrix, labels), Data[tuple[Any, Any, Any, Any]])
assert_type(Data.from_arrays(matrix, labels, matrix, labels, matrix), Data[Any])

# A loss in place of labels.
batches = Data.batches((matrix, labels), 2)
assert_type(batches, Data[tuple[jax.Array, jax.Array]])
assert_type(Data.batches((matrix, labels), 2, sample_weights=[1, 2, 3, 4]), Data[tuple[jax.Array, jax.Array]])
paired: Data[tuple[jax.Array, Loss]] = batches.with_loss(losses.cross_entropy_sparse)
for image, loss_of_image in paired:
    assert_type((image, loss_of_image), tuple[jax.Array, Loss])
paired = batches.with_loss(lambda output, y: losses.mse(output, y)).epochs(2)
paired = batches.with_loss(functools.partial(losses.huber, delta=0.1))
with_context = batches.map(lambda b: (b[0], b[1], Context(mask=b[1])))
three: Data[tuple[jax.Array, Loss, Context]] = with_context.with_loss(losses.mse)
untyped: Data[Any] = batches
assert_type(untyped.with_loss(losses.mse), Data[Any])
rows_of_table = Data.batches(table, 2).map(lambda b: (b["x"], b["x"]))
of_numpy: Data[tuple[np.ndarray[Any, Any], Loss]] = rows_of_table.with_loss(losses.mse).epoch(1).take(1).skip(0)


def masked(output: jax.Array, y: jax.Array, *, where: jax.Array) -> losses.Mean:
    return losses.cross_entropy_sparse.parts(output, y, where=where)


# The items of a padded pipeline have a context more.
padded = Data.batches((matrix, labels), 2, pad=True)
for x, loss, ctx in padded.with_loss(masked):
    assert_type(loss(x), Any)
    assert ctx["row_mask"].shape == (2,)
assert padded.padding == (4, 0, 0, 0)
tokens = Data.from_items([(np.arange(3), 1), (np.arange(2), 0)])
assert_type(tokens.bucket(lambda row: len(row[0]), [2, 4], 2), Data[Any])
assert_type(tokens.bucket([3, 2], edges=(2, 4), batch_size=2).with_loss(losses.mse), Data[Any])
assert_type(Data.folds(table, 2, 2, pad=True), list[tuple[Data[Any], Data[Any]]])

pairs = Data.from_arrays(np.zeros((4, 2), np.float32), np.zeros(4, np.int32))
for x, y in pairs.batch(2):
    shapes = (x.shape, y.shape)

# A loss without annotations, in items that have a name; and results that are Any.
repeated = Data.repeat(3, (matrix, lambda output: losses.mse(output, matrix)))
closures = Data.batches((matrix, labels), 2).map(lambda b: (b[0], lambda output: losses.mse(output, b[1])))
first_inputs: list[jax.Array] = [x for data in (repeated, closures) for x, _ in data]


def anything(item: Any) -> Any:
    return item


assert_type(words.map(anything), Data[Any])
assert_type(words.map(lambda word: (word, anything(word))), Data[tuple[str, Any]])
assert_type(Data.repeat(3, unknown), Data[Any])
