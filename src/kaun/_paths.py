"""Paths that users pass: ``~`` is expanded, and addresses of remote storage are refused."""

from __future__ import annotations

import functools
import io
import os
import re
from pathlib import Path
from typing import Any

__all__ = ["local_path", "picture_path", "saved_picture"]

# A scheme has two letters at least: one is a drive of Windows. pathlib makes gs://bucket into gs:/bucket.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(//.*)", re.DOTALL)
_ADDRESS_IN_PATH = re.compile(r"[a-z][a-z0-9]+:(/.*)", re.DOTALL)


def local_path(where: str, path: str | os.PathLike[str]) -> Path:
    """Return a path on a local disk.

    Args:
        where: The function that received the path, for messages.
        path: The path; ``~`` is the user's home folder.

    Returns:
        The path; relative where it was. What is kept for later needs ``.absolute()``: the working directory may change.

    Raises:
        ValueError: If it is an address such as ``gs://bucket/run``, which would become a local folder named ``gs:``.

    Examples:
        >>> from kaun._paths import local_path
        >>> str(local_path("save", "runs/first"))
        'runs/first'
    """
    text = os.fspath(path)
    form = _ADDRESS if isinstance(path, str) else _ADDRESS_IN_PATH
    if isinstance(text, str) and (found := form.fullmatch(text)):  # pyright: ignore[reportUnnecessaryIsInstance]
        name = found[1].rstrip("/").rpartition("/")[2] or "run"
        raise ValueError(
            f"{where} takes a path on a local disk, and received the address {text!r}. Pass a local path, {name!r}, "
            f"and copy the files when the run is over; or a path where that storage is mounted, '/mnt/{name}'."
        )
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises where nobody has that name


def picture_path(where: str, path: str | os.PathLike[str]) -> Path:
    """Return ``local_path`` of a picture's file, whose format is its suffix, by default ``.png``."""
    whole = local_path(where, path)
    return whole if whole.suffix else whole.with_suffix(".png")


def saved_picture(where: str, figure: Any, path: str | os.PathLike[str] | None, *, writes: bool) -> Any:
    """Save a matplotlib figure and return the path of the file; without a path return the figure.

    A notebook shows a figure that is the value of a cell, and once: pyplot does not know it. It does so also where
    pyplot, which tells IPython how, was never imported.

    Args:
        where: The function that received the path, for messages.
        figure: The figure.
        path: The file, whose format is its suffix, by default ``.png``; or None. Missing folders are made.
        writes: Whether this process writes the file.
    """
    if path is None:
        figure._repr_png_ = functools.partial(_png, figure)
        return figure
    path = picture_path(where, path)
    if writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return path


def _png(figure: Any) -> tuple[bytes, dict[str, int]]:
    """A figure for a notebook, with the width at which a page shows it."""
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue(), {"width": round(figure.get_figwidth() * 100)}
