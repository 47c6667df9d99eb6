"""The logger for TensorBoard."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kaun.reports.log import Log, Row, require_package

__all__ = ["tensorboard"]


def tensorboard(folder: str | os.PathLike[str]) -> Log:
    """The report that writes scalars for TensorBoard, with tensorboardX, which needs no TensorFlow.

    Each value becomes a scalar under its name, at the step of the state; which values, is as for ``jsonl``. A fit that
    begins with step s tells TensorBoard to forget what the folder has of step s and later, so that a run that was
    killed and goes on from a checkpoint has no step missing and none twice. Each fit adds a file to the folder. It
    never makes ``fit`` wait for the device; at thousands of steps a second, ``every(100, tensorboard(folder))`` is
    enough.

    Arguments:
        folder: the folder of one run, made where it is missing: ``tensorboard --logdir`` gets it, or one above.

    Raises:
        ImportError: when tensorboardX is not installed.
        TypeError: when ``folder`` is no path.
        OSError: in the fit, when it cannot be written.

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
    require_package("tensorboard", "tensorboardX", "tensorboard")
    if not isinstance(folder, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f'tensorboard expected the path of a folder, received {folder!r}. Write tensorboard("run").')
    return Log(_TensorBoard(Path(folder).absolute()))


class _TensorBoard:
    name, run = "tensorboard", ""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        # Not its SummaryWriter, whose flush leaves what a queue holds, and whose files of one second take one name.
        self._files: Any = importlib.import_module("tensorboardX.event_file_writer")
        self._events: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summaries: Any = importlib.import_module("tensorboardX.proto.summary_pb2")

    def cut(self, step: int) -> None:
        self.close(None)
        self._folder.mkdir(parents=True, exist_ok=True)
        another = any(self._folder.glob("events.out.tfevents.*"))
        # Readers go through files in the order of their names.
        self._writer = self._files.EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        if another:
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._write(step, session_log=start)
            self._writer.flush()

    def write(self, rows: Sequence[Row]) -> None:
        if self._writer is None or not rows:
            return
        value = self._summaries.Summary.Value
        for row in rows:
            scalars = [value(tag=name, simple_value=float(v)) for name, v in row.items() if name != "step"]
            self._write(row["step"], summary=self._summaries.Summary(value=scalars))
        self._writer.flush()

    def sync(self) -> None:
        pass  # flushed already; tensorboardX does not show the file

    def close(self, error: BaseException | None) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=time.time(), step=step, **what))
