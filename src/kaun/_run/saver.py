"""When a checkpoint is due, what is written, and that nothing is lost when an exception ends a run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import jax

from kaun import tree
from kaun._engine import StepInputs, TracedStep, digest_program
from kaun._run.identity import refuse_difference
from kaun._run.position import position
from kaun._run.report_state import pack_snapshot
from kaun.checkpoint import Directory
from kaun.checkpoint.store import Saved, Store
from kaun.state import TrainState


class CheckpointSaver:
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
        told, arrays = pack_snapshot({} if snapshot is None else snapshot())
        facts = {
            **self._facts, "programs": self._known, "report": told, "ended": ended,
            "again": None if again is None else again.hex(),
            # After an item that was pulled and then failed, the loader's place is not the run's.
            "place": position(self.data) if self.pulled == step else None,
        }  # fmt: skip
        self._store.save(step, state, arrays, facts)
        self._done = step
        self._next = None if self._pause is None else time.monotonic() + self._pause

    def traced(self, call: StepInputs, body: TracedStep) -> None:
        x, _, ctx = call.split(call.leaves)
        # Not by the loss's code, which may be another where only the program is to be the same.
        given = tree.flatten({"x": x, "ctx": dict(ctx.items())})[0]
        kind = ", ".join(f"{path} {tree.describe(leaf)}" for path, leaf in given.items())
        name = f"{getattr(call.subject, '__qualname__', type(call.subject).__name__)}: {kind}"
        digest = digest_program(body.jaxpr) + " " + body.on_nonfinite
        if self._known.get(name, digest) != digest:
            line = (
                f"the compiled step for {kind}: the model, loss, optimizer, one of their constants (a learning rate) "
                "or on_nonfinite was changed"
            )
            refuse_difference(self._directory, "program", self._done, [line])
        self._known[name] = digest
