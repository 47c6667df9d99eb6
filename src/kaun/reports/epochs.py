"""The averages over one pass of the data, by the one weighting rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kaun._run import StepValues
from kaun.metrics import BatchMean, Counted, CountedParts, Counts, CountSums, ExactMean, result_or_nan

__all__ = ["PassMeans"]


class PassMeans:
    """The sums of the steps of one pass so far. What they give does not depend on how the steps come in blocks.

    Attributes:
        steps: How many steps it has.
    """

    def __init__(self) -> None:
        self.steps: int = 0
        self._means: dict[str, ExactMean] = {}
        self._counts: dict[str, CountSums] = {}
        self._counted: dict[str, Counted] = {}  # a checkpoint does not have these: they come with the next steps
        self._saved: dict[str, Any] = {}  # the results of parts whose metric is not known yet

    def add(self, values: StepValues) -> None:
        """Add steps of the pass."""
        losses = values["loss"]
        self.steps += len(losses)
        for name, weights in values.weights.items():
            counted = weights != 0  # a step that is left out may have a loss that is not finite
            part = BatchMean(values[name][counted], weights[counted])
            self._means.setdefault(name, ExactMean(name)).add(part)
        applied = ~values["skipped"] if "skipped" in values else np.ones(len(losses), bool)
        for name, parts in values.parts.items():
            self._counted[name] = parts.counted
            counts = parts.counts if applied.all() else jax.tree_util.tree_map(lambda a: a[applied], parts.counts)
            sums = self._counts.setdefault(name, CountSums(name))
            if applied.any():
                sums.add_each(Counts(counts))

    def results(self) -> dict[str, Any]:
        """The averages by name, floats and arrays; NaN where all weights are 0."""
        means = {name: mean.result() if mean.weight else math.nan for name, mean in self._means.items()}
        return means | self._saved | {name: self._result(name) for name in self._counted}

    def _result(self, name: str) -> Any:
        sums = self._counts[name]
        if sums.empty:
            return math.nan
        return result_or_nan(f"{name!r}, which the loss returned", CountedParts(self._counted[name], sums.result()))

    def snapshot(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint."""
        return {
            "steps": self.steps,
            "means": {name: mean.snapshot() for name, mean in self._means.items()},
            "counts": {name: sums.snapshot() for name, sums in self._counts.items()},
            "results": self._saved | {name: self._result(name) for name in self._counted},
        }

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> PassMeans:
        """Return the sums of a snapshot."""
        found = cls()
        found.steps, found._saved = saved["steps"], dict(saved["results"])
        for name, sums in saved["means"].items():
            found._means[name] = ExactMean(name)
            found._means[name].restore(sums)
        for name, sums in saved["counts"].items():
            found._counts[name] = CountSums(name)
            found._counts[name].restore(sums)
        return found
