"""Checkpoints of two real processes: written in parts, read on other devices, and whole whenever a process is killed."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from kaun.checkpoint import Directory
from kaun.checkpoint.__main__ import main

RUNS = str(Path(__file__).with_name("parts_runs.py"))
spec = importlib.util.spec_from_file_location("parts_runs", RUNS)
parts_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parts_runs)
PART = "part-0000{}-of-00002.safetensors"


def names(path):
    return sorted(entry.name for entry in path.iterdir() if entry.name != ".kaun-lock")


def check_saved_and_resumed(two, folder):
    path = folder / "runs"
    (first, whole), (_, other) = two.run(RUNS, "run", folder=str(folder / "whole"), steps=4)
    assert first == 0 and whole == other
    assert two.run(RUNS, "run", folder=str(path), steps=3, keep=1)[0][0] == 0
    assert names(path) == ["step-00000002", "step-00000003"]  # the best one too
    assert names(path / "step-00000003") == ["manifest.json", PART.format(1), PART.format(2)]
    assert two.run(RUNS, "run", folder=str(path), steps=4, keep=1) == [(3, whole)] * 2
    digest, placed, same, warned = two.run(RUNS, "read", folder=str(path))[1]
    assert (digest, placed, same, warned) == (whole, True, True, [])
    assert parts_runs.digest(Directory(path).load(parts_runs.start(1))) == whole
    best = two.run(RUNS, "read", folder=str(path), at="best")
    assert best[0] == best[1] and best[0][0] != whole
    # A part is damaged: an older one is read by both, and resumed from.
    file = path / "step-00000004" / PART.format(2)
    os.truncate(file, file.stat().st_size - 1)
    for _, _, _, warned in two.run(RUNS, "read", folder=str(path)):
        assert f"loaded step 2, because newer checkpoints are damaged:\n  step-00000004: {PART.format(2)}" in warned[0]
    assert two.run(RUNS, "run", folder=str(path), steps=4, keep=1) == [(2, whole)] * 2
    assert names(path) == ["damaged-step-00000004", "step-00000002", "step-00000004"]
    # One process begins, both go on from its file, and it goes on from their parts.
    path = folder / "moved"
    assert parts_runs.run(path, 1)[0] == 0
    assert names(path / "step-00000001") == ["manifest.json", "reports.safetensors", "state.safetensors"]
    assert two.run(RUNS, "run", folder=str(path), steps=3)[1][0] == 1
    assert parts_runs.run(path, 4) == (3, whole)


def check_one_file(two, folder):
    path = folder / "whole.safetensors"
    (there, found, saved, dtype, placed), other = two.run(RUNS, "one_file", folder=str(path))
    assert (there, found, dtype, placed) == (True, saved, "bfloat16", True) and other[:2] == (True, saved)
    two.run(RUNS, "run", folder=str(folder / "runs"), steps=1)
    assert main(["join", str(folder / "runs"), str(folder / "joined")]) == 0
    assert (folder / "joined").read_bytes() == path.read_bytes()
    first, second = two.run(RUNS, "one_file", folder="/no/such/folder/x")
    assert first.kind == "FileNotFoundError" and first.text.startswith("checkpoint.save: the folder '/no/such/folder'")
    assert second.kind == "FailedElsewhere" and first.text in second.text
    found, none = two.run(RUNS, "save_in", folder=str(folder / "alone"), wanted=[0])
    assert found.text.startswith(
        "Process 1 did not come to checkpoint.save, which every process has to call, within 3 s"
    )
    assert none is None and not (folder / "alone").exists()
    # The next save is another one in each of them. It ends at once, in both, and they are together again.
    late, other = two.run(RUNS, "save_in", folder=str(folder / "after"), wanted=[0, 1])[::-1]
    assert late.kind == other.kind == "FailedElsewhere" and "came to checkpoint.save" in late.text
    assert "Process 1 failed" in other.text and late.text[:40] in other.text
    assert two.run(RUNS, "save_in", folder=str(folder / "after"), wanted=[0, 1]) == [None, None]


def check_failing_disk(two, folder):
    for at in (0, 1):
        found = two.run(RUNS, "fail", folder=str(folder / str(at)), at=at)
        assert found[at][0].startswith("OSError: [Errno 28] a checkpoint could not be written to")
        assert "The newest checkpoint is of step 1. Free some space" in found[at][0]
        start = f"FailedElsewhere: Process {at} failed, so process {1 - at} ends too: OSError: [Errno 28] No space left"
        assert found[1 - at][0].startswith(start)
        assert found[at][1] == [".kaun-lock", "step-00000001", "step-00000003"]


def check_other_refusals(two, folder):
    """A report that one process cannot save, and folders that are not shared."""
    found = two.run(RUNS, "not_saved", folder=str(folder / "runs"), at=1)
    assert found[1].kind == "TypeError" and found[0].kind == "FailedElsewhere" and "a set" in found[0].text
    found = two.run(RUNS, "open_there", folder=str(folder))
    assert [each.kind for each in found] == ["FailedElsewhere", "FileNotFoundError"]
    assert "process 1 does not see in " in found[1].text
    assert "choose a directory on a file system that all of them share" in found[1].text


def test_checkpoints_of_two_processes(pair, tmp_path):
    check_saved_and_resumed(pair, fresh(tmp_path, "a"))
    check_one_file(pair, fresh(tmp_path, "b"))
    check_failing_disk(pair, fresh(tmp_path, "c"))
    check_other_refusals(pair, fresh(tmp_path, "d"))
    check_fit(pair, fresh(tmp_path, "f"))


@pytest.mark.slow  # test_votes.py has the short form of a process that is killed
def test_a_process_killed_after_its_part_leaves_the_step_before(make_group, tmp_path):
    _, whole = parts_runs.run(tmp_path / "whole", 4)
    with contextlib.closing(make_group()) as two:
        saved, said = kill(two, tmp_path, "after its part", 1)
    assert saved == 1 and "Process 1 did not come to the checkpoints in '" in said
    found = Directory(tmp_path / "runs").load(parts_runs.start(1))
    assert found.step == 1 and parts_runs.digest(found) != whole


def check_fit(two, folder):
    """A fit that fails in one process is resumed by both, with the best state of a report and a history in process 0."""
    whole = two.run(RUNS, "fit", folder=str(folder / "whole"))
    assert [each[:2] for each in whole] == [("returned", 12)] * 2 and whole[0][2:4] == whole[1][2:4]
    failed = two.run(RUNS, "fit", folder=str(folder / "runs"), fails=7)
    assert failed[1][:2] == ("OSError: no such row", 7) and failed[0][0].startswith("FailedElsewhere: Process 1 failed")
    assert names(folder / "runs")[-1] == "step-00000007"
    two.run(RUNS, "looked")
    assert two.run(RUNS, "fit", folder=str(folder / "runs")) == whole
    assert two.run(RUNS, "looked") == [[*range(7, 13)]] * 2  # a call that fails in one process is repeated in all
    assert two.run(RUNS, "fit", folder=str(folder / "runs")) == whole  # it is finished
    for _ in range(2):  # the second time for the step of the checkpoint, which only process 0 would save again
        failed = two.run(RUNS, "fit", folder=str(folder / "again"), fails=7, by=0)
        assert failed[0][:2] == ("OSError: no such row", 7) and failed[0][2:4] == failed[1][2:4]
        assert failed[1][0].startswith("FailedElsewhere: Process 0 failed") and "Also" not in failed[1][0]
    assert two.run(RUNS, "fit", folder=str(folder / "again")) == whole
    forgot = two.run(RUNS, "fit", folder=str(folder / "forgot"), forgets=6)
    assert forgot[1][0].startswith("LookupError: forgotten\nAlso, no checkpoint of step 6 was written: forgotten")
    assert forgot[0][0].startswith("FailedElsewhere: Process 1 failed, so process 0 ends too: LookupError: forgotten")
    assert forgot[0][1:4] == forgot[1][1:4] and names(folder / "forgot")[-1] == "step-00000004"


def fresh(folder, name):
    (folder / name).mkdir()
    return folder / name


CALL = """
import sys; sys.path.insert(0, {folder!r})
import parts_runs
print(*parts_runs.{call})
"""


def in_one_process(devices, call):
    """What a scenario prints in a process with some devices."""
    code = CALL.format(folder=str(Path(RUNS).parent), call=call)
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | flags, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_resumed_by_one_process(pair, tmp_path, devices):
    """Leaf bytes are equal, the end of the run within 1e-6, and two processes can go on from there."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    pair.run(RUNS, "fit", folder=str(whole), loose=str(tmp_path / "whole.safetensors"))
    failed = pair.run(RUNS, "fit", folder=str(moved), fails=7, keep=9)
    saved = pair.run(RUNS, "fit_digest", folder=str(moved), step=6)[0]
    assert in_one_process(devices, f"fit_digest({str(moved)!r}, 6)") == ["".join(saved)]
    found = in_one_process(devices, f"fit({str(moved)!r}, loose={str(tmp_path / 'moved.safetensors')!r}, keep=9)")
    assert failed[1][1] == 7 and found[:2] == ["returned", "12"]
    ends = [load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "moved")]
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) == 4
    for name, leaf in ends[0].items():
        assert np.abs(leaf - ends[1][name]).max() < 1e-6
    assert pair.run(RUNS, "fit", folder=str(moved), epochs=4, loose=str(tmp_path / "more"))[0][:2] == ("returned", 16)


