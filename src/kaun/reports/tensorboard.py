"""The logger for TensorBoard."""

from __future__ import annotations

import errno
import importlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kaun._calls import public, shown
from kaun._messages import optional_package
from kaun._paths import local_path
from kaun._report import Report
from kaun.reports.log import Log, Row

__all__ = ["tensorboard"]


@public
def tensorboard(folder: str | os.PathLike[str], *, epochs: bool = False) -> Report:
    """Return the report that writes scalars for TensorBoard, with tensorboardX, which needs no TensorFlow.

    Each value becomes a scalar under its name, at the step of the state; the values are those of ``jsonl``. A fit that
    begins with step s makes TensorBoard drop what the folder has of step s and later, so that a run that was killed and
    is resumed has no step missing and none twice. Each fit adds a file to the folder. It never makes ``fit`` wait for
    the device; at thousands of steps a second, ``every(100, tensorboard(folder))`` is enough.
    TensorBoard stores float32: it shows a float64 rounded, and one beyond 3.4e38 as infinite.

    Args:
        folder: The folder of one run, made if it is missing; pass it, or one above it, to ``tensorboard --logdir``.
        epochs: Whether the last step of each pass also has the averages over the pass, as those of
            ``history().epochs``: ``"epoch"``, its number in the fit, ``"epoch_loss"`` and so on. Default False.

    Raises:
        ImportError: If tensorboardX is not installed.
        TypeError: If ``folder`` is not a path.
        OSError: If, in the fit, it cannot be written.

    Examples:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from kaun import reports
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = reports.tensorboard(folder)
        ...     report.begin(1, 2)  # fit does this
        ...     report.block(1, {"loss": np.array([0.5, 0.25], np.float32), "step": np.array([1, 2])})
        ...     report.end()
        ...     len(list(pathlib.Path(folder).glob("events.out.tfevents.*")))
        1
    """
    optional_package("reports.tensorboard", "tensorboardX", "tensorboard")
    if not isinstance(folder, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f'tensorboard expected the path of a folder, received {shown(folder)}. Write tensorboard("run").'
        )
    return Log(_TensorBoard(local_path("tensorboard", folder).absolute()), epochs)


class _TensorBoard:
    name, run = "tensorboard", ""

    def __init__(self, folder: Path) -> None:
        self._folder, self.path = folder, str(folder)
        self._writer: Any = None
        self._last = 0  # the newest step that this report wrote
        # Not its SummaryWriter: its flush does not empty its queue, and two of its files made within one second get
        # the same name.
        self._files: Any = importlib.import_module("tensorboardX.event_file_writer")
        self._events: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summaries: Any = importlib.import_module("tensorboardX.proto.summary_pb2")

    def check(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as err:
            raise OSError(err.errno, f"tensorboard cannot write to {self.path!r}: {err.strerror or err}") from err

    def cut(self, step: int) -> tuple[int, int] | None:
        self.close(None)
        self._folder.mkdir(parents=True, exist_ok=True)
        another = any(self._folder.glob("events.out.tfevents.*"))
        # Files are read in the order of their names.
        self._writer = self._files.EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        if another:
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._write(step, session_log=start)
            self._writer.flush()
        if another and not self._last:
            self._last = max(self._steps(), default=0)
        dropped = (step, self._last) if self._last >= step else None
        self._last = min(self._last, step - 1)
        return dropped

    def write(self, rows: Sequence[Row]) -> None:
        if self._writer is None or not rows:
            return
        if not self._folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"tensorboard: the folder {self.path!r} was deleted during the run")
        self._last = rows[-1]["step"]
        value = self._summaries.Summary.Value
        for row in rows:
            scalars = [value(tag=name, simple_value=float(v)) for name, v in row.items() if name != "step"]
            self._write(row["step"], summary=self._summaries.Summary(value=scalars))
        self._writer.flush()

    def sync(self) -> None:
        pass  # flushed already; tensorboardX does not give access to the file

    def close(self, error: BaseException | None) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _steps(self) -> Iterator[int]:
        """The steps in the folder's files, up to the first part of each that is not whole."""
        for path in self._folder.glob("events.out.tfevents.*"):
            with path.open("rb") as file:
                # The form of TensorFlow's records: length, its checksum, an event, its checksum.
                while len(head := file.read(12)) == 12:
                    length = int.from_bytes(head[:8], "little")
                    event = file.read(length)
                    if len(event) < length or len(file.read(4)) < 4:
                        break
                    parsed = self._events.Event.FromString(event)
                    if parsed.HasField("summary"):
                        yield parsed.step

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=time.time(), step=step, **what))
