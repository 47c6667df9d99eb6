"""Keys of a pipeline: the order of the items in each pass, draws by weight, and the keys of ``random_map``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kaun import rng
from kaun._jax import is_traced

__all__ = ["Draws", "Orders", "draw_key", "item_keys"]


def draw_key(where: str) -> jax.Array:
    """A key for a pipeline, drawn from the RNG scope.

    Args:
        where: The method of Data, for messages.

    Raises:
        RuntimeError: If it is called inside compiled code.
    """
    key = rng.next_key()
    if is_traced(key):
        raise RuntimeError(
            f"{where} was called inside compiled code, where keys have no values yet. Build the pipeline outside "
            "and pass its batches in."
        )
    return key


def item_keys(key: jax.Array, epoch: int | None) -> Callable[[int], jax.Array]:
    """The function from index to key of one pass: ``fold_in(fold_in(key, epoch), index)``."""
    of_pass = _fold_in(key, epoch or 0)
    return lambda i: _fold_in(of_pass, i)


# 15 us on a busy machine, and 100 us without jit.
_fold_in: Callable[[jax.Array, int], jax.Array] = jax.jit(jax.random.fold_in)


class Orders:
    """The order of ``n`` items in each pass, a function of a key and the pass.

    Args:
        where: The method of Data, for messages.
        n: How many items there are.
        key: The key; one is drawn from the RNG scope where it is None.

    Attributes:
        key: The key.

    Raises:
        RuntimeError: If it is called inside compiled code.
    """

    def __init__(self, where: str, n: int, key: jax.Array | None = None) -> None:
        self.key: jax.Array = draw_key(where) if key is None else key
        self._n = n
        self._words = _words_of(self.key)

    def __call__(self, epoch: int | None) -> np.ndarray[Any, Any]:
        """The order of one pass: a permutation of ``range(n)``."""
        # RandomState, whose numbers NumPy has frozen, and not Generator, whose numbers a new version may change: a run
        # resumed after an upgrade must continue in the same order.
        seed = np.random.SeedSequence([*self._words, epoch or 0])
        return np.random.RandomState(np.random.PCG64(seed)).permutation(self._n)


class Draws:
    """Numbers drawn by weight, with replacement: a function of a key and the number of the group of draws.

    Args:
        where: The method of Data, for messages.
        weights: Float64, finite, at least 0, not all 0; they need not add up to 1.

    Attributes:
        key: The key, drawn from the RNG scope.

    Raises:
        RuntimeError: If it is called inside compiled code.
    """

    def __init__(self, where: str, weights: np.ndarray[Any, Any]) -> None:
        self.key: jax.Array = draw_key(where)
        self._words = _words_of(self.key)
        sums = np.cumsum(weights / weights.max())
        self._edges = sums[:-1] / sums[-1]

    def __call__(self, group: int, n: int) -> np.ndarray[Any, Any]:
        """The ``n`` draws of one group: int64 [n], each below the number of weights."""
        seed = np.random.SeedSequence([*self._words, group])
        uniform = np.random.RandomState(np.random.PCG64(seed)).random_sample(n)  # frozen by NumPy, as in Orders
        return np.searchsorted(self._edges, uniform, side="right")


def _words_of(key: jax.Array) -> list[int]:
    return [int(word) for word in np.asarray(jax.random.key_data(key)).ravel()]
