"""What is measured besides steps. A new one is one more function in ``EXTRAS``: from the rounds to a dict."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.growth import growth
from bench.launch import run_one

ROOT = Path(__file__).resolve().parent.parent
CACHED = ("xor", "mlp", "cnn", "gpt")
FLAG = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=65536"

IMPORT = """
import jax, jax.numpy, time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""

APART = """
from bench.extras import capture_time
print(capture_time())
"""


def seconds_of(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def found_by(module: str, call: str) -> dict[str, Any]:
    """What a call of a module of the bench returns in its own process; what it prints besides is shown."""
    code = f"import json\nfrom bench.{module} import *\nprint(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    print("\n".join(printed), flush=True)
    return json.loads(last)


def passes(rounds: int) -> dict[str, Any]:
    """Microseconds of a batch of `evaluate` and `predict`, and of jitted loops written by hand."""
    return found_by("passes", f"measure({3 * rounds})")


def loaders(rounds: int) -> dict[str, Any]:
    """Microseconds of a step of `fit` over loaders of PyTorch and grain, and of loops written by hand."""
    missing = [name for name in ("torch", "grain") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"loaders: skipped, {', '.join(missing)} is not installed")
        return {}
    return found_by("loaders", f"measure({3 * rounds})")


def checkpoints(rounds: int) -> dict[str, Any]:
    """Seconds to save and restore a state of 120 MB, by kaun and by Orbax."""
    return found_by("checkpoints", f"measure(installed(), PARAMETERS, {rounds + 2})")


def importing(rounds: int) -> dict[str, Any]:
    """Seconds of ``import kaun`` after ``import jax``, and of ``import optax`` alone, which is most of it."""
    # The first one writes the byte code.
    seconds_of(IMPORT.format(module="kaun"))
    measured = {"kaun": [], "optax": []}
    for _ in range(2 * rounds + 1):
        for module, found in measured.items():
            found.append(seconds_of(IMPORT.format(module=module)))
    return {module: statistics.median(found) for module, found in measured.items()}


def closures(rounds: int) -> dict[str, Any]:
    """Microseconds of capturing a fresh closure."""
    return {"microseconds": statistics.median(seconds_of(APART) for _ in range(rounds))}


def capture_time(count: int = 1000) -> float:
    """The median microseconds of capturing a fresh closure over a batch's labels, over ``count`` of them."""
    import jax.numpy as jnp

    from kaun import losses
    from kaun._loss import capture_loss

    def make(y):
        return lambda out: losses.cross_entropy_sparse(out, y)

    fresh = [make(jnp.zeros(4, jnp.int32)) for _ in range(count)]
    times = []
    for loss in fresh:
        start = time.perf_counter()
        capture_loss(loss)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def cache(rounds: int) -> dict[str, Any]:
    """The seconds of kaun's first step in a process that fills JAX's compile cache, and in the next one."""
    found: dict[str, Any] = {name: {"cold": [], "warm": []} for name in CACHED}
    for _ in range(rounds):
        for workload in CACHED:
            with tempfile.TemporaryDirectory() as folder:
                env = {
                    "JAX_COMPILATION_CACHE_DIR": folder,
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                }
                for when in ("cold", "warm"):
                    found[workload][when].append(run_one(workload, "kaun", ["--first-only"], env)["first"])
    return found


def flag(rounds: int) -> dict[str, Any]:
    """Seconds per step of xor with and without an XLA option about small loops."""
    found: dict[str, Any] = {runner: {"without": [], "with": []} for runner in ("hand-scan", "kaun")}
    for _ in range(rounds):
        for runner, times in found.items():
            given = os.environ.get("XLA_FLAGS", "")
            times["without"].append(run_one("xor", runner)["step"])
            times["with"].append(run_one("xor", runner, env={"XLA_FLAGS": f"{given} {FLAG}".strip()})["step"])
    return found


EXTRAS: dict[str, Callable[[int], dict[str, Any]]] = {
    "import": importing,
    "closures": closures,
    "cache": cache,
    "flag": flag,
    "passes": passes,
    "loaders": loaders,
    "checkpoints": checkpoints,
    "growth": growth,
}
