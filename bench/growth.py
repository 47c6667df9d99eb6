"""How time and memory grow with width, depth, batch and devices: ``python -m bench.growth`` measures and draws it.

A dense network is trained with Adam by a loop written by hand around a jitted step, by ``step`` and by ``fit``; see
``bench.scale`` for the loops. One size at a time grows from a common base. For each size one process runs the loops in
turn, and one process for each loop finds how much memory it takes. What kaun adds is shown twice: as the time of the
thread that calls, which other programs on the machine change little, and as the Python functions called in each step,
which nothing changes. The results are an extra of the bench, and the page and its picture are written again from all
results.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.one import peak_memory

ROOT = Path(__file__).resolve().parent.parent
PICTURE = "performance-growth.svg"
LOOPS = {"hand": "by hand", "step": "step", "fit": "fit"}
STEPS, FEW = 96, 32  # of the data, and of a pass that is timed
IN, OUT = 32, 8


@dataclasses.dataclass(frozen=True)
class Size:
    """The width and number of hidden layers, the rows of a batch, and the number of simulated devices."""

    width: int = 128
    depth: int = 2
    batch: int = 64
    devices: int = 1


AXES = {
    "width": (32, 128, 512),
    "depth": (1, 2, 4, 8, 16),
    "batch": (8, 64, 512),
    "devices": (1, 2, 4, 8),
}


def size_at(axis: str, value: int) -> Size:
    return dataclasses.replace(Size(), **{axis: value})


def loops_at(size: Size) -> dict[str, Any]:
    from bench import scale
    from kaun import sharding

    widths = (IN, *[size.width] * size.depth, OUT)
    where = None if size.devices == 1 else sharding.data_parallel()
    found = scale.loops_of(scale.Task(size.batch, STEPS, widths), where)
    return {name: found[name] for name in LOOPS}


def times(size: Size, rounds: int) -> dict[str, Any]:
    """Of each loop, the microseconds of a step in each round, by the clock and of the calling thread, and the calls.

    The first two rounds compile.
    """
    loops = loops_at(size)
    found: dict[str, Any] = {name: {"clock": [], "thread": []} for name in LOOPS}
    for number in range(rounds + 2):
        for name in list(loops)[:: 1 if number % 2 else -1]:
            clock, thread = time.perf_counter(), time.thread_time()
            float(loops[name](FEW))
            spent = {"clock": time.perf_counter() - clock, "thread": time.thread_time() - thread}
            if number > 1:
                for what, seconds in spent.items():
                    found[name][what].append(seconds / FEW * 1e6)
    for name, run in loops.items():
        run(STEPS)  # `fit` of more steps may compile once more
        found[name]["calls"] = (calls(run, STEPS) - calls(run, FEW)) / (STEPS - FEW)
    return found


def calls(run: Any, steps: int) -> int:
    """How many Python functions so many steps call."""
    count = 0

    def see(frame: Any, event: str, given: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(see)
    try:
        run(steps)
    finally:
        sys.setprofile(None)
    return count


def memory(size: Size, loop: str) -> float:
    """The peak of memory in MB while a loop runs that has compiled, beyond that of a process with JAX alone."""
    import jax

    jax.block_until_ready(jax.numpy.zeros(1) + 1)
    before = peak_memory()
    run = loops_at(size)[loop]
    run(FEW)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is held now
    run(FEW)
    return peak_memory() - before


def in_process(size: Size, what: str, rounds: int) -> Any:
    """What ``times`` finds in a process with so many devices, or ``memory`` for a loop."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={size.devices}".strip()
    given = json.dumps(dataclasses.asdict(size))
    command = [sys.executable, "-m", "bench.growth", "--one", what, "--size", given, "--rounds", str(rounds)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} of {size} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def growth(rounds: int) -> dict[str, Any]:
    """Time per step and memory against width, depth, batch and the number of simulated devices."""
    known: dict[Size, dict[str, Any]] = {}
    has_peak = Path("/proc/self/clear_refs").exists()
    for size in dict.fromkeys(size_at(axis, value) for axis, values in AXES.items() for value in values):
        known[size] = {"times": in_process(size, "times", 3 * rounds)}
        known[size]["memory"] = {name: in_process(size, name, 0) for name in LOOPS} if has_peak else {}
        print(f"{size}: {', '.join(row(known[size]))}", flush=True)
    return {axis: {str(value): known[size_at(axis, value)] for value in values} for axis, values in AXES.items()}


