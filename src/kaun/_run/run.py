"""A run of ``fit``: the steps done, the data that is left and the state, of a new run or of one that is resumed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._calls import shown
from kaun._engine import StepInputs, StepLoop, TracedStep
from kaun._messages import add_note, contextmanager, set_on, warn
from kaun._processes import is_first
from kaun._report import member
from kaun._run.agree import Agreement, EndedElsewhere, agreement_of
from kaun._run.differences import differences
from kaun._run.generators import captured_generators, global_states, refuse_draws
from kaun._run.hyperparameters import changed_hyperparameters
from kaun._run.identity import HYPERPARAMETERS, check_facts, refuse_difference, run_facts, unscoped_run, warn_of_machine
from kaun._run.position import resume_from
from kaun._run.report_state import keeping, match_reports, report_kind, unpack_snapshot
from kaun._run.reports import ReportCaller, check_best_is_measured
from kaun._run.same import begin_facts, refuse_unscoped
from kaun._run.saver import CheckpointSaver
from kaun._run.signals import Signals, note_interrupt
from kaun.checkpoint import Best, Directory, Saved, Store, group_for, processes_with
from kaun.data import Chunk, PassLength, has_exact_length, known_length, pass_length, stages_of
from kaun.sharding import Sharding, put
from kaun.sharding.core import processes_of
from kaun.state import TrainState

__all__ = ["TrainingRun", "open_run"]


class TrainingRun:
    """A run of steps over some data, which an earlier process may have started.

    Args:
        state: The state to start from.
        data: All items of the run.
        saver: Writes its checkpoints, None without a directory for them.
        together: What its processes agree on, None where it has one.

    Attributes:
        data: The items that are left.
        done: How many steps it has taken.
        total: How many it will have taken at the end, None if that is not known.
        passes: How the data are cut into passes, None where they are one or that is not known.
        finished: Whether there is nothing left to do.
        stopped: Whether it is finished because its report raised ``EarlyStop``.
        pending_report_loss: The last step's loss if its report was interrupted; the report is called again on resume.
        saver: Writes its checkpoints, None without a directory for them.
        together: What its processes agree on, None where it has one.
        signals: The signals that end it, where it has a directory or several processes.
        now: Gives the state after the last step, while the steps are taken and after that.
    """

    def __init__(
        self,
        state: TrainState,
        data: Iterable[Any],
        saver: CheckpointSaver | None = None,
        together: Agreement | None = None,
    ) -> None:
        self._state: TrainState | None = state
        self.data: Iterable[Any] = data
        self.done: int = 0
        self.total: int | None = known_length(data)
        self.passes: PassLength | None = pass_length(stages_of(data))
        self.finished: bool = False
        self.stopped: bool = False
        self.pending_report_loss: float | None = None
        self.saver: CheckpointSaver | None = saver
        self.together: Agreement | None = together
        self.signals: Signals = Signals(wanted=saver is not None or together is not None)
        self.now: Callable[[], TrainState] | None = None

    def peek(self) -> TrainState:
        """The state from which the run continues, before it is taken."""
        assert self._state is not None
        return self._state

    def take(self) -> TrainState:
        """The state from which the run continues. It is returned once, so that the run does not keep it alive."""
        state, self._state = self._state, None
        assert state is not None
        return state

    def next_steps(self, step: int, caller: ReportCaller, loop: StepLoop) -> int:
        """How many steps come next, up to a call of the report or a checkpoint; with several processes, in all."""
        if self.together is not None:
            return self.together.ahead(step)
        count = caller.ahead(step, loop.limit)
        return count if self.saver is None else self.saver.ahead(step, count)

    def until_data_ends(self) -> contextlib.AbstractContextManager[Any]:
        """A block that also ends where the data of another process does."""
        return contextlib.suppress(EndedElsewhere)

    def ahead(self, done: int, most: int) -> int:
        """How many of the next ``most`` steps may run before a checkpoint is due."""
        return most if self.saver is None else self.saver.ahead(done, most)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return self.saver is not None and self.saver.due(step, None if self.together is None else self.together.due)

    def is_best(self, step: int, values: Mapping[str, float]) -> bool:
        """Take what a report measured after a step, and return whether that is the best so far."""
        return self.saver is not None and self.saver.is_best(step, values)

    def save_best(self, step: int, state: TrainState) -> None:
        """Save a step because it is the best one."""
        if self.saver is not None:
            self.saver.save(step, state, is_best=True)

    def interruptible_items(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The same chunks; a signal may interrupt getting each, but where the processes do not vote on each."""
        if self.together is None or not self.together.certain:
            chunks = self.signals.interruptible_items(chunks)
        return chunks if self.saver is None else self.saver.count_pulled(chunks)

    @property
    def on_trace(self) -> Callable[[StepInputs, TracedStep], None] | None:
        """Compares the program of a step with the one that the run was started with; None without a directory."""
        return None if self.saver is None else self.saver.check_program


