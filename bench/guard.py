"""Measure what the guard against steps that are not finite costs: ``python -m bench.guard mlp cnn gpt adam50m``.

Trainers of all modes run in turn in one process: "raise" and "skip" look at loss, gradient and update, and discard a
step that is not finite, "ignore" takes the norm of the gradient alone, and "bare" takes no norm. Printed are the
medians, and the ratios to "bare" within each round.
"""

import contextlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax

import kaun
from bench.runners import by_kaun
from bench.workloads import WORKLOADS
from kaun import rng
from kaun._step import step

KINDS = {"raise": "raise", "skip": "skip", "ignore": "ignore", "bare": "ignore"}


@contextlib.contextmanager
def bare():
    """Inside, steps are traced without the norm of the gradient."""
    checks_of = step.checks_of
    step.checks_of = lambda gradient, *_: jnp.zeros(len(jax.tree.leaves(gradient)), jnp.float32)
    try:
        yield
    finally:
        step.checks_of = checks_of


def measure(name: str, rounds: int) -> dict[str, list[float]]:
    workload = WORKLOADS[name]
    model, vars = by_kaun.own(workload)
    data = by_kaun.items(workload, *workload.data())
    trainers = {}
    for kind, mode in KINDS.items():
        with rng.scope(0):
            trainer = kaun.Trainer(model=model, optimizer=optax.adam(workload.rate), on_nonfinite=mode)
            state = trainer.make_state(vars)
        with bare() if kind == "bare" else contextlib.nullcontext():
            jax.block_until_ready(trainer.fit(state, data).vars)
        trainers[kind] = trainer, state
    found = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, (trainer, state) in trainers.items():
            start = time.perf_counter()
            jax.block_until_ready(trainer.fit(state, data).vars)
            found[kind].append((time.perf_counter() - start) / workload.steps)
    return found


def main(arguments: list[str]) -> None:
    rounds = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 15
    for name in arguments or ["mlp", "cnn", "gpt", "adam50m"]:
        found = measure(name, rounds if WORKLOADS[name].steps > 10 else max(3, rounds // 3))
        for kind, seconds in found.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, found["bare"], strict=True))
            print(f"{name:8} {kind:7} {statistics.median(seconds) * 1e3:9.4f} ms  {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
