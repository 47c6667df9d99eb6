"""Whole runs, killed by the system at random times and started again until they are done."""

import contextlib
import functools
import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECONDS = 600
SIGNALS = [signal.SIGKILL]
MORE = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM] + [signal.SIGKILL] * 7
LONG = [pytest.param(seed, MORE, marks=pytest.mark.slow) for seed in range(20)]
ROOT = Path(__file__).resolve().parents[2]
RUN = Path(__file__).parent / "run.py"
STEPS = 12 * 8


class Process:
    """``run.py`` in a folder; its output is a file, so that nothing of it is lost when it is killed."""

    def __init__(self, folder, cache, flags):
        folder.mkdir(exist_ok=True)
        self.output = folder / "output"
        # Flags of the tests are replaced: the number of devices is a part of what the bytes depend on.
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT / "src"), "XLA_FLAGS": flags,
        }  # fmt: skip
        command = [sys.executable, "-W", "error::UserWarning:kaun", str(RUN), str(folder)]
        self.begun = len(self.lines())
        with self.output.open("a") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=folder)

    def lines(self):
        return self.output.read_text().splitlines() if self.output.exists() else []

    def until(self, step):
        """Wait until it has printed this many steps, or has ended."""
        while self.process.poll() is None and len(self.lines()) - self.begun < step:
            time.sleep(0.002)

    def send(self, number):
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(SECONDS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs are kept from one process to the next: those of the suite, where it keeps them."""
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def start(cache, xla_flags):
    return functools.partial(Process, cache=cache, flags=xla_flags)


def lines_here(folder):
    """What ``run.py`` prints for a folder in this process, where nothing stops it."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(RUN))["main"](folder)
    return out.getvalue().splitlines()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    last = lines_here(folder)[-1]
    return last, {name: (folder / name).read_text() for name in ("log.jsonl", "log.csv")}


def content(text):
    """The rows of a log without what a clock made."""
    return [
        {k: v for k, v in json.loads(line).items() if "second" not in k and "time" not in k}
        for line in text.splitlines()
    ]


def stopped_within_fit(folder, start):
    """A signal within fit saves the step in progress; the exit code."""
    process = start(folder)
    process.until(3)
    code = process.send(signal.SIGTERM)
    assert code == 143, process.output.read_text()
    printed = int(process.lines()[-1])
    saved = sorted(int(path.name[5:13]) for path in (folder / "checkpoints").glob("step-*"))
    assert saved[-1] >= printed >= 3
    return code


@pytest.mark.parametrize(("seed", "signals"), [(0, SIGNALS), *LONG], ids=lambda value: str(value)[:2])
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(tmp_path, start, uninterrupted, seed, signals):
    rand = random.Random(seed)
    whole, logs = uninterrupted
    codes = [(signal.SIGTERM, stopped_within_fit(tmp_path, start))]
    for number in signals:
        process = start(tmp_path)
        process.until(rand.randint(0, STEPS // 3))
        time.sleep(rand.random() * 0.05)
        codes.append((number, process.send(number)))
    if signals is SIGNALS:  # a process costs two seconds of CPU
        printed = lines_here(tmp_path)
    else:
        last = start(tmp_path)
        assert last.process.wait(SECONDS) == 0, last.output.read_text()
        printed = last.lines()
    expected = {
        signal.SIGKILL: {-signal.SIGKILL},
        signal.SIGTERM: {143, -signal.SIGTERM},
        signal.SIGINT: {1, 130, -signal.SIGINT},
    }
    assert all(code in expected[number] | {0} for number, code in codes), codes
    assert printed[-1] == whole, f"seed {seed}: {codes}"
    assert content((tmp_path / "log.jsonl").read_text()) == content(logs["log.jsonl"])
    steps = [row.split(",")[0] for row in (tmp_path / "log.csv").read_text().splitlines()]
    assert steps == [row.split(",")[0] for row in logs["log.csv"].splitlines()]
    assert lines_here(tmp_path) == [whole], "a finished run takes no step"
    print(f"seed {seed}: {len(codes)} signals, exit codes {[code for _, code in codes]}")
