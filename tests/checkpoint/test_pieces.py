"""Large files: their sums are of pieces that several threads hash, older sums are read, and memory is shared in blocks."""

import functools
import hashlib
import json
import queue
import re
import sys
import threading
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun.checkpoint import disk as disks
from kaun.checkpoint import manifest, one, strict_json
from kaun.checkpoint.hashed import FileContent
from kaun.checkpoint.parts import Share
from kaun.checkpoint.safetensors_header import Memory
from kaun.checkpoint.workers import Workers

PIECE = 4 << 20
TEXT = '"reports":{},"facts":{}'


def large_state(make, seed):
    """Arrays that are larger and smaller than a piece, one that ends within it, and an empty one."""
    sizes = [*(200_003 + i for i in range(9)), 1_200_001, 0, 1_048_576]
    return make(seed).replace(opt_state=[np.arange(seed, n + seed, dtype=np.float32) for n in sizes])


@pytest.fixture
def written(disk, tmp_path, make):
    """The folder of a checkpoint of 16.2 MB, and its manifest."""
    one.Draft(7, large_state(make, 3), {"a": np.zeros(3)}, {}).write(disk, tmp_path / "step-00000007")
    return tmp_path / "step-00000007", json.loads((tmp_path / "step-00000007" / one.MANIFEST).read_bytes())


def seal(folder, records, version):
    """A manifest of a format, whatever its records are."""
    raw = manifest.sealed(7, {name: manifest.FileDigest(**record) for name, record in records.items()}, TEXT)
    raw = re.sub(rb'"kaun":[0-9]', b'"kaun":%d' % version, raw[: raw.rindex(b'"sha256":"') + 10], count=1)
    (folder / one.MANIFEST).write_bytes(raw + hashlib.sha256(raw).hexdigest().encode() + b'"}\n')


def crcs(raw):
    return [zlib.crc32(raw[at : at + PIECE]).to_bytes(4, "big").hex() for at in range(0, len(raw), PIECE)]


