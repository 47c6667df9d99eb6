"""Metrics of batches whose rows are filled or weighted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from kaun import tree
from kaun._loss import FrozenLoss
from kaun._messages import locate
from kaun.data import RowInfo
from kaun.evaluation.totals import Metric, with_counts
from kaun.losses import Mean, parts_of, row_arguments
from kaun.metrics import Counted

__all__ = ["RowMetrics"]

Host = np.ndarray[Any, Any]


class RowMetrics:
    """Metrics by name, for batches of which something is known of the rows.

    Args:
        metrics: The functions of predictions and targets.
        constant: The names of those that read nothing that may change between two batches.
    """

    def __init__(self, metrics: Mapping[str, Metric], constant: Collection[str] = ()) -> None:
        self._metrics, self._constant = metrics, constant
        self._captured: dict[tuple[str, str], FrozenLoss] = {}
        self._bind = {name: _binder(metric) for name, metric in metrics.items()}

    def of(self, rows: RowInfo, targets: Any) -> dict[str, Metric] | None:
        """The metrics with the weights of the rows of one batch; None if the batch has to be cut to its real rows.

        Raises:
            TypeError: If the rows, or positions in them, have weights that a metric does not take.
        """
        counted = rows.counted(targets)
        weighted = rows.weights is not None or counted is not rows.mask
        found: dict[str, Metric] = {}
        for name, bind in self._bind.items():
            bound = bind(counted, rows.weights)
            if bound is None and not weighted:
                return None
            if bound is None:
                raise TypeError(
                    f"evaluate of rows with weights, or with padding inside of them, expected metrics that take them; "
                    f"metric {name!r} {locate(self._metrics[name])} does not. Write def {name}(predictions, targets, "
                    "*, weights): return (weights * values).sum(), weights.sum()."
                )
            found[name] = self._metric(name, *bound)
        return found

    def _metric(self, name: str, form: Metric, keyword: str, values: Host | None) -> Metric:
        """A metric with the values of a batch's rows. One that is constant is captured once."""
        if name not in self._constant or values is None:
            return functools.partial(form, **{keyword: values})
        captured = self._captured.get((name, keyword))
        if captured is None:
            captured = self._captured[name, keyword] = FrozenLoss(functools.partial(form, **{keyword: values}))
            assert len(captured.arrays) == 1
        return captured.with_arrays([values])


_Bound = tuple[Metric, str, Host | None]


def _binder(metric: Metric) -> Callable[[Host | None, Host | None], _Bound | None]:
    """The function of what counts, a bool mask or None, and the weights or None, which says how a metric takes them.

    It returns the metric, the name of its argument for them, and what to pass; None if the metric takes none.
    """
    counted = Counted.find(metric)
    if counted is not None:
        if "weights" not in row_arguments(counted.counts):
            return lambda mask, weights: None
        form = with_counts(metric)
        return lambda mask, weights: (form, "weights", _product(mask, weights))
    function, takes = parts_of(metric), row_arguments(parts_of(metric))
    sums = functools.partial(_sums, function)

    def bind(mask: Host | None, weights: Host | None) -> _Bound | None:
        if weights is None and "where" in takes:
            return sums, "where", mask
        if "weights" in takes:
            return sums, "weights", _product(mask, weights).astype(np.float32)
        return None

    return bind


def _product(mask: Host | None, weights: Host | None) -> Any:
    if weights is None:
        return mask
    return weights if mask is None else np.where(mask, weights, 0)


def _sums(metric: Metric, predictions: Any, targets: Any, **rows: Any) -> Any:
    """What a metric gives for weighted rows, if it is a pair or a Mean."""
    value = metric(predictions, targets, **rows)
    if not isinstance(value, (Mean, tuple)):
        (name,) = rows
        raise TypeError(
            f"metric {locate(metric)} of padded or weighted rows must return a losses.Mean or a pair (sum, count), "
            f"received {tree.describe(value)}: a scalar counts by the number of rows, filled ones too. Write "
            f"return ({name} * values).sum(), {name}.sum()."
        )
    return value
