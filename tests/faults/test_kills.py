"""A run that is killed, or meets an error, at any operation on a file: the next one finds the last save, or the one before."""

import contextlib
import shutil
import warnings

import numpy as np
import pytest

from kaun.checkpoint import Best, Directory, one
from kaun.checkpoint.folders import scan
from kaun.checkpoint.store import Store


def record(step, *extra):
    return {"best": Best("score", "max", float(step), step, extra).fact()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, quick_disk, state_of):
    """A directory of steps 1, the best one, and 2, a damaged step 3, and what a killed save left behind."""
    path = tmp_path_factory.mktemp("prepared") / "runs"
    with Store.open(Directory(path, keep=3), quick_disk()) as store:
        for step in (1, 2, 3):
            store.save(step, state_of(step), {"a": np.arange(step)}, record(1, 1))
    damaged = path / "step-00000003" / one.STATE
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (path / ".kaun-00000000000000ff.tmp").mkdir()
    (path / ".kaun-00000000000000ff.tmp" / one.STATE).write_bytes(b"half")
    return path


# The step and the seed of the state of each save of a session; the third takes the place of the one before.
SAVES = [(3, 13), (4, 14), (4, 24), (5, 15)]
RECORDS = {
    13: (3, 1, 3),
    14: (3, 3),
    24: (3, 3),
    15: (5, 5, 3),
}  # the best step, and those saved for that alone, by seed
SEEDS = {1: 1, 3: 13, 5: 15}  # of the best steps
SETTINGS = {"keep": 2, "forever": 4}


def session(disk, path, state_of, done):
    """A run: finds a damaged checkpoint, goes on from the one before, saves four times. ``done`` gets what is safe."""
    store = Store.open(Directory(path, **SETTINGS), disk)
    try:
        done.append((2, 2))
        assert store.newest(state_of(99)).step == 2
        for step, seed in SAVES:
            store.save(step, state_of(seed), {"a": np.arange(step)}, record(*RECORDS[seed]))
            store.join()
            done.append((step, seed))
    finally:
        store._lock.release()  # as the system does for the dead


def check(path, quick_disk, state_of, bytes_of, done):
    """The next run: finds the last save that was safe, or the one that was being written, and the best one as of that.

    Nothing else is left over.
    """
    possible = [done[-1] if done else (2, 2)]
    if len(done) <= len(SAVES):
        possible.append(SAVES[max(0, len(done) - 1)])
    with Store.open(Directory(path, **SETTINGS), quick_disk()) as store, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        planted = (path / "step-00000003" / one.STATE).exists() and not (path / "damaged-step-00000003").exists()
        saved = store.newest(state_of(99))
        bad = [w for w in warned if not (planted and "step-00000003: state.safetensors: it has" in str(w.message))]
        assert not bad, [str(w.message) for w in bad]
        step, _ = next((pair for pair in possible if bytes_of(state_of(pair[1])) == bytes_of(saved.state)), (0, 0))
        assert step == saved.step, f"found step {saved.step}, possible were {possible}"
        assert saved.reports["a"].tolist() == list(range(step))
        assert set(Directory(path).steps()) == {found.step for found in scan(quick_disk(), path)}
        best = Best.of(saved.facts)
        assert store.check_best(best) == ""
        assert bytes_of(Directory(path).load(state_of(99), at="best")) == bytes_of(state_of(SEEDS[best.step]))
        store.save(50, state_of(50), {}, saved.facts)
        store.join()
        assert bytes_of(store.newest(state_of(99)).state) == bytes_of(state_of(50))
        assert bytes_of(Directory(path).load(state_of(99), at="best")) == bytes_of(state_of(SEEDS[best.step]))
    left = {entry.name for entry in path.iterdir()} - {found.path.name for found in scan(quick_disk(), path)}
    assert left <= {".kaun-lock", "damaged-step-00000003"}
    ordinary = {step for step in (2, 4, 50) if step <= saved.step or step == 50}
    expected = {best.step, *sorted(ordinary)[-2:], *(ordinary & {4})}
    assert sorted(found.step for found in scan(quick_disk(), path)) == sorted(expected)


@pytest.fixture(scope="module")
def operations(tmp_path_factory, prepared, stopping, kinds_of_operations, state_of):
    """The names of the operations of a whole session, in their order."""
    path = tmp_path_factory.mktemp("operations") / "runs"
    shutil.copytree(prepared, path)
    disk, done = stopping(None, "kill"), []
    with pytest.warns(UserWarning, match="the run resumes from step 2"):
        session(disk, path, state_of, done)
    assert done[1:] == SAVES
    assert Directory(path).steps() == [2, 4, 5]
    assert len(disk.done) > 100 and set(disk.done) == kinds_of_operations
    return disk.done


@pytest.mark.parametrize(("how", "short"), [("kill", 2), ("half", 6), pytest.param("error", 2, marks=pytest.mark.slow)])
def test_stopped_at_every_operation(
    tmp_path, prepared, stopping, killed, quick_disk, state_of, bytes_of, operations, cases, how, short
):
    """In the short form at some operations of each name; half of an operation is done by writes only."""
    outcomes = {"old": 0, "new": 0}
    places = [at for at, name in enumerate(operations) if how != "half" or name == "write"]
    for at in cases.some(places, short, kind=lambda at: operations[at]):
        path = tmp_path / f"{at}"
        shutil.copytree(prepared, path)
        disk, done = stopping(at, how), []
        with warnings.catch_warnings(), contextlib.suppress(killed, OSError):
            warnings.simplefilter("ignore")
            session(disk, path, state_of, done)
        assert disk.dead or disk.failed, f"operation {at} was not reached"
        new = len(done) <= len(SAVES) and scan(quick_disk(), path)[0].step == SAVES[max(0, len(done) - 1)][0]
        outcomes["new" if new else "old"] += 1
        check(path, quick_disk, state_of, bytes_of, done)
        shutil.rmtree(path)
    print(f"faults: {how}: {outcomes}")


def test_an_error_at_any_operation_of_a_save_is_told_and_leaves_nothing(
    tmp_path, quick_disk, stopping, state_of, bytes_of, cases
):
    """An error that passes: the same store goes on, without what the failed save wrote."""
    count = None
    for at in [None, *cases.some(range(40), 3, kind=lambda at: at // 4)]:
        path = tmp_path / f"{at}"
        disk = stopping(None, "error")
        with Store.open(Directory(path, keep=1), disk) as store:
            store.save(1, state_of(1), {"a": np.arange(3)}, {})
            store.join()
            disk.done, disk.at = [], at
            store.save(2, state_of(2), {"a": np.arange(3)}, {})
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                try:
                    store.join()
                    told = None
                except OSError as err:
                    told = str(err)
            disk.at = None
            if count is None:
                count = len(disk.done)
                assert 20 < count < 40
                continue
            assert bool(told or warned) == (at < count)
            if told:
                assert "No space left on device. The newest checkpoint is of step 1." in told or "of step 2." in told
                assert "Free some space" in told
            saved = store.newest(state_of(99))
            assert bytes_of(saved.state) == bytes_of(state_of(saved.step))
            assert saved.step == 2 or told
            store.save(3, state_of(3), {}, {})
            store.join()
            names = sorted(entry.name for entry in path.iterdir())
            hidden = [name for name in names if name.startswith(".kaun-") and name != ".kaun-lock"]
            assert [name for name in names if name not in hidden] == [".kaun-lock", "step-00000003"]
            # Only what was being removed when the error came may be left, until the next start.
            assert len(hidden) <= (disk.failed in ("remove", "remove_folder", "entries"))
