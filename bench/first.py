"""Measure the parts of a first step: ``python -m bench.first [ROUNDS] xor gpt``.

Each first step is that of a new process without a compile cache; the hand-written loop and ``fit`` run in turn. Printed
are medians of the CPU time of all threads, which other programs on the machine change less than the wall time: of
tracing, of lowering to StableHLO, of XLA's compilation, and of all else; and ratios to the hand-written loop within
each round.
"""

import collections
import importlib
import json
import os
import statistics
import subprocess
import sys
import time

import jax

from bench.runners import RUNNERS
from bench.workloads import WORKLOADS

PARTS = {
    "jaxpr_trace_duration": "trace",
    "jaxpr_to_mlir_module_duration": "lower",
    "backend_compile_duration": "compile",
}
COLUMNS = ("programs", *PARTS.values(), "else", "all")


def parts(workload: str, runner: str) -> dict[str, float]:
    """CPU seconds of the parts of the first step in this process, and the number of programs."""
    open_, found, programs = [], collections.Counter(), []

    def begin(event: str, value: float, **about: str) -> None:
        if event.rsplit("/", 1)[1] in PARTS:
            open_.append([time.process_time(), 0.0])

    def end(event: str, seconds: float, **about: str) -> None:
        name = event.rsplit("/", 1)[1]
        if name in PARTS:
            start, inside = open_.pop()
            taken = time.process_time() - start
            found[PARTS[name]] += taken - inside  # a part inside of another one counts for itself alone
            if open_:
                open_[-1][1] += taken
            if PARTS[name] == "compile":
                programs.append(about.get("fun_name", ""))

    module, function = RUNNERS[runner].where.split(":")
    session = getattr(importlib.import_module(f"bench.runners.{module}"), function)(WORKLOADS[workload])
    jax.monitoring.register_scalar_listener(begin)
    jax.monitoring.register_event_duration_secs_listener(end)
    start = time.process_time()
    session.run(1)
    whole = time.process_time() - start
    print(f"{workload} {runner}: {', '.join(programs)}", file=sys.stderr)
    return {"programs": len(programs), **found, "else": whole - sum(found.values()), "all": whole}


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--one"]:
        print(json.dumps(parts(*arguments[1:])))
        return
    rounds = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 5
    env = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    for workload in arguments or ["xor", "gpt"]:
        runs: dict[str, list[dict[str, float]]] = {"hand": [], "kaun": []}
        for number in range(rounds):
            for runner in sorted(runs, reverse=bool(number % 2)):
                command = [sys.executable, "-m", "bench.first", "--one", workload, runner]
                done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
                runs[runner].append(json.loads(done.stdout))
        for runner, found in runs.items():
            print(f"{workload:8} {runner:5}", *(_cell(name, found, runs["hand"]) for name in COLUMNS), flush=True)


def _cell(name: str, found: list[dict[str, float]], base: list[dict[str, float]]) -> str:
    if name == "programs":
        return f"{name} {found[0][name]}"
    ratio = statistics.median(a[name] / b[name] for a, b in zip(found, base, strict=True))
    return f"| {name} {statistics.median(run[name] for run in found) * 1e3:.0f} ms, {ratio:.2f}"


if __name__ == "__main__":
    main(sys.argv[1:])