def microseconds(point: dict[str, Any], name: str) -> float:
    return statistics.median(point["times"][name]["clock"])


def added(point: dict[str, Any], name: str) -> list[float]:
    """The quartiles of the microseconds that a loop's step takes the calling thread more than the loop by hand."""
    pairs = zip(point["times"][name]["thread"], point["times"]["hand"]["thread"], strict=True)
    return statistics.quantiles((a - b for a, b in pairs), n=4)


def row(point: dict[str, Any]) -> list[str]:
    """A point in words."""
    found = [f"{microseconds(point, name):,.0f} us" for name in LOOPS]
    found += [f"{added(point, name)[1]:+,.0f} us" for name in ("step", "fit")]
    found += [f"{point['times'][name]['calls']:,.1f}" for name in LOOPS]
    return found + [f"{point['memory'][name]:,.0f} MB" if point["memory"] else "" for name in LOOPS]


def rows(found: dict[str, Any]) -> list[str]:
    """The table of the page."""
    three = ["by hand", "`step`", "`fit`"]
    head = [*three, "`step` adds", "`fit` adds", *(f"{what} {name}" for what in ("calls", "memory") for name in three)]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for axis in AXES:
        lines += [f"| {axis} {value} | " + " | ".join(row(point)) + " |" for value, point in found[axis].items()]
    return lines


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw time, what kaun adds to it, and memory, against each of the sizes."""
    import matplotlib

    # No date and no random identifiers, so that equal results give equal files.
    with matplotlib.rc_context({"svg.hashsalt": "kaun", "svg.fonttype": "none"}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 10), layout="constrained")
        grid = figure.subplots(4, len(AXES), sharex="col", sharey="row")
        for (axis, values), column in zip(AXES.items(), grid.T, strict=True):
            draw_axis(axis, values, [found[axis][str(value)] for value in values], column)
        labels = ("microseconds per step", "added, microseconds", "Python calls per step", "MB")
        for axes, label in zip(grid[:, 0], labels, strict=True):
            axes.set_ylabel(label)
        grid[0, 0].legend()
        figure.savefig(path, metadata={"Date": None})


def draw_axis(axis: str, values: Any, points: list[dict[str, Any]], column: Any) -> None:
    time_of, more, called, held = column
    for i, (name, label) in enumerate(LOOPS.items()):
        style = {"label": label, "color": f"C{i}", "linewidth": 3 if name == "fit" else 1.5, "marker": "o"}
        time_of.loglog(values, [microseconds(point, name) for point in points], **style)
        low, middle, high = zip(*(added(point, name) for point in points), strict=True)
        more.plot(values, middle, **style)
        more.fill_between(values, low, high, color=f"C{i}", alpha=0.2)
        called.loglog(values, [point["times"][name]["calls"] for point in points], **style)
        if all(point["memory"] for point in points):
            held.plot(values, [point["memory"][name] for point in points], **style)
    for axes in column:
        axes.set_xscale("log")
        axes.set_xticks(values, map(str, values), minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    held.set_xlabel(axis)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="default 5; each takes three times of each loop")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.one:
        size = Size(**json.loads(options.size))
        print(json.dumps(times(size, options.rounds) if options.one == "times" else memory(size, options.one)))
        return
    from bench.__main__ import main as bench

    bench(["--only", "", "--runners", "", "--extras", "growth", "--rounds", str(options.rounds)])


if __name__ == "__main__":
    main()
