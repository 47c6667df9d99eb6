"""StepValues: the values of a block of steps for the reports, with the weight of each in a mean over steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from kaun.data import PassLength
from kaun.metrics import CountedParts, result_or_nan

__all__ = ["StepValues"]

_Columns = dict[str, np.ndarray[Any, Any]]


class StepValues(Mapping[str, np.ndarray[Any, Any]]):
    """The values of consecutive steps by name, arrays with a number for each step.

    The value of a metric that the loss returned as ``Counted.parts`` is computed when it is read: that of the rows of
    the one step, NaN where these all weigh 0.

    Args:
        first_step: The number of the first of the steps in its fit.
        columns: The values by name, without the metrics of ``parts``.
        weights: The weights of the loss and of each scalar that it returned, in float64: 0 for a step that was skipped.
        parts: The parts that the loss returned, stacked along axis 0.
        passes: How the data of the fit are cut into passes, None where they are one.

    Attributes:
        first_step: As the argument.
        weights: As the argument.
        parts: As the argument.
        passes: As the argument.
    """

    __slots__ = ("_columns", "first_step", "parts", "passes", "weights")

    def __init__(
        self,
        first_step: int,
        columns: _Columns,
        weights: _Columns,
        parts: Mapping[str, CountedParts],
        passes: PassLength | None,
    ) -> None:
        self._columns = columns
        self.first_step: int = first_step
        self.weights: _Columns = weights
        self.parts: Mapping[str, CountedParts] = parts
        self.passes: PassLength | None = passes

    @classmethod
    def of(cls, first_step: int, values: Mapping[str, np.ndarray[Any, Any]]) -> StepValues:
        """Return the values that a report was given; a plain dict has weights for the loss alone."""
        if isinstance(values, StepValues):
            return values
        columns = dict(values)
        ones = np.ones(len(columns["loss"]))
        weights = columns.get("loss_weight", columns.get("examples_per_step", ones)).astype(np.float64)
        if "skipped" in columns:
            weights = np.where(columns["skipped"], 0, weights)
        return cls(first_step, columns, {"loss": weights}, {}, None)

    @property
    def masked(self) -> dict[str, np.ma.MaskedArray[Any, Any]]:
        """The values that only some of the steps have, by name."""
        return {name: column for name, column in self._columns.items() if isinstance(column, np.ma.MaskedArray)}

    def replaced(self, columns: Mapping[str, np.ndarray[Any, Any]]) -> StepValues:
        """Return the same values with further ones, or others of these names."""
        return StepValues(self.first_step, {**self._columns, **columns}, self.weights, self.parts, self.passes)

    def by_pass(self) -> Iterator[tuple[int, StepValues, bool]]:
        """Yield for each pass its number in the fit, from 1, its steps among these, and whether it ends with them."""
        if self.passes is None:
            yield 1, self, False
            return
        items, skipped = self.passes
        start, steps = 0, len(self._columns["loss"])
        while start < steps:
            number, done = divmod(self.first_step - 1 + skipped + start, items)
            end = min(steps, start + items - done)
            number -= skipped // items
            part = self if (start, end) == (0, steps) else self.at(slice(start, end))
            yield number + 1, part, end - start == items - done
            start = end

    def at(self, index: slice) -> StepValues:
        """Return the values of some of the steps."""
        columns = {name: column[index] for name, column in self._columns.items()}
        weights = {name: column[index] for name, column in self.weights.items()}
        parts = {name: _at(stacked, index) for name, stacked in self.parts.items()}
        return StepValues(self.first_step + (index.start or 0), columns, weights, parts, self.passes)

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        if name not in self._columns and name in self.parts:
            self._columns[name] = _results(name, self.parts[name], len(self._columns["loss"]))
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._columns, *self.parts]))

    def __len__(self) -> int:
        return len({*self._columns, *self.parts})


def _at(parts: CountedParts, index: Any) -> CountedParts:
    """Return stacked parts with an index applied to axis 0."""
    return jax.tree_util.tree_map(lambda stack: stack[index], parts)


def _results(name: str, parts: CountedParts, steps: int) -> np.ndarray[Any, Any]:
    """The metric of each step; for one that is an array, such arrays stacked."""
    where = f"{name!r}, which the loss returned"
    found = [result_or_nan(where, _at(parts, i)) for i in range(steps)]
    shape = max((np.shape(result) for result in found), key=len, default=())
    return np.stack([np.broadcast_to(result, shape) for result in found]) if found else np.zeros(0)
