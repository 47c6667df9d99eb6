"""A fit with a checkpoint directory: where its run stands, what must be the same to go on, and when it is saved."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from kaun import rng
from kaun._engine import StepInputs, StepLoop, TracedStep
from kaun._run import identity
from kaun._run.identity import refuse_difference, run_facts, warn_of_machine
from kaun._run.position import resume_from
from kaun._run.report_state import unpack_snapshot
from kaun._run.reports import ReportCaller
from kaun._run.saver import CheckpointSaver
from kaun._run.signals import Signals
from kaun.checkpoint import Directory, Saved, Store
from kaun.data import Chunk as Items
from kaun.data import known_length
from kaun.state import TrainState

__all__ = [
    "TrainingRun",
    "open_run",
]


class TrainingRun:
    """A run of steps over some data, which may have been begun by an earlier process.

    Attributes:
        data: the items that are left.
        done: how many steps it has taken.
        total: how many it will have taken at the end, None where that is not known.
        finished: whether there is nothing left to do.
        again: the loss of the last step, where the report for it was interrupted and has to be called once more.
    """

    def __init__(self, state: TrainState, data: Iterable[Any], keeper: CheckpointSaver | None = None) -> None:
        self._state: TrainState | None = state
        self.data, self.total = data, known_length(data)
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

    def _counted(self, items: Iterator[Items], keeper: CheckpointSaver) -> Iterator[Items]:
        for item in items:
            keeper.pulled += item.n
            yield item

    def traced(self, call: StepInputs, body: TracedStep) -> None:
        """Hold the program of a step against the one that the run was begun with."""
        if self._keeper is not None:
            self._keeper.traced(call, body)


@contextmanager
def open_run(
    checkpoints: Directory | None, state: TrainState, data: Iterable[Any], report: Any
) -> Generator[TrainingRun, None, None]:
    """The run that a fit goes on with. What is being written when the block ends is on the disk afterwards.

    Raises:
        ResumeMismatch: when the directory holds another run.
        ValueError: when a run could not be resumed.
        TypeError: for what is no Directory, and for data that can be iterated once only.
        OSError: when checkpoints cannot be written.
    """
    if checkpoints is None:
        run = TrainingRun(state, data)
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


def _stands(store: Store, directory: Directory, state: TrainState, data: Iterable[Any], report: Any) -> TrainingRun:
    facts = run_facts(state, data)
    saved = store.newest(like=state)
    keeper = CheckpointSaver(store, directory, facts, report, saved)
    run = TrainingRun(state if saved is None else saved.state, data, keeper)
    if saved is not None:
        _go_on(run, directory, saved, facts, report)
    if not run.finished:
        run.data = keeper.data = resume_from(data, run.done, None if saved is None else saved.facts["place"])
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
    keyed += identity.unscoped(data)
    if keyed:
        raise ValueError(
            f"fit(checkpoints=...) cannot be resumed by another process: {' and '.join(keyed)} drew a key outside an "
            "rng scope, which will be another one there. Make trainer, state and data in one:\n"
            "    with rng.scope(42):\n        state = trainer.init()\n        train = Data.batches(..., shuffle=True)"
        )
    resume_from(data, 0)  # refuses what can be iterated once


def _go_on(run: TrainingRun, directory: Directory, saved: Saved, facts: dict[str, Any], report: Any) -> None:
    """Set a run to where a checkpoint left it, if that is the same run."""
    found, done = saved.facts, saved.step
    if found["key"] != facts["key"]:
        refuse_difference(directory, "key", done, ["the run's key: another seed (rng.scope) made this state"])
    if found["start"] != facts["start"]:
        line = f"the state's step at the start of the run was {found['start']}, is {facts['start']}"
        refuse_difference(directory, "key", done, [line])
    if lines := identity.differences(found["data"], facts["data"], done):
        refuse_difference(directory, "data", done, lines)
    warn_of_machine(found["machine"], facts["machine"])
    run.done = done
    longer = run.total > done if run.total is not None else found["data"] != facts["data"]
    run.finished = found["ended"] == "stopped" or (found["ended"] == "data" and not longer)
    run.again = None if found["again"] is None else float.fromhex(found["again"])
    _restore(directory, report, saved)


def _restore(directory: Directory, report: Any, saved: Saved) -> None:
    restore = getattr(report, "restore", None)
    kept = unpack_snapshot(saved.facts["report"], saved.reports, saved.state)
    if restore is None:
        if kept:
            line = f"what they had to go on from is for none of these: {', '.join(kept)}"
            refuse_difference(directory, "reports", saved.step, [line])
        return
    try:
        restore(kept)
    except ValueError as error:
        refuse_difference(directory, "reports", saved.step, [str(error)])


def flush_and_save(
    run: TrainingRun, loop: StepLoop, now: Callable[[], TrainState], hook: ReportCaller, ended: str = ""
) -> None:
    """Run what waits, tell the report of it, and save it."""
    loop.flush()
    loop.wait()
    hook.finish()
    if run.kept:
        run.save(loop.done, now(), ended=ended)


@contextmanager
def save_on_error(
    run: TrainingRun, loop: StepLoop, now: Callable[[], TrainState], hook: ReportCaller
) -> Generator[None]:
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
