"""Runs the notebooks of docs/notebooks in one process each, without Jupyter, and stores their outputs.

Usage: python .ci/notebooks.py docs/notebooks/*.ipynb. tests/test_notebooks.py runs them too, and compares.

A cell's output is what it prints, and the value of its last expression: as text, and a figure of matplotlib as SVG.
"""

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
import types
from pathlib import Path

FORMAT = {"indent": 1, "ensure_ascii": False}


def source_of(cell: dict) -> str:
    return "".join(cell["source"])


def run(path: Path) -> list[list[dict]]:
    """The outputs of the code cells, in order, which share one namespace and the working directory."""
    module = types.ModuleType(f"notebook_{path.stem.replace('-', '_')}")
    sys.modules[module.__name__] = module
    try:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        return [run_cell(source_of(cell), f"{path.name}, cell {n}", n, vars(module)) for n, cell in enumerate(cells, 1)]
    finally:
        del sys.modules[module.__name__]


def run_cell(source: str, name: str, number: int, namespace: dict) -> list[dict]:
    tree = ast.parse(source, name)
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        if last is not None:
            value = eval(compile(last, name, "eval"), namespace)
    outputs = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines_of(printed.getvalue())})
    if value is not None:
        data = data_of(value)
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


def data_of(value: object) -> dict:
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    data = {"text/plain": lines_of(repr(value))}
    if isinstance(value, Figure):
        svg = io.StringIO()
        with pyplot.rc_context({"svg.hashsalt": "kaun"}):
            value.savefig(svg, format="svg", metadata={"Date": None})
        pyplot.close(value)
        data = {"image/svg+xml": lines_of(svg.getvalue()), **data}
    return data


def lines_of(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def store(path: Path) -> None:
    """Write the outputs into the notebook."""
    notebook = json.loads(path.read_text())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        outputs = run(path)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, output) in enumerate(zip(cells, outputs, strict=True), 1):
        cell.update(outputs=output, execution_count=number)
    path.write_text(json.dumps(notebook, **FORMAT) + "\n")


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "Agg"
    for name in sys.argv[1:]:
        store(Path(name).resolve())
