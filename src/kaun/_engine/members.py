"""The results of an ensemble's steps on the host: arrays [steps, members], and what reports get of them."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["CODE", "LOST", "NOT_FINITE", "RUNS", "STOPPED", "mean_of_members", "none_left", "of_members"]

Host = np.ndarray[Any, Any]

CODE = "member"
"""The name of the number of a step that says of each member what it did: one of the four below."""
RUNS, STOPPED, NOT_FINITE, LOST = 1, 0, -1, -2
"""It ran; ``stop=`` stopped it before; its step was discarded because it is not finite; that was so before."""


def none_left(codes: Host) -> Host:
    """Return for each step whether no member is left: each one ended at a step that was not finite."""
    return np.asarray((codes < 0).all(axis=1))


def mean_of_members(values: Host, codes: Host) -> Host:
    """Return for each step the mean over the members that ran.

    Where none ran, it is the mean over those that ``stop=`` stopped, and without these over those that were discarded.

    Args:
        values: An array [steps, members].
        codes: The codes of the members, likewise.
    """
    counted = codes == RUNS
    for code in (STOPPED, NOT_FINITE):
        counted = np.where(counted.any(axis=1, keepdims=True), counted, codes == code)
    dtype = values.dtype if values.dtype.kind == "f" else np.float32
    if counted.all():
        return values.mean(axis=1, dtype=np.float64).astype(dtype)
    counts = counted.sum(axis=1)
    mean = np.where(counted, values, 0).sum(axis=1, dtype=np.float64) / np.maximum(counts, 1)
    return np.where(counts, mean, np.nan).astype(dtype)


def of_members(columns: dict[str, Host]) -> dict[str, Host]:
    """Return what reports get of the numbers [steps, members]: their means, and ``losses`` of each member.

    A step counts as finite if that of a member is. ``losses`` are masked where they do not count in the mean.

    Args:
        columns: The numbers by name, with the codes.
    """
    columns = dict(columns)
    codes, finite, losses = columns.pop(CODE), columns.pop("finite", None), columns["loss"]
    means = {name: mean_of_members(column, codes) for name, column in columns.items()}
    if finite is not None:
        ran = np.abs(codes) == RUNS
        means["finite"] = np.where(ran.any(axis=1), np.where(ran, finite, -np.inf).max(axis=1), 1).astype(finite.dtype)
    rests = codes != RUNS
    return means | {"losses": np.ma.masked_array(losses, rests) if rests.any() else losses}
