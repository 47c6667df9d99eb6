"""Pipelines in several processes."""

import warnings

import jax
import numpy as np

from kaun import Data, _processes, rng, sharding, tree

N = 23
X, Y = np.arange(2.0 * N, dtype=np.float32).reshape(N, 2), np.arange(N)
LENGTHS = np.arange(N) % 4 + 1


def pipelines(load=lambda i: (X[i], Y[i])):
    with rng.scope(0):
        return {
            "shuffled": Data.batches((X, Y), 8, shuffle=True).epochs(2),
            "weighted": Data.batches((X, Y), 8, shuffle=True, pad=True, sample_weights=np.arange(N)),
            "rows": Data.from_fn(N, load).shuffle().batch(8),
            "augmented": Data.from_fn(16, load)
            .random_map(lambda key, row: (row[0] + jax.random.uniform(key), row[1]))
            .batch(4),
            "bucket": Data.from_fn(N, lambda i: (np.arange(LENGTHS[i]), Y[i])).bucket(LENGTHS, [2, 4], 4).shuffle(),
            "keys": Data.batches((X[:8], jax.random.split(jax.random.key(0), 8)), 4),
        }


def host(item):
    data = lambda leaf: jax.random.key_data(leaf) if tree.is_key(leaf) else leaf
    return jax.tree.map(lambda leaf: tree.on_host(data(leaf)), jax.tree.leaves(item))


def whole_items():
    """The items of each pipeline, as NumPy arrays."""
    return {name: [host(item) for item in data] for name, data in pipelines().items()}


def assembled_items():
    """The same, of global arrays; how many rows this process has of each item, and how many calls read a row."""
    s, read = sharding.data_parallel(), []
    found, own = {}, {}
    for name, data in pipelines(lambda i: read.append(i) or (X[i], Y[i])).items():
        read.clear()
        items = list(data.local(s).map(lambda batch: batch).assemble(s).prefetch(2))
        found[name] = [host(item) for item in items]
        own[name] = [sum(len(p.data) for p in jax.tree.leaves(item)[0].addressable_shards) for item in items], len(read)
    return found, own


def split_loader():
    """Batches of 8 rows of a loader that gives each process its half; and one whose rows the devices do not divide."""
    s = sharding.data_parallel()
    half = slice(4 * jax.process_index(), 4 * jax.process_index() + 4)
    items = list(Data.from_iterable(lambda: (X[8 * i : 8 * i + 8][half] for i in range(2))).assemble(s))
    try:
        list(Data.from_iterable([X[:3]]).assemble(s))
    except ValueError as error:
        return [tree.on_host(item) for item in items], str(error)


def compared(split, same):
    """The first item of a pipeline without local, the same in both processes or not; and a warning, if there is one."""
    x = X[:8] + (0 if same else jax.process_index())
    data = Data.from_iterable(lambda: iter([x])) if split else Data.batches(x, 8)
    channel = _processes.Channel(f"compared {split} {same}")
    if jax.process_index():  # after the first, which learns of nothing
        channel.exchange("", repr)
    with warnings.catch_warnings(record=True) as caught:
        try:
            return [item.shape for item in data.assemble(sharding.data_parallel())], [str(w.message) for w in caught]
        finally:
            if not jax.process_index():
                channel.exchange("", repr)
