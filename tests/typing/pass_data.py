"""The type of a pipeline's items flows through its stages."""

from collections.abc import Iterator
from typing import Any, assert_type

import jax
import numpy as np

from kaun import Data

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

pairs = Data.from_arrays(np.zeros((4, 2), np.float32), np.zeros(4, np.int32))
for x, y in pairs.batch(2):
    shapes = (x.shape, y.shape)
