"""What holds for each file of examples/models: it says how it is run, its model is short, and it has its own tests."""

import ast
from pathlib import Path

import pytest

from .conftest import FOLDER

FILES = sorted(FOLDER.glob("*.py"))


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
    assert (Path(__file__).parent / f"test_{path.stem}.py").is_file()
