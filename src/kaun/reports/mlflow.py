"""The logger for MLflow."""

from __future__ import annotations

import itertools
import posixpath
import re
import time
from collections.abc import Sequence
from typing import Any

from kaun._calls import public
from kaun._messages import optional_package, warn
from kaun._report import Report
from kaun.reports.log import Log, Row

__all__ = ["mlflow"]

BATCH = 1000  # metrics that MLflow takes at once
LONGEST = 240  # characters of a name: MLflow takes 250, and a number may be added
_ILLEGAL = re.compile(r"[^\w\-. /]")


@public
def mlflow(
    experiment: str = "Default",
    *,
    name: str | None = None,
    tracking_uri: str | None = None,
    run: str | None = None,
    epochs: bool = False,
) -> Report:
    """Return the report that logs to MLflow.

    Each value is a metric under its name at the step of the state; the values are those of ``jsonl``. In a name that
    MLflow would refuse, the characters that it does not take become ``_``, with a warning. The run begins
    with the first step of the first fit, and ends with each fit as finished, failed or killed; a further fit, and a fit
    resumed from a checkpoint, resume it, and log no value of a step twice. It never makes ``fit`` wait for the device,
    but it waits for MLflow: with a remote server, use ``every(100, mlflow(...))``.

    Args:
        experiment: The name of the experiment, made if it is missing.
        name: The name of the run, default chosen by MLflow.
        tracking_uri: Where to log, default as MLflow is configured.
        run: The id of an existing run, which is logged to and not ended; default a new one.
        epochs: Whether the last step of each pass also has the averages over the pass, as those of
            ``history().epochs``: ``"epoch"``, its number in the fit, ``"epoch_loss"`` and so on. Default False.

    Raises:
        ImportError: If mlflow is not installed.

    Examples:
        >>> from kaun import reports
        >>> report = reports.mlflow("digits", tracking_uri="sqlite:///runs.db")  # doctest: +SKIP
        >>> state = trainer.fit(state, data, report=reports.every(10, report))  # doctest: +SKIP
    """
    package = optional_package("reports.mlflow", "mlflow", "mlflow")
    return Log(_Mlflow(package, experiment, name, tracking_uri, run), epochs)


class _Mlflow:
    name = "mlflow"
    path = ""

    def __init__(
        self, package: Any, experiment: str, name: str | None, tracking_uri: str | None, given: str | None
    ) -> None:
        self._package, self._experiment, self._name, self._given = package, experiment, name, given
        self._client: Any = None
        self._uri = tracking_uri
        self.run = given or ""
        self._logged: dict[str, set[int]] = {}
        self._legal: dict[str, str] = {}  # names of metrics for those of values

    def check(self) -> None:
        pass  # the first values are sent with the first steps

    def cut(self, step: int) -> tuple[int, int] | None:
        if self._client is None:
            self._client = self._package.MlflowClient(tracking_uri=self._uri)
            self._resume() if self.run else self._create()
        self._logged = {
            key: {metric.step for metric in self._client.get_metric_history(self.run, key) if metric.step >= step}
            for key in self._client.get_run(self.run).data.metrics
        }
        steps = set[int]().union(*self._logged.values())
        return (min(steps), max(steps)) if steps else None

    def _create(self) -> None:
        found = self._client.get_experiment_by_name(self._experiment)
        number = self._client.create_experiment(self._experiment) if found is None else found.experiment_id
        self.run = self._client.create_run(number, run_name=self._name).info.run_id

    def _resume(self) -> None:
        if self._given is None:
            self._client.update_run(self.run, status="RUNNING")

    def write(self, rows: Sequence[Row]) -> None:
        if self._client is None:
            return
        now, metric = int(time.time() * 1000), self._package.entities.Metric
        self._rename(list(dict.fromkeys([name for row in rows for name in row if name not in self._legal])))
        metrics = [
            metric(self._legal[name], float(value), now, row["step"])
            for row in rows
            for name, value in row.items()
            if name != "step" and row["step"] not in self._logged.get(self._legal[name], ())
        ]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(self.run, metrics=metrics[start : start + BATCH])

    def _rename(self, new: list[str]) -> None:
        """Give each of these names one that MLflow takes, and that no other has."""
        legal = [name for name in new if _legal_name(name) == name]  # these first: they keep their names
        for name in [*legal, *[name for name in new if name not in legal]]:
            wanted, taken = _legal_name(name), self._legal.values()
            numbered = itertools.chain([wanted], (f"{wanted}_{i}" for i in itertools.count(2)))
            self._legal[name] = next(each for each in numbered if each not in taken)
        if changed := [f"{name!r} as {self._legal[name]!r}" for name in new if self._legal[name] != name]:
            warn(f"mlflow does not take all names of values. It logs {', '.join(changed)}.")

    def sync(self) -> None:
        pass  # log_batch returns when the values are stored

    def close(self, error: BaseException | None) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            if self._given is None:
                killed = isinstance(error, (KeyboardInterrupt, SystemExit))
                client.set_terminated(self.run, status="KILLED" if killed else "FAILED" if error else "FINISHED")


def _legal_name(name: str) -> str:
    """A name as MLflow takes it: of some characters, not too long, and a path that leads to no other place."""
    name = _ILLEGAL.sub("_", name)[:LONGEST]
    path = posixpath.normpath(name).lstrip("/")
    return "_" + path.lstrip("./") if path in ("", ".") or path.startswith("..") else path
