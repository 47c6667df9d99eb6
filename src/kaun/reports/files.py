"""Loggers that write one file: a JSON object or a line of a table for each step."""

from __future__ import annotations

import contextlib
import csv as tables
import errno
import io
import itertools
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path

from kaun._calls import public, shown
from kaun._paths import local_path
from kaun._report import Report
from kaun.checkpoint import Disk
from kaun.reports.log import Log, Row, encoded

__all__ = ["check_writable", "csv", "jsonl"]

_LINE = re.compile(rb'\{"step": (\d+)[,}]')
_CELLS = re.compile(rb"(\d+),")


@public
def jsonl(path: str | os.PathLike[str], *, epochs: bool = False) -> Report:
    """Return the report that writes a file with a JSON object for each step: ``{"step": 1, "loss": 0.5, ...}``.

    A line has the step of the state (``state.step``) and everything recorded for it, by name: the loss, the scalars
    that the loss function returned, learning rate and gradient norm if they are known, and in one ``all_of`` what other
    reports measured after the step (``validate``), as ``valid_...`` if a value of the training has the same name. The
    lines are strict JSON: what is not finite is written ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``, which
    ``float(...)`` reads. In ``every(100, jsonl(path))`` each hundredth step is written. It never makes ``fit`` wait for
    the device; a line is written when values of a later step arrive, at the latest when the fit ends.

    One file holds the steps of one state's life. A fit that begins with step s removes the lines of step s and later,
    so that a run that was killed and is resumed from a checkpoint has no line missing and none twice, and a run from
    the start begins a new file.

    Args:
        path: The file; missing folders are made.
        epochs: Whether the line of the last step of each pass also has the averages over the pass, as those of
            ``history().epochs``: ``"epoch"``, its number in the fit, ``"epoch_loss"`` and so on. Default False.

    Raises:
        TypeError: If ``path`` is not a path.
        ValueError: If, in the fit, the file exists and holds something else.
        OSError: If, in the fit, it cannot be written.

    Examples:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from kaun import reports
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "run.jsonl"
        ...     report = reports.jsonl(path)
        ...     report.begin(1, 2)  # fit does this
        ...     report.block(1, {"loss": np.array([0.5, 0.25], np.float32), "step": np.array([1, 2])})
        ...     report.observe(2, {"accuracy": 0.9}, None)
        ...     report.end()
        ...     print(path.read_text())
        {"step": 1, "loss": 0.5}
        {"step": 2, "loss": 0.25, "accuracy": 0.9}
    """
    return Log(_JsonLines(_path("jsonl", path)), epochs)


@public
def csv(path: str | os.PathLike[str], *, epochs: bool = False) -> Report:
    """Return the report that writes a table with a line for each step, as comma-separated values under a line of names.

    What it contains, and when it is written, is as for ``jsonl``. The first column is the step; a cell is empty if a
    step has no such value; values that are not finite are written ``nan``, ``inf`` and ``-inf``. Names that come later,
    for example of ``validate``, become further columns at the right: the file is then rewritten once and replaced.

    Args:
        path: The file; missing folders are made.
        epochs: Whether the line of the last step of each pass also has the averages over the pass, as those of
            ``history().epochs``: ``"epoch"``, its number in the fit, ``"epoch_loss"`` and so on. Default False.

    Raises:
        TypeError: If ``path`` is not a path.
        ValueError: If, in the fit, the file exists and holds something else, or a name has a line break.
        OSError: If, in the fit, it cannot be written.

    Examples:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from kaun import reports
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "run.csv"
        ...     report = reports.csv(path)
        ...     report.begin(1, 2)  # fit does this
        ...     report.block(1, {"loss": np.array([0.5, 0.25], np.float32), "step": np.array([1, 2])})
        ...     report.observe(2, {"accuracy": 0.9}, None)
        ...     report.end()
        ...     print(path.read_text())
        step,loss,accuracy
        1,0.5,
        2,0.25,0.9
    """
    return Log(_Table(_path("csv", path)), epochs)


def _path(where: str, path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f'{where} expected the path of a file, received {shown(path)}. Write {where}("run.{where}").')
    return local_path(where, path).absolute()


class _JsonLines:
    name, run = "jsonl", ""

    def __init__(self, path: Path) -> None:
        self.path, self._file = str(path), _File(path)

    def check(self) -> None:
        check_writable(self.name, self._file.path)

    def cut(self, step: int) -> tuple[int, int] | None:
        with self._file.read() as lines:
            rows = _Rows(self._file.path, lines, _LINE, step, head=b'{"step": ')
            size = sum(map(len, rows))
        self._file.open(size)
        return rows.dropped

    def write(self, rows: Sequence[Row]) -> None:
        self._file.append("".join([encoded(row) + "\n" for row in rows]))

    def sync(self) -> None:
        self._file.sync()

    def close(self, error: BaseException | None) -> None:
        self._file.close()


