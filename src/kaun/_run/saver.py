"""When a checkpoint of a run is due, and what is written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import jax

from kaun import tree
from kaun._engine import StepInputs, TracedStep
from kaun._run.generators import check_draws
from kaun._run.identity import digest_item, refuse_difference
from kaun._run.position import makes_items, position
from kaun._run.report_state import keeping, pack_snapshot, snapshot_reports
from kaun.checkpoint import BEST, BRANCH, FOREVER, Best, Directory, Saved, Store
from kaun.data import Chunk
from kaun.state import TrainState

__all__ = ["CheckpointSaver"]

_MOST_PROGRAMS = 8  # of inputs of one kind; where there are several, another one is no difference


class CheckpointSaver:
    """Writes the checkpoints of a run.

    Args:
        store: The open directory.
        directory: The directory as the user gave it.
        facts: What the run is, see ``identity.run_facts``.
        report: The report of the fit, whose snapshot is saved too.
        saved: The checkpoint from which the run was resumed, None for a new one.
        best: The best step so far, whose checkpoint is there.

    Attributes:
        data: The data of the run, whose position is saved.
        draws: The states, at the start of the run, of the global generators that a loader draws from.
    """

    def __init__(
        self,
        store: Store,
        directory: Directory,
        facts: dict[str, Any],
        report: Any,
        saved: Saved | None,
        best: Best | None = None,
    ) -> None:
        every = directory.every
        self.data: Iterable[Any] = ()
        self._every = every if isinstance(every, int) else None
        self._pause = every.total_seconds() if isinstance(every, timedelta) else None
        self._next = None if self._pause is None else time.monotonic() + self._pause
        self._store, self._directory, self._facts, self._report = store, directory, dict(facts), report
        branch = {} if saved is None or BRANCH not in saved.facts else {BRANCH: saved.facts[BRANCH]}
        asked = directory.resume
        self._facts |= {BRANCH: asked} if asked == "best" or isinstance(asked, int) else branch
        self._facts |= {} if directory.forever is None else {FOREVER: directory.forever}
        same = saved is not None and saved.facts["machine"]["jax"] == jax.__version__
        self._programs: dict[str, str] = dict(saved.facts["programs"]) if saved is not None and same else {}
        self._traced: set[str] = set()
        self._saved_step = 0 if saved is None else saved.step
        self._pulled = self._saved_step
        self.draws: dict[str, str] = {} if saved is None else dict(saved.facts.get("draws", {}))
        self._digest: str | None = None if saved is None else saved.facts.get("last")
        # The best step so far, the one recorded in the newest save, and the one whose save has finished.
        self._best = self._written = self._sure = best
        self._last: Any = None  # the item that was pulled last, where making it again may give another one

    def newest(self, like: TrainState) -> Saved | None:
        """The newest undamaged checkpoint, None if there is none."""
        return self._store.newest(like)

    def ahead(self, done: int, most: int) -> int:
        """How many of the next ``most`` steps may run before a checkpoint is due."""
        return min([most, *(n - done % n for n in (self._every, self._directory.forever) if n is not None)])

    def due(self, step: int, clock: bool | None = None) -> bool:
        """Whether a checkpoint is due after this step; ``clock`` is what the clock says, None to read it."""
        if any(n is not None and step % n == 0 for n in (self._every, self._directory.forever)):
            return True
        return self.clock_is_due() if clock is None else clock

    def clock_is_due(self) -> bool:
        """Whether the time between two checkpoints has passed."""
        return self._next is not None and time.monotonic() >= self._next

    def count_pulled(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The same chunks; counts the items in them, and looks at how they are made."""
        kept = makes_items(self.data)
        for chunk in check_draws(chunks, self.data, self._directory, self.draws) if kept else chunks:
            self._pulled += chunk.n
            self._last = chunk.item if kept else None
            yield chunk

    def check_last(self, count: int, item: Any, final: bool) -> bool:
        """Compare the last item of the run's checkpoint, which was made again, with the one that it was.

        Args:
            count: How many items there are up to it.
            item: The item, None where there are fewer.
            final: Whether a difference is refused.

        Raises:
            ResumeMismatch: If they differ, unless the directory accepts that.
        """
        step, lines = self._saved_step, list[str]()
        if count < step:
            lines = [f"the data has {count} items now, and the run has taken {step} already"]
        elif self._digest is not None and digest_item(item) != self._digest:
            lines = [
                f"item {step - 1} (counted from 0), made again, is another one than in that run: the data has changed, "
                "a loader has no seed, or random numbers come from no key. Seed the loader, "
                "torch.Generator().manual_seed(0); draw random numbers in data.random_map(f)"
            ]
        if lines and final:
            refuse_difference(self._directory, "data", step, lines)
        return not lines

    def is_best(self, step: int, values: Mapping[str, float]) -> bool:
        """Take the values that a report measured after a step, and return whether its value is the best so far."""
        wanted = self._directory.best
        if wanted is None or wanted[0] not in values:
            return False
        best = Best.after(self._best, wanted, step, float(values[wanted[0]]))
        self._best = self._best if best is None else best
        return best is not None

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        ended: str = "",
        pending_report_loss: float | None = None,
        is_best: bool = False,
    ) -> None:
        """Write a checkpoint of a step, unless it is there already. A thread writes the files.

        Args:
            step: How many steps the run has taken; of step 0 nothing is written.
            state: The state after them.
            ended: How the run ended, ``"data"`` or ``"stopped"``; empty where it has not.
            pending_report_loss: The step's loss if its report was interrupted; the report is called again on resume.
            is_best: Whether it is saved because its value is the best so far.
        """
        if not step or (step == self._saved_step and not ended and pending_report_loss is None and not is_best):
            return  # the checkpoint that is there may say that the run had ended
        self._confirm_best()
        arrays, facts = self._store.in_all(lambda: self._values(step))  # reports and loaders may fail in one alone
        facts |= {"ended": ended, "again": None if pending_report_loss is None else pending_report_loss.hex()}
        if self._best is not None:
            self._best = self._best.saved(step, alone=is_best and not self.due(step))
            facts[BEST] = self._best.fact()
        self._store.save(step, state, arrays, facts)
        self._saved_step, self._written = step, self._best
        self._next = None if self._pause is None else time.monotonic() + self._pause

    def _values(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What reports keep, and facts of the run after a step. The names are those of earlier checkpoints."""
        report, arrays = pack_snapshot(snapshot_reports(keeping(self._report)))
        # Where an item was pulled and then failed, the loader's position is not the run's.
        current = self._pulled == step
        last = digest_item(self._last) if current and self._last is not None else None
        facts = {"place": position(self.data) if current else None, "last": last, "draws": self.draws}
        return arrays, {**self._facts, "programs": self._programs, "report": report, **facts}

    def _confirm_best(self) -> None:
        """Wait for the save in progress. If it failed, the best step that it recorded is replaced by the one before."""
        try:
            self._store.join()
        except BaseException:
            self._best = self._sure if self._best is self._written else self._best
            raise
        self._sure = self._written

    def check_program(self, inputs: StepInputs, traced_step: TracedStep) -> None:
        """Compare a step's program with the one that the run was started with.

        Raises:
            ResumeMismatch: If they differ, unless the directory accepts that.
        """
        x, _, ctx = inputs.split(inputs.leaves)
        # Not by the loss's code, which may be another where only the program is to be the same.
        given = tree.flatten({"x": x, "ctx": dict(ctx.items())})[0]
        kind = ", ".join(f"{path} {tree.describe(leaf)}" for path, leaf in given.items())
        name = f"{getattr(inputs.subject, '__qualname__', type(inputs.subject).__name__)}: {kind}"
        digest = f"{traced_step.digest()} {traced_step.on_nonfinite}"
        known = self._programs.get(name, digest).split("; ")
        # A static value that the loss captures may change within a run, and gives it another program.
        varies = name in self._traced or len(known) > 1
        if digest not in known and not varies:
            line = (
                f"the compiled step for {kind}: the model, loss, optimizer, one of their constants (a learning rate), "
                "or one of the Trainer's on_nonfinite, penalty, accumulate, average was changed"
            )
            refuse_difference(self._directory, "program", self._saved_step, [line])
            known = []
        self._traced.add(name)
        self._programs[name] = "; ".join([*known, *{digest}.difference(known)][-_MOST_PROGRAMS:])
