"""Prints constraints for pip that hold kaun's dependencies at the floors of pyproject.toml, for `make test-oldest`."""

import re
import sys
import tomllib
from pathlib import Path

# The first release with wheels for a Python that is newer than the floor.
FIRST = {"numpy": {13: "2.1.0", 14: "2.3.2"}}

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    name, floor = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
    floor = FIRST.get(name, {}).get(sys.version_info.minor, floor)
    print(f"{name}=={floor}")
    if name == "jax":
        print(f"jaxlib=={floor}")
