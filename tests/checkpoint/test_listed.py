"""What a save costs where many checkpoints are kept, and folders that somebody else adds or removes meanwhile."""

import shutil

import pytest

from kaun.checkpoint import Directory
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


@pytest.mark.parametrize("full", [False, True])
def test_a_save_costs_the_same_however_many_are_kept(tmp_path, make, full):
    """Every step is kept, to look at the training afterwards: at 10,000 kept ones a save took 2.5 s, and more each."""
    costs = []
    for kept in (5, 300):
        path, disk = tmp_path / str(kept), Counting()
        path.mkdir()
        for step in range(kept):
            (path / f"step-{step:08d}").mkdir()
        with Store.open(Directory(path, keep=kept if full else 1000), disk) as store:
            for step in range(kept, kept + 3):
                before = disk.count
                store.save(step, make(1), {}, {})
                store.join()
            costs.append(disk.count - before)
        assert len(names(path)) == (kept if full else kept + 3)
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
