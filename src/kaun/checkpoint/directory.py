"""Directory: where the checkpoints of one run are, how often they are written, and how many are kept."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, cast

from kaun._messages import warn
from kaun._paths import local_path
from kaun.checkpoint import one
from kaun.checkpoint.disk import Disk
from kaun.errors import ResumeMismatch
from kaun.state import TrainState

__all__ = ["Directory", "Found", "all_damaged", "of_other_leaves", "parse_name", "scan"]

_RESUME = ("auto", "must", "never")
_ACCEPT = ("data", "key", "program", "reports")
_STEP = re.compile(r"step-([0-9]{8,18})(?:\.([0-9]{1,6}))?", re.ASCII)
_CHILD = re.compile(r"\w(?:[\w .-]{0,98}\w)?")
_OURS = re.compile(r"(step|damaged)-[0-9].*|lock", re.IGNORECASE)  # lock: of earlier versions
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows reserves


@dataclass(frozen=True, init=False)
class Directory:
    """A folder for the checkpoints of one run; pass it to ``fit`` as ``checkpoints=``.

    Args:
        path: The folder, on a local disk. It is made when it is first used. Only one run at a time may use it. A
            relative path is taken from the working directory of now, and ``~`` is the home folder.
        every: How often a checkpoint is written: a number of steps (int) or a time (timedelta). Default None: only at
            the end, and when the run is interrupted.
        keep: How many of the newest checkpoints are kept, at least 1. Default 3.
        resume: ``"auto"`` (default) resumes from the newest checkpoint, if there is one; ``"must"`` raises if there is
            none; ``"never"`` raises if there is one, so that nothing is ever mixed or overwritten.
        accept: The kinds of differences with which a run may still be resumed, with a warning: ``"data"``,
            ``"program"``, ``"key"``, ``"reports"``. Default none: each difference raises ``ResumeMismatch``.

    Attributes:
        path: The folder, absolute.
        every: As the argument.
        keep: As the argument.
        resume: As the argument.
        accept: As the argument, a frozenset.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, or the path is an address such as ``gs://bucket/run``.

    Examples:
        >>> from datetime import timedelta
        >>> from kaun import checkpoint
        >>> runs = checkpoint.Directory("runs/digits", every=timedelta(minutes=10))
        >>> runs.child("finetune").path.name
        'finetune'
        >>> runs.steps()
        []
    """

    path: Path
    every: int | timedelta | None
    keep: int
    resume: Literal["auto", "must", "never"]
    accept: frozenset[str]

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        every: int | timedelta | None = None,
        keep: int = 3,
        resume: Literal["auto", "must", "never"] = "auto",
        accept: Iterable[str] = (),
    ) -> None:
        fields = {
            "path": _path(path),
            "every": _every(every),
            "keep": _keep(keep),
            "resume": _resume(resume),
            "accept": _accept(accept),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def child(self, name: str) -> Directory:
        """Return a directory for another run, with the same settings, in a folder inside this one.

        Args:
            name: The folder's name: at most 100 letters, digits, and `` _-.`` between them.

        Raises:
            TypeError: If the name is not a str.
            ValueError: If it is not such a name.

        Examples:
            >>> from kaun import checkpoint
            >>> checkpoint.Directory("runs", keep=5).child("second").keep
            5
        """
        if not isinstance(cast("object", name), str):
            raise TypeError(
                f"Directory.child expected a name, received {type(name).__name__}. Write child('finetune')."
            )
        if not _CHILD.fullmatch(name) or _OURS.fullmatch(name) or _DEVICES.fullmatch(name):
            raise ValueError(
                f"Directory.child: {name!r:.120} is not a name for a folder. A name has at most 100 letters, digits, "
                "and ' _-.' between them, and is not one that kaun uses itself (step-1, lock). For a folder in a "
                "folder write child('a').child('b')."
            )
        return Directory(self.path / name, every=self.every, keep=self.keep, resume=self.resume, accept=self.accept)

    def steps(self) -> list[int]:
        """Return the steps that have an undamaged checkpoint, in ascending order.

        Every byte of every checkpoint is read and verified for this. Checkpoints of a newer kaun, which this one cannot
        read, are left out, with a warning.

        Examples:
            >>> from kaun import checkpoint
            >>> checkpoint.Directory("runs/of/tomorrow").steps()
            []
        """
        disk = Disk()
        sound: set[int] = set()
        newer: list[str] = []
        for found in scan(disk, self.path):
            try:
                one.verify(disk, found.path, found.step)
                sound.add(found.step)
            except one.Damaged:
                continue
            except ResumeMismatch as err:
                newer.append(f"{found.path.name}: {err}")
        if newer:
            warn(f"{str(self.path)!r}: checkpoints that this kaun cannot read are left out:\n  " + "\n  ".join(newer))
        return sorted(sound)

    def load(self, like: TrainState, step: int | None = None) -> TrainState:
        """Return the state of a checkpoint, for example for ``predict`` after training.

        A run may be writing to the directory meanwhile.

        Args:
            like: A state of the structure, shapes and dtypes to load, for example ``trainer.init()``. Its values do not
                matter; see ``checkpoint.load``.
            step: The step of the checkpoint. Default None: the newest undamaged one, with a warning if a newer one is
                damaged.

        Raises:
            FileNotFoundError: If there is no checkpoint, or none of that step.
            ValueError: If all checkpoints are damaged, or the one of that step is; each is listed.
            ResumeMismatch: If the state has other leaves, shapes or dtypes than ``like``.

        Examples:
            >>> import tempfile, jax.numpy as jnp, optax, kaun
            >>> from kaun import checkpoint, layers, rng
            >>> with rng.scope(0):
            ...     state = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1)).init(dtype=jnp.float32)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     checkpoint.Directory(folder).load(state)
            Traceback (most recent call last):
            FileNotFoundError: there is no checkpoint in ...
        """
        disk = Disk()
        bad: list[str] = []
        seen: set[str] = set()
        # Listed again after each attempt: a run may delete a checkpoint that was listed, and then there is a newer one.
        while todo := [f for f in scan(disk, self.path) if f.path.name not in seen and step in (None, f.step)]:
            found = todo[0]
            seen.add(found.path.name)
            try:
                state = one.read(disk, found.path, found.step, like).state
            except one.Damaged as err:
                if found.path.is_dir():
                    bad.append(f"{found.path.name}: {err}")
                continue
            except ResumeMismatch as err:
                raise of_other_leaves(self, found, err) from None
            if bad:
                warn(
                    f"{str(self.path)!r}: loaded step {found.step}, because newer checkpoints are damaged:\n  "
                    + "\n  ".join(bad),
                )
            return state
        if bad:
            raise all_damaged(self, bad)
        raise self._nothing(step, disk)

    def _nothing(self, step: int | None, disk: Disk) -> FileNotFoundError:
        steps = sorted({found.step for found in scan(disk, self.path)})
        if step is None or not steps:
            return FileNotFoundError(
                f"there is no checkpoint in {str(self.path)!r}. Train with fit(..., checkpoints=...) first, or look "
                "for the right folder."
            )
        return FileNotFoundError(
            f"there is no checkpoint of step {step} in {str(self.path)!r}. It has these steps: {steps}."
        )


class Found(NamedTuple):
    """A folder with a checkpoint's name. Of two folders of one step, the one with the higher edition is newer."""

    step: int
    edition: int
    path: Path


