"""The time of a step on 1, 2, 4 and 8 simulated devices, beside hand-written loops: ``python -m bench.scale``.

The hand-written loop is ``jax.jit`` with the placements of its results, donated arguments, the gradient's norm as a
result, and ``jax.device_put`` of each batch. It does not read the loss, but waits for the step before the last one, as
kaun does: on simulated devices a longer queue of programs with collectives can fill XLA's pool of threads with devices
that wait for others, which then never run. ``control`` is the same loop once more: what its ratio differs from 1 is the
noise of the machine. ``fit`` and ``step`` are kaun's.

For each number of devices one process runs all loops in turn. Printed are medians over the rounds: the time of a step,
and ratios to the hand-written loop within a round, of the wall time and, after the slash, of the CPU time of all
threads, which other programs on the machine change less. In ``blocks`` the batches are small, and ``fit`` runs many
steps in one dispatch; in ``single`` a batch has more than 1 MiB, and each step is a dispatch.

Simulated devices share the cores of the machine: the times say what a loop adds to its program, and not what a program
gains from devices.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, reports, rng, sharding

ROOT = Path(__file__).resolve().parent.parent
DEVICES = "1,2,4,8"
LOOPS = ("control", "fit", "step")
TOLERANCE = 1e-4  # of the losses after a pass, relative

Run = Callable[..., Any]
Times = dict[str, list[tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Task:
    """The rows of a batch, the steps of a pass, and the widths of the dense layers, from input to output."""

    rows: int
    steps: int
    widths: tuple[int, ...] = (256, 256, 256, 8)


TASKS = {"blocks": Task(128, 96), "single": Task(2048, 12)}
QUICK = {"blocks": Task(128, 16), "single": Task(2048, 4)}
KINDS = {"data parallel": sharding.data_parallel, "fsdp": lambda: sharding.fsdp(min_size=1024)}


class LastLoss(reports.Report):
    """Keeps the loss of the last step, as a report that waits for no step."""

    def wants(self, step: int) -> bool:
        return False

    def block(self, first: int, values: Any) -> None:
        self.loss = values["loss"][-1]


def loops_of(task: Task, where: sharding.Sharding | None) -> dict[str, Run]:
    """The loops, on one device without a placement; each trains from the same state, and returns the last loss.

    They may be given the number of steps, if not all.
    """
    g = np.random.default_rng(0)
    x = g.normal(size=(task.steps * task.rows, task.widths[0])).astype(np.float32)
    y = g.integers(0, task.widths[-1], task.steps * task.rows).astype(np.int32)
    optimizer = optax.adam(1e-3)
    parts = [part for a, b in itertools.pairwise(task.widths) for part in (layers.linear(a, b), layers.relu())]
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.sequential(parts[:-1]), optimizer=optimizer, sharding=where)
        state = trainer.init()
    data = Data.batches((x, y), task.rows).with_loss(losses.cross_entropy_sparse)

    def fit(steps: int = task.steps) -> Any:
        report = LastLoss()
        trainer.fit(state, data if steps == task.steps else data.take(steps), report=report)
        return report.loss

    def step(steps: int = task.steps) -> Any:
        now, waiting = state, []
        for item, loss in itertools.islice(data, steps):
            value, now = trainer.step(now, item, loss=loss)
            wait(waiting, value)
        return value

    hand = by_hand(task, where, optimizer, state, x, y)
    return {"hand": hand, "control": hand, "fit": fit, "step": step}


def by_hand(task: Task, where: sharding.Sharding | None, optimizer: Any, state: Any, x: Any, y: Any) -> Run:
    def forward(params: Any, x: Any) -> Any:
        *hidden, last = (layer for layer in params if layer)
        for layer in hidden:
            x = jax.nn.relu(x @ layer["weight"] + layer["bias"])
        return x @ last["weight"] + last["bias"]

    def objective(params: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y).mean()

    def update(params: Any, opt_state: Any, x: Any, y: Any) -> Any:
        value, gradient = jax.value_and_grad(objective)(params, x, y)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value, optax.global_norm(gradient)

    out = None
    if where is not None:
        placed = where.of(state)
        out = placed.vars.params, placed.opt_state, where.replicated, where.replicated
    compiled = jax.jit(update, donate_argnums=(0, 1), out_shardings=out)

    def run(steps: int = task.steps) -> Any:
        params, opt_state = jax.tree.map(lambda a: a.copy(), (state.vars.params, state.opt_state))
        waiting: list[Any] = []
        for i in range(steps):
            rows = slice(i * task.rows, (i + 1) * task.rows)
            batch = (x[rows], y[rows]) if where is None else jax.device_put((x[rows], y[rows]), where.spread)
            params, opt_state, value, _ = compiled(params, opt_state, *batch)
            wait(waiting, value)
        return value

    return run


def wait(waiting: list[Any], value: Any) -> None:
    waiting.append(value)
    if len(waiting) > 2:
        waiting.pop(0).block_until_ready()


def measure(task: Task, kind: str, rounds: int) -> Times:
    """Seconds a step of each loop in each round, of the wall and of the CPU. The first round compiles."""
    loops, ends = loops_of(task, KINDS[kind]()), {}
    found: Times = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name in list(loops)[:: 1 if number % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            ends[name] = float(loops[name]())
            spent = time.perf_counter() - wall, time.process_time() - cpu
            if number:
                found[name].append((spent[0] / task.steps, spent[1] / task.steps))
    if max(ends.values()) - min(ends.values()) > TOLERANCE * max(ends.values()):
        raise SystemExit(f"{kind}: these loops did not train the same model on the same batches: {ends}")
    return found


def in_process(name: str, kind: str, devices: str, options: argparse.Namespace) -> Times:
    """What ``measure`` finds in a process with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    command = [sys.executable, "-m", "bench.scale", "--one", f"{name}/{kind}", "--rounds", str(options.rounds)]
    command += ["--quick"] * options.quick
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, {kind}, {devices} devices failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio(found: Times, name: str, i: int) -> float:
    """The median ratio of a loop to the hand-written one within a round, of the wall (0) or the CPU time (1)."""
    return statistics.median(a[i] / b[i] for a, b in zip(found[name], found["hand"], strict=True))


def line(cells: list[str], found: Times) -> str:
    """A row of the table."""
    middle = lambda name: f"{statistics.median(wall for wall, _ in found[name]) * 1e6:,.0f} us"
    ratios = [f"{ratio(found, name, 0):.2f} / {ratio(found, name, 1):.2f}" for name in LOOPS]
    return "| " + " | ".join([*cells, middle("hand"), middle("fit"), *ratios]) + " |"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, three rounds")
    parser.add_argument("--rounds", type=int, help="default 15")
    parser.add_argument("--devices", default=DEVICES, help=f"with commas, default {DEVICES}")
    parser.add_argument("--only", default=",".join(TASKS), help=f"with commas: {', '.join(TASKS)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.rounds = options.rounds or (3 if options.quick else 15)
    if options.one:
        name, kind = options.one.split("/")
        print(json.dumps(measure((QUICK if options.quick else TASKS)[name], kind, options.rounds)))
        return
    head = ["batches", "placement", "devices", "by hand", "fit", *LOOPS]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for name in options.only.split(","):
        for kind in KINDS:
            for devices in options.devices.split(","):
                print(line([name, kind, devices], in_process(name, kind, devices, options)), flush=True)


if __name__ == "__main__":
    main()
