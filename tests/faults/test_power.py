"""A loss of power: what was not synced may be missing, incomplete or zeros, renamed or not. Nothing saved is lost.

The model is harsher than file systems are: of the operations on a folder's names since its last sync any subset may have
happened, and of a file's bytes since its last sync nothing, some, or zeros may be there.
"""

import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from kaun.checkpoint import Best, Directory
from kaun.checkpoint.folders import scan
from kaun.checkpoint.store import Store

SAVES = [(1, 11), (2, 12), (3, 13), (3, 23), (4, 14), (5, 15)]
RECORDS = {11: (1,), 12: (2, 2), 13: (2, 2), 23: (2, 2), 14: (4, 4, 2), 15: (4, 4)}  # the best step, by seed
SEEDS = {1: 11, 2: 12, 4: 14}  # of the best steps


def facts(seed):
    step, *extra = RECORDS[seed]
    return {"seed": seed, "best": Best("score", "max", float(step), step, tuple(extra)).fact()}


MODES = ["nothing that was not synced", "names and no bytes", "names and zeros", "everything", "random"]


class File:
    def __init__(self):
        self.data, self.synced = b"", b""

    def after(self, mode, draw):
        choices = {
            "nothing that was not synced": self.synced,
            "names and no bytes": self.synced,
            "names and zeros": self.synced + bytes(len(self.data) - len(self.synced)),
            "everything": self.data,
        }
        half = self.data[: draw.randint(len(self.synced), len(self.data))]
        return choices[draw.choice(MODES[:-1]) if mode == "random" else mode] if draw.random() < 0.7 else half


class Folder:
    def __init__(self):
        self.entries, self.synced, self.pending = {}, {}, []

    def change(self, *what):
        self.pending.append(what)
        apply(self.entries, what)

    def after(self, mode, draw):
        entries = dict(self.synced)
        for what in self.pending:
            if mode == "random":
                happened = draw.random() < 0.5
            else:
                happened = mode != MODES[0]
            if happened:
                apply(entries, what)
        return entries


def apply(entries, what):
    match what:
        case ("add", name, node):
            entries[name] = node
        case ("drop", name):
            entries.pop(name, None)
        case ("move", name, to, node):
            entries.pop(name, None)
            entries[to] = node


@pytest.fixture(scope="module")
def recording(quick_disk):
    """A disk that does what it is told, and keeps what a loss of power could undo."""

    class Recording(quick_disk):
        def __init__(self, root):
            self.root, self.log, self.files = root, [], {}

        def _note(self, operation, *arguments):
            self.log.append((operation, *(a.relative_to(self.root) if hasattr(a, "parts") else a for a in arguments)))

        def make_folder(self, path):
            super().make_folder(path)
            self._note("make_folder", path)

        def create(self, path):
            file = super().create(path)
            self.files[file] = path
            self._note("create", path, file)
            return file

        def write(self, file, data):
            super().write(file, data)
            self._note("write", file, bytes(data))

        def sync(self, file):
            self._note("sync", file)

        def sync_folder(self, path):
            self._note("sync_folder", path)

        def rename(self, path, to):
            super().rename(path, to)
            self._note("rename", path, to)

        def remove(self, path):
            super().remove(path)
            self._note("remove", path)

        def remove_folder(self, path):
            super().remove_folder(path)
            self._note("remove", path)

    return Recording


def replay(log):
    """The folder in which all of this happened."""
    root, files = Folder(), {}

    def at(path):
        node = root
        for part in path.parts:
            node = node.entries[part]
        return node

    for operation, *arguments in log:
        match operation, arguments:
            case "make_folder", (path,):
                at(path.parent).change("add", path.name, Folder())
            case "create", (path, file):
                files[file] = File()
                at(path.parent).change("add", path.name, files[file])
            case "write", (file, data):
                files[file].data += data
            case "sync", (file,):
                files[file].synced = files[file].data
            case "sync_folder", (path,):
                folder = at(path)
                folder.synced, folder.pending = dict(folder.entries), []
            case "rename", (path, to):
                assert path.parent == to.parent
                at(path.parent).change("move", path.name, to.name, at(path))
            case "remove", (path,):
                at(path.parent).change("drop", path.name)
            case "safe", _:
                pass
            case _:
                raise AssertionError(operation)
    return root


