"""The arguments of Directory, checked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

from kaun._calls import shown
from kaun._paths import local_path

__all__ = ["check_accept", "check_best", "check_every", "check_forever", "check_keep", "check_path", "check_resume"]

_RESUME = ("auto", "must", "never", "best")
_ACCEPT = ("data", "key", "program", "reports")
_MODES = ("min", "max")


def check_path(path: object) -> Path:
    """The absolute path."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"checkpoint.Directory expected a path first, received {type(path).__name__}. "
            "Write Directory('runs/first')."
        )
    return local_path("checkpoint.Directory", path).absolute()


def check_every(every: object) -> object:
    """The number of steps, the time, or None."""
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


def check_keep(keep: object) -> int:
    """The number of checkpoints."""
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise TypeError(f"checkpoint.Directory: keep expected an int, received {keep!r:.40}. Write keep=3.")
    if keep < 1:
        raise ValueError(
            f"checkpoint.Directory: keep={keep} is less than 1, and the newest checkpoint is always kept. Write keep=1."
        )
    return keep


def check_resume(resume: object) -> object:
    """The word or the step."""
    if isinstance(resume, int) and not isinstance(resume, bool):
        if resume < 1:
            raise ValueError(f"checkpoint.Directory: resume={resume} is not a step of a checkpoint. Write resume=1200.")
        return resume
    if resume not in _RESUME:
        raise ValueError(
            "checkpoint.Directory: resume expected 'auto', 'must', 'never', 'best' or a step, received "
            f"{resume!r:.40}. Write resume='auto' or resume=1200."
        )
    return resume


def check_accept(accept: object) -> frozenset[str]:
    """The names, a frozenset."""
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


def check_best(best: object) -> tuple[str, str] | None:
    """The name and the mode, or None."""
    if best is None:
        return None
    if not isinstance(best, (tuple, list)) or len(best) != 2 or not isinstance(best[0], str):
        raise TypeError(
            "checkpoint.Directory: best expected a pair of the name of a value and 'min' or 'max', received "
            f"{shown(best)}. Write best=('accuracy', 'max')."
        )
    name, mode = best
    if mode not in _MODES:
        raise ValueError(
            f"checkpoint.Directory: best expected 'max' (more is better) or 'min' (less is better) for {name!r:.60}, "
            f"received {mode!r:.40}. Write best=('accuracy', 'max')."
        )
    return name, mode


def check_forever(forever: object) -> int | None:
    """The number of steps, or None."""
    if forever is None:
        return None
    if isinstance(forever, bool) or not isinstance(forever, int):
        raise TypeError(
            f"checkpoint.Directory: forever expected a number of steps, received {forever!r:.40}. Write forever=10_000."
        )
    if forever < 1:
        raise ValueError(f"checkpoint.Directory: forever={forever} steps is less than one. Write forever=10_000.")
    return forever
