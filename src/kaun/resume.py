"""A fit with a checkpoint directory: where its run stands, what must be the same to go on, and when it is saved."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import fingerprint, rng, tree
from kaun.body import Body
from kaun.call import Call
from kaun.checkpoint import Directory, ResumeMismatch
from kaun.checkpoint.store import Saved, Store
from kaun.compiled import Loop
from kaun.errors import warn
from kaun.hook import Hook
from kaun.items import length
from kaun.runs import Run as Items
from kaun.signals import Signals
from kaun.snapshots import packed, unpacked
from kaun.staging import programs
from kaun.state import TrainState

__all__ = ["Run", "begun", "digest_of", "nothing_lost", "settle"]


class Run:
    """A run of steps over some data, which may have been begun by an earlier process.

    Attributes:
        data: the items that are left.
        done: how many steps it has taken.
        total: how many it will have taken at the end, None where that is not known.
        finished: whether there is nothing left to do.
        again: the loss of the last step, where the report for it was interrupted and has to be called once more.
    """

    def __init__(self, state: TrainState, data: Iterable[Any], keeper: _Keeper | None = None) -> None:
        self._state: TrainState | None = state
        self.data, self.total = data, length(data)
        self.done = 0
        self.finished = False
        self.again: float | None = None
        self.signals = Signals(wanted=keeper is not None)
        self._keeper = keeper

    def take(self) -> TrainState:
        """The state where it stands; it is not kept."""
        state, self._state = self._state, None
        assert state is not None
        return state

    def ahead(self, done: int, most: int) -> int:
        """How many of the next ``most`` steps may run before a checkpoint is due."""
        keeper = self._keeper
        return most if keeper is None or keeper.each is None else min(most, keeper.each - done % keeper.each)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return self._keeper is not None and self._keeper.due(step)

    @property
    def kept(self) -> bool:
        """Whether there is a directory for its checkpoints."""
        return self._keeper is not None

    def save(self, step: int, state: TrainState, *, ended: str = "", again: float | None = None) -> None:
        """Write a checkpoint, where there is a directory for it: the file work is done by a thread.

        Arguments:
            step: how many steps the run has taken.
            ended: how it ended, ``"data"`` or ``"stopped"``, empty while it goes on.
            again: the loss of that step, where its report was interrupted.
        """
        if self._keeper is not None and step:
            self._keeper.save(step, state, ended, again)

    def save_last(self, step: int, state: TrainState, again: float | None, error: BaseException) -> None:
        """As ``save``, when an exception ends the run; what goes wrong with it becomes a note of that exception."""
        try:
            self.save(step, state, again=again)
        except Exception as failed:
            error.add_note(f"And no checkpoint of step {step} was written: {failed}")

    def heard(self, items: Iterator[Items]) -> Iterator[Items]:
        """The same items; a signal may interrupt getting each."""
        return items if self._keeper is None else self._counted(self.signals.heard_in(items), self._keeper)

    def _counted(self, items: Iterator[Items], keeper: _Keeper) -> Iterator[Items]:
        for item in items:
            keeper.pulled += item.n
            yield item

    def traced(self, call: Call, body: Body) -> None:
        """Hold the program of a step against the one that the run was begun with."""
        if self._keeper is not None:
            self._keeper.traced(call, body)


@contextmanager
def begun(
    checkpoints: Directory | None, state: TrainState, data: Iterable[Any], report: Any
) -> Generator[Run, None, None]:
    """The run that a fit goes on with. What is being written when the block ends is on the disk afterwards.

    Raises:
        ResumeMismatch: when the directory holds another run.
        ValueError: when a run could not be resumed.
        TypeError: for what is no Directory, and for data that can be iterated once only.
        OSError: when checkpoints cannot be written.
    """
    if checkpoints is None:
        run = Run(state, data)
        del state  # fit frees it where nobody else holds it
        yield run
        return
    _check(checkpoints, state, data)
    store = Store.open(checkpoints)
    try:
        run = _stands(store, checkpoints, state, data, report)
        del state
        with run.signals:
            yield run
    except BaseException as error:
        try:
            store.close()
        except Exception as failed:
            error.add_note(f"And the last checkpoint was not written: {failed}")
        raise
    store.close()


def _stands(store: Store, directory: Directory, state: TrainState, data: Iterable[Any], report: Any) -> Run:
    facts = _facts(state, data)
    saved = store.newest(like=state)
    keeper = _Keeper(store, directory, facts, report, saved)
    run = Run(state if saved is None else saved.state, data, keeper)
    if saved is not None:
        _go_on(run, directory, saved, facts, report)
    if not run.finished:
        run.data = keeper.data = fingerprint.after(data, run.done, None if saved is None else saved.facts["place"])
    return run


def _check(checkpoints: Any, state: TrainState, data: Any) -> None:
    if not isinstance(checkpoints, Directory):
        raise TypeError(
            f"fit(checkpoints=...) expected a checkpoint.Directory, received {checkpoints!r}. Write "
            'checkpoints=checkpoint.Directory("runs/digits", every=500).'
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"fit(checkpoints=...) is for one process, and this is one of {jax.process_count()}. Save the states of a "
            "run over several hosts with Orbax, in a report."
        )
    keyed = ["the state (trainer.init or trainer.make_state)"] if rng.unscoped(state.key) else []
    keyed += fingerprint.unscoped(data)
    if keyed:
        raise ValueError(
            f"fit(checkpoints=...) cannot be resumed by another process: {' and '.join(keyed)} drew a key outside an "
            "rng scope, which will be another one there. Make trainer, state and data in one:\n"
            "    with rng.scope(42):\n        state = trainer.init()\n        train = Data.batches(..., shuffle=True)"
        )
    fingerprint.after(data, 0)  # refuses what can be iterated once


def _facts(state: TrainState, data: Any) -> dict[str, Any]:
    """What must be the same in the process that goes on, and what had better be."""
    return {
        "key": np.asarray(jax.random.key_data(state.key)).tobytes().hex(),
        "start": int(state.step),
        "data": fingerprint.of(data),
        "machine": {
            "jax": jax.__version__, "python": platform.python_version(), "backend": jax.default_backend(),
            "devices": jax.device_count(), "cores": len(os.sched_getaffinity(0)) if _AFFINITY else os.cpu_count(),
        },
    }  # fmt: skip


_AFFINITY = hasattr(os, "sched_getaffinity")


def _go_on(run: Run, directory: Directory, saved: Saved, facts: dict[str, Any], report: Any) -> None:
    """Set a run to where a checkpoint left it, if that is the same run."""
    found, done = saved.facts, saved.step
    if found["key"] != facts["key"]:
        _differs(directory, "key", done, ["the run's key: another seed (rng.scope) made this state"])
    if found["start"] != facts["start"]:
        line = f"the state's step at the start of the run was {found['start']}, is {facts['start']}"
        _differs(directory, "key", done, [line])
    if lines := fingerprint.differences(found["data"], facts["data"], done):
        _differs(directory, "data", done, lines)
    _warn_of(found["machine"], facts["machine"])
    run.done = done
    longer = run.total > done if run.total is not None else found["data"] != facts["data"]
    run.finished = found["ended"] == "stopped" or (found["ended"] == "data" and not longer)
    run.again = None if found["again"] is None else float.fromhex(found["again"])
    _restore(directory, report, saved)


def _restore(directory: Directory, report: Any, saved: Saved) -> None:
    restore = getattr(report, "restore", None)
    kept = unpacked(saved.facts["report"], saved.reports, saved.state)
    if restore is None:
        if kept:
            line = f"what they had to go on from is for none of these: {', '.join(kept)}"
            _differs(directory, "reports", saved.step, [line])
        return
    try:
        restore(kept)
    except ValueError as error:
        _differs(directory, "reports", saved.step, [str(error)])


def _differs(directory: Directory, what: str, step: int, lines: list[str]) -> None:
    listed = "".join(f"\n  {line}" for line in lines)
    where = f"{str(directory.path)!r} holds another run, at step {step}. Its {what} differ{'s' * (what != 'reports')}:"
    if what not in directory.accept:
        raise ResumeMismatch(
            f"{where}{listed}\nMake them the same again to go on; begin another run in a directory of its own, "
            f'checkpoints=runs.child("other"); or go on all the same, Directory(..., accept={{"{what}"}}).'
        )
    warn(f"{where}{listed}\nThe run goes on, because accept= names it.")


def _warn_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        warn(
            f"A run is resumed where {'; '.join(changed)}. It goes on from the same state, but the bytes of its "
            "results may differ from those of a run without a break."
        )


def settle(run: Run, loop: Loop, now: Callable[[], TrainState], hook: Hook, ended: str = "") -> None:
    """Run what waits, tell the report of it, and save it."""
    loop.flush()
    loop.wait()
    hook.finish()
    if run.kept:
        run.save(loop.done, now(), ended=ended)


@contextmanager
def nothing_lost(run: Run, loop: Loop, now: Callable[[], TrainState], hook: Hook) -> Generator[None]:
    """The steps of a fit; whatever ends them, what is done is kept: on the exception, and in the directory."""
    try:
        hook.begin()
        yield
    except BaseException as error:
        first: BaseException = error
        with suppress(Exception):
            now()  # the steps whose items came before this are run
            first = loop.failure() or error
            hook.finish()
        first.kaun_state = state = now()  # pyright: ignore[reportAttributeAccessIssue]
        run.save_last(loop.done, state, hook.again, first)
        if first is error:
            raise
        raise first from error
    finally:
        hook.end()


class _Keeper:
    """Writes the checkpoints of a run."""

    def __init__(
        self, store: Store, directory: Directory, facts: dict[str, Any], report: Any, saved: Saved | None
    ) -> None:
        every = directory.every
        self.each = every if isinstance(every, int) else None
        self._pause = every.total_seconds() if isinstance(every, timedelta) else None
        self._next = None if self._pause is None else time.monotonic() + self._pause
        self._store, self._directory, self._facts, self._report = store, directory, facts, report
        same = saved is not None and saved.facts["machine"]["jax"] == jax.__version__
        self._known: dict[str, str] = dict(saved.facts["programs"]) if saved is not None and same else {}
        self._done = 0 if saved is None else saved.step  # the step of the newest checkpoint
        self.data: Iterable[Any] = ()
        self.pulled = self._done  # items that were asked for

    def due(self, step: int) -> bool:
        if self.each is not None:
            return step % self.each == 0
        return self._next is not None and time.monotonic() >= self._next

    def save(self, step: int, state: TrainState, ended: str, again: float | None) -> None:
        if step == self._done and not ended and again is None:
            return  # it is there, and may say that the run had ended
        snapshot = getattr(self._report, "snapshot", None)
        told, arrays = packed({} if snapshot is None else snapshot())
        facts = {
            **self._facts, "programs": self._known, "report": told, "ended": ended,
            "again": None if again is None else again.hex(),
            # After an item that was pulled and then failed, the loader's place is not the run's.
            "place": fingerprint.position(self.data) if self.pulled == step else None,
        }  # fmt: skip
        self._store.save(step, state, arrays, facts)
        self._done = step
        self._next = None if self._pause is None else time.monotonic() + self._pause

    def traced(self, call: Call, body: Body) -> None:
        x, _, ctx = call.split(call.leaves)
        # Not by the loss's code, which may be another where only the program is to be the same.
        given = tree.flatten({"x": x, "ctx": dict(ctx.items())})[0]
        kind = ", ".join(f"{path} {tree.describe(leaf)}" for path, leaf in given.items())
        name = f"{getattr(call.subject, '__qualname__', type(call.subject).__name__)}: {kind}"
        digest = digest_of(body.traced) + " raises" * body.selects
        if self._known.get(name, digest) != digest:
            line = (
                f"the compiled step for {kind}: the model, loss, optimizer, one of their constants (a learning rate) "
                "or on_nonfinite was changed"
            )
            _differs(self._directory, "program", self._done, [line])
        self._known[name] = digest


def digest_of(closed: Any) -> str:
    """The SHA-256 of a traced program, a closed jaxpr: its text, and the bytes of all its constants."""
    digest = hashlib.sha256(_ADDRESS.sub("", str(closed.jaxpr)).encode())
    for constant in _constants(closed):
        if jnp.issubdtype(constant.dtype, jax.dtypes.prng_key):
            constant = jax.random.key_data(constant)
        array = np.asarray(constant)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _constants(closed: Any) -> Iterator[Any]:
    """The arrays of a program that its text does not spell out, of all programs inside it too."""
    for program in programs(closed):
        yield from (c for c in getattr(program, "consts", ()) if hasattr(c, "dtype"))
        for equation in getattr(program, "jaxpr", program).eqns:
            values = (getattr(each, "val", None) for each in equation.invars)
            yield from (value for value in values if getattr(value, "ndim", 0))
