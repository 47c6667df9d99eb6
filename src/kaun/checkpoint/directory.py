"""Directory: where the checkpoints of one run are, how often they are written, and how many are kept."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, SupportsIndex, cast

from kaun._calls import explained_methods
from kaun._messages import warn
from kaun.checkpoint import arguments, one
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.folders import scan
from kaun.checkpoint.group import group_for
from kaun.checkpoint.reading import load_from
from kaun.errors import ResumeMismatch
from kaun.layers.core import Vars
from kaun.state import TrainState

__all__ = ["Directory"]

_CHILD = re.compile(r"\w(?:[\w .-]{0,98}\w)?")
_OURS = re.compile(r"(step|damaged)-[0-9].*|lock", re.IGNORECASE)  # lock: of earlier versions
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows reserves


@explained_methods
@dataclass(frozen=True, init=False)
class Directory:
    """A folder for the checkpoints of one run; pass it to ``fit`` as ``checkpoints=``.

    Args:
        path: The folder, on a local disk, or for several processes on one that all of them share. It is made when it is
            first used. Only one run at a time may use it. A relative path is taken from the working directory of now,
            and ``~`` is the home folder.
        every: How often a checkpoint is written: a number of steps (int) or a time (timedelta). Default None: only at
            the end, and when the run is interrupted.
        keep: How many of the newest checkpoints are kept, at least 1. Default 3. The best one is not counted.
        resume: ``"auto"`` (default) resumes from the newest checkpoint, if there is one; ``"must"`` raises if there is
            none; ``"never"`` raises if there is one, so that nothing is ever mixed or overwritten. A step (int), or
            ``"best"``, resumes from that checkpoint, once: when the run has saved again, the same script resumes from
            the newest. The checkpoints of later steps are renamed to ``aside-step-...`` at the first save.
        accept: The kinds of differences with which a run may still be resumed, with a warning: ``"data"``,
            ``"program"``, ``"key"``, ``"reports"``. Default none: each difference raises ``ResumeMismatch``.
        best: The name of a value that a report of the fit measures, such as ``validate``, and ``"max"`` if a larger
            value is better or ``"min"`` if a smaller one is. A step whose value is the best so far is saved whatever
            ``every`` says, and kept until another is better. NaN is never better. Default None.
        forever: Steps that are multiples of this number are saved, and never removed. Default None.

    Attributes:
        path: The folder, absolute.
        every: As the argument.
        keep: As the argument.
        resume: As the argument.
        accept: As the argument, a frozenset.
        best: As the argument.
        forever: As the argument.

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
        >>> runs = checkpoint.Directory("runs/digits", every=500, best=("accuracy", "max"), forever=10_000)
    """

    path: Path
    every: int | timedelta | None
    keep: int
    resume: Literal["auto", "must", "never", "best"] | int
    accept: frozenset[str]
    best: tuple[str, Literal["min", "max"]] | None
    forever: int | None

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        every: int | timedelta | None = None,
        keep: int = 3,
        resume: Literal["auto", "must", "never", "best"] | int = "auto",
        accept: Iterable[str] = (),
        best: tuple[str, Literal["min", "max"]] | None = None,
        forever: int | None = None,
    ) -> None:
        fields = {
            "path": arguments.check_path(path),
            "every": arguments.check_every(every),
            "keep": arguments.check_keep(keep),
            "resume": arguments.check_resume(resume),
            "accept": arguments.check_accept(accept),
            "best": arguments.check_best(best),
            "forever": arguments.check_forever(forever),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def child(self, name: str) -> Directory:
        """Return a directory for another run, with the same settings, in a folder inside this one.

        A ``resume`` that names a checkpoint of this run is ``"auto"`` there.

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
        own = self.resume == "best" or isinstance(self.resume, int)
        return replace(self, path=self.path / name, resume="auto" if own else self.resume)

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

    def load(self, like: TrainState, at: Literal["newest", "best"] | SupportsIndex = "newest") -> TrainState:
        """Return the state of a checkpoint, for example for ``predict`` after training.

        A run may be writing to the directory meanwhile. Where ``like`` lies on the devices of several processes, all of
        them have to call this, and each reads what its devices need. With ``accumulate`` the items of an open window
        wait in the state: ``trainer.flush(runs.load(state))`` is what the ``fit`` of a finished run returned.

        Args:
            like: A state of the structure, shapes and dtypes to load, for example ``trainer.init()``. Its values do not
                matter; see ``checkpoint.load``.
            at: ``"newest"`` (default) for the newest undamaged checkpoint, with a warning if a newer one is damaged;
                ``"best"`` for the best one of a run with ``best=``; or the step of the checkpoint.

        Raises:
            TypeError, ValueError: If ``at`` is something else.
            FileNotFoundError: If there is no checkpoint, or not that one; the steps that are there are listed.
            ValueError: If all checkpoints are damaged, or the one asked for is; each is listed.
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
        read = lambda disk, found, verified: one.read(disk, found.path, found.step, like, verified=verified).state
        return load_from("load", self.path, at, group_for(self.path, like), read)

    def load_vars(self, like: Vars | TrainState, at: Literal["newest", "best"] | SupportsIndex = "newest") -> Vars:
        """Return the variables of a checkpoint, whatever the optimizer of its run was.

        For ``predict``, for another optimizer, ``trainer.make_state(runs.load_vars(state))``, or for the trunk of
        another model. Every byte is verified, and no other leaves than these are kept in memory. Where the run averages
        its weights, the variables are those of its last step; ``load`` gives a state with both.

        Args:
            like: Variables of the structure, shapes and dtypes to load, or a state with them, for example
                ``trainer.init()``. The values do not matter, nor does the optimizer's state.
            at: As for ``load``.

        Raises:
            TypeError: If ``like`` is something else.
            FileNotFoundError, ValueError, ResumeMismatch: As for ``load``.

        Examples:
            >>> import tempfile, jax.numpy as jnp, optax, kaun
            >>> from kaun import Data, checkpoint, layers, rng
            >>> model, item = layers.linear(2, 1), (jnp.ones((1, 2)), lambda out: (out**2).mean())
            >>> with tempfile.TemporaryDirectory() as folder, rng.scope(0):
            ...     runs = checkpoint.Directory(folder)
            ...     first = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
            ...     trained = first.fit(first.init(), Data.repeat(3, item), checkpoints=runs)
            ...     second = kaun.Trainer(model=model, optimizer=optax.adam(0.01))
            ...     state = second.make_state(runs.load_vars(second.init()))
            >>> bool((state.vars.params["weight"] == trained.vars.params["weight"]).all())
            True
        """
        given: Any = like
        template = given.vars if isinstance(given, TrainState) else given
        if not isinstance(template, Vars):
            raise TypeError(
                f"Directory.load_vars expected a Vars or a TrainState, received {type(given).__name__}. Write "
                "runs.load_vars(trainer.init())."
            )
        read = lambda disk, found, verified: one.read_vars(disk, found.path, found.step, template, verified=verified)
        return load_from("load_vars", self.path, at, group_for(self.path, template), read)
