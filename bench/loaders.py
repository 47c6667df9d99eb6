"""Measure `fit` over loaders of other libraries against loops written by hand: ``python -m bench.loaders [rounds]``.

Needs torch and grain (the environment of `make test-interop`). Both sides iterate the same loader and train the same
network with optax, in turn in one process. The loop by hand waits for nothing, as `fit` without a report does. Printed
are medians of the time of one step by the clock, and of the ratios within a round by the CPU and by the clock; the bar
is 1.05.
"""

import functools
import statistics
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import kaun
from kaun import Data, layers, losses, rng

BATCH, STEPS = 128, 100


class Rows:
    """The rows of two arrays, as grain and PyTorch read them."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def loaders(x, y):
    """By name: a loader, and how its batches become arrays by hand."""
    tensors = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    yield (
        "torch DataLoader",
        torch.utils.data.DataLoader(tensors, batch_size=BATCH),
        lambda b: (b[0].numpy(), b[1].numpy()),
    )
    source = grain.MapDataset.source(Rows(x, y)).seed(0).shuffle().batch(BATCH)
    yield "grain MapDataset", source, lambda b: b
    reader = source.to_iter_dataset(grain.ReadOptions(num_threads=0))
    yield "grain IterDataset", reader, lambda b: b


def sides(width, loader, arrays):
    """A pass of `fit` over the loader, and one by hand."""
    optimizer = optax.adam(1e-4)
    with rng.scope(0):
        model = layers.sequential([layers.linear(width, 128), layers.relu(), layers.linear(128, 10)])
        trainer = kaun.Trainer(model=model, optimizer=optimizer)
        state = trainer.init()
    data = Data.from_iterable(loader).with_loss(losses.cross_entropy_sparse)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, x, y):
        def loss(params):
            logits = model.apply(state.vars.replace(params=params), x, training=True, ctx=kaun.Context())[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def by_hand():
        params = jax.tree.map(jnp.copy, state.vars.params)
        opt_state = optimizer.init(params)
        for batch in loader:
            params, opt_state, _ = step(params, opt_state, *arrays(batch))
        return jax.block_until_ready(params)

    def by_kaun():
        return jax.block_until_ready(trainer.fit(state, data).vars.params)

    for one, other in zip(jax.tree.leaves(by_kaun()), jax.tree.leaves(by_hand()), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    return by_kaun, by_hand


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """By width and loader: the microseconds of a step by kaun and by hand, and the ratios of CPU and clock."""
    found, draw = {}, np.random.default_rng(0)
    for width in (16, 784):
        x = draw.normal(size=(BATCH * STEPS, width)).astype(np.float32)
        y = draw.integers(0, 10, BATCH * STEPS).astype(np.int32)
        for name, loader, arrays in loaders(x, y):
            row = found[f"{name}, rows of {width}"] = compare(*sides(width, loader, arrays), rounds)
            print(
                f"{width:4} {name:18} kaun {row['kaun']:7.1f} us  by hand {row['hand']:7.1f} us  "
                f"CPU {row['CPU']:.2f}  clock {row['ratio']:.2f}",
                flush=True,
            )
    return found


def compare(by_kaun, by_hand, rounds: int) -> dict[str, float]:
    measured = []
    for i in range(rounds + 1):
        times = {}
        for run in (by_kaun, by_hand) if i % 2 else (by_hand, by_kaun):
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            times[run] = time.process_time() - cpu, time.perf_counter() - wall
        measured.append([side[clock] / STEPS * 1e6 for clock in (0, 1) for side in (times[by_kaun], times[by_hand])])
    medians = [statistics.median(column) for column in zip(*measured[1:], strict=True)]
    cpu, wall = (statistics.median(row[i] / row[i + 1] for row in measured[1:]) for i in (0, 2))
    return {"kaun": medians[2], "hand": medians[3], "CPU": cpu, "ratio": wall}


if __name__ == "__main__":
    measure(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
