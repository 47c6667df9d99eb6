"""The rows of each fold of a cross-validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from kaun.data.shuffle import Orders, draw_key

__all__ = ["FoldPart", "fold_rows"]


class FoldPart(NamedTuple):
    """The rows of one pipeline.

    Attributes:
        rows: The rows, int64 [rows], as they were dealt.
        order: The rows of a pass, in its order.
        key: The key that was drawn, None where each pass is the same.
    """

    rows: np.ndarray[Any, Any]
    order: Callable[[int | None], np.ndarray[Any, Any]]
    key: jax.Array | None


def fold_rows(n: int, k: int, shuffle: bool) -> list[tuple[FoldPart, FoldPart]]:
    """The rows for training and for validation of each fold of ``n`` rows.

    Raises:
        ValueError: If there are fewer rows than folds.
        RuntimeError: with ``shuffle``, inside compiled code.
    """
    if k > n:
        fix = f"Write k={n} to leave one row out in each fold, or fewer." if n > 1 else "Pass more rows."
        raise ValueError(f"Data.folds expected at least one row for each fold, received {n} rows for k={k}. {fix}")
    where = "Data.folds(..., shuffle=True)"
    key = draw_key(where) if shuffle else None
    dealt = np.arange(n) if key is None else Orders(where, n, jax.random.fold_in(key, k))(0)
    folds = [np.sort(rows) for rows in np.array_split(dealt, k)]
    return [
        (
            _training(np.sort(np.concatenate(folds[:i] + folds[i + 1 :])), key, i),
            FoldPart(rows, lambda e, r=rows: r, None),
        )
        for i, rows in enumerate(folds)
    ]


def _training(rows: np.ndarray[Any, Any], key: jax.Array | None, fold: int) -> FoldPart:
    if key is None:
        return FoldPart(rows, lambda epoch: rows, None)
    orders = Orders("Data.folds(..., shuffle=True)", len(rows), jax.random.fold_in(key, fold))
    return FoldPart(rows, lambda epoch: rows[orders(epoch)], key)
