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

import jax
import pytest

import kaun

PROGRAMS = Path(__file__).resolve().parent / "typing"


# Two programs whose marks are wrong: a finding without a mark, and a mark without a finding.
WRONG = {
    "pass_wrong.py": "x: int = 'a'\n",
    "fail_wrong.py": "y: int = 1  # E: reportAssignmentType\nz: int = ''  # E: reportCallIssue\n",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What basedpyright finds and what the marks say, of all programs and of WRONG, in one run of it."""
    folder = tmp_path_factory.mktemp("typing")
    for path in [PROGRAMS / "pyrightconfig.json", *PROGRAMS.glob("[pf]a*.py")]:
        (folder / path.name).write_text(path.read_text())
    for name, text in WRONG.items():
        (folder / name).write_text(text)
    return check(folder), expected(folder)


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


@pytest.mark.slow  # `make lint` runs it, as the two below: five seconds of CPU of the type checker
def test_programs_pass_and_fail_as_they_say(results):
    found, marked = ({mark for mark in marks if mark[0] not in WRONG} for marks in results)
    assert len(marked) > 20
    assert (sorted(found - marked), sorted(marked - found)) == ([], [])


@pytest.mark.slow
def test_every_public_name_has_a_known_type():
    """Types that come from packages without annotations, such as optax, are not kaun's."""
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--verifytypes", "kaun", "--ignoreexternal"]
    # Here it does not read --pythonpath; without JAX's types, a class that extends jax.Array would be unknown.
    paths = [str(Path(kaun.__file__).parents[1]), str(Path(jax.__file__).parents[1])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
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


@pytest.mark.slow
def test_a_finding_without_a_mark_and_a_mark_without_a_finding_show(results):
    found, marked = ({mark for mark in marks if mark[0] in WRONG} for marks in results)
    assert found - marked == {
        ("pass_wrong.py", 1, "reportAssignmentType"),
        ("fail_wrong.py", 2, "reportAssignmentType"),
    }
    assert marked - found == {("fail_wrong.py", 1, "reportAssignmentType"), ("fail_wrong.py", 2, "reportCallIssue")}
