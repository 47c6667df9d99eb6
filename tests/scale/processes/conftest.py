"""Real processes that form one JAX program over gloo on loopback, and run functions that a test names."""

import contextlib
import os
import pickle
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# It imports a file beside it, as the workers can.
collect_ignore = ["single_scenarios.py"]

HERE = Path(__file__).parent
SOURCE = Path(__file__).resolve().parents[3] / "src"


class Raised(NamedTuple):
    """An exception of a scenario.

    Attributes:
        kind: The name of its class.
        text: Its message.
        notes: Its notes.
    """

    kind: str
    text: str
    notes: list[str]


class Group:
    """Some processes of one program.

    Args:
        folder: For what they print.
        count: How many processes.
        devices: Simulated devices of each.
        flags: More options of XLA, as in XLA_FLAGS.
        environment: More environment variables.
    """

    def __init__(self, folder: Path, count: int = 2, devices: int = 2, *, flags: str = "", **environment: str) -> None:
        self.log = folder / "log.txt"
        inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        paths = [str(SOURCE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        env = inherited | {
            "JAX_PLATFORMS": "cpu",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "KAUN_TIMEOUT": "120",
        }
        port = _free_port()
        self._ends: list[tuple[Any, Any]] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        with self.log.open("wb") as log:
            for i in range(count):
                (calls, to), (back, answers) = os.pipe(), os.pipe()
                command = [
                    sys.executable,
                    str(HERE / "worker.py"),
                    str(i),
                    str(count),
                    str(port),
                    str(calls),
                    str(answers),
                ]
                started = subprocess.Popen(
                    command, cwd=folder, env=env | environment, pass_fds=(calls, answers), stdout=log, stderr=log
                )
                os.close(calls)
                os.close(answers)
                self.processes.append(started)
                self._ends.append((os.fdopen(to, "wb"), os.fdopen(back, "rb")))
        self._read([*range(count)], 120)

    def run(self, path: str, name: str, timeout: float = 200, **arguments: Any) -> list[Any]:
        """Run a function in all processes, and return what each of them returned, or its ``Raised``.

        Args:
            path: The file of the function.
            name: Its name.
            timeout: Seconds after which all are killed and the test fails.
            arguments: Its arguments.
        """
        self.begin(path, name, **arguments)
        return self.results(timeout)

    def begin(self, path: str, name: str, **arguments: Any) -> None:
        """Start a function in all processes."""
        for to, _ in self._ends:
            pickle.dump((path, name, arguments), to)
            to.flush()

    def results(self, timeout: float = 200, among: list[int] | None = None) -> list[Any]:
        """What a function that was begun gave, in all processes or among some."""
        answers = self._read([*range(len(self._ends))] if among is None else among, timeout)
        return [Raised(*value) if how == "raised" else value for how, value in answers]

    def result_or_exit(self, index: int, timeout: float = 200) -> Any:
        """What a function that was begun gave in a process, or the exit code where that has ended."""
        back = self._ends[index][1]
        select.select([back], [], [], timeout)
        try:
            how, value = pickle.load(back)
        except EOFError:
            return self.processes[index].wait()
        return Raised(*value) if how == "raised" else value

    def close(self) -> None:
        """End them all."""
        for process in self.processes:
            process.kill()
            process.wait()
        for to, back in self._ends:
            back.close()
            with contextlib.suppress(BrokenPipeError):
                to.close()

    def _read(self, among: list[int], timeout: float) -> list[Any]:
        deadline, found = time.monotonic() + timeout, []
        for i in among:
            ready, _, _ = select.select([self._ends[i][1]], [], [], max(0.0, deadline - time.monotonic()))
            try:
                found.append(pickle.load(self._ends[i][1]) if ready else self._fail(f"process {i} hangs"))
            except EOFError:
                self._fail(f"process {i} ended with {self.processes[i].wait()}")
        return found

    def _fail(self, what: str) -> None:
        for process in self.processes:
            process.kill()
        pytest.fail(f"{what}; the end of its log:\n{self.log.read_text()[-4000:]}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="session")
def pairs():
    """All that `pair` has started."""
    with contextlib.ExitStack() as stack:
        yield stack, []


@pytest.fixture
def pair(make_group, pairs):
    """Two processes of two devices each, the same for all tests until one of them has ended.

    Starting them costs seconds. The test that kills one lies in the last file of the short form, test_votes.py.
    """
    stack, started = pairs
    if not started or any(process.poll() is not None for process in started[-1].processes):
        started.append(stack.enter_context(contextlib.closing(make_group())))
    return started[-1]


@pytest.fixture(scope="session")
def make_group(tmp_path_factory, xla_flags):
    """Starts a group of its own for a test, which closes it."""
    return lambda *args, **kwargs: Group(tmp_path_factory.mktemp("group"), *args, flags=xla_flags, **kwargs)
