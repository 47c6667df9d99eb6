"""What holds for each file of examples/models: it says how it is run, its model is short, and it has its own tests."""

import ast
import re
from pathlib import Path

import pytest

from .conftest import FOLDER

FILES = sorted(FOLDER.glob("*.py"))
TESTS = Path(__file__).resolve().parents[1]


def lines_of_model(text):
    """The lines of ``make_model`` and of the functions of the file that it calls."""
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    found, left = set(), ["make_model"]
    while left:
        name = left.pop()
        found.add(name)
        named = {node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
        left += (named & functions.keys()) - found
    return sum(functions[name].end_lineno - functions[name].lineno + 1 for name in found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_family_is_short_and_has_its_tests(path):
    text = path.read_text()
    assert f"Run it with: python examples/models/{path.name}" in text
    assert lines_of_model(text) <= 80
    assert len(text.splitlines()) <= 180
    assert (TESTS / "models" / f"test_{path.stem}.py").is_file()


def test_the_page_of_the_families_has_each_file_and_names_a_comparison_that_exists():
    rows = re.findall(r"^\| .*\|$", (TESTS.parent / "docs" / "families.md").read_text(), re.MULTILINE)[2:]
    files = [re.search(r"\[\w+\.py\]\(\.\./examples/models/(\w+)\.py\)", row) for row in rows]
    assert sorted(match[1] for match in files if match) == [path.stem for path in FILES]
    for row in rows:
        file, test = re.search(r"`(\w+/\w+\.py)::(\w+)` \|$", row).groups()
        assert f"def {test}(" in (TESTS / "parity" / file).read_text()
