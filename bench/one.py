"""One run, in its own process: ``python -m bench.one WORKLOAD RUNNER`` prints what it measured as JSON."""

import argparse
import importlib
import json
import statistics
import time
from pathlib import Path

from bench.runners import RUNNERS
from bench.workloads import WORKLOADS, Workload, quick


def measure(workload: Workload, runner: str, first_only: bool = False) -> dict:
    """Seconds of the first step and of one step thereafter, the losses after each, and the peak of memory in MB."""
    module, function = RUNNERS[runner].where.split(":")
    session = getattr(importlib.import_module(f"bench.runners.{module}"), function)(workload)
    first = timed(session.run, 1)
    found = {"workload": workload.name, "runner": runner, "first": first}
    if first_only:
        return found
    losses = [session.check()]
    warm = timed(session.run, workload.steps)
    passes = [timed(session.run, workload.steps) for _ in range(workload.passes)]
    step = statistics.median(passes) / workload.steps
    compiling = max(0.0, first + warm - (workload.steps + 1) * step)
    # Before the last check, which compiles and runs another program.
    peak = peak_memory()
    losses.append(session.check())
    return {**found, "step": step, "compiling": compiling, "losses": losses, "peak": peak}


def timed(run, steps: int) -> float:
    start = time.perf_counter()
    run(steps)
    return time.perf_counter() - start


def peak_memory() -> float:
    """The largest resident size of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its peak takes in the parent's, from before this program was loaded.
        return next(int(line.split()[1]) / 1e3 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("runner", choices=RUNNERS)
    parser.add_argument("--quick", action="store_true", help="few steps, timed once")
    parser.add_argument("--steps", type=int, help="the steps of a pass")
    parser.add_argument("--first-only", action="store_true", help="stop after the first step")
    given = parser.parse_args()
    workload = WORKLOADS[given.workload]
    if given.quick or given.steps:
        workload = quick(workload, given.steps)
    print(json.dumps(measure(workload, given.runner, given.first_only)))


if __name__ == "__main__":
    main()