@contextmanager
def open_run(
    checkpoints: Directory | None,
    state: TrainState,
    data: Iterable[Any],
    report: Any,
    on_nonfinite: str = "raise",
    sharding: Sharding | None = None,
) -> Generator[TrainingRun, None, None]:
    """The run of a fit: a new one, or that of the directory. When the block ends, all checkpoints are on the disk.

    Args:
        checkpoints: The directory, or None.
        state: The state that ``fit`` was given.
        data: All items of the run.
        report: The report of the fit, whose snapshot is restored.
        on_nonfinite: As the trainer's; unless it is ``"ignore"``, no run is resumed from a state that is not finite.
        sharding: Where the state will lie: over which processes.

    Raises:
        ResumeMismatch: If the directory holds another run.
        ValueError: If a run could not be resumed, or no report measures what ``best=`` names.
        TypeError: If ``checkpoints`` is not a Directory, or data can be iterated once only.
        OSError: If checkpoints cannot be written.
    """
    with agreement_of(processes_of(sharding, state)) as together, contextlib.ExitStack() as stack:
        if checkpoints is None:
            run = TrainingRun(state, data, None, together)
        else:
            if sharding is not None:  # what a checkpoint holds is read onto the devices of this state
                state = jax.tree_util.tree_map(put, state, sharding.of(state))
            _check_resumable(checkpoints, state, data)
            if checkpoints.best is not None and is_first():
                check_best_is_measured(checkpoints.best[0], report)
            if together is not None:
                together.meet()  # what was refused above in one process ends the fit in all
            store = Store.open(checkpoints, group=group_for(checkpoints.path, state))
            stack.enter_context(_closed(store))
            run = _start_or_resume(
                store, checkpoints, state, data, report, together, sharding, watched=on_nonfinite != "ignore"
            )
        if together is not None:
            refuse_unscoped(state, data)
            together.begin(begin_facts(run.peek(), data, report, run.done, saves=run.saver is not None))
        del state  # fit frees its memory where nothing else refers to it
        with _state_on_error(run), _finished(together, stack), run.signals:
            yield run


@contextmanager
def _state_on_error(run: TrainingRun) -> Generator[None]:
    """Give the last state to an exception that came after the steps: of the last save, or of a signal."""
    try:
        yield
    except BaseException as error:
        if run.now is not None and not hasattr(error, "kaun_state"):
            set_on(error, "kaun_state", run.now())
            note_interrupt(error, "after the last step")
        raise
    finally:
        run.now = None  # it holds the loop, which holds the run


@contextmanager
def _finished(together: Agreement | None, stack: contextlib.ExitStack) -> Generator[None]:
    """Close what the stack holds at the end, and then wait for the other processes to have come that far."""
    with stack:
        yield
    if together is not None:
        together.finish()


@contextmanager
def _closed(store: Store) -> Generator[None]:
    """Wait for the last save at the end, and release the directory."""
    try:
        yield
    except BaseException as error:
        try:
            store.close()
        except Exception as failed:
            add_note(error, f"Also, the last checkpoint was not written: {failed}")
        raise
    store.close()


def _check_resumable(checkpoints: Any, state: TrainState, data: Any) -> None:
    """Refuse what another process could not resume."""
    if not isinstance(checkpoints, Directory):
        raise TypeError(
            f"fit(checkpoints=...) expected a checkpoint.Directory, received {shown(checkpoints)}. Write "
            'checkpoints=checkpoint.Directory("runs/digits", every=500).'
        )
    if jax.process_count() > 1 and not processes_with(state):
        raise ValueError(
            f"fit(checkpoints=...): each of the {jax.process_count()} processes has a state of its own, on its own "
            "devices, and one directory holds one run. Spread the state over all devices, Trainer(..., "
            "sharding=kaun.sharding.data_parallel())."
        )
    if keyed := unscoped_run(state, data):
        raise ValueError(
            f"fit(checkpoints=...) cannot be resumed by another process: {' and '.join(keyed)} drew a key outside an "
            "rng scope, and another process would draw another key. Make trainer, state and data in a scope:\n"
            "    with rng.scope(42):\n        state = trainer.init()\n        train = Data.batches(..., shuffle=True)"
        )
    if found := captured_generators(data):
        refuse_draws(checkpoints, found)
    resume_from(data, 0)  # refuses what can be iterated once