def of_format(version, raw):
    """The record of a large file in an earlier format."""
    if version < 3:
        return {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    sums = [hashlib.sha256(raw[at : at + PIECE]).digest() for at in range(0, len(raw), PIECE)]
    return {"size": len(raw), "sha256": hashlib.sha256(b"".join(sums)).hexdigest(), "piece": PIECE}


def test_anyone_can_check_the_sums_of_the_pieces(written):
    folder, about = written
    raw = (folder / one.STATE).read_bytes()
    assert about["kaun"] == 4 and len(crcs(raw)) == 4
    assert about["files"][one.STATE] == {"size": len(raw), "crc32": "".join(crcs(raw)), "piece": PIECE}
    assert about["files"][one.REPORTS].keys() == {"size", "sha256"}


def test_it_comes_back_and_no_piece_may_be_damaged(written, disk, make, same):
    folder, _ = written
    found = one.read(disk, folder, 7, large_state(make, 4))
    assert same(found.state, large_state(make, 3)) and found.reports["a"].tolist() == [0, 0, 0]
    raw = bytearray((folder / one.STATE).read_bytes())
    state = [f"opt_state.{i}" for i in (0, 1, 11, 2, 3, 4, 5, 6, 7, 8, 9)]
    where = {
        9: ["header"],
        PIECE - 1: ["their CRC-32 differs in its header", *state[:3]],
        PIECE: ["their CRC-32 differs in 'opt_state.11", *state[3:6]],
        2 * PIECE + 5: ["their CRC-32 differs in 'opt_state.5", *state[7:10]],
        len(raw) - 1: [
            "their CRC-32 differs in 'opt_state.9', 'vars.params.bias', 'vars.params.weight', 'key', 'step'"
        ],
    }
    for at, texts in where.items():
        raw[at] ^= 1
        (folder / one.STATE).write_bytes(raw)
        raw[at] ^= 1
        for act in (lambda: one.verify(disk, folder, 7), lambda: one.read(disk, folder, 7, large_state(make, 4))):
            with pytest.raises(one.Damaged, match=r"^state\.safetensors: ") as caught:
                act()
            assert all(text in str(caught.value) for text in texts)


@pytest.mark.parametrize("version", [1, 3])
def test_a_file_of_an_earlier_format_is_read_and_verified(written, disk, make, same, version):
    folder, _ = written
    raw = bytearray((folder / one.STATE).read_bytes())
    seal(folder, {one.STATE: of_format(version, raw)}, version)
    assert same(one.read(disk, folder, 7, large_state(make, 4)).state, large_state(make, 3))
    raw[-1] ^= 1
    (folder / one.STATE).write_bytes(raw)
    with pytest.raises(one.Damaged, match="their SHA-256 differs"):
        one.verify(disk, folder, 7)


def test_another_record_is_refused(written, disk):
    folder, about = written
    sums = about["files"][one.STATE]["crc32"]
    crc = {"crc32": sums, "sha256": None}
    record = of_format(3, (folder / one.STATE).read_bytes())
    cases = [
        *((3, {"piece": piece}) for piece in (0, 1000, True, "4194304", 4194304.0)),
        *((1, {}), (4, {}), (3, crc), (4, {"crc32": sums}), (4, crc | {"piece": None})),
        *((4, crc | {"crc32": other}) for other in (sums[:-8], sums[:-1] + "X", sums[:-1] + "\n", 5)),
    ]
    for version, change in cases:
        seal(folder, {one.STATE: record | change}, version)
        with pytest.raises(one.Damaged, match="its entries of files are not those of a manifest"):
            one.verify(disk, folder, 7)
    seal(folder, {one.STATE: record | crc}, 4)
    one.verify(disk, folder, 7)


def test_the_sums_of_a_large_file_have_room_in_the_manifest(make, monkeypatch):
    state, text = make(3).replace(opt_state=[np.zeros(16 << 20, np.uint8)]), "x" * 1000
    used = len('"reports":{"a":""},"facts":{}') + len(text) + one._RECORDS
    monkeypatch.setattr(strict_json, "LARGEST", used + 40)
    one.Draft(7, state, {"a": text}, {})
    monkeypatch.setattr(strict_json, "LARGEST", used + 20)
    with pytest.raises(ValueError, match=r"take 1029 bytes as JSON, and at most"):
        one.Draft(7, state, {"a": text}, {})


def test_parts_have_pieces_too(disk, tmp_path, make, same):
    folder = tmp_path / "step-00000007"
    one.Draft(7, large_state(make, 3), {}, {}, Share(0, 1)).write(disk, folder)
    about = one.verify(disk, folder, 7)
    assert about.leaves is not None and [record.piece for record in about.files.values()] == [PIECE]
    assert b'{"kaun":4,' in (folder / one.MANIFEST).read_bytes()
    assert same(one.read(disk, folder, 7, large_state(make, 4)).state, large_state(make, 3))


def test_arrays_of_a_large_file_share_blocks_and_no_byte():
    memory, sizes = Memory(40 << 20), [100, 4_000_000, 1, 0, 64, 4_000_000, 4_000_000, 4_000_000, 4_000_000, 4 << 20]
    taken = [memory.take(size) for size in sizes]
    for i, array in enumerate(taken):
        array[:] = i
    assert [array.size for array in taken] == sizes
    assert all((array == i).all() for i, array in enumerate(taken))
    assert all(array.ctypes.data % 64 == 0 for array in taken if array.size)
    owners = [array.base.ctypes.data for array in taken]
    assert len(set(owners)) == 3 and owners.count(owners[-1]) == 1  # two blocks, and one that is large enough
    alone = [Memory(1 << 20).take(size) for size in (100, 200)]
    assert alone[0].base is not alone[1].base


def test_all_tasks_are_done_and_an_error_is_raised_at_the_end():
    done: list[int] = []
    with Workers(2) as workers:
        for i in range(100):
            workers.put(functools.partial(done.append, i))
        workers.finish()
    assert sorted(done) == list(range(100))
    begun = threading.Event()
    with Workers(1) as workers:
        workers.put(begun.wait)
        workers.put([].pop)
        workers.put(functools.partial(done.append, 100))
        begun.set()
        with pytest.raises(IndexError, match="pop from empty list"):
            workers.finish()
    assert 100 not in done  # what is left is not read where the file is damaged
    with Workers(0) as workers:
        workers.put(functools.partial(done.append, -1))
        assert done[-1] == -1


def test_each_thread_ends_whichever_takes_the_end_first(monkeypatch):
    class Slow(queue.SimpleQueue):
        def put(self, item):
            super().put(item)
            if item is None:
                time.sleep(0.05)  # one thread takes it and ends meanwhile

    monkeypatch.setattr(queue, "SimpleQueue", Slow)
    workers, begun = Workers(2), threading.Event()
    held: dict[threading.Thread, threading.Event] = {}

    def hold():
        begun.wait()
        held[threading.current_thread()].wait()

    workers.put(hold)
    workers.put(hold)
    first, last = workers._threads
    held |= {first: threading.Event(), last: threading.Event()}
    begun.set()
    held[last].set()
    stopping = threading.Thread(target=workers.stop, daemon=True)
    stopping.start()
    last.join(5)
    held[first].set()
    stopping.join(5)
    assert not stopping.is_alive()


def test_where_no_thread_is_left_those_that_began_end(monkeypatch):
    start, started = threading.Thread.start, []

    def one_alone(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", one_alone)
    with pytest.raises(RuntimeError, match="can't start new thread"), Workers(2) as workers:
        workers.put(int)
        workers.put(int)
    workers.stop()
    assert len(started) == 1 and not started[0].is_alive()


def test_a_thread_that_ctrl_c_interrupts_while_it_starts_ends(monkeypatch):
    start, started = threading.Thread.start, []

    def interrupted(thread):
        start(thread)
        started.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), Workers(1) as workers:
        workers.put(int)
    started[0].join(5)
    assert not started[0].is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such call")
def test_the_disk_begins_before_it_is_waited_for(tmp_path, monkeypatch):
    disk, begun = disks.Disk(), []
    begin = disks.begin_sync
    monkeypatch.setattr(disks, "begin_sync", lambda file: begun.append(begin(file)))
    file = disk.create(tmp_path / "f")
    disk.write(file, memoryview(bytes(1000)))
    assert begun == []
    disk.write(file, memoryview(bytes(2_000_000)))
    assert begun == [True]
    disk.close(file)
    assert not begin(file)  # nothing is raised: `sync` reports what is wrong


def test_a_draft_of_large_arrays_is_of_them_as_they_were(written, disk, tmp_path, make):
    folder, _ = written
    state = large_state(make, 3)
    arrays = [a if i == 9 else jnp.asarray(a) for i, a in enumerate(state.opt_state)]
    draft = one.Draft(7, state.replace(opt_state=arrays), {"a": np.zeros(3)}, {})
    for array in arrays:
        if isinstance(array, np.ndarray):
            array[:] = 9
        else:
            jax.jit(lambda a: a * 0 - 5, donate_argnums=0)(array).block_until_ready()
    del array, arrays
    draft.write(disk, tmp_path / "again")
    assert (tmp_path / "again" / one.STATE).read_bytes() == (folder / one.STATE).read_bytes()


def test_large_jax_arrays_are_not_copied_for_a_draft():
    array = jnp.ones((1 << 19,))
    content = FileContent({"a": array})
    assert any(np.shares_memory(np.asarray(array), np.frombuffer(part, np.uint8)) for part in content._parts if part)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(5, one.Damaged), (13, PermissionError), (None, one.Damaged)],
    ids=["EIO", "EACCES", "short"],
)
def test_what_a_thread_cannot_read(written, disk, make, number, expected):
    folder, _ = written

    class Broken(type(disk)):
        def read_at(self, file, at, into):
            if len(into) < 1000 or number is None:
                return max(0, super().read_at(file, at, into) - (len(into) > 1000))
            raise OSError(number, "no")

    before = threading.active_count()
    with pytest.raises(expected, match=r"no|ends early"):
        one.read(Broken(), folder, 7, large_state(make, 4))
    assert threading.active_count() == before
