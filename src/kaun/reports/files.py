"""Loggers that write one file: a JSON object or a line of a table for each step."""

from __future__ import annotations

import contextlib
import csv as tables
import io
import itertools
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path

from kaun.checkpoint import Disk
from kaun.reports.log import Log, Row, encoded

__all__ = ["csv", "jsonl"]

_LINE = re.compile(rb'\{"step": (\d+)[,}]')
_CELLS = re.compile(rb"(\d+),")


def jsonl(path: str | os.PathLike[str]) -> Log:
    """The report that writes a file with a JSON object for each step: ``{"step": 1, "loss": 0.5, ...}``.

    A line has the step of the state (``state.step``), and everything recorded for it, by name: the loss, what the loss
    function returned beside it, learning rate and gradient norm where they are known, and in one ``all_of`` what other
    reports measured after the step (``validate``), as ``valid_...`` where the training has the same name. The lines are
    JSON in the strict sense: what is not finite is written ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``, which
    ``float(...)`` reads. In ``every(100, jsonl(path))`` each hundredth step is written. It never makes ``fit`` wait for
    the device; a line is in the file as soon as a later step is known of, at the latest when the fit ends.

    One file holds one life of a state. A fit that begins with step s cuts off the lines of step s and later, so that a
    run that was killed and goes on from a checkpoint has no line missing and none twice, and a run from the start
    begins a new file.

    Arguments:
        path: the file; folders that are missing are made.

    Raises:
        TypeError: when ``path`` is none.
        ValueError: in the fit, when the file there holds something else.
        OSError: in the fit, when it cannot be written.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from kaun import reports
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "run.jsonl"
    ...     report = reports.jsonl(path)
    ...     report.begin(1, 2)  # fit does this
    ...     report.block(1, {"loss": np.array([0.5, 0.25], np.float32), "step": np.array([1, 2])})
    ...     report.observe(2, {"accuracy": 0.9})
    ...     report.end()
    ...     print(path.read_text())
    {"step": 1, "loss": 0.5}
    {"step": 2, "loss": 0.25, "accuracy": 0.9}
    """
    return Log(_JsonLines(_path("jsonl", path)))


def csv(path: str | os.PathLike[str]) -> Log:
    """The report that writes a table with a line for each step, as comma-separated values under a line of names.

    What stands in it, and when, is as for ``jsonl``. The first column is the step; a cell is empty where a step has no
    such value; ``nan``, ``inf`` and ``-inf`` stand for what is not finite. Names that come later, those of
    ``validate`` say, become further columns at the right: the file is then written anew once, and put in the place of
    the old one.

    Arguments:
        path: the file; folders that are missing are made.

    Raises:
        TypeError: when ``path`` is none.
        ValueError: in the fit, when the file there holds something else, or a name has a line break.
        OSError: in the fit, when it cannot be written.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from kaun import reports
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "run.csv"
    ...     report = reports.csv(path)
    ...     report.begin(1, 2)  # fit does this
    ...     report.block(1, {"loss": np.array([0.5, 0.25], np.float32), "step": np.array([1, 2])})
    ...     report.observe(2, {"accuracy": 0.9})
    ...     report.end()
    ...     print(path.read_text())
    step,loss,accuracy
    1,0.5,
    2,0.25,0.9
    """
    return Log(_Table(_path("csv", path)))


def _path(where: str, path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f'{where} expected the path of a file, received {path!r}. Write {where}("run.{where}").')
    return Path(path).absolute()


class _JsonLines:
    name, run = "jsonl", ""

    def __init__(self, path: Path) -> None:
        self._file = _File(path)

    def cut(self, step: int) -> None:
        with self._file.read() as lines:
            size = sum(len(line) for line in _kept(self._file.path, lines, _LINE, step, head=b'{"step": '))
        self._file.open(size)

    def write(self, rows: Sequence[Row]) -> None:
        self._file.append("".join([encoded(row) + "\n" for row in rows]))

    def sync(self) -> None:
        self._file.sync()

    def close(self, error: BaseException | None) -> None:
        self._file.close()


