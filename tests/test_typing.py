"""Programs that the type checker must accept (tests/typing/pass_*.py) and must refuse (fail_*.py), in strict mode.

A line that must be refused ends in ``# E: `` and the rules that basedpyright names there, with commas between them.
Anything that it finds elsewhere, or does not find where it must, fails. What passes must run as well.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import kaun

PROGRAMS = Path(__file__).resolve().parent / "typing"


def check(folder):
    """What basedpyright finds in a folder's programs: a set of (file, line, rule)."""
    command = [sys.executable, "-m", "basedpyright", "--project", str(folder), "--pythonpath", sys.executable]
    done = subprocess.run([*command, "--outputjson"], capture_output=True, text=True)
    assert done.stdout, f"basedpyright (in kaun[test]) did not run: {done.stderr}"
    result = json.loads(done.stdout)
    assert result["summary"]["filesAnalyzed"] == len(list(folder.glob("[pf]a*.py")))
    return {
        (Path(d["file"]).name, d["range"]["start"]["line"] + 1, d.get("rule", d["message"]))
        for d in result["generalDiagnostics"]
    }


def expected(folder):
    """What the programs' own marks say, in the same form."""
    marks = set()
    for path in folder.glob("[pf]a*.py"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if match := re.search(r"# E: ([\w, ]+)$", line):
                assert path.name.startswith("fail_"), f"{path.name}:{number}: a program that must pass marks an error"
                marks |= {(path.name, number, rule) for rule in match[1].split(", ")}
    return marks


def test_programs_pass_and_fail_as_they_say():
    found, marked = check(PROGRAMS), expected(PROGRAMS)
    assert len(marked) > 20
    assert (sorted(found - marked), sorted(marked - found)) == ([], [])


def test_every_public_name_has_a_known_type():
    """Types that come from packages without annotations, such as optax, are not kaun's."""
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson"]
    source = str(Path(kaun.__file__).parents[1])
    done = subprocess.run(
        [*command, "--verifytypes", "kaun", "--ignoreexternal"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": source},
    )  # fmt: skip
    assert done.stdout, f"basedpyright (in kaun[test]) did not run: {done.stderr}"
    report = json.loads(done.stdout)["typeCompleteness"]
    exported = [symbol for symbol in report["symbols"] if symbol["isExported"]]
    assert {"kaun.train.Trainer.fit", "kaun.errors.NonFiniteLoss.step"} <= {symbol["name"] for symbol in exported}
    assert not [
        (symbol["name"], [diagnostic["message"] for diagnostic in symbol["diagnostics"]])
        for symbol in exported
        if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]
    ]


@pytest.mark.parametrize("path", sorted(PROGRAMS.glob("pass_*.py")), ids=lambda path: path.stem)
def test_programs_that_pass_also_run(path):
    runpy.run_path(str(path))


def test_a_finding_without_a_mark_and_a_mark_without_a_finding_show(tmp_path):
    (tmp_path / "pyrightconfig.json").write_text((PROGRAMS / "pyrightconfig.json").read_text())
    (tmp_path / "pass_a.py").write_text("x: int = 'a'\n")
    (tmp_path / "fail_b.py").write_text("y: int = 1  # E: reportAssignmentType\nz: int = ''  # E: reportCallIssue\n")
    found, marked = check(tmp_path), expected(tmp_path)
    assert found - marked == {("pass_a.py", 1, "reportAssignmentType"), ("fail_b.py", 2, "reportAssignmentType")}
    assert marked - found == {("fail_b.py", 1, "reportAssignmentType"), ("fail_b.py", 2, "reportCallIssue")}