def materialize(node, path, mode, draw):
    if isinstance(node, File):
        path.write_bytes(node.after(mode, draw))
        return
    path.mkdir()
    for name, inner in node.after(mode, draw).items():
        materialize(inner, path / name, mode, draw)


@pytest.fixture(scope="module")
def log(tmp_path_factory, recording, state_of):
    """What a run did to its disk, with a mark after each save that was told to be done."""
    root = tmp_path_factory.mktemp("power")
    disk = recording(root)
    with Store.open(Directory(root / "a" / "runs", keep=1), disk) as store:
        for step, seed in SAVES:
            store.save(step, state_of(seed), {"a": np.arange(step)}, facts(seed))
            store.join()
            disk.log.append(("safe", step, seed))
    return disk.log


def test_the_model_loses_what_was_not_synced():
    log = [
        ("make_folder", Path("d")),
        ("create", Path("d/f"), 3),
        ("write", 3, b"abc"),
        ("sync", 3),
        ("write", 3, b"d"),
    ]
    draw = random.Random(0)
    assert replay(log).after(MODES[0], draw) == {}
    folder = replay([*log, ("sync_folder", Path())]).after(MODES[0], draw)["d"]
    assert folder.after(MODES[0], draw) == {}
    file = replay([*log, ("sync_folder", Path("d"))]).entries["d"].after(MODES[0], draw)["f"]
    assert {file.after(MODES[0], draw) for _ in range(50)} == {b"abc", b"abcd"}
    assert b"abc\0" in {file.after("names and zeros", draw) for _ in range(50)}


@pytest.mark.parametrize(("mode", "short"), list(zip(MODES, [4, 2, 2, 1, 3], strict=True)))
def test_power_lost_after_every_operation(tmp_path, log, quick_disk, state_of, bytes_of, cases, mode, short):
    """In the short form after some operations of each name."""
    repeats = range(60 if mode == "random" else 3)
    places = [(end, repeat) for end in range(len(log) + 1) for repeat in repeats]
    for end, repeat in cases.some(places, short, kind=lambda place: log[place[0] - 1][0] if place[0] else None):
        path = tmp_path / f"{end}-{repeat}"
        materialize(replay(log[:end]), path, mode, random.Random(end * 1000 + repeat))
        safe = [entry[1:] for entry in log[:end] if entry[0] == "safe"]
        possible = [safe[-1] if safe else None, *SAVES[len(safe) : len(safe) + 1]]
        with Store.open(Directory(path / "a" / "runs"), quick_disk()) as store, warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing that was renamed to its place may be damaged
            saved = store.newest(state_of(99))
            if saved is None:
                assert None in possible
            else:
                found = {bytes_of(state_of(seed)): (step, seed) for step, seed in filter(None, possible)}
                step, seed = found[bytes_of(saved.state)]
                assert (saved.step, saved.facts) == (step, facts(seed))
                assert saved.reports["a"].tolist() == list(range(step))
                best = bytes_of(state_of(SEEDS[RECORDS[seed][0]]))
                assert bytes_of(Directory(path / "a" / "runs").load(state_of(99), at="best")) == best
            store.save(50, state_of(50), {}, {})
            store.join()
            assert store.newest(state_of(99)).step == 50
        names = [entry.name for entry in (path / "a" / "runs").iterdir()]
        hidden = [name for name in names if name.startswith(".kaun-") and name != ".kaun-lock"]
        assert not hidden
        assert scan(quick_disk(), path / "a" / "runs")
        shutil.rmtree(path)
