"""python -m kaun.checkpoint: what is there, whether it verifies, and the leaves; nothing a file says reaches the terminal raw."""

import hashlib
import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest

from kaun.checkpoint import Best, one
from kaun.checkpoint.__main__ import main


@pytest.fixture
def runs(disk, tmp_path, make):
    for step in (3, 40):
        draft = one.Draft(step, make(step), {"loss": np.zeros(5, np.float32), "best": 0.5}, {"jax": "1.2"})
        draft.write(disk, tmp_path / f"step-{step:08d}")
    return tmp_path


def test_verify(runs, capsys):
    assert main(["verify", str(runs)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out[:2]] == [["step-00000003", "sound"], ["step-00000040", "sound"]]
    assert out[2:] == ["2 sound, 0 damaged"]
    os.truncate(runs / "step-00000040" / one.STATE, 10)
    assert main(["verify", str(runs)]) == 1
    out = capsys.readouterr().out
    assert "step-00000003  sound" in out
    assert "step-00000040  DAMAGED  state.safetensors: it has 10 bytes" in out
    assert out.endswith("1 sound, 1 damaged\n")
    assert main(["verify", str(runs / "step-00000003")]) == 0
    assert main(["verify", str(runs / "step-00000040") + "/"]) == 1


def test_list(runs, capsys, disk, make):
    assert main(["list", str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in (runs / "step-00000003").iterdir())
    assert [line.split()[:3] for line in lines] == [
        ["step-00000003", f"{size / 1000:.3g}", "KB"],
        ["step-00000040", f"{size / 1000:.3g}", "KB"],
    ]
    assert main(["list", str(runs / "step-00000040")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_list_marks_the_best_one_and_those_kept_for_ever(runs, capsys, disk, make):
    facts = {"best": Best("accu\x1bracy", "max", 0.75, 40).fact(), "forever": 20}
    one.Draft(60, make(60), {}, facts).write(disk, runs / "step-00000060")
    assert main(["list", str(runs)]) == 0
    lines = [line.partition(":")[2].split("  ")[1:] for line in capsys.readouterr().out.splitlines()]
    assert lines == [[], ["best (accu\\x1bracy 0.75)", "forever"], ["forever"]]
    assert main(["list", str(runs / "step-00000040")]) == 0
    assert capsys.readouterr().out.endswith("  best (accu\\x1bracy 0.75)  forever\n")
    one.Draft(80, make(80), {}, {"best": 3, "forever": "x"}).write(disk, runs / "step-00000080")
    assert main(["list", str(runs)]) == 0
    assert "best" not in capsys.readouterr().out


def test_show(runs, capsys):
    assert main(["show", str(runs)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step-00000040/state.safetensors\n")
    rows = [line.split() for line in out.splitlines()]
    assert ["vars.params.weight", "float32[2,", "1]", "8", "B"] in rows
    assert ["key", "uint32[2]", "(key", "threefry2x32)", "8", "B"] in rows
    assert ["step", "int32[]", "4", "B"] in rows
    assert ["loss", "float32[5]", "20", "B"] in rows
    assert "reports: best = 0.5" in out
    assert "facts: jax = '1.2'" in out
    assert main(["show", str(runs / "step-00000003")]) == 0
    assert capsys.readouterr().out.startswith("step-00000003/state")


def test_show_of_a_damaged_one(runs, capsys):
    (runs / "step-00000040" / one.MANIFEST).unlink()
    assert main(["show", str(runs)]) == 1
    captured = capsys.readouterr()
    assert captured.err == "step-00000040 is damaged: manifest.json: No such file or directory\n"
    assert captured.out == ""


@pytest.mark.parametrize("command", ["verify", "list", "show"])
def test_where_nothing_is(tmp_path, capsys, command):
    for path in (tmp_path, tmp_path / "absent"):
        assert main([command, str(path)]) == 1
        assert capsys.readouterr().err == f"no checkpoint in {str(path)!r}\n"


def test_what_a_file_says_does_not_command_the_terminal(disk, tmp_path, make, capsys):
    evil = "\x1b]0;x\x07\r\n\u202e"
    folder = tmp_path / "step-00000003"
    one.Draft(3, make(3), {evil: 1, "a" + evil: np.zeros(1)}, {evil: evil}).write(disk, folder)
    assert main(["show", str(folder)]) == 0
    raw = (folder / one.MANIFEST).read_bytes()
    start = b'{"kaun":1,"step":"\\u001b[2J","files":{},"reports":{},"facts":{},"sha256":"'
    (folder / one.MANIFEST).write_bytes(start + hashlib.sha256(start).hexdigest().encode() + b'"}\n')
    main(["verify", str(folder)])
    (folder / one.MANIFEST).write_bytes(raw)
    state = (folder / one.STATE).read_bytes()
    (folder / one.STATE).write_bytes(state.replace(b'"weight"', b'"\\u001bXX"'))
    main(["verify", str(folder)])
    captured = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in captured.out + captured.err)
    assert "\\x1b]0;x\\x07\\r\\n\\u202e" in captured.out


def test_as_a_program(runs, capsys, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "kaun.checkpoint", "verify", str(runs)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("2 sound, 0 damaged\n")
    monkeypatch.setattr(sys, "argv", ["kaun.checkpoint", "verify", str(runs / "absent")])
    with pytest.raises(SystemExit) as absent:
        runpy.run_path(main.__code__.co_filename, run_name="__main__")  # a process costs a second of CPU
    assert absent.value.code == 1
    with pytest.raises(SystemExit) as wrong:
        main(["repair", str(runs)])
    assert wrong.value.code == 2
    assert "invalid choice: 'repair'" in capsys.readouterr().err
    assert json.loads((runs / "step-00000003" / one.MANIFEST).read_bytes())["step"] == 3