def _start_or_resume(
    store: Store,
    directory: Directory,
    state: TrainState,
    data: Iterable[Any],
    report: Any,
    together: Agreement | None,
    sharding: Sharding | None,
    *,
    watched: bool,
) -> TrainingRun:
    facts = run_facts(state, data, sharding)
    saved = store.newest(state, functools.partial(_spoiled, state)) if watched else store.newest(state)
    if saved is not None:
        check_facts(directory, saved.step, saved.facts)
    own = (
        facts if saved is None else facts | {HYPERPARAMETERS: saved.facts.get(HYPERPARAMETERS, facts[HYPERPARAMETERS])}
    )
    saver = CheckpointSaver(store, directory, own, report, saved, _best(store, directory, saved))
    run = TrainingRun(state if saved is None else saved.state, data, saver, together)
    if saved is not None:
        _resume(run, directory, saved, facts, report, exact=has_exact_length(data))
    if not run.finished:
        if store.read_only is not None:
            raise store.read_only
        known = None if saved is None else saved.facts["place"]
        run.data = saver.data = resume_from(data, run.done, known, saver.check_last)
    return run


def _best(store: Store, directory: Directory, saved: Saved | None) -> Best | None:
    """The best step of a run that is resumed, None where its checkpoint is damaged or was removed since."""
    best = None if saved is None else Best.of(saved.facts)
    if saved is None or best is None or best.step == saved.step:
        return best
    wrong = store.check_best(best)
    if not wrong:
        return best
    warn(
        f"{str(directory.path)!r}: the checkpoint of the best {best} cannot be used: {wrong}. The run is resumed from "
        f"step {saved.step}, and the best one of the steps after it will be kept."
    )
    return None


def _spoiled(start: TrainState, found: TrainState) -> str:
    """Return what to say of a saved state with a leaf that is not finite, and was at the start of the run."""
    before = tree.flatten(start)[0]
    for path, leaf in tree.flatten(found)[0].items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            pairs = zip(_pieces_here(leaf), _pieces_here(before[path]), strict=True)
            if any((~np.isfinite(now) & np.isfinite(then)).any() for now, then in pairs):
                return (
                    f"{path!r} is not finite, and was finite when the run began. To train with it all the same, write "
                    'Trainer(..., on_nonfinite="ignore")'
                )
    return ""


def _pieces_here(leaf: Any) -> list[np.ndarray[Any, Any]]:
    """The values of an array, or those that lie on devices of this process."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return [np.asarray(leaf)]
    return [np.asarray(shard.data) for shard in leaf.addressable_shards]


def _resume(
    run: TrainingRun, directory: Directory, saved: Saved, facts: dict[str, Any], report: Any, *, exact: bool
) -> None:
    """Set a run to where a checkpoint left it, if that is the same run."""
    found, done = saved.facts, saved.step
    if found["key"] != facts["key"]:
        refuse_difference(directory, "key", done, ["the run's key: this state was made with another seed (rng.scope)"])
    if found["start"] != facts["start"]:
        line = f"the state's step at the start of the run was {found['start']}, is {facts['start']}"
        if found["start"] < facts["start"]:
            line += (
                ". This state is probably what that run returned, as in a cell of a notebook that is run twice. Pass "
                "the state that the run began with: run the cell that makes it again, and give the result another "
                "name, trained = trainer.fit(state, train, checkpoints=runs)"
            )
        refuse_difference(directory, "key", done, [line])
    kept = found.get(HYPERPARAMETERS)  # not there in a checkpoint of an older kaun
    if changed := changed_hyperparameters(kept or {}, facts[HYPERPARAMETERS]):
        refuse_difference(directory, "program", done, changed)
    lines, states = differences(found["data"], facts["data"], done, exact=exact), global_states()
    lines += [
        f"{name} has another state, and the loader draws its order from it: seed it at the same place of the script"
        for name, state in found.get("draws", {}).items()
        if state != states.get(name)
    ]
    if lines:
        refuse_difference(directory, "data", done, lines)
    warn_of_machine(found["machine"], facts["machine"])
    run.done = done
    longer = run.total > done if run.total is not None and exact else found["data"] != facts["data"]
    run.stopped = found["ended"] == "stopped"
    run.finished = run.stopped or (found["ended"] == "data" and not longer)
    run.pending_report_loss = None if found["again"] is None else float.fromhex(found["again"])
    _restore_report(directory, report, saved)


def _restore_report(directory: Directory, report: Any, saved: Saved) -> None:
    """Give each report what it had kept; those that are new have nothing, and those that are gone are refused."""
    try:
        kept = unpack_snapshot(saved.facts["report"], saved.reports, saved.state)
        matched, gone = match_reports(keeping(report), kept)
    except ValueError as error:
        matched, gone = [], [str(error)]
    if gone and is_first():  # a report may be there in process 0 alone, whose reports a checkpoint holds
        refuse_difference(directory, "reports", saved.step, gone)
    for each, values in matched:
        restore = member(each, "restore")
        assert restore is not None
        try:
            restore(values)
        except ValueError as error:
            refuse_difference(directory, "reports", saved.step, [str(error)])
        except (TypeError, LookupError, AttributeError) as error:  # values of another form than the report saves
            line = f"{report_kind(each)}.restore(values) failed, {type(error).__name__}: {error}"
            refuse_difference(directory, "reports", saved.step, [line])
