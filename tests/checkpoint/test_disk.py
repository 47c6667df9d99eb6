"""The file layer does what its docstrings say, on the real disk."""

import os
import stat

import pytest

from kaun.checkpoint.disk import Disk, Entry

disk = Disk()
posix = pytest.mark.skipif(os.name == "nt", reason="links, pipes and descriptors of POSIX")


def test_bytes_are_written_whole_and_read_whole(tmp_path):
    data = os.urandom(40_000_000)  # more than one write and one read take
    file = disk.create(tmp_path / "f")
    disk.write(file, memoryview(data)[:10])
    disk.write(file, memoryview(b""))
    disk.write(file, memoryview(data)[10:])
    disk.sync(file)
    disk.close(file)
    file, size = disk.open(tmp_path / "f")
    assert size == len(data)
    into = bytearray(size + 5)
    assert disk.read(file, memoryview(into)) == size
    assert into == data + bytes(5)
    assert disk.read(file, memoryview(bytearray(3))) == 0
    disk.close(file)


def test_reading_goes_on_where_it_stopped(tmp_path):
    (tmp_path / "f").write_bytes(b"abcdef")
    file, _ = disk.open(tmp_path / "f")
    first, second = bytearray(4), bytearray(4)
    assert (disk.read(file, memoryview(first)), disk.read(file, memoryview(second))) == (4, 2)
    assert (first, second) == (b"abcd", b"ef\0\0")
    disk.close(file)


@pytest.mark.parametrize("missing", [False, True])
def test_reading_at_a_place(tmp_path, monkeypatch, missing):
    if missing:
        monkeypatch.delattr(os, "preadv", raising=False)
    (tmp_path / "f").write_bytes(b"abcdef")
    file, _ = disk.open(tmp_path / "f")
    last, first = bytearray(4), bytearray(2)
    assert (disk.read_at(file, 3, memoryview(last)), disk.read_at(file, 0, memoryview(first))) == (3, 2)
    assert (last, first) == (b"def\0", b"ab")
    disk.close(file)


def test_without_readv_the_bytes_are_the_same(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "readv", raising=False)
    test_reading_goes_on_where_it_stopped(tmp_path)


def test_nothing_that_is_there_is_written_over(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    (tmp_path / "d").mkdir()
    for act in (lambda: disk.create(tmp_path / "f"), lambda: disk.make_folder(tmp_path / "d")):
        with pytest.raises(FileExistsError):
            act()
    (tmp_path / "d" / "x").touch()
    (tmp_path / "e").mkdir()
    with pytest.raises(OSError, match=r"."):
        disk.rename(tmp_path / "e", tmp_path / "d")
    assert (tmp_path / "f").read_bytes() == b"old"


def test_folders(tmp_path):
    disk.make_folder(tmp_path / "a")
    disk.sync_folder(tmp_path)
    disk.rename(tmp_path / "a", tmp_path / "b")
    disk.close(disk.create(tmp_path / "b" / "f"))
    with pytest.raises(OSError, match=r"."):
        disk.remove_folder(tmp_path / "b")
    disk.remove(tmp_path / "b" / "f")
    disk.remove_folder(tmp_path / "b")
    assert disk.entries(tmp_path) == []
    assert disk.free(tmp_path) > 0
    with pytest.raises(FileNotFoundError):
        disk.entries(tmp_path / "absent")


@posix
def test_links_are_neither_folders_nor_files_and_are_not_followed(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_bytes(b"secret")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    (tmp_path / "d").symlink_to(tmp_path / "b")
    assert disk.entries(tmp_path) == [
        Entry("a", False, True),
        Entry("b", True, False),
        Entry("c", False, False),
        Entry("d", False, False),
    ]
    with pytest.raises(OSError, match=r"."):
        disk.open(tmp_path / "c")
    (tmp_path / "e").symlink_to(tmp_path / "absent")
    with pytest.raises(OSError, match=r"."):
        disk.create(tmp_path / "e")
    disk.remove(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == b"secret"


@posix
def test_only_plain_files_are_opened_and_nothing_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="pipe' is not a plain file"):
        disk.open(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="' is not a plain file"):
        disk.open(tmp_path)


@posix
def test_files_and_folders_have_the_permissions_of_any_new_ones(tmp_path):
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    disk.close(disk.create(tmp_path / "f"))
    disk.make_folder(tmp_path / "d")
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == stat.S_IMODE((tmp_path / "folder").stat().st_mode)


@posix
def test_files_are_synced_and_not_inherited(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd))[1])
    file = disk.create(tmp_path / "f")
    assert not os.get_inheritable(file)
    disk.sync(file)
    disk.sync_folder(tmp_path)
    disk.close(file)
    if not hasattr(__import__("fcntl"), "F_FULLFSYNC"):
        assert synced == [(tmp_path / "f").stat().st_ino, tmp_path.stat().st_ino]
