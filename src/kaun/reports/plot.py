"""The loss curve as a picture that is redrawn during the fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from kaun._calls import public, shown
from kaun._messages import optional_package
from kaun._paths import picture_path
from kaun._processes import is_first
from kaun._report import Report
from kaun.reports.files import check_writable
from kaun.reports.history import History
from kaun.train import TrainState

__all__ = ["plot"]

FIRST, SECONDS = 2.0, 10.0  # until the first picture, and from one to the next
SHARE = 20  # a picture takes at most this part of the time


@public
def plot(path: str | os.PathLike[str], *, log: bool = False) -> Report:
    """Return the report that keeps a picture of the run up to date: ``history().plot(path)``, redrawn during the fit.

    It shows the losses and, in one ``all_of``, what other reports measured. It is drawn after 2 seconds, then every 10
    seconds or so rarely that drawing takes a twentieth of the time, whichever is less often, and at the end of each
    fit, whatever ended it. Each new picture replaces the old one as a whole, so a viewer never sees half of one. It
    never makes ``fit`` wait for the device. Passed to several fits, or in a resumed run, it continues its curve.

    Args:
        path: The file to write; the suffix is the format (``.png``, ``.svg``, ``.pdf``), default ``.png``. Missing
            folders are made.
        log: Whether the loss axis is logarithmic. Default False.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If ``path`` is not a path.
        OSError: If, in the fit, the file cannot be written.

    Examples:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from kaun import reports
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = reports.plot(pathlib.Path(folder) / "loss.png")
        ...     report.begin(1, 500)  # fit does this
        ...     report.block(1, {"loss": np.geomspace(2.0, 0.1, 500, dtype=np.float32)})
        ...     report.end()
        ...     [path.name for path in pathlib.Path(folder).iterdir()]
        ['loss.png']
    """
    if not isinstance(path, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f'plot expected the path of a picture, received {shown(path)}. Write plot("loss.png").')
    optional_package("reports.plot", "matplotlib", "plot")
    return _Plot(picture_path("plot", path).absolute(), log)


class _Plot(Report):
    def __init__(self, path: Path, log: bool) -> None:
        self.__name__ = "plot"
        self._path, self._log = path, log
        self.path = path
        self._history = History()
        self._next = 0.0  # when to draw
        self._new = False  # whether something was recorded since the last picture

    def __repr__(self) -> str:
        return f"plot({str(self.path)!r}{', log=True' if self._log else ''})"

    def begin(self, first_step: int, total: int | None, *_: Any) -> None:
        self._next = monotonic() + FIRST
        self._history.begin(first_step, total)
        if is_first():
            check_writable("plot", self._path)

    def wants(self, step: int) -> bool:
        return False

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        self._history(step, loss, state)
        self._changed()

    def block(self, first_step: int, values: Mapping[str, np.ndarray]) -> None:
        self._history.block(first_step, values)
        self._changed()

    def observe(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        self._history.observe(step, values, state)
        self._changed()

    def end(self) -> None:
        self._draw()

    def snapshot(self) -> dict[str, Any]:
        return self._history.snapshot()

    def restore(self, values: Mapping[str, Any]) -> None:
        self._history.restore(values)
        self._new = True

    def _changed(self) -> None:
        self._new = True
        if monotonic() >= self._next:
            self._draw()

    def _draw(self) -> None:
        losses = self._history.losses
        if not is_first() or not self._new or not (np.isfinite(losses) & ((losses > 0) | (not self._log))).any():
            return
        start = monotonic()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_name(f".{self._path.stem}.new{self._path.suffix}")
        self._history.plot(new, log=self._log)
        new.replace(self._path)
        self._new = False
        self._next = monotonic() + max(SECONDS, (SHARE - 1) * (monotonic() - start))
