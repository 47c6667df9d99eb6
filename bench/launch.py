"""Starts runs, each in its own process, in rounds, and refuses results of runners that trained differently."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.results import BASE
from bench.runners import RUNNERS
from bench.workloads import WORKLOADS, close

ROOT = Path(__file__).resolve().parent.parent
# Of the loss after one step, when rounding has had no time to grow.
FIRST_TOLERANCE = 1e-5


def run_one(
    workload: str, runner: str, options: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What ``bench.one`` measured in a new process."""
    command = [sys.executable, "-m", "bench.one", workload, runner, *options]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{workload} by {runner} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def installed(runners: Iterable[str]) -> list[str]:
    """The runners whose library is here; a line for each that is not."""
    here = []
    for name in runners:
        needs = RUNNERS[name].needs
        if importlib.util.find_spec(needs) is None:
            print(f"{name}: skipped, {needs} is not installed")
        else:
            here.append(name)
    return here


def pairs(workloads: Sequence[str], runners: Sequence[str]) -> list[tuple[str, str]]:
    """What to run in a round: the base with each workload, whoever else was asked for."""
    wanted = [BASE, *(runner for runner in runners if runner != BASE)]
    return [
        (workload, runner)
        for workload in workloads
        for runner in wanted
        if WORKLOADS[workload].runners is None or runner in WORKLOADS[workload].runners
        if not RUNNERS[runner].only or workload in RUNNERS[runner].only
    ]


def one_round(todo: Sequence[tuple[str, str]], number: int, options: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The runs of one round, in its own order; those of one workload follow each other, to be compared."""
    draw = random.Random(number)
    workloads = list(dict.fromkeys(workload for workload, _ in todo))
    draw.shuffle(workloads)
    for workload in workloads:
        runners = [runner for name, runner in todo if name == workload]
        draw.shuffle(runners)
        runs = []
        for runner in runners:
            found = run_one(workload, runner, options)
            print(f"round {number + 1}: {workload:9} {runner:14} {found['step'] * 1e6:12.1f} us per step", flush=True)
            runs.append({**found, "round": number})
        compare(runs)
        yield from runs


def compare(runs: Sequence[dict[str, Any]]) -> None:
    """Refuses runs of one workload that did not end at the same losses."""
    (base,) = [run for run in runs if run["runner"] == BASE]
    tolerances = (FIRST_TOLERANCE, WORKLOADS[base["workload"]].tolerance)
    different = [
        f"  {run['runner']}: {run['losses']}, {BASE}: {base['losses']}"
        for run in runs
        if not all(close(*pair, t) for *pair, t in zip(run["losses"], base["losses"], tolerances, strict=True))
    ]
    if different:
        raise SystemExit(
            f"{base['workload']}: these runners did not train the same model on the same batches (losses after the "
            "first step and at the end):\n" + "\n".join(different)
        )
