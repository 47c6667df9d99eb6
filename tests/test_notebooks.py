"""Each notebook of docs/notebooks runs, and its stored outputs are what it gives now."""

import doctest
import json
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))
NEAR = 0.05  # numbers with a decimal point depend on the version of JAX and on the machine


@pytest.fixture(scope="module")
def notebooks(module_at):
    return module_at(ROOT / ".ci" / "notebooks.py")


@pytest.fixture(scope="module")
def docs(module_at):
    return module_at(ROOT / "tests" / "test_docs.py")


@pytest.fixture
def as_users_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def shown(output):
    """The kind of an output, and its text; a picture is compared by its kind alone."""
    data = output.get("data", {})
    return output["output_type"], sorted(data), "".join(output.get("text") or data["text/plain"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_stored_outputs_are_those_of_a_run(path, notebooks, docs, as_users_do):
    for number, (cell, outputs) in enumerate(zip(code_cells(path), notebooks.run(path), strict=True), 1):
        assert cell["execution_count"] == number
        assert len(cell["outputs"]) == len(outputs), f"cell {number} of {path.name}"
        for (kind, types, stored), (now, types_now, printed) in zip(
            map(shown, cell["outputs"]), map(shown, outputs), strict=True
        ):
            near = docs.with_numbers_of(stored, printed, f"{NEAR:.0%}")
            same = doctest.OutputChecker().check_output(stored, near, doctest.NORMALIZE_WHITESPACE)
            assert (kind, types) == (now, types_now) and same, (
                f"cell {number} of {path.name} has stored\n{stored}\nand gives\n{printed}\n"
                f"Run python .ci/notebooks.py {path.relative_to(ROOT)}"
            )


def test_the_notebooks_are_found_and_have_pictures_in_svg():
    assert [path.stem for path in NOTEBOOKS] == ["fine-tuning", "first-model", "project"]
    for path in NOTEBOOKS:
        kinds = {kind for cell in code_cells(path) for output in cell["outputs"] for kind in output.get("data", ())}
        assert kinds == {"image/svg+xml", "text/plain"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_form_that_jupyter_reads(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source", *code}


def test_the_project_takes_at_most_28_lines_without_imports():
    lines = "\n".join(
        "".join(cell["source"]) for cell in code_cells(ROOT / "docs/notebooks/project.ipynb")
    ).splitlines()
    code = [line for line in lines if line.strip() and not re.match(r"\s*(#|import |from )", line)]
    assert 20 <= len(code) <= 28, len(code)


def test_a_run_gives_what_is_printed_the_last_value_and_pictures(tmp_path, notebooks):
    sources = [
        "import matplotlib.pyplot as plt\nx = 2",
        "print(x)\nx + 1",
        "figure, axes = plt.subplots()\nfigure",
        "x;",
    ]
    cells = [{"cell_type": "code", "source": [source]} for source in sources]
    (path := tmp_path / "small.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown"}, *cells]}))
    nothing, (printed, value), (picture,), (last,) = notebooks.run(path)
    assert nothing == [] and printed["text"] == ["2\n"]
    assert value["data"] == {"text/plain": ["3"]} and last["data"] == {"text/plain": ["2"]}
    assert "<svg" in "".join(picture["data"]["image/svg+xml"])