def scan(disk: Disk, path: Path) -> list[Found]:
    """The folders with a checkpoint's name, the newest first; what is in them is not read."""
    try:
        entries = disk.entries(path)
    except FileNotFoundError:
        return []
    named = [parse_name(path / entry.name) for entry in entries if not entry.is_file]
    return sorted(filter(None, named), reverse=True)


def parse_name(path: Path) -> Found | None:
    """The step and edition in the last name of a path, None if it is not a checkpoint's name."""
    match = _STEP.fullmatch(path.name)
    return Found(int(match[1]), int(match[2] or 0), path) if match else None


def all_damaged(directory: Directory, bad: list[str]) -> ValueError:
    """The error when every checkpoint is damaged."""
    listed = "\n  ".join(bad)
    return ValueError(
        f"no checkpoint in {str(directory.path)!r} is undamaged:\n  {listed}\n"
        "Restore one of them from a copy, or start again in another directory: "
        f"checkpoint.Directory({str(directory.path)!r}).child('again')."
    )


def of_other_leaves(directory: Directory, found: Found, listing: ResumeMismatch) -> ResumeMismatch:
    """The error when a checkpoint is undamaged, and does not match the template."""
    if not str(listing).startswith("\n"):
        return ResumeMismatch(f"{str(found.path)!r}: {listing}")
    return ResumeMismatch(
        f"the checkpoint of step {found.step} in {str(directory.path)!r} does not match the state that was "
        f"passed:{listing}\n"
        "Use the model and the optimizer of that run, or start another run in another directory: "
        f"checkpoint.Directory({str(directory.path)!r}).child('second')."
    )


def _path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"checkpoint.Directory expected a path first, received {type(path).__name__}.")
    return local_path("checkpoint.Directory", path).absolute()


def _every(every: object) -> object:
    if every is None:
        return None
    if isinstance(every, timedelta):
        if every <= timedelta(0):
            raise ValueError(
                f"checkpoint.Directory: every={every!r} is not a positive time. Write every=timedelta(minutes=10)."
            )
    elif isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(
            f"checkpoint.Directory: every expected a number of steps or a datetime.timedelta, received {every!r:.40}. "
            "Write every=500 or every=timedelta(minutes=10)."
        )
    elif every < 1:
        raise ValueError(
            f"checkpoint.Directory: every={every} steps is less than one. Write every=None for the end only."
        )
    return every


def _keep(keep: object) -> int:
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise TypeError(f"checkpoint.Directory: keep expected an int, received {keep!r:.40}. Write keep=3.")
    if keep < 1:
        raise ValueError(
            f"checkpoint.Directory: keep={keep} is less than 1, and the newest checkpoint is always kept. Write keep=1."
        )
    return keep


def _resume(resume: object) -> object:
    if resume not in _RESUME:
        raise ValueError(f"checkpoint.Directory: resume expected 'auto', 'must' or 'never', received {resume!r:.40}.")
    return resume


def _accept(accept: object) -> frozenset[str]:
    if isinstance(accept, str) or not isinstance(accept, Iterable):
        raise TypeError(
            f"checkpoint.Directory: accept expected a set of names, received {accept!r:.40}. Write {{'data'}}."
        )
    names = frozenset(accept)
    unknown = [name for name in names if name not in _ACCEPT]
    if unknown:
        known = ", ".join(map(repr, _ACCEPT))
        raise ValueError(f"checkpoint.Directory: accept expected names among {known}, received {unknown[0]!r:.40}.")
    return names
