"""Measure what the options for fine-tuning save: `python -m bench.finetuning [rounds]`.

One process; the trainers of a table take their steps in turn. Time is the median of a step, and the median ratio to the
first trainer's within each round. Memory is XLA's: the state in, and the temporaries of one compiled step.
"""

import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, rng

WIDTH, DEPTH, LENGTH, STEPS = 256, 6, 64, 3


def transformer() -> Any:
    """Six blocks of width 256 (4.7M parameters), and a head of two classes for each position."""

    def block() -> Any:
        attend = layers.layer_norm(WIDTH) >> layers.multi_head_attention(WIDTH, 4, is_causal=True)
        widen = [layers.layer_norm(WIDTH), layers.linear(WIDTH, 4 * WIDTH), layers.gelu()]
        return layers.residual(attend) >> layers.residual(layers.sequential([*widen, layers.linear(4 * WIDTH, WIDTH)]))

    return layers.sequential([*(block() for _ in range(DEPTH)), layers.linear(WIDTH, 2)])


def perceptron() -> Any:
    """Twelve layers of width 512."""
    return layers.sequential([part for _ in range(12) for part in (layers.linear(512, 512), layers.gelu())])


def tables() -> dict[str, tuple[Any, tuple[int, ...], Any, dict[str, dict[str, Any]]]]:
    """By name: the model, the shape of a batch, its loss, and the trainers' options."""
    last = f"{DEPTH}."
    labels = np.random.default_rng(1).integers(0, 2, (16, LENGTH))
    return {
        "freezing, transformer": (
            transformer(), (16, LENGTH, WIDTH), lambda out: losses.cross_entropy_sparse(out, labels),
            {
                "all": {},
                "last block and head": {"trainable": lambda path: path.startswith((last, f"{DEPTH - 1}."))},
                "head": {"trainable": lambda path: path.startswith(last)},
            },
        ),
        "microbatches, perceptron": (
            perceptron(), (2048, 512), lambda out: (out**2).mean(),
            {"1 part": {}, **{f"{n} parts": {"microbatches": n} for n in (2, 4, 8)}},
        ),
        "precision, perceptron": (
            perceptron(), (512, 512), lambda out: (out**2).mean(),
            {"float32": {}, "mixed_bfloat16": {"precision": "mixed_bfloat16"}},
        ),
    }  # fmt: skip


def measure(model: Any, shape: tuple[int, ...], loss: Any, options: dict[str, Any], rounds: int) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    data, runs, found = Data.repeat(STEPS, (x, loss)), {}, {}
    for name, given in options.items():
        with rng.scope(0):
            trainer = kaun.Trainer(model=model, optimizer=optax.adam(1e-3), **given)
            state = trainer.init(dtype=jnp.float32)
        jax.block_until_ready(trainer.fit(state, data).vars)
        runs[name], found[name] = (trainer, state), []
    for _ in range(rounds):
        for name, (trainer, state) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(trainer.fit(state, data).vars)
            found[name].append((time.perf_counter() - start) / STEPS)
    first = found[next(iter(options))]
    for name, (trainer, _) in runs.items():
        summary = kaun.summary(trainer, x, loss)
        ratio = statistics.median(a / b for a, b in zip(found[name], first, strict=True))
        print(
            f"  {name:20} {statistics.median(found[name]) * 1e3:8.1f} ms {ratio:6.2f}"
            f"   parameters {summary.bytes / 1e6:5.1f} MB   optimizer {summary.optimizer_bytes / 1e6:5.1f} MB"
            f"   temporaries {summary.cost.temporaries / 1e6:6.1f} MB",
            flush=True,
        )


def main(arguments: list[str]) -> None:
    rounds = int(arguments[0]) if arguments else 5
    for name, table in tables().items():
        print(name, flush=True)
        measure(*table, rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