@pytest.mark.slow
def test_a_fit_whose_process_is_killed_is_resumed(make_group, pair, tmp_path):
    whole = pair.run(RUNS, "fit", folder=str(tmp_path / "whole"))
    with contextlib.closing(make_group()) as group:
        group.begin(RUNS, "fit", folder=str(tmp_path / "runs"), dies=7)
        assert group.processes[1].wait(30) == -signal.SIGKILL
        begun, said = time.monotonic(), group.result_or_exit(0, 60)
        assert time.monotonic() - begun < 15
        # The devices may say it first, where it died within a step.
        assert isinstance(said, int) or said.startswith(("FailedElsewhere: Process 1 ", "JaxRuntimeError: ")), said
    # Of step 6, which a thread may have been writing, all or nothing is there.
    assert Directory(tmp_path / "runs").steps()[-1] in (4, 6)
    assert pair.run(RUNS, "fit", folder=str(tmp_path / "runs")) == whole


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


def kill(group, folder, point, killed):
    """Kill a process at a point of a save, and return the newest step and how the other process ended."""
    by = 0 if point in OF_THE_FIRST else killed
    text, number = POINTS[point]
    number = number if isinstance(number, int) else number[by]
    group.begin(RUNS, "run", folder=str(folder / "runs"), steps=4, keep=2, killed=killed, at=(text, number), by=by)
    if by == killed:
        assert group.processes[killed].wait(30) == -signal.SIGKILL
    else:
        wait_for(folder / "reached")
        group.processes[killed].kill()
        group.processes[killed].wait()
        (folder / "killed").touch()
    begun = time.monotonic()
    said = how_it_ended(group, 1 - killed)
    assert time.monotonic() - begun < 15
    steps = Directory(folder / "runs").steps()
    assert steps == [*range(1, len(steps) + 1)]
    return steps[-1], said


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_of_a_save(make_group, pair, tmp_path, point, killed):
    """The newest complete checkpoint is there, the next start continues from it, and the other process does not hang."""
    whole = pair.run(RUNS, "run", folder=str(tmp_path / "whole"), steps=4)[0][1]
    with contextlib.closing(make_group()) as group:
        saved, said = kill(group, tmp_path, point, killed)
    print(f"{point}, process {killed}: step {saved}; {said}")
    assert saved == 2 if point == "after it has its name" or (point in OF_THE_FIRST and killed == 1) else saved == 1
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
