"""What is left when an exception ends a fit: the newest state that can be read, on the exception and saved."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress

import jax

from kaun._engine import StepLoop
from kaun._messages import add_note, contextmanager, set_on
from kaun._run.reports import ReportCaller
from kaun._run.run import TrainingRun
from kaun._run.signals import note_interrupt
from kaun.state import TrainState

__all__ = ["save_on_error"]


@contextmanager
def save_on_error(
    run: TrainingRun, loop: StepLoop, now: Callable[[], TrainState], hook: ReportCaller
) -> Generator[None]:
    """The block in which a fit takes its steps: an exception in it is given the last state, which is saved too.

    Args:
        run: The run.
        loop: The steps of the fit.
        now: Gives the state after the last step.
        hook: Calls the report, also at the begin and at the end.
    """
    run.now = now
    try:
        try:
            hook.begin(now)
            yield
        except BaseException as error:
            first: BaseException = error
            if run.together is not None:
                run.together.fail(error)
            with suppress(Exception):
                now()  # runs the steps whose items came before this
                found = loop.failure()
                # Where the devices of other processes are gone, each dispatch in flight fails, with an error that does
                # not name them. The first exception does, or has a note that does.
                of_devices = isinstance(found, jax.errors.JaxRuntimeError)
                if found is not None and not (of_devices and run.together is not None):
                    first = found
                if run.together is None or not run.together.broken:
                    hook.finish()
            _keep_state(first, run, loop, hook)
            if first is error:
                raise
            raise first from error
    except BaseException as error:
        try:
            _end(run, hook)
        except Exception as failed:
            add_note(error, f"Also, end() of a report raised {type(failed).__name__}: {failed}")
        raise
    _end(run, hook)


def _end(run: TrainingRun, hook: ReportCaller) -> None:
    try:
        hook.end()
    except BaseException as error:
        if run.now is not None:
            set_on(error, "kaun_state", run.now())
        raise


def _keep_state(error: BaseException, run: TrainingRun, loop: StepLoop, hook: ReportCaller) -> None:
    """Give an exception the newest state that can be read, and save it."""
    assert run.now is not None
    found = loop.recover()
    if found == "newest":
        state = run.now()
        set_on(error, "kaun_state", state)
        there, pending = True, hook.pending_report_loss
        if run.saver is not None and run.together is not None:
            there, pending = run.together.all_have(str(loop.done), pending)
        note_interrupt(error, f"after step {loop.done}")
        if not there:
            add_note(error, f"Also, no checkpoint of step {loop.done} was written, because not all processes have it.")
        elif run.saver is not None:
            try:
                run.saver.save(loop.done, state, pending_report_loss=pending)
            except Exception as failed:
                add_note(error, f"Also, no checkpoint of step {loop.done} was written: {failed}")
        return
    # Not saved: the reports may have the values of later steps already.
    lost = "The compiled step failed, and the newest states were lost with the memory given to it. "
    saved = None
    if run.saver is not None and run.together is None:  # several processes could only read it together
        vars, opt_state, count = loop.kinds
        like = TrainState(vars=vars, opt_state=opt_state, step=count, key=loop.key)
        with suppress(Exception):
            saved = run.saver.newest(like)
    if saved is not None and (found == "lost" or saved.step >= loop.done):
        set_on(error, "kaun_state", saved.state)
        run.now = lambda: saved.state
        add_note(error, f"{lost}kaun_state is that of the newest checkpoint, after step {saved.step}.")
    elif found == "held":
        set_on(error, "kaun_state", run.now())
        add_note(error, f"{lost}kaun_state is the newest that was held elsewhere, after step {loop.done}.")
    else:
        run.now = None
        add_note(
            error,
            f"{lost}No earlier one is left, so there is no kaun_state. Write fit(..., checkpoints=checkpoint.Directory("
            '"runs/digits", every=500)), or hold the state that you pass to fit.',
        )
