"""Metrics on held-out data, measured during a fit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from typing import Any, cast

import numpy as np

from kaun import _html, tree
from kaun._calls import explained, has_items, shown
from kaun._messages import locate
from kaun._report import Report
from kaun._run import pack_results, unpack_results
from kaun.context import Context
from kaun.data import Item, stages_of
from kaun.ensemble import Ensemble
from kaun.evaluation import check_metrics
from kaun.metrics import gives_array
from kaun.reports.compose import ValuesOf, steps_of_a_pass
from kaun.state import count_steps
from kaun.train import Trainer, TrainState

__all__ = ["Validation", "validate"]


@explained("reports.validate")
def validate(
    trainer: Trainer[Any, Any] | Ensemble[Any, Any],
    data: Iterable[Any],
    metrics: Mapping[str, Callable[[Any, Any], Any]],
    each: Sized | int,
    *,
    of: Callable[[TrainState], TrainState] | None = None,
    ctx: Context | None = None,
    per_member: bool = False,
) -> Validation:
    """Return the report that runs ``trainer.evaluate(state, data, metrics)`` after each pass, or every so many steps.

    In one ``all_of`` with others, its results are shown by ``progress``, kept by ``history`` and given to every report
    that observes values; the order does not matter. Everywhere a result has the name that it has in ``metrics``, also
    for ``early_stopping``; only the bar and the columns of files add ``valid_`` where the training has a value of that
    name.

    Args:
        trainer: The trainer whose ``fit`` gets the report; or the ``Ensemble``, of whose members the results are means.
        data: The held-out data, as for ``evaluate``; it is iterated again each time.
        metrics: As for ``evaluate``, by name.
        each: The pipeline of one epoch, of known length, of which ``fit`` gets ``train.epochs(n)`` (of that, one epoch
            counts); or a number of steps, at least 1. Steps count from 1 in each fit; a resumed run continues the
            count.
        of: Returns the state that is evaluated, given the state after the step: ``lambda s: s.averaged``. It is also
            what ``early_stopping`` keeps as ``best``. By default the state itself.
        ctx: A Context for the layers, default none.
        per_member: Whether each member of an ensemble has data of its own, as for ``Ensemble.evaluate``.

    Raises:
        TypeError: If an argument is of the wrong kind, ``data`` can be iterated only once, the length of ``each`` is
            unknown, ``of`` does not return a TrainState, or a metric gives an array, as ``confusion_matrix`` does:
            reports take numbers.
        ValueError: If ``each`` is empty, less than 1 or a part of several epochs, or there are no metrics.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, layers, losses, reports, rng
        >>> x = jnp.arange(8.0).reshape(4, 2)
        >>> pairs = Data.batches((x, x @ jnp.array([[1.0], [2.0]])), batch_size=2)
        >>> trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.adam(0.1))
        >>> train = pairs.with_loss(losses.mse)
        >>> validation = reports.validate(trainer, pairs, {"mse": losses.mse}, each=train)
        >>> with rng.scope(0):
        ...     state = trainer.init()
        >>> state = trainer.fit(state, train.epochs(50), report=validation)
        >>> [step for step, values in validation.results][-2:], validation.latest["mse"] < 0.5
        ([98, 100], True)
    """
    if not isinstance(trainer, (Trainer, Ensemble)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"validate expected a Trainer first, received {tree.describe(trainer)}. Write "
            "validate(trainer, data, metrics, each=train)."
        )
    if isinstance(data, Iterator) or not has_items(data):
        raise TypeError(
            f"validate iterates its data many times, but received {tree.describe(data)}. Pass a kaun.Data or a list; "
            "for a generator write Data.from_items(list(generator))."
        )
    if isinstance(data, (tuple, list)) and data and all(map(tree.is_array, data)):  # items would be rows of x
        raise TypeError(
            f"validate expected data of items (x, y), received arrays {', '.join(map(tree.describe, data))}. "
            "Write Data.batches((x, y), batch_size=256)."
        )
    if _has_losses(data):
        raise TypeError(
            "validate expected data of items (x, y), received items with a loss, which are for fit. Write "
            'validate(trainer, valid, {"loss": losses.mse}, each=train), with valid as it is before with_loss.'
        )
    if isinstance(each, (bool, float, str)) or not isinstance(each, (int, Sized)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"validate expected each as the pipeline of one epoch or a number of steps, received {shown(each)}. Write "
            "each=train, where fit gets train.epochs(n), or each=1000."
        )
    if isinstance(each, int) and each < 1:
        raise ValueError(f"validate expected each to be at least 1 step, received {each}. Write each=1000.")
    if ctx is not None and not isinstance(ctx, Context):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"ctx expected a kaun.Context, received {type(ctx).__name__}. Write Context(name=array).")
    if of is not None and not callable(of):
        raise TypeError(
            "validate expected of as a function from a state to the one that is evaluated, received "
            f"{shown(of)}. Write "
            "of=lambda s: s.averaged."
        )
    steps = each if isinstance(each, int) else steps_of_a_pass("validate", each, "each=steps_per_epoch")
    checked = check_metrics("validate", metrics)
    for name, metric in checked.items():
        if gives_array(metric):
            raise _not_a_number(name)
    if isinstance(trainer, Ensemble):
        evaluate = functools.partial(trainer.evaluate, per_member=per_member)
    elif per_member:
        raise ValueError("validate(per_member=True) expected an Ensemble, received a Trainer, which has no members.")
    else:
        evaluate = trainer.evaluate
    return Validation(evaluate, data, checked, steps, of, ctx)


def _has_losses(data: Any) -> bool:
    """Whether the items of some data have a loss, as far as is known before any is made."""
    if isinstance(data, (tuple, list)):
        return any(map(Item.is_training_item, cast("Any", data)[:1]))
    names = [stage.name for stage in stages_of(data)]
    return "Data.with_loss" in names and not {"Data.map", "Data.map_batch"} & {*names[names.index("Data.with_loss") :]}


class Validation(Report):
    """Results on held-out data so far; made by ``validate(...)``. See there.

    Attributes:
        results: Pairs of a step, numbered as ``state.step``, and the metrics after it, floats by name, sorted by name.
        measures: The names of the metrics.

    Examples:
        >>> import optax, kaun
        >>> from kaun import layers, metrics, reports
        >>> trainer = kaun.Trainer(model=layers.linear(2, 3), optimizer=optax.adam(0.1))
        >>> validation = reports.validate(trainer, [], {"accuracy": metrics.accuracy}, each=100)
        >>> [step for step in range(1, 301) if validation.wants(step)], validation.results, validation.latest
        ([100, 200, 300], [], {})
    """

    measures: Collection[str]
    results: list[tuple[int, dict[str, float]]]

    def __init__(
        self,
        evaluate: Callable[..., Mapping[str, Any]],
        data: Any,
        metrics: dict[str, Any],
        steps: int,
        of: Callable[[TrainState], TrainState] | None,
        ctx: Context | None,
    ) -> None:
        self._evaluate, self._data, self._metrics = evaluate, data, metrics
        self._steps, self._of, self._ctx = steps, of, ctx
        self.results = []
        self.measures = frozenset(metrics)

    @property
    def latest(self) -> dict[str, float]:
        """The newest metrics by name; empty before the first evaluation."""
        return self.results[-1][1] if self.results else {}

    def __repr__(self) -> str:
        newest = ", ".join(f"{name}={value:.4g}" for name, value in self.latest.items())
        held = f"step {self.results[-1][0]}: {newest}" if self.results else "no results yet"
        return f"<validate({', '.join(sorted(self.measures))}), each {self._steps} steps: {held}>"

    def _repr_html_(self) -> str:
        names = sorted(self.measures)
        rows = [(step, *(values.get(name, math.nan) for name in names)) for step, values in self.results[::-1]]
        return _html.document(
            "validate: results on held-out data, the newest first", _html.table(("step", *names), rows)
        )

    def wants(self, step: int) -> bool:
        """Return whether it evaluates after this step."""
        return step % self._steps == 0

    def __call__(self, step: int, loss: float, state: TrainState, /) -> dict[str, float] | None:
        """Evaluate, and return the metrics by name; called by ``fit``. For other steps it returns None."""
        if not self.wants(step):  # called by a user's own function after every step
            return None
        at, state = count_steps(state), state if self._of is None else self._evaluated(state)
        values = dict(self._evaluate(state, self._data, self._metrics, ctx=self._ctx))
        for name, value in values.items():
            if np.ndim(value) != state.step.ndim:
                raise _not_a_number(name)
            values[name] = float(np.mean(value))  # over the members of an ensemble
        if self.results and self.results[-1][0] == at:  # a second time, in a run that was interrupted there
            self.results.pop()
        self.results.append((at, values))
        return dict(values) if self._of is None else ValuesOf(values, state)

    def _evaluated(self, state: TrainState) -> TrainState:
        assert self._of is not None
        found = self._of(state)
        if not isinstance(found, TrainState):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"validate(of=...) expected a function that returns a TrainState, {locate(self._of)} returned "
                f"{tree.describe(found)}. Write of=lambda s: s.averaged."
            )
        return found

    def snapshot(self) -> dict[str, Any]:
        """Return the results, for a checkpoint."""
        return pack_results(self.results)

    def restore(self, values: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.results = unpack_results(self, values)


def _not_a_number(name: str) -> TypeError:
    return TypeError(
        f"validate expected metrics that give numbers, but {name!r} gives an array, and reports take numbers. For the "
        "array call trainer.evaluate after fit or in a report of your own. For a number of it write matrix = "
        "metrics.Counted.of(metrics.confusion_matrix) and give validate metrics.Counted(matrix.counts, lambda sums: "
        "float(matrix.result(sums)[0, 1]))."
    )
