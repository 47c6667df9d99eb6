"""Checkpoints of two real processes: written in parts, read on other devices, and whole whenever a process is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kaun.checkpoint import Directory
from kaun.checkpoint.__main__ import main

RUNS = str(Path(__file__).with_name("parts_runs.py"))
PART = "part-0000{}-of-00002.safetensors"


def names(path):
    return sorted(entry.name for entry in path.iterdir() if entry.name != ".kaun-lock")


def test_saved_and_resumed_by_two_processes(pair, tmp_path):
    path = tmp_path / "runs"
    (first, whole), (_, other) = pair.run(RUNS, "run", folder=str(tmp_path / "whole"), steps=4)
    assert first == 0 and whole == other
    assert pair.run(RUNS, "run", folder=str(path), steps=3, keep=1)[0][0] == 0
    assert names(path) == ["step-00000002", "step-00000003"]  # the best one too
    assert names(path / "step-00000003") == ["manifest.json", PART.format(1), PART.format(2)]
    assert pair.run(RUNS, "run", folder=str(path), steps=4, keep=1) == [(3, whole)] * 2
    digest, placed, same, warned = pair.run(RUNS, "read", folder=str(path))[1]
    assert (digest, placed, same, warned) == (whole, True, True, [])
    best = pair.run(RUNS, "read", folder=str(path), at="best")
    assert best[0] == best[1] and best[0][0] != whole
    # A part is damaged: an older one is read by both, and resumed from.
    file = path / "step-00000004" / PART.format(2)
    os.truncate(file, file.stat().st_size - 1)
    for _, _, _, warned in pair.run(RUNS, "read", folder=str(path)):
        assert f"loaded step 2, because newer checkpoints are damaged:\n  step-00000004: {PART.format(2)}" in warned[0]
    assert pair.run(RUNS, "run", folder=str(path), steps=4, keep=1) == [(2, whole)] * 2
    assert names(path) == ["damaged-step-00000004", "step-00000002", "step-00000004"]


def test_one_file_of_two_processes(pair, tmp_path):
    path = tmp_path / "whole.safetensors"
    (there, found, saved, dtype, placed), other = pair.run(RUNS, "one_file", folder=str(path))
    assert (there, found, dtype, placed) == (True, saved, "bfloat16", True) and other[1] == saved and other[0]
    # The same bytes as the parts joined.
    pair.run(RUNS, "run", folder=str(tmp_path / "runs"), steps=1)
    assert main(["join", str(tmp_path / "runs"), str(tmp_path / "joined")]) == 0
    assert (tmp_path / "joined").read_bytes() == path.read_bytes()
    # An error of the disk in process 0 is one of all.
    for kind, found in zip(
        ("FileNotFoundError", "FailedElsewhere"), pair.run(RUNS, "one_file", folder="/no/such/folder/x"), strict=True
    ):
        assert found.kind == kind and "the folder '/no/such/folder' does not exist" in found.text


def test_a_disk_that_fails_in_one_process_is_an_error_of_all(pair, tmp_path):
    for at in (0, 1):
        path = tmp_path / str(at)
        found = pair.run(RUNS, "fail", folder=str(path), at=at)
        assert found[at][0].startswith("OSError: [Errno 28] a checkpoint could not be written to")
        assert "The newest checkpoint is of step 1. Free some space" in found[at][0]
        assert found[1 - at][0].startswith(f"FailedElsewhere: Process {at} failed: OSError: [Errno 28] No space left")
        assert found[at][1] == [".kaun-lock", "step-00000001", "step-00000003"]


def test_processes_that_share_no_file_system_are_refused(pair, tmp_path):
    found = pair.run(RUNS, "open_there", folder=str(tmp_path))
    assert [each.kind for each in found] == ["FailedElsewhere", "FileNotFoundError"]
    assert "choose a directory on a file system that all of them share" in found[1].text


READ = """
import sys; sys.path.insert(0, {folder!r})
import jax, parts_runs
from kaun import checkpoint, sharding
like = parts_runs.start(1, sharding.mesh(data=-1))
print(parts_runs.digest(checkpoint.Directory({path!r}).load(like)))
"""


@pytest.mark.parametrize(
    "devices", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_read_by_one_process(pair, tmp_path, devices):
    whole = pair.run(RUNS, "run", folder=str(tmp_path / "runs"), steps=1)[0][1]
    code = READ.format(folder=str(Path(RUNS).parent), path=str(tmp_path / "runs"))
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | flags, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == whole, done.stderr


# Operations of the save of step 2, in their order, each with its number among those of the same text in the process that
# does it. The first two saves, and opening the directory, have the others.
POINTS = {
    "before its part": ("create part", 2),
    "within its part": ("write", {0: 4, 1: 2}),
    "after its part": ("close", {0: 6, 1: 2}),
    "before the manifest": ("create manifest", 2),
    "before it has its name": ("rename .kaun", 3),
    "after it has its name": ("sync_folder runs", 3),
}
OF_THE_FIRST = ["before the manifest", "before it has its name", "after it has its name"]
SHORT = [("after its part", 1)]


@pytest.mark.parametrize(
    ("point", "killed"),
    [
        pytest.param(point, killed, marks=[] if (point, killed) in SHORT else pytest.mark.slow)
        for point in POINTS
        for killed in (0, 1)
    ],
)
def test_killed_at_a_point_of_a_save(start, pair, tmp_path, point, killed):
    """The newest complete checkpoint is there, the next start continues from it, and the other process does not hang."""
    by = 0 if point in OF_THE_FIRST else killed
    text, number = POINTS[point]
    number = number if isinstance(number, int) else number[by]
    whole = pair.run(RUNS, "run", folder=str(tmp_path / "whole"), steps=4)[0][1]
    group = start(KAUN_TIMEOUT="4")
    group.begin(RUNS, "run", folder=str(tmp_path / "runs"), steps=4, keep=2, killed=killed, at=(text, number), by=by)
    if by == killed:
        assert group.processes[killed].wait(30) == -signal.SIGKILL
    else:
        wait_for(tmp_path / "reached")
        group.kill(killed)
        (tmp_path / "killed").touch()
    begun = time.monotonic()
    said = how_it_ended(group, 1 - killed)
    assert time.monotonic() - begun < 15 and said
    saved = 2 if point == "after it has its name" or (point in OF_THE_FIRST and killed == 1) else 1
    assert Directory(tmp_path / "runs").steps() == [1, 2][:saved]
    group.close()
    assert pair.run(RUNS, "run", folder=str(tmp_path / "runs"), steps=4, keep=2) == [(saved, whole)] * 2
    assert names(tmp_path / "runs") == ["step-00000002", "step-00000003", "step-00000004"]


def wait_for(file):
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} did not come"
        time.sleep(0.01)


def how_it_ended(group, index):
    """What the process that is left said: an exception, or JAX ended it, which also ends what it holds."""
    said = group.result_or_exit(index, 30)
    if isinstance(said, int):
        return f"it ended with {said}"
    assert said.kind == "FailedElsewhere", said
    return said.text
