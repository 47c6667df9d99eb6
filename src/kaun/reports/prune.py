"""The report that lets an Optuna study end a trial early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kaun import tree
from kaun._calls import public, shown
from kaun._messages import optional_package
from kaun._report import Report
from kaun.state import count_steps
from kaun.train import TrainState

__all__ = ["prune"]


@public
def prune(trial: Any, name: str) -> Report:
    """Return the report that gives a measured value to an Optuna trial, and ends the fit where the trial is pruned.

    The value is one that another report of the same ``all_of`` measures, such as ``validate``. Each goes to
    ``trial.report(value, step)``, with the step as ``state.step``; where ``trial.should_prune()`` is then true, the
    report raises ``optuna.TrialPruned``, which Optuna expects from the objective. It leaves ``fit`` unchanged, with the
    state after that step as its ``kaun_state``.

    Args:
        trial: An ``optuna.Trial``, or an object with its ``report`` and ``should_prune``.
        name: The name of the value.

    Raises:
        TypeError: If ``trial`` is not a trial, or ``name`` is not a string.
        ValueError: If, in the fit, no report measures the value.
        ImportError: If a trial is pruned and Optuna is not installed.

    Examples:
        >>> from kaun import reports
        >>> class Trial:
        ...     def report(self, value, step): print(step, value)
        ...     def should_prune(self): return False
        >>> report = reports.prune(Trial(), "accuracy")
        >>> report.watches
        ('accuracy',)
    """
    if not all(callable(getattr(trial, method, None)) for method in ("report", "should_prune")):
        raise TypeError(
            f"prune expected an optuna.Trial first, with report and should_prune, received {tree.describe(trial)}. "
            'Write def objective(trial): ... reports.prune(trial, "accuracy") ...; study.optimize(objective).'
        )
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f'prune expected the name of a measured value, received {shown(name)}. Write prune(trial, "loss").'
        )
    return _Prune(trial, name)


class _Prune(Report):
    def __init__(self, trial: Any, name: str) -> None:
        self.__name__ = "prune"
        self._trial, self._name = trial, name
        self.watches = (name,)

    def __repr__(self) -> str:
        return f"<prune: by {self._name!r}>"

    def observe(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        if self._name not in values:
            return
        at = count_steps(state)
        self._trial.report(float(values[self._name]), at)
        if self._trial.should_prune():
            optuna = optional_package("reports.prune", "optuna", "optuna")
            raise optuna.TrialPruned(f"pruned at step {at}")
