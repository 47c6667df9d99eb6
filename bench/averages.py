"""Measure what an average of the weights costs a step: ``python -m bench.averages mlp adam50m``.

Trainers with and without an average run in turn in one process. Printed are the medians of the CPU time of all threads,
which other programs on the machine change less than the wall time, and the ratios to the trainer without within each
round. A fit copies its state once, so a pass is five times as long as in the other measurements.
"""

import dataclasses
import statistics
import sys
import time

import jax
import optax

import kaun
from bench.runners import by_kaun
from bench.workloads import WORKLOADS
from kaun import averages, rng

KINDS = {"none": None, "ema": averages.ema(0.999), "swa": averages.swa(start=10, every=10)}


def measure(name: str, rounds: int) -> dict[str, list[float]]:
    workload = dataclasses.replace(WORKLOADS[name], steps=5 * WORKLOADS[name].steps)
    model, vars = by_kaun.own(workload)
    data = by_kaun.items(workload, *workload.data())
    trainers = {}
    for kind, average in KINDS.items():
        with rng.scope(0):
            trainer = kaun.Trainer(model=model, optimizer=optax.adam(workload.rate), average=average)
            state = trainer.make_state(vars)
        jax.block_until_ready(trainer.fit(state, data).vars)
        trainers[kind] = trainer, state
    found = {kind: [] for kind in KINDS}
    for number in range(rounds):
        order = list(trainers.items())
        for kind, (trainer, state) in order if number % 2 else reversed(order):
            start = time.process_time()
            jax.block_until_ready(trainer.fit(state, data).vars)
            found[kind].append((time.process_time() - start) / workload.steps)
    return found


def main(arguments: list[str]) -> None:
    rounds = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 15
    for name in arguments or ["mlp"]:
        found = measure(name, rounds if WORKLOADS[name].steps > 10 else max(3, rounds // 3))
        for kind, seconds in found.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, found["none"], strict=True))
            print(f"{name:8} {kind:5} {statistics.median(seconds) * 1e3:9.4f} ms  {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
