"""Directory: a frozen value whose arguments are checked; its steps and its states."""

import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from kaun import checkpoint
from kaun.checkpoint import one
from kaun.checkpoint.directory import Directory
from kaun.checkpoint.folders import scan
from kaun.errors import ResumeMismatch


@pytest.fixture
def saved(disk, tmp_path, make):
    def saved(*steps, names=None):
        for step, name in zip(steps, names or [f"step-{step:08d}" for step in steps], strict=True):
            tmp_path.mkdir(exist_ok=True)
            one.Draft(step, make(step), {}, {}).write(disk, tmp_path / name)
        return Directory(tmp_path)

    return saved


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 4
    path.write_bytes(raw)


# The value


def test_defaults_and_equality(tmp_path):
    runs = checkpoint.Directory(str(tmp_path))
    assert (runs.path, runs.every, runs.keep, runs.resume, runs.accept) == (tmp_path, None, 3, "auto", frozenset())
    assert runs == Directory(tmp_path)
    assert len({runs, Directory(tmp_path), Directory(tmp_path, keep=2)}) == 2
    with pytest.raises(AttributeError):
        runs.keep = 5
    assert (runs.best, runs.forever) == (None, None)
    assert repr(Directory("a", every=5, accept=["data"], best=["mse", "min"], forever=9)) == (
        f"Directory(path={Path('a').absolute()!r}, every=5, keep=3, resume='auto', accept=frozenset({{'data'}}), "
        "best=('mse', 'min'), forever=9)"
    )


def test_making_one_touches_nothing(tmp_path):
    runs = Directory(tmp_path / "a").child("b")
    assert runs.steps() == []
    assert list(tmp_path.iterdir()) == []


def test_a_child_has_the_same_settings(tmp_path):
    settings = {
        "every": timedelta(minutes=1), "keep": 7, "resume": "must", "accept": {"data", "key"},
        "best": ("accuracy", "max"), "forever": 100,
    }  # fmt: skip
    for name in ["finetune", "a.b", "run 2", "x" * 100, "_", "größe", "stepwise", "damaged"]:
        assert Directory(tmp_path, **settings).child(name) == Directory(tmp_path / name, **settings)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "..",
            "a/b",
            "/a",
            "a\\b",
            "..\\a",
            ".hidden",
            "a.",
            " a",
            "a ",
            "a:b",
            "a\nb",
            "a\n",
            "a\0",
            "x" * 101,
        ),
        *(
            "step-00000001",
            "Step-1",
            "damaged-1",
            "damaged-1.2",
            "lock",
            "LOCK",
            "con",
            "nul.txt",
            "COM1",
            "~",
            "-a",
            "a*",
        ),
    ],
    ids=repr,
)
def test_what_is_no_name_for_a_folder(tmp_path, name):
    with pytest.raises(
        ValueError, match=r"Directory\.child: .* is not a name for a folder.*child\('a'\)\.child\('b'\)"
    ):
        Directory(tmp_path).child(name)


@pytest.mark.parametrize("name", [None, 3, Path("a"), b"a"], ids=repr)
def test_a_name_is_a_str(tmp_path, name):
    with pytest.raises(TypeError, match=r"Directory\.child expected a name, received .*child\('finetune'\)"):
        Directory(tmp_path).child(name)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"every": 0}, ValueError, r"every=0 steps is less than one\. Write every=None"),
        ({"every": -1}, ValueError, r"every=-1 steps"),
        (
            {"every": 1.0},
            TypeError,
            r"every expected a number of steps or a datetime.timedelta, received 1\.0\. Write every=500",
        ),
        ({"every": True}, TypeError, "received True"),
        ({"every": "5min"}, TypeError, r"received '5min'.*timedelta\(minutes=10\)"),
        (
            {"every": timedelta(0)},
            ValueError,
            r"every=datetime\.timedelta\(0\) is not a positive time\. Write every=timedelta\(minutes=10\)",
        ),
        ({"every": -timedelta(1)}, ValueError, "is not a positive time"),
        ({"keep": 0}, ValueError, r"keep=0 is less than 1, and the newest checkpoint is always kept\. Write keep=1"),
        ({"keep": None}, TypeError, r"keep expected an int, received None\. Write keep=3"),
        ({"keep": True}, TypeError, "keep expected an int, received True"),
        (
            {"resume": "maybe"},
            ValueError,
            r"resume expected 'auto', 'must', 'never', 'best' or a step, received 'maybe'\. Write .* resume=1200\.",
        ),
        ({"resume": True}, ValueError, "resume expected .*, received True"),
        ({"resume": 0}, ValueError, r"resume=0 is not a step of a checkpoint\. Write resume=1200"),
        ({"resume": 2.0}, ValueError, "resume expected .*, received 2.0"),
        (
            {"best": "accuracy"},
            TypeError,
            r"best expected a pair of .*, received 'accuracy'\. Write best=\('accuracy', 'max'\)",
        ),
        ({"best": ("a", "max", 3)}, TypeError, r"received \('a', 'max', 3\)"),
        ({"best": (3, "max")}, TypeError, r"received \(3, 'max'\)"),
        (
            {"best": ("loss", "least")},
            ValueError,
            r"best expected 'max' .* 'min' .* for 'loss', received 'least'\. Write",
        ),
        ({"forever": 1.5}, TypeError, r"forever expected a number of steps, received 1\.5\. Write forever=10_000"),
        ({"forever": True}, TypeError, "forever expected .*, received True"),
        ({"forever": 0}, ValueError, r"forever=0 steps is less than one\. Write forever=10_000"),
        ({"accept": "data"}, TypeError, r"accept expected a set of names, received 'data'\. Write \{'data'\}"),
        ({"accept": 3}, TypeError, "accept expected a set of names, received 3"),
        (
            {"accept": {"seed"}},
            ValueError,
            "accept expected names among 'data', 'key', 'program', 'reports', received 'seed'",
        ),
        ({"accept": [3]}, ValueError, "accept expected .*, received 3"),
    ],
    ids=repr,
)
def test_arguments_are_checked(options, error, text):
    with pytest.raises(error, match=rf"checkpoint\.Directory: .*{text}"):
        Directory("a", **options)


