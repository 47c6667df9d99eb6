"""Prints the newest Python from 3.12 to 3.14 that runs here and can make environments; nothing where there is none.

A name on PATH is not enough: a pyenv shim exists for every installed version and refuses to run most of them.
"""

import os
import subprocess
from pathlib import Path

PROBE = "import ensurepip, sys, venv; print(sys.version_info[1], sys.executable)"


def probe(candidate: str) -> tuple[int, str]:
    """The minor version and the path of a Python 3, (0, "") for what does not run."""
    try:
        done = subprocess.run([candidate, "-c", PROBE], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        return 0, ""
    minor, _, path = done.stdout.strip().partition(" ")
    return (int(minor), path) if done.returncode == 0 else (0, "")


pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
candidates = ["python3.14", "python3.13", "python3.12", "python3", *map(str, pyenv.glob("versions/3.*/bin/python"))]
# Newer ones are left out until the dependencies have wheels for them.
found = [(minor, path) for minor, path in map(probe, candidates) if 12 <= minor <= 14]
print(max(found, default=(0, ""))[1])
