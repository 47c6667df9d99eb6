"""The steps of a run: the loop that takes them, the update of its last window, and the check of a finished run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from kaun._engine import ProgramCache, StepLoop, error_of, last_member_error, run_flush
from kaun._jax import is_traced
from kaun._messages import set_on
from kaun._processes import failures_told
from kaun._report import Report, ReportFunction
from kaun._run.notices import warn_of_open_window
from kaun._run.reports import ReportCaller
from kaun._run.run import TrainingRun
from kaun._step import (
    Settings,
    error_for,
    find_rate,
    flush_error,
    flush_window,
    is_open,
    optimizer_state,
    placed_key,
    trainable_part,
)
from kaun.context import Context
from kaun.data import not_data, open_items
from kaun.sharding.core import processes_of
from kaun.state import Members, TrainState, own_state

__all__ = ["finished_state", "flush_and_save", "flush_state", "start_loop"]


def start_loop(
    run: TrainingRun,
    settings: Settings,
    programs: ProgramCache,
    report: Report | ReportFunction | None,
    ctx: Context | None,
) -> tuple[ReportCaller, StepLoop]:
    """Return the caller of a run's report, and the loop that takes its steps, starting from its state."""
    state = run.take()
    mode, pending, interruptible = settings.on_nonfinite, run.pending_report_loss, run.signals.interruptible_or_none
    rate = find_rate(settings.optimizer) if settings.accumulate == 1 else None
    inner, penalized = optimizer_state(settings, own_state(state.opt_state)), settings.penalty is not None
    windows = (settings.accumulate, int(inner.updates) if settings.accumulate > 1 and mode == "skip" else 0)
    best = (run.together, run.is_best, run.save_best)
    about = (mode, pending, interruptible, run.passes, rate and rate.fixed, windows, *best)
    before = state.step.max() if state.step.ndim else state.step
    caller = ReportCaller(report, run.total, run.done, before, *about)
    if settings.penalty is not None:
        settings.penalty.refuse_changes()
    trained = trainable_part(settings.trainable, state.vars.params)
    if isinstance(state.opt_state, Members):
        failure = functools.partial(last_member_error, settings, row_axis=programs.row_axis)
    else:
        failure = functools.partial(error_of, settings, error_for(trained, state.vars, inner, penalized=penalized))
    failure = failure if mode == "raise" else None
    carry, key = (state.vars, state.opt_state, state.step), state.key
    del state, trained, inner
    ran = caller.ran if caller.takes_results else None
    hooks = (ran, caller.compiled, failure, run.done, run.on_trace, caller.compiling, caller.numbers)
    loop = StepLoop(programs, carry, key, ctx, *hooks, together=run.together)
    if run.together is not None:
        pending = None if run.pending_report_loss is None else run.done
        run.together.attach(loop, functools.partial(_own_turn, run, caller, loop), run.signals, pending)
    return caller, loop


def _own_turn(run: TrainingRun, caller: ReportCaller, loop: StepLoop, done: int) -> dict[str, Any]:
    """What this process alone would do in the turn after ``done`` steps."""
    count, wants = caller.next_call(done, run.ahead(done, loop.limit))
    due = run.saver is not None and run.saver.clock_is_due()
    return {"next": count, "want": done + count if wants else None, "limit": loop.own_limit, "due": due}


def flush_and_save(
    run: TrainingRun, loop: StepLoop, now: Callable[[], TrainState], hook: ReportCaller, ended: str = ""
) -> None:
    """Run the steps that wait, hand their values to the report, and write a checkpoint where there is a directory.

    Args:
        run: The run.
        loop: The steps of the fit.
        now: Gives the state after the last step.
        hook: Calls the report.
        ended: How the run ended, ``"data"`` or ``"stopped"``; empty where it has not.
    """
    if run.together is not None and ended == "data":
        run.together.end()
    loop.flush()
    loop.wait()
    hook.finish(last=bool(ended))
    if run.together is not None:
        run.together.meet(last=bool(ended))
    if run.saver is not None:
        run.saver.save(loop.done, now(), ended=ended)
    if ended == "data":
        warn_of_open_window(now())


def finished_state(
    run: TrainingRun, settings: Settings, programs: ProgramCache, data: Iterable[Any], ctx: Context | None
) -> TrainState:
    """Return the state that the fit of a finished run returned, if this trainer would run the same program."""
    state = run.take()
    carry = (state.vars, state.opt_state, state.step)
    loop = StepLoop(programs, carry, state.key, ctx, on_trace=run.on_trace)
    with open_items(data, not_data(data)) as items:
        for item in items:
            loop.trace(item)
            break
    return state if run.stopped else flush_state(settings, programs, state)


def flush_state(settings: Settings, programs: ProgramCache, state: TrainState) -> TrainState:
    """Return the state after the update of its open window, and a state without one as it is.

    Raises:
        NonFiniteLoss: If the update is not finite, under ``on_nonfinite="raise"``; ``kaun_state`` is the given state.
            Not inside a function that JAX traces: there the state stays as it is.
    """
    if isinstance(state.opt_state, Members):
        return state  # an ensemble has no windows
    waits = is_open(settings, state.opt_state)
    if not (is_traced(waits) or waits):
        return state
    if settings.penalty is not None:
        settings.penalty.refuse_changes()
    carry = (state.vars, state.opt_state, state.step)
    with failures_told("flush", processes_of(programs.sharding, state)):
        (vars, opt_state, step), checks = run_flush(
            programs, functools.partial(flush_window, settings), carry, state.key
        )
    if settings.on_nonfinite == "raise" and not is_traced(checks) and not np.isfinite(np.asarray(checks)).all():
        window = optimizer_state(settings, state.opt_state)
        trained = trainable_part(settings.trainable, state.vars.params)
        error = flush_error(trained, state.vars, window, int(state.step), np.asarray(checks))
        set_on(error, "kaun_state", state)
        raise error
    return TrainState(vars=vars, opt_state=opt_state, step=step, key=placed_key(settings, state.key))
