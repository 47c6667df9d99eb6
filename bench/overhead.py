"""What kaun's loop costs: microseconds per step beside hand-written jitted and donated optax loops.

    python bench/overhead.py            prints the table and writes docs/performance.md
    python bench/overhead.py --quick    fewer rounds, prints only

Rounds of all runners are interleaved in one process, so that a slow moment of the machine hits them alike; what is
reported is the median of the ratios within a round. Every runner starts from the same weights and sees the same
batches; their final losses are compared before anything is timed.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, layers, lift, losses, reports, rng

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"


def xor():
    """2-4-1, a batch of 4, the same each step."""
    x = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]], jnp.float32)
    y = jnp.array([[0], [1], [1], [0]], jnp.float32)
    steps = 2000
    with rng.scope(0):
        model = layers.sequential([layers.linear(2, 4), layers.tanh(), layers.linear(4, 1)])
    data = Data.repeat(steps, (x, lambda out: losses.binary_cross_entropy(out, y)))

    def forward(params, x):
        hidden = jnp.tanh(x @ params[0]["weight"] + params[0]["bias"])
        return hidden @ params[2]["weight"] + params[2]["bias"]

    loss = lambda out, y: optax.sigmoid_binary_cross_entropy(out, y).mean()
    return model, data, forward, loss, lambda: ((x, y) for _ in range(steps)), steps


def mlp():
    """784-256-128-10, batches of 128 out of 6,400 shuffled host arrays."""
    g = np.random.default_rng(0)
    images = g.normal(size=(6400, 784)).astype(np.float32)
    labels = g.integers(0, 10, 6400).astype(np.int32)
    with rng.scope(0):
        parts = [layers.linear(784, 256), layers.relu(), layers.linear(256, 128), layers.relu(), layers.linear(128, 10)]
        model = layers.sequential(parts)
        batches = Data.batches((images, labels), batch_size=128, shuffle=True)
    with rng.scope(0):
        order = np.concatenate(list(Data.batches(np.arange(6400), batch_size=128, shuffle=True)))
    data = batches.with_loss(losses.cross_entropy_sparse)

    def forward(params, x):
        x = jax.nn.relu(x @ params[0]["weight"] + params[0]["bias"])
        x = jax.nn.relu(x @ params[2]["weight"] + params[2]["bias"])
        return x @ params[4]["weight"] + params[4]["bias"]

    loss = lambda out, y: optax.softmax_cross_entropy_with_integer_labels(out, y).mean()

    def items():
        for start in range(0, 6400, 128):
            index = order[start : start + 128]
            yield images[index], labels[index]

    return model, data, forward, loss, items, 50


def runners(workload):
    """Functions that train over the whole data once and give the last loss, by name; and the number of steps."""
    model, data, forward, loss, items, steps = workload()
    trainer = kaun.Trainer(model=model, optimizer=optax.adam(1e-2))
    with rng.scope(1):
        start = trainer.init()

    def step(params, opt_state, x, y):
        value, gradient = jax.value_and_grad(lambda p: loss(forward(p, x), y))(params)
        updates, opt_state = trainer.optimizer.update(gradient, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    donated = jax.jit(step, donate_argnums=(0, 1))

    def by_hand(sync):
        params, opt_state = jax.tree.map(jnp.copy, (start.vars.params, start.opt_state))
        for x, y in items():
            value, params, opt_state = donated(params, opt_state, x, y)
            if sync:
                float(value)
        jax.block_until_ready(params)
        return float(value)

    def by_kaun(make):
        last = []
        report = make(lambda step, loss, state: last.append(loss))
        jax.block_until_ready(trainer.fit(start, data, report=report).vars)
        return last[-1] if last else None

    table = {
        "by hand, no sync": lambda: by_hand(False),
        "by hand, float(loss) each step": lambda: by_hand(True),
        "kaun, no report": lambda: by_kaun(lambda f: None),
        "kaun, every(100)": lambda: by_kaun(lambda f: reports.every(100, f)),
        "kaun, report each step": lambda: by_kaun(lambda f: f),
    }
    values = [v for v in (run() for run in table.values()) if v is not None]
    if not np.allclose(values, values[0], rtol=1e-3):
        raise SystemExit(f"{workload.__name__}: the runners disagree, {values}")
    return table, steps


def measure(table, steps, rounds):
    """Microseconds per step of each runner in each round, rounds interleaved."""
    times = {name: [] for name in table}
    for _ in range(rounds):
        for name, run in table.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / steps * 1e6)
    return times


def apart(count=1000):
    """The median microseconds of taking apart a fresh closure, over `count` of them."""
    def make(y):
        return lambda out: losses.cross_entropy_sparse(out, y)

    fresh = [make(jnp.zeros(4, jnp.int32)) for _ in range(count)]
    times = []
    for loss in fresh:
        start = time.perf_counter()
        lift.take_apart(loss)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def rows(times):
    unsynced, synced = times["by hand, no sync"], times["by hand, float(loss) each step"]
    for name, found in times.items():
        one = statistics.median(a / b for a, b in zip(found, unsynced, strict=True))
        other = statistics.median(a / b for a, b in zip(found, synced, strict=True))
        yield f"| {name} | {statistics.median(found):.1f} | {one:.2f} | {other:.2f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    lines = []
    for workload in (xor, mlp):
        table, steps = runners(workload)
        times = measure(table, steps, 3 if quick else 21)
        lines += ["", f"**{workload.__name__}**: {workload.__doc__}", ""]
        lines += ["| loop | us per step | to unsynced | to synced |", "|---|---|---|---|", *rows(times)]
    lines += ["", f"Taking a fresh closure apart: {apart():.1f} us (median of 1,000)."]
    print("\n".join(lines))
    if not quick:
        write(lines)


def write(lines):
    about = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in about if "model name" in line), "unknown processor")
    head = [
        "# Performance",
        "",
        "What the loop costs, measured beside the loops that one would write by hand with `jax.jit`,",
        "`donate_argnums` and optax. Made by `make bench`, which writes this page; figures are medians over",
        "interleaved rounds, ratios are medians of the ratios within a round.",
        "",
        f"Machine: {os.cpu_count()} cores, {platform.machine()}, {cpu}; Python {platform.python_version()}, "
        f"JAX {jax.__version__}, optax {optax.__version__}, NumPy {np.__version__}.",
    ]
    PAGE.write_text("\n".join(head + lines) + "\n")


if __name__ == "__main__":
    main()
