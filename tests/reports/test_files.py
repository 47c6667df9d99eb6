"""jsonl and csv: what is in the files, what is cut, and what they refuse. Runs that are killed are in test_rows.py."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from kaun import reports


def write(report, first, rows, *, measured=None, offset=0, end=True):
    """A fit of these losses, and what was measured after its last step."""
    report.begin(first, None)
    values = {"loss": np.array(rows, np.float32), "step": np.arange(first + offset, first + offset + len(rows))}
    report.block(first, values)
    if measured is not None:
        report.observe(first + len(rows) - 1, measured, None)
    if end:
        report.end()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_fits_of_one_life_are_one_file_and_a_fit_from_before_cuts_it(tmp_path, kind):
    path = tmp_path / f"run.{kind}"
    report = getattr(reports, kind)(str(path))
    steps = lambda: [
        int("".join(filter(str.isdigit, line.split(",")[0]))) for line in path.read_text().splitlines()[kind == "csv" :]
    ]
    write(report, 1, [3.0, 2.0, 1.0])
    write(report, 1, [0.5, 0.25], offset=3)
    assert steps() == [1, 2, 3, 4, 5]
    with pytest.warns(UserWarning, match="holds steps 3 to 5 of an earlier fit, which are removed"):
        write(report, 1, [9.0], offset=2)
    assert steps() == [1, 2, 3]
    with pytest.warns(UserWarning, match="holds steps 1 to 3 of an earlier fit, which are removed"):
        write(getattr(reports, kind)(path), 1, [7.0])
    assert steps() == [1]


def test_a_new_name_becomes_a_column_at_the_right_and_leaves_with_its_lines(tmp_path):
    path = tmp_path / "run.csv"
    write(reports.csv(path), 1, [3.0, 2.0], measured={"a,b": 0.5, 'c "d"': np.float32(2)})
    assert path.read_text() == 'step,loss,"a,b","c ""d"""\n1,3.0,,\n2,2.0,0.5,2.0\n'
    report = reports.csv(path)
    report.begin(3, None)
    report.block(3, {"loss": np.array([np.nan, -np.inf], np.float32), "skipped": np.array([True, False])})
    report.end()
    assert path.read_text().splitlines()[3:] == ["3,nan,,,true", "4,-inf,,,false"]
    with pytest.warns(UserWarning, match="holds steps 3 to 4 of an earlier fit"):
        write(reports.csv(path), 3, [1.0])
    assert path.read_text() == 'step,loss,"a,b","c ""d"""\n1,3.0,,\n2,2.0,0.5,2.0\n3,1.0,,\n'
    with pytest.warns(UserWarning, match="holds steps 2 to 3 of an earlier fit"):
        write(reports.csv(path), 2, [1.0])
    assert path.read_text() == "step,loss\n1,3.0\n2,1.0\n"
    assert [p.name for p in tmp_path.iterdir()] == ["run.csv"]


def test_a_name_of_two_lines_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"csv writes the names of all columns in one line, received the name 'a\\nb'"):
        write(reports.csv(tmp_path / "run.csv"), 1, [3.0], measured={"a\nb": 1.0})


def test_what_is_not_finite_is_a_word(tmp_path):
    path = tmp_path / "run.jsonl"
    write(reports.jsonl(path), 1, [np.nan, np.inf, -np.inf])
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == ["NaN", "Infinity", "-Infinity"]


@pytest.mark.parametrize(
    ("kind", "text", "line"),
    [
        ("jsonl", "my thesis\n", 1),
        ("jsonl", "my thesis", 1),
        ("jsonl", '{"loss": 0.5}\n', 1),
        ("jsonl", '{"step": 1, "loss": 0.5}\noops\n', 2),
        ("jsonl", '{"step": 1, "loss": 0.5}\n\0\0\n{"step": 3, "loss": 0.5}\n', 2),
        ("csv", "name,age\nann,3\n", 1),
        ("csv", "my thesis", 1),
        ("csv", "step,loss\nann,3\n", 2),
        ("csv", "step,loss\n1,3\n\0\n2,0.5\n", 3),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, kind, text, line):
    path = tmp_path / f"run.{kind}"
    path.write_text(text)
    report = getattr(reports, kind)(path)
    with pytest.raises(
        ValueError,
        match=rf"run\.{kind}, line {line}: expected .*, as this report writes it\. The file is damaged, or was written by another program\. Move it away",
    ):
        write(report, 9, [0.5], end=False)
    report.end()
    assert path.read_text() == text


def test_an_empty_file_is_nobodys(tmp_path):
    for kind in ("jsonl", "csv"):
        path = tmp_path / f"run.{kind}"
        path.touch()
        write(getattr(reports, kind)(path), 1, [0.5])
        assert "0.5" in path.read_text()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_checkpoint_waits_for_the_disk(tmp_path, kind, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(str(Path(f"/proc/self/fd/{number}").readlink())))
    path = tmp_path / f"run.{kind}"
    report = getattr(reports, kind)(path)
    report.snapshot()
    assert synced == []
    write(report, 1, [0.5, 0.25], end=False)
    report.snapshot()
    assert synced == [str(path), str(tmp_path)]
    size = path.stat().st_size
    report.snapshot()
    assert synced == [str(path), str(tmp_path), str(path)]
    report.observe(2, {"late": 1.0}, None)
    synced.clear()
    report.snapshot()
    assert synced == ([str(path)] if kind == "jsonl" else [str(tmp_path / ".run.csv.new"), str(path), str(tmp_path)])
    report.end()
    assert path.stat().st_size > size


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_full_disk_is_not_silent(tmp_path, kind):
    resource = pytest.importorskip("resource")
    report, limits = getattr(reports, kind)(tmp_path / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(report, 1, [0.5] * 200, end=False)
        report.end()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_paths(tmp_path, monkeypatch, kind):
    make = getattr(reports, kind)
    with pytest.raises(
        TypeError, match=rf'{kind} expected the path of a file, received 3\. Write {kind}\("run\.{kind}"\)'
    ):
        make(3)
    monkeypatch.chdir(tmp_path)
    report = make("run")
    monkeypatch.chdir("/")
    write(report, 1, [0.5])
    assert (tmp_path / "run").is_file()
    with pytest.raises(IsADirectoryError):
        write(make(tmp_path), 1, [0.5])