def test_a_path_is_first():
    with pytest.raises(
        TypeError, match=r"checkpoint\.Directory expected a path first, received dict\. Write Directory\('runs/first'\)"
    ):
        Directory({})


# Steps


def test_steps_are_those_that_verify_ascending(tmp_path, saved):
    runs = saved(30, 4, 2_000_000_000)
    for name in ["step-1", "step-00000005x", "notes", ".kaun-0123456789abcdef.tmp", "damaged-step-00000009"]:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000006").write_text("a file")
    (tmp_path / "step-00000007").mkdir()
    assert runs.steps() == [4, 30, 2_000_000_000]
    flip(tmp_path / "step-00000030" / one.STATE)
    assert runs.steps() == [4, 2_000_000_000]


def test_the_newest_of_a_step_is_the_one_of_the_highest_edition(disk, tmp_path, saved, make, same):
    saved(4, 4, 4, names=["step-00000004", "step-00000004.10", "step-00000004.9"])
    assert [(f.step, f.edition) for f in scan(disk, tmp_path)] == [(4, 10), (4, 9), (4, 0)]
    one.Draft(4, make(9), {}, {}).write(disk, tmp_path / "step-00000004.11")
    assert Directory(tmp_path).steps() == [4]
    assert same(Directory(tmp_path).load(make(1)), make(9))


def test_a_folder_that_holds_a_file_in_its_place_is_no_directory(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(NotADirectoryError):
        Directory(tmp_path / "f").steps()


# States


def test_load_gives_the_newest_or_the_one_asked_for(saved, make, same):
    runs = saved(3, 5, 40)
    assert same(runs.load(make(1)), make(40))
    assert same(runs.load(make(1), at=5), make(5))
    assert same(runs.load(like=make(1), at=np.int64(3)), make(3))


def test_load_falls_back_with_a_warning_and_moves_nothing(tmp_path, saved, make, same):
    runs = saved(3, 5, 40)
    for step in (5, 40):
        flip(tmp_path / f"step-{step:08d}" / one.MANIFEST)
    before = sorted(tmp_path.rglob("*"))
    with pytest.warns(
        UserWarning,
        match=r"loaded step 3, because newer checkpoints are damaged:\n  step-00000040: .*\n  step-00000005: ",
    ) as warned:
        loaded = runs.load(make(1))
    assert warned[0].filename == __file__
    assert same(loaded, make(3))
    assert sorted(tmp_path.rglob("*")) == before


def test_all_damaged_is_an_error_that_lists_each(tmp_path, saved, make):
    runs = saved(3, 5)
    for step in (3, 5):
        flip(tmp_path / f"step-{step:08d}" / one.STATE)
    with pytest.raises(
        ValueError,
        match=r"no checkpoint in .* is undamaged:\n  step-00000005: state.*\n  step-00000003: state.*\n.*child\('again'\)",
    ):
        runs.load(make(1))
    with pytest.raises(ValueError, match=r"is undamaged:\n  step-00000003: state.*\nRestore one of them from a copy"):
        runs.load(make(1), at=3)


def test_nothing_to_load(tmp_path, saved, make):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint in .*absent'\. Train with fit"):
        Directory(tmp_path / "absent").load(make(1))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        Directory(tmp_path).load(make(1), at=3)
    runs = saved(3, 5)
    with pytest.raises(
        FileNotFoundError, match=r"there is no checkpoint of step 4 in .*\. It has these steps: \[3, 5\]"
    ):
        runs.load(make(1), at=4)


def test_another_model_is_a_mismatch_and_nothing_older_is_taken(tmp_path, disk, saved, make):
    runs = saved(3)
    one.Draft(5, make(5, width=3), {}, {}).write(disk, tmp_path / "step-00000005")
    with pytest.raises(
        ResumeMismatch,
        match=r"(?s)the checkpoint of step 5 in .* does not match the state that was passed:\n  .*expected float32\[2, 1\], found float32\[3, 1\].*child\('second'\)",
    ) as error:
        runs.load(make(1))
    assert error.value.__suppress_context__


def test_a_checkpoint_that_goes_away_while_it_is_loaded(tmp_path, saved, make, same, monkeypatch):
    runs = saved(3, 5)
    read = one.read

    def late(disk, folder, step, like, **options):
        if step == 5:  # a run made another one meanwhile, and removed this
            shutil.rmtree(folder)
            saved(6)
        return read(disk, folder, step, like, **options)

    monkeypatch.setattr(one, "read", late)
    assert same(runs.load(make(1)), make(6))
