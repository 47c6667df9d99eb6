"""A warning for a loop over epochs in Python that trains in one order."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kaun import tree
from kaun._jax import any_traced
from kaun._messages import warn
from kaun.data import key_text, random_passes, stages_of

__all__ = ["RepeatedPasses"]

_MOST = 64
_WARNED = 1 << 62  # no step is beyond it


class RepeatedPasses:
    """The random passes that one trainer was trained on, and the first step of each run on them."""

    def __init__(self) -> None:
        self._first: OrderedDict[Any, int] = OrderedDict()  # the step before the passes
        self._lock = threading.Lock()

    def check_data(self, data: Any, key: jax.Array, step: jax.Array) -> None:
        """``check`` the data of a fit."""
        self.check("fit", stages_of(data), key, step)

    def check(self, entry: str, stages: Sequence[Any], key: jax.Array, step: jax.Array) -> None:
        """Warn once where a state that came out of training on a random pass is trained on the same pass again.

        Args:
            entry: ``"fit"`` or ``"step"``.
            stages: Those of the pipeline.
            key: The run's key, of the state before the pass.
            step: The number of steps of that state.
        """
        found = None if any_traced((key, step)) else random_passes(stages)
        if found is None:
            return
        run, count = (*found, key_text(key)), int(np.asarray(tree.readable(step)).max())
        with self._lock:
            first = self._first.setdefault(run, count)
            if first < count:
                self._first[run] = _WARNED
            while len(self._first) > _MOST:
                self._first.popitem(last=False)
        if first < count:
            loop = {
                "fit": "for e in range(3): state = trainer.fit(state, train.epoch(e))",
                "step": "for x, loss in train.epochs(3): _, state = trainer.step(state, x, loss=loss)",
            }[entry]
            warn(
                f"{entry} received a pass on which this run was trained already, from step {first} on. Each "
                "iteration of a shuffled or random pipeline has the same order and the same random numbers. For others "
                "in each epoch write trainer.fit(state, train.epochs(3)), or take pass e as train.epoch(e):\n"
                f"    {loop}"
            )