class _Table:
    name, run = "csv", ""

    def __init__(self, path: Path) -> None:
        self.path, self._file = str(path), _File(path)
        self._columns: list[str] = []

    def check(self) -> None:
        check_writable(self.name, self._file.path)

    def cut(self, step: int) -> tuple[int, int] | None:
        with self._file.read() as lines:
            head = next(lines, b"")
            if not b"step,".startswith(head[:5].strip(b"\0")):
                raise ValueError(_damaged(self._file.path, 1, 'the names of the columns, the first of them "step"'))
            # Columns in which only removed lines have a value are the rightmost ones; they will be added again.
            spare, size = None, len(head)
            rows = _Rows(self._file.path, lines, _CELLS, step, number=2)
            for line in rows:
                size += len(line)
                spare = min(len(line) - len(line.rstrip(b",\n")) - 1, size if spare is None else spare)
        if spare is None:
            self._columns = []
            self._file.open(0)
            return rows.dropped
        self._columns = next(tables.reader([head.decode()]))
        self._file.open(size)
        if spare:
            del self._columns[-spare:]
            self._rewrite(lambda line: line[: -spare - 1] + b"\n")
        return rows.dropped

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
            raise ValueError(
                f"csv writes the names of all columns in one line, received the name {broken[0]!r}. Rename the value."
            )
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


class _Rows:
    """The lines of the steps before this one, up to one that a crash left incomplete; any other damage is an error.

    Attributes:
        dropped: The first and the last of the other steps, None without any.
    """

    def __init__(
        self,
        path: Path,
        lines: Iterator[bytes],
        form: re.Pattern[bytes],
        step: int,
        number: int = 1,
        head: bytes | None = None,
    ) -> None:
        self._path, self._lines, self._form, self._step = path, lines, form, step
        self._number, self._head = number, head
        self.dropped: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[bytes]:
        torn: int | None = None
        for at, line in enumerate(self._lines, start=self._number):
            found = self._form.match(line) if line.endswith(b"\n") else None
            if found is not None and int(found[1]) >= self._step:
                self._drop(int(found[1]))
                return
            if found is not None and torn is None:
                yield line
                continue
            # A kill leaves a part of a line, a power cut may leave zeros.
            head = self._head
            begins = head is None or at > self._number or head.startswith(line[: len(head)].strip(b"\0"))
            if found is not None or not begins or (line.endswith(b"\n") and b"\0" not in line):
                raise ValueError(_damaged(self._path, at if torn is None else torn, "the values of a step"))
            torn = at if torn is None else torn

    def _drop(self, first: int) -> None:
        last = first
        for line in self._lines:
            found = self._form.match(line)
            last = last if found is None else int(found[1])
        self.dropped = first, last


def _damaged(path: Path, line: int, expected: str) -> str:
    return (
        f"{path}, line {line}: expected {expected}, as this report writes it. The file is damaged, or was written by "
        "another program. Move it away, or write to another path."
    )


def check_writable(name: str, path: Path) -> None:
    """Raise OSError, with the path, where a file cannot be written; it is neither made nor changed, its folder is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("xb" if new else "r+b").close()
        if new:
            path.unlink()
    except OSError as err:
        raise _cannot_write(name, path, err) from err


def _cannot_write(name: str, path: Path, err: OSError) -> OSError:
    text = f"{name} cannot write to {str(path)!r}: {err.strerror or err}. Choose a path that you may write to"
    return OSError(err.errno, text)


class _File:
    """A file that is appended to, and can be truncated and replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._named = True  # whether its name in the folder survives a crash

    @contextlib.contextmanager
    def read(self) -> Generator[Iterator[bytes]]:
        if not self.path.exists():
            yield iter(())
            return
        with self.path.open("rb") as file:
            yield iter(file)

    def open(self, size: int) -> None:
        """Open it for writing after the first ``size`` bytes."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._named = self.path.exists()
        self._file = self.path.open("r+b" if self._named else "xb", buffering=0)
        self._file.truncate(size)
        self._file.seek(size)

    def append(self, text: str) -> None:
        left = memoryview(text.encode())
        try:
            if self._file is not None and left and not os.fstat(self._file.fileno()).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "the file was deleted during the run")
            while self._file is not None and left:
                left = left[self._file.write(left) :]
        except OSError as err:
            self.close()
            raise _cannot_write("the log", self.path, err) from err
        except BaseException:
            self.close()  # the last line may be incomplete, so nothing may follow it
            raise

    def replace(self, parts: Iterable[bytes]) -> None:
        """Replace the file atomically by one of these parts."""
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
