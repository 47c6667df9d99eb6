"""The order of the items in each pass."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from kaun import rng
from kaun._jax import is_traced


class Orders:
    """The order of ``n`` items in each pass, a function of a key and the pass. The key is drawn from the RNG scope.

    Args:
        where: the method of Data, for messages.
        n: how many items there are.

    Attributes:
        key: the key.

    Raises:
        RuntimeError: inside compiled code.
    """

    def __init__(self, where: str, n: int) -> None:
        self.key: jax.Array = rng.next_key()
        if is_traced(self.key):
            raise RuntimeError(
                f"{where} was called inside compiled code, where keys have no values yet. Build the pipeline outside "
                "and pass its batches in."
            )
        self._n = n
        self._words = [int(word) for word in np.asarray(jax.random.key_data(self.key)).ravel()]

    def __call__(self, epoch: int) -> np.ndarray[Any, Any]:
        """The order of one pass: a permutation of ``range(n)``."""
        # RandomState, whose numbers NumPy has frozen, and not Generator, whose numbers a new version may change: a run
        # resumed after an upgrade must continue in the same order.
        seed = np.random.SeedSequence([*self._words, epoch])
        return np.random.RandomState(np.random.PCG64(seed)).permutation(self._n)
