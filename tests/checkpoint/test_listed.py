"""What a save costs where many checkpoints are kept, and folders that somebody else adds or removes meanwhile."""

import shutil

import pytest

from kaun.checkpoint import Best, Directory
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.store import Store


class Counting(Disk):
    """Counts operations, and each name that a listing returns."""

    def __init__(self):
        self.count = 0

    def sync(self, file):
        self.count += 1

    def sync_folder(self, path):
        self.count += 1


def counted(name):
    def operation(self, *arguments):
        found = getattr(Disk, name)(self, *arguments)
        self.count += 1 + (len(found) if name == "entries" else 0)
        return found

    return operation


for name in ("make_folder", "create", "write", "close", "rename", "remove", "remove_folder", "entries", "open"):
    setattr(Counting, name, counted(name))


def names(path):
    return sorted(p.name for p in path.iterdir() if not p.name.startswith("."))


@pytest.mark.parametrize("kind", ["room", "full", "forever", "best"])
def test_a_save_costs_the_same_however_many_are_kept(tmp_path, make, kind):
    """Every step is kept, to look at the training afterwards: at 10,000 kept ones a save took 2.5 s, and more each."""
    settings = {"full": {}, "room": {"keep": 1000}, "forever": {"keep": 1, "forever": 1}, "best": {"keep": 1000}}[kind]
    costs = []
    for kept in (5, 300):
        path, disk = tmp_path / str(kept), Counting()
        path.mkdir()
        for step in range(kept):
            (path / f"step-{step:08d}").mkdir()
        with Store.open(Directory(path, **{"keep": kept, **settings}), disk) as store:
            for step in range(kept, kept + 3):
                before = disk.count
                best = Best("score", "max", 1.0, step, (step, step - 1))
                store.save(step, make(1), {}, {"best": best.fact()} if kind == "best" else {})
                store.join()
            costs.append(disk.count - before)
        assert len(names(path)) == {"full": kept, "best": kept}.get(kind, kept + 3)
    assert costs[0] == costs[1]


def test_a_folder_that_somebody_puts_there_is_not_overwritten(tmp_path, disk, make):
    with Store.open(Directory(tmp_path), disk) as store:
        store.save(1, make(1), {}, {})
        store.join()
        (tmp_path / "step-00000002").mkdir()
        (tmp_path / "step-00000002" / "notes").write_text("mine")
        store.save(2, make(2), {}, {})
        store.join()
        assert "step-00000002.1" in names(tmp_path)


def test_a_kept_one_that_somebody_removes_ends_no_run(tmp_path, disk, make, recwarn):
    with Store.open(Directory(tmp_path, keep=2), disk) as store:
        for step in (1, 2):
            store.save(step, make(step), {}, {})
            store.join()
        shutil.rmtree(tmp_path / "step-00000001")
        for step in (3, 4):
            store.save(step, make(step), {}, {})
            store.join()
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    assert not recwarn.list


def test_steps_in_any_order_are_kept_by_number(tmp_path, disk, make):
    with Store.open(Directory(tmp_path, keep=2), disk) as store:
        for step in (5, 3, 9, 9, 4):
            store.save(step, make(step), {}, {})
            store.join()
    assert names(tmp_path) == ["step-00000005", "step-00000009.1"]


# The best one, and those that are kept for ever


def record(step, *extra):
    return {"best": Best("score", "max", 1.0, step, extra).fact()}


def test_the_best_one_stays_and_is_not_counted(tmp_path, disk, make):
    with Store.open(Directory(tmp_path, keep=2), disk) as store:
        for step in (1, 2, 3, 4, 5):
            store.save(step, make(step), {}, record(2) if step >= 2 else {})
        store.join()
        assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
        store.save(6, make(6), {}, record(6))
        store.join()
        assert names(tmp_path) == ["step-00000004", "step-00000005", "step-00000006"]


def test_one_that_was_saved_for_that_alone_goes_when_another_is_better(tmp_path, disk, make):
    with Store.open(Directory(tmp_path, keep=3), disk) as store:
        for step, facts in [(1, {}), (2, record(2, 2)), (3, record(2, 2)), (4, record(4, 2, 4)), (5, record(4, 4))]:
            store.save(step, make(step), {}, facts)
        store.join()
    assert names(tmp_path) == [f"step-{step:08d}" for step in (1, 3, 4, 5)]


def test_one_that_a_killed_run_did_not_remove_is_removed_by_the_next(tmp_path, disk, make):
    for step in (1, 2, 4):
        (tmp_path / f"step-{step:08d}").mkdir()
    with Store.open(Directory(tmp_path, keep=9), disk) as store:
        store.save(5, make(5), {}, record(4, 2, 4))
    assert names(tmp_path) == [f"step-{step:08d}" for step in (1, 4, 5)]


def test_multiples_of_forever_stay_and_may_be_written_again(tmp_path, disk, make):
    with Store.open(Directory(tmp_path, keep=1, forever=3), disk) as store:
        for step in (1, 2, 3, 4, 6, 7, 8):
            store.save(step, make(step), {}, record(4) if step >= 4 else {})
        store.join()
        assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 4, 6, 8)]
        store.save(6, make(6), {}, record(4))
        store.join()
        assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000006.1", "step-00000008"]


def test_a_best_one_of_another_edition_takes_its_place(tmp_path, disk, make):
    with Store.open(Directory(tmp_path, keep=1), disk) as store:
        store.save(3, make(3), {}, record(3, 3))
        store.save(3, make(3), {}, record(3))
        store.save(4, make(4), {}, record(3))
    assert names(tmp_path) == ["step-00000003.1", "step-00000004"]


def test_a_best_one_that_was_not_written_removes_nothing(tmp_path, disk, make):
    """The first save of a run, which has listed the directory, fails; the best one is still the one before."""

    class Full(type(disk)):
        full = True

        def rename(self, path, to):
            if self.full and to.name.startswith("step-"):
                raise OSError(28, "No space left on device")
            super().rename(path, to)

    (tmp_path / "step-00000001").mkdir()
    full = Full()
    with Store.open(Directory(tmp_path, keep=9), full) as store:
        store.save(5, make(5), {}, record(5, 1, 5))
        with pytest.raises(OSError, match="could not be written"):
            store.join()
        full.full = False
        store.save(6, make(6), {}, record(1, 1))
    assert names(tmp_path) == ["step-00000001", "step-00000006"]
