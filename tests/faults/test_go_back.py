"""A run that goes back to an older step, and is killed or meets an error at any operation: nothing is lost or mixed."""

import contextlib
import shutil

import numpy as np
import pytest

from kaun.checkpoint import Directory
from kaun.checkpoint.folders import scan
from kaun.checkpoint.store import Store

SAVES = [(3, 13), (4, 14)]
SETTINGS = {"keep": 9, "resume": 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, quick_disk, state_of):
    """Steps 1 to 4, and step 4 a second time."""
    path = tmp_path_factory.mktemp("back") / "runs"
    with Store.open(Directory(path, keep=9), quick_disk()) as store:
        for step in (1, 2, 3, 4):
            store.save(step, state_of(step), {"a": np.arange(step)}, {})
    shutil.copytree(path / "step-00000004", path / "step-00000004.1")
    return path


def session(disk, path, state_of, done):
    """A run that goes back to step 2, and saves twice. ``done`` gets what is safe."""
    store = Store.open(Directory(path, **SETTINGS), disk)
    try:
        assert store.newest(state_of(99)).step == 2
        for step, seed in SAVES:
            store.save(step, state_of(seed), {"a": np.arange(step)}, {"branch": 2})
            store.join()
            done.append((step, seed))
    finally:
        store._lock.release()  # as the system does for the dead


@pytest.mark.parametrize(("how", "short"), [pytest.param("kill", 1, marks=pytest.mark.slow), ("half", 2), ("error", 1)])
def test_stopped_at_every_operation(
    tmp_path, prepared, stopping, killed, quick_disk, state_of, bytes_of, cases, how, short
):
    """The next start of the same script: from the newest step of the new branch, from step 2 where there is none."""
    shutil.copytree(prepared, tmp_path / "whole")
    whole = stopping(None, how)
    session(whole, tmp_path / "whole", state_of, [])
    operations = whole.done
    places = [at for at, name in enumerate(operations) if how != "half" or name == "write"]
    old = {found.path.name: bytes_of(state_of(found.step)) for found in scan(quick_disk(), prepared)}
    for at in cases.some(places, short, kind=lambda at: operations[at]):
        path, done = tmp_path / f"{at}", []
        shutil.copytree(prepared, path)
        disk = stopping(at, how)
        with contextlib.suppress(killed, OSError):
            session(disk, path, state_of, done)
        assert disk.dead or disk.failed, f"operation {at} was not reached"
        possible = [done[-1] if done else (2, 2), *SAVES[len(done) : len(done) + 1]]
        with Store.open(Directory(path, **SETTINGS), quick_disk()) as store:
            saved = store.newest(state_of(99))
            assert (saved.step, bytes_of(saved.state)) in [(step, bytes_of(state_of(seed))) for step, seed in possible]
            store.save(50, state_of(50), {}, {"branch": 2})
            store.join()
            assert store.newest(state_of(99)).step == 50
        new = [seed for _, seed in SAVES[: 0 if saved.step == 2 else saved.step - 2]]
        there = {
            found.step: bytes_of(Directory(path).load(state_of(99), at=found.step))
            for found in scan(quick_disk(), path)
        }
        assert there == {int(state_of(seed).step) % 10 or 50: bytes_of(state_of(seed)) for seed in (1, 2, *new, 50)}
        # Each of the other branch is whole, under the name that says so.
        for name in ("step-00000003", "step-00000004", "step-00000004.1"):
            (path / f"aside-{name}").rename(path / "moved")
            (path / "moved").rename(tmp_path / name)
            assert bytes_of(Directory(tmp_path).load(state_of(99))) == old[name]
            shutil.rmtree(tmp_path / name)
        shutil.rmtree(path)
