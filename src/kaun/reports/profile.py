"""A trace of some steps, for Perfetto and TensorBoard."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import jax

from kaun._calls import public, shown
from kaun._messages import warn
from kaun._paths import local_path
from kaun._processes import is_first
from kaun._report import Report
from kaun.reports.files import check_writable
from kaun.train import TrainState

__all__ = ["Profile", "profile"]

ANNOTATION = "train"  # the name of a step in the trace
_FIX = "Write profile(path, steps=(100, 110))."


@public
def profile(path: str | os.PathLike[str], steps: tuple[int, int] = (100, 110)) -> Profile:
    """Return the report that traces some steps with JAX's profiler: what runs when, on the host and on the device.

    Open the file in ``report.trace`` at https://ui.perfetto.dev, or the folder with ``tensorboard --logdir`` and its
    profile plugin. Each step is an event ``train`` with its number. The compiled program in the folder says for each
    operation its layer, ``jvp(0)/dot_general`` in the forward pass and ``transpose(jvp(0))`` in the backward pass;
    events of GPUs and TPUs contain it, those of the CPU are named after the operation alone (``dot.5``). A program from
    JAX's persistent compilation cache has the names with which it was compiled.

    The traced steps are dispatched one by one, and ``fit`` waits for each, so that they do not overlap in the trace: a
    tiny model is slower in them than in the blocks of other steps. Results are the same bit for bit. ``fit`` does not
    wait for other steps. The trace ends after the last of these steps, or at the end of the fit.

    Args:
        path: The folder to write to, made if it is missing.
        steps: The first and the last step of the fit to trace, counted from 1. Choose steps after the first ones, in
            which programs are compiled.

    Raises:
        TypeError: If ``path`` is not a path, or ``steps`` is not a pair of ints.
        ValueError: If ``steps`` is not a range of steps from 1.
        RuntimeError: If, in the fit, another trace is running.
        OSError: If, in the fit, the folder cannot be written.

    Examples:
        >>> import tempfile
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, layers, losses, reports, rng
        >>> with rng.scope(0):
        ...     trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
        ...     state = trainer.init()
        >>> data = Data.repeat(12, (jnp.ones((3, 2)), lambda out: losses.mse(out, jnp.ones((3, 1)))))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = reports.profile(folder, steps=(10, 11))
        ...     state = trainer.fit(state, data, report=report)
        ...     report.trace.name
        'perfetto_trace.json.gz'
    """
    if not isinstance(path, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f'profile expected the path of a folder, received {shown(path)}. Write profile("trace").')
    pair: Any = steps
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or any(type(step) is not int for step in pair):
        raise TypeError(f"profile expected the first and the last step, two ints, received {shown(steps)}. {_FIX}")
    if not 1 <= steps[0] <= steps[1]:
        raise ValueError(f"profile expected steps from 1, the first before the last, received {shown(steps)}. {_FIX}")
    return Profile(local_path("profile", path).absolute(), *steps)


class Profile(Report):
    """The report that traces some steps; see ``profile``, which makes it.

    Attributes:
        path: The folder.
        trace: The newest file for Perfetto; None before the trace has ended.

    Examples:
        >>> from kaun import reports
        >>> report = reports.profile("trace", steps=(3, 4))
        >>> [step for step in range(1, 9) if report.wants(step)], report.trace
        ([2, 3, 4], None)
    """

    path: Path
    trace: Path | None

    def __init__(self, path: Path, first: int, last: int) -> None:
        self.path, self._first, self._last = path, first, last
        self.trace = None
        self._running = False
        self._step: Any = None  # the annotation of the step that is running
        self._awaited = False  # whether a resumed run is not beyond these steps
        self._outer: BaseException | None = None

    def __repr__(self) -> str:
        held = "no trace yet" if self.trace is None else f"trace in {str(self.trace)!r}"
        return f"<profile({str(self.path)!r}, steps=({self._first}, {self._last})): {held}>"

    def begin(self, first_step: int, total: int | None, *_: Any) -> None:
        """Start before the first step, if that is one of those to trace; called by ``fit``."""
        self.trace, self._outer, self._awaited = None, sys.exception(), is_first() and first_step <= self._last
        if is_first():
            check_writable("profile", self.path / "trace")
        if self._first <= first_step <= self._last:
            self._start()

    def wants(self, step: int) -> bool:
        """Return whether it is a step to trace, or the one before the first of them."""
        # While it traces, it wants each step, and so is asked for it when the one before was reported.
        if self._running and self._step is None and step <= self._last:
            self._step = jax.profiler.StepTraceAnnotation(ANNOTATION, step_num=step)
            self._step.__enter__()
        return self._first - 1 <= step <= self._last

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        """End the step in the trace, and begin or end the trace itself; called by ``fit``."""
        self._end_step()
        if step == self._last:
            self._stop()
        elif step == self._first - 1 and not self._running:
            self._start()

    def end(self) -> None:
        """End the trace, however the fit ended; called by ``fit``."""
        self._end_step()
        self._stop()
        if self._awaited and self.trace is None and sys.exception() is self._outer:
            warn(
                f"profile traced nothing: the fit ended before step {self._first}. Write profile(path, steps=(1, 10))."
            )

    def _start(self) -> None:
        if not is_first():
            return
        try:
            jax.profiler.start_trace(self.path, create_perfetto_trace=True)
        except RuntimeError as err:
            raise RuntimeError(
                f"profile cannot trace, because another trace is running in this process ({err}). End it first, "
                "jax.profiler.stop_trace(), or leave this report out."
            ) from err
        self._running = True

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            made = self.path.glob("plugins/profile/*/perfetto_trace.json.gz")
            self.trace = max(made, key=lambda file: file.stat().st_mtime_ns, default=None)

    def _end_step(self) -> None:
        annotation, self._step = self._step, None
        if annotation is not None:
            annotation.__exit__(None, None, None)