class _Table:
    name, run = "csv", ""

    def __init__(self, path: Path) -> None:
        self._file = _File(path)
        self._columns: list[str] = []

    def cut(self, step: int) -> None:
        with self._file.read() as lines:
            head = next(lines, b"")
            if not b"step,".startswith(head[:5].strip(b"\0")):
                raise ValueError(_damaged(self._file.path, 1, 'the names of the columns, the first of them "step"'))
            # The columns that only lines cut off had a value in stand at the right; they will come again.
            spare, size = None, len(head)
            for line in _kept(self._file.path, lines, _CELLS, step, number=2):
                size += len(line)
                spare = min(len(line) - len(line.rstrip(b",\n")) - 1, size if spare is None else spare)
        if spare is None:
            self._columns = []
            self._file.open(0)
            return
        self._columns = next(tables.reader([head.decode()]))
        self._file.open(size)
        if spare:
            del self._columns[-spare:]
            self._rewrite(lambda line: line[: -spare - 1] + b"\n")

    def write(self, rows: Sequence[Row]) -> None:
        new = list(dict.fromkeys([name for row in rows for name in row if name not in self._columns]))
        if new:
            before, self._columns = len(self._columns), self._columns + new
            self._rewrite(lambda line: line[:-1] + b"," * len(new) + b"\n", empty=not before)
        cells = [",".join([_cell(row[name]) if name in row else "" for name in self._columns]) for row in rows]
        self._file.append("".join([f"{line}\n" for line in cells]))

    def sync(self) -> None:
        self._file.sync()

    def close(self, error: BaseException | None) -> None:
        self._file.close()

    def _rewrite(self, change: Callable[[bytes], bytes], *, empty: bool = False) -> None:
        if broken := [name for name in self._columns if len(name.splitlines()) != 1]:
            raise ValueError(f"csv has a column for each name, in one line, received the name {broken[0]!r}.")
        head = io.StringIO()
        tables.writer(head, lineterminator="\n").writerow(self._columns)
        if empty:
            self._file.append(head.getvalue())
            return
        with self._file.read() as lines:
            next(lines)
            self._file.replace(itertools.chain([head.getvalue().encode()], map(change, lines)))


def _cell(value: float) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else repr(value)


def _kept(
    path: Path, lines: Iterable[bytes], form: re.Pattern[bytes], step: int, number: int = 1, head: bytes | None = None
) -> Iterator[bytes]:
    """The lines of the steps before this one, up to one that a crash tore; what no crash explains is an error."""
    torn: int | None = None
    for at, line in enumerate(lines, start=number):
        found = form.match(line) if line.endswith(b"\n") else None
        if found is not None and int(found[1]) >= step:
            return
        if found is not None and torn is None:
            yield line
            continue
        # A kill leaves a part of a line, a power cut may leave zeros.
        begins = head is None or at > number or head.startswith(line[: len(head)].strip(b"\0"))
        if found is not None or not begins or (line.endswith(b"\n") and b"\0" not in line):
            raise ValueError(_damaged(path, at if torn is None else torn, "the values of a step"))
        torn = at if torn is None else torn


def _damaged(path: Path, line: int, expected: str) -> str:
    return (
        f"{path}, line {line}: expected {expected}, as this report writes it. The file is damaged, or another "
        "program's. Move it away, or write to another path."
    )


class _File:
    """A file that grows at its end, and can be cut and replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._named = True  # whether its folder knows it for good

    @contextlib.contextmanager
    def read(self) -> Generator[Iterator[bytes]]:
        if not self.path.exists():
            yield iter(())
            return
        with self.path.open("rb") as file:
            yield iter(file)

    def open(self, size: int) -> None:
        """Begin to write after the first ``size`` bytes."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._named = self.path.exists()
        self._file = self.path.open("r+b" if self._named else "xb", buffering=0)
        self._file.truncate(size)
        self._file.seek(size)

    def append(self, text: str) -> None:
        left = memoryview(text.encode())
        try:
            while self._file is not None and left:
                left = left[self._file.write(left) :]
        except BaseException:
            self.close()  # a line may be torn now, and must be the last
            raise

    def replace(self, parts: Iterable[bytes]) -> None:
        """Put a file of these parts in its place, as a whole."""
        new = self.path.with_name(f".{self.path.name}.new")
        with new.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        new.replace(self.path)
        self.open(size)
        self._named = False

    def sync(self) -> None:
        if self._file is None:
            return
        os.fsync(self._file.fileno())
        if not self._named:
            Disk().sync_folder(self.path.parent)
            self._named = True

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()
