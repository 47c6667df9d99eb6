"""Lists the raise statements in src that no test has reached; `make raises` runs it after the suite under coverage.

Usage: python .ci/raises.py DATA, a file that `coverage run` has written. The exit code is the number of lines listed.
"""

import ast
import sys
from pathlib import Path

import coverage

ROOT = Path(__file__).resolve().parent.parent


def main(data_file: str) -> int:
    data = coverage.CoverageData(data_file)
    data.read()
    missed: list[str] = []
    total = 0
    for path in sorted((ROOT / "src").rglob("*.py")):
        source = path.read_text()
        raises = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
        reached = set(data.lines(str(path)) or ())
        total += len(raises)
        lines = source.splitlines()
        missed += [f"{path.relative_to(ROOT)}:{n}: {lines[n - 1].strip()}" for n in sorted(raises) if n not in reached]
    print(*missed, f"{total - len(missed)} of {total} raise statements are reached by the tests.", sep="\n")
    return min(len(missed), 100)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
