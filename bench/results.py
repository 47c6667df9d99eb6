"""What was measured, kept as JSON: runs of several sessions, and ratios within a round of one session.

The file has ``sessions`` (machine and versions, by number), ``runs`` (what ``bench.one`` printed, with session and
round) and ``extras`` (other measurements, by name, each with its session).
"""

import json
import os
import platform
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

BASE = "hand"
PACKAGES = ("kaun", "jax", "numpy", "optax", "flax", "equinox", "keras", "torch")


def empty() -> dict[str, Any]:
    return {"sessions": {}, "runs": [], "extras": {}}


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else empty()


def save(path: Path, results: dict[str, Any]) -> None:
    # A line for each run: a later session's changes can be read.
    rows = lambda values: ",\n    ".join(json.dumps(value) for value in values)
    named = lambda values: ",\n    ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in values.items())
    parts = [
        f'  "sessions": {{\n    {named(results["sessions"])}\n  }}',
        f'  "runs": [\n    {rows(results["runs"])}\n  ]',
        f'  "extras": {{\n    {named(results["extras"])}\n  }}',
    ]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def about() -> dict[str, Any]:
    """The machine and the versions that a session measures."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown processor")
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"machine": f"{os.cpu_count()} cores, {platform.machine()}, {cpu}", "versions": versions}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old results with what the new session measured in place of what they had for it.

    An old base run stays as long as another old run of its session is compared to it.
    """
    (session,) = new["sessions"]
    fresh = {(run["workload"], run["runner"]) for run in new["runs"]}
    before = [run for run in old["runs"] if run["session"] != session]
    kept = [run for run in before if run["runner"] != BASE and (run["workload"], run["runner"]) not in fresh]
    needed = {(run["session"], run["workload"]) for run in kept}
    measured = {workload for workload, _ in fresh}
    for run in before:
        where = (run["session"], run["workload"])
        if run["runner"] == BASE and (where in needed or run["workload"] not in measured):
            kept.append(run)
    extras = {**old["extras"], **new["extras"]}
    used = {run["session"] for run in kept} | {extra["session"] for extra in extras.values()}
    sessions = {key: value for key, value in old["sessions"].items() if key in used}
    return {"sessions": {**sessions, **new["sessions"]}, "runs": kept + new["runs"], "extras": extras}


def values(results: dict[str, Any], workload: str, runner: str, field: str) -> dict[tuple[str, int], float]:
    """A measured number by session and round."""
    runs = (run for run in results["runs"] if (run["workload"], run["runner"]) == (workload, runner))
    return {(run["session"], run["round"]): run[field] for run in runs}


def median(results: dict[str, Any], workload: str, runner: str, field: str) -> float | None:
    found = values(results, workload, runner, field)
    if runner == BASE and found:
        newest = max((session for session, _ in found), key=int)
        found = {key: value for key, value in found.items() if key[0] == newest}
    return statistics.median(found.values()) if found else None


def ratio(results: dict[str, Any], workload: str, runner: str, to: str, field: str = "step") -> float | None:
    """The median over the rounds of the ratio within a round; through the base where they never shared one."""
    a, b = (values(results, workload, name, field) for name in (runner, to))
    shared = [a[key] / b[key] for key in a if key in b]
    if shared:
        return statistics.median(shared)
    if BASE in (runner, to):
        return None
    one, other = (ratio(results, workload, name, BASE, field) for name in (runner, to))
    return None if one is None or other is None else one / other
