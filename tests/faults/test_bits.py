"""Damage to the files of a checkpoint: one flipped bit anywhere, truncation, deletion, swapped files. Never a wrong load."""

import itertools
import shutil
import warnings

import numpy as np
import pytest

from kaun.checkpoint import Best, Directory, one
from kaun.checkpoint.store import Store

FILES = [one.STATE, one.REPORTS, one.MANIFEST]
REPORTS = {"loss": np.arange(3, dtype=np.float32), "best": 0.25, "worst": float("inf"), "names": ["a", "b"]}
FACTS = {"data": [{"stage": "batches", "size": 64}], "jax": "0.10.2"}


@pytest.fixture
def runs(tmp_path, quick_disk, state_of):
    """A directory of two checkpoints."""
    with Store.open(Directory(tmp_path / "runs"), quick_disk()) as store:
        for step in (1, 2):
            best = Best("score", "max", 0.5, step).fact()  # each step was the best one when it was saved
            store.save(step, state_of(step), REPORTS, FACTS | {"best": best})
    return tmp_path / "runs"


@pytest.fixture
def refused(runs, quick_disk, state_of, bytes_of):
    """Says that step 2 cannot be loaded, nor as the best one: where its manifest is damaged, that is step 1."""
    disk, folder = quick_disk(), runs / "step-00000002"

    def refused():
        with pytest.raises(one.Damaged) as error:
            one.read(disk, folder, 2, state_of(99))
        with pytest.raises(one.Damaged):
            one.verify(disk, folder, 2)
        assert one.MANIFEST in str(error.value) or loads_no_best()
        return str(error.value)

    def loads_no_best():
        """A damaged file of reports is no reason to refuse the variables."""
        with pytest.raises(ValueError, match=r"is undamaged:\n  step-00000002: "):
            Directory(runs).load(state_of(99), at="best")
        return True

    return refused


@pytest.fixture
def falls_back(runs, quick_disk, state_of, bytes_of):
    """Says that a run resumes from step 1, with a warning, and leaves the directory as it was."""

    def falls_back():
        shutil.copytree(runs, copy := runs.parent / "copy")
        with Store.open(Directory(copy), quick_disk()) as store:
            with pytest.warns(UserWarning, match="resumes from step 1, because newer checkpoints are damaged"):
                saved = store.newest(state_of(99))
            assert (saved.step, bytes_of(saved.state)) == (1, bytes_of(state_of(1)))
            assert (copy / "damaged-step-00000002").is_dir()
        shutil.rmtree(copy)

    return falls_back


def test_one_flipped_bit_anywhere(runs, refused, falls_back, cases):
    whole = {name: (runs / "step-00000002" / name).read_bytes() for name in FILES}
    bits = [(name, i, bit) for name in FILES for i in range(len(whole[name])) for bit in range(8)]
    chosen = cases.some(bits, 6, kind=lambda case: (case[0], case[2]))
    assert {(name, bit) for name, _, bit in chosen} == {(name, bit) for name in FILES for bit in range(8)}
    for number, (name, i, bit) in enumerate(chosen):
        raw = bytearray(whole[name])
        raw[i] ^= 1 << bit
        path = runs / "step-00000002" / name
        path.write_bytes(raw)
        assert refused().startswith(f"{name}: ")
        if number % 48 == 0:
            falls_back()
        path.write_bytes(whole[name])
    assert Directory(runs).steps() == [1, 2]


def test_cut_short_or_grown_anywhere(runs, refused, falls_back, cases):
    whole = {name: (runs / "step-00000002" / name).read_bytes() for name in FILES}
    lengths = [(name, n) for name in FILES for n in range(len(whole[name]) + 20) if n != len(whole[name])]
    grown = lambda case: (case[0], case[1] > len(whole[case[0]]))
    for number, (name, n) in enumerate(cases.some(lengths, 12, kind=grown)):
        path = runs / "step-00000002" / name
        path.write_bytes(whole[name].ljust(n, b"\0")[:n])
        assert refused().startswith(f"{name}: ")
        if number % 12 == 0:
            falls_back()
        path.write_bytes(whole[name])


def test_any_files_deleted(runs, refused, falls_back):
    for count in (1, 2, 3):
        for names in itertools.combinations(FILES, count):
            gone = {name: (runs / "step-00000002" / name).read_bytes() for name in names}
            for name in names:
                (runs / "step-00000002" / name).unlink()
            assert "No such file" in refused()
            falls_back()
            for name, raw in gone.items():
                (runs / "step-00000002" / name).write_bytes(raw)


def test_any_files_of_another_checkpoint(runs, refused, falls_back):
    """All three are step 1's in step 2's folder; the manifest knows its step. The reports of both are the same bytes."""
    old, new = ({name: (runs / f"step-0000000{step}" / name).read_bytes() for name in FILES} for step in (1, 2))
    assert [name for name in FILES if old[name] == new[name]] == [one.REPORTS]
    taken = [names for n in (1, 2, 3) for names in itertools.combinations(FILES, n) if names != (one.REPORTS,)]
    for names in taken:
        for name in names:
            (runs / "step-00000002" / name).write_bytes(old[name])
        refused()
        falls_back()
        for name in names:
            (runs / "step-00000002" / name).write_bytes(new[name])


def test_files_of_one_checkpoint_under_each_others_names(runs, refused):
    whole = {name: (runs / "step-00000002" / name).read_bytes() for name in FILES}
    for order in itertools.permutations(FILES):
        if list(order) != FILES:
            for name, other in zip(FILES, order, strict=True):
                (runs / "step-00000002" / name).write_bytes(whole[other])
            refused()


def test_bytes_that_were_swapped_lost_or_doubled(runs, refused, cases):
    """Whole stretches: a block of the disk that came back as another one."""
    draw = np.random.default_rng(0)
    whole = {name: (runs / "step-00000002" / name).read_bytes() for name in FILES}
    for number in range(len(cases.some(range(2000), 4, kind=lambda number: number % 15))):
        name = FILES[number % 3]
        raw = bytearray(whole[name])
        size = int(draw.integers(1, 40))
        a, b = (int(draw.integers(0, len(raw) - size)) for _ in range(2))
        raw[a : a + size] = [bytes(size), raw[b : b + size], draw.bytes(size), b"", raw[a : a + size] * 2][number % 5]
        if bytes(raw) == whole[name]:
            continue
        (runs / "step-00000002" / name).write_bytes(raw)
        assert refused().startswith(f"{name}: ")
        (runs / "step-00000002" / name).write_bytes(whole[name])


def test_all_damaged_is_an_error_and_nothing_is_loaded(runs, quick_disk, state_of):
    for step in (1, 2):
        raw = bytearray((runs / f"step-0000000{step}" / one.STATE).read_bytes())
        raw[-1] ^= 128
        (runs / f"step-0000000{step}" / one.STATE).write_bytes(raw)
    with Store.open(Directory(runs), quick_disk()) as store, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"step-00000002: state.*SHA-256.*\n  step-00000001: state.*SHA-256"):
            store.newest(state_of(99))
