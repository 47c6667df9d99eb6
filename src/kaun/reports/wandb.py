"""The logger for Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kaun._calls import public
from kaun._messages import optional_package
from kaun._report import Report
from kaun.reports.log import Log, Row

__all__ = ["wandb"]


@public
def wandb(*, run: Any = None, epochs: bool = False, **settings: Any) -> Report:
    """Return the report that logs to Weights & Biases.

    Each value is logged under its name at the step of the state; the values are those of ``jsonl``. The run begins with
    the first step of the first fit, and is finished when a fit ends; a further fit, and a fit resumed from a
    checkpoint, resume it by its id. Weights & Biases ignores steps that it already has; offline it writes the resumed
    part to a second folder, and ``wandb sync`` merges the two. It never makes ``fit`` wait for the device.

    Args:
        run: An existing run, which is logged to and not finished; default a new one with these ``settings``.
        epochs: Whether the last step of each pass also has the averages over the pass, as those of
            ``history().epochs``: ``"epoch"``, its number in the fit, ``"epoch_loss"`` and so on. Default False.
        settings: The arguments of ``wandb.init``: ``project="digits"``, ``name=``, ``config=``, ``mode="offline"``.

    Raises:
        ImportError: If wandb is not installed.
        TypeError: If both ``run`` and ``settings`` are given.

    Examples:
        >>> from kaun import reports
        >>> report = reports.wandb(project="digits", mode="offline")  # doctest: +SKIP
        >>> state = trainer.fit(state, data, report=reports.every(10, report))  # doctest: +SKIP
    """
    package = optional_package("reports.wandb", "wandb", "wandb")
    if run is not None and settings:
        raise TypeError(
            f"wandb received both run= and {', '.join(settings)} for a new run. Write wandb(run=run), or "
            "wandb(project=...) without a run."
        )
    return Log(_Wandb(package, run, settings), epochs)


class _Wandb:
    name = "wandb"
    path = ""

    def __init__(self, package: Any, given: Any, settings: dict[str, Any]) -> None:
        self._package, self._given, self._settings = package, given, settings
        self._run: Any = None
        self.run = ""
        self._last = 0  # the newest step that this report logged

    def check(self) -> None:
        pass  # wandb tells what is wrong when the run begins

    def cut(self, step: int) -> tuple[int, int] | None:
        dropped = (step, self._last) if self._last >= step else None
        if self._run is not None:
            return dropped
        # A new run, in addition to one that the program may have started.
        settings = {"resume": "allow", "reinit": "create_new", **self._settings}
        settings |= {"id": self.run} if self.run else {}
        self._run = self._package.init(**settings) if self._given is None else self._given
        self.run = self._run.id
        return dropped

    def write(self, rows: Sequence[Row]) -> None:
        if self._run is None:
            return
        for row in rows:
            values = {name: value for name, value in row.items() if name != "step"}
            self._run.log(values, step=row["step"], commit=True)
            self._last = row["step"]

    def sync(self) -> None:
        pass  # wandb writes in another process

    def close(self, error: BaseException | None) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            if self._given is None:
                run.finish(exit_code=0 if error is None else 1)
