"""Arguments of the methods of ``Data``, checked: counts, sequences and functions; and what a pipeline cannot do."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from kaun import tree
from kaun._calls import shown
from kaun._messages import locate

__all__ = [
    "checked_batch_size", "checked_count", "checked_loader", "checked_pipelines", "checked_sequence",
    "checked_weights", "function_text", "moved_lengths", "moved_weights", "no_index", "no_length", "not_picklable",
]  # fmt: skip


def checked_count(where: str, name: str, value: Any, least: int, fix: str = "") -> int:
    """A count as an int of at least ``least``.

    Args:
        where: The method of Data, with the names of its arguments.
        name: The name of the argument.
        value: What was given.
        least: The smallest count.
        fix: What to write instead of a smaller one.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is too small.
    """
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        other = callable(value) or isinstance(value, (tuple, list, dict))
        fix = f"Write {where}, in this order" if other else f"Write {name}=int(...)"
        raise TypeError(f"{where} expected an int for {name}, received {shown(value)}. {fix}.")
    if number < least:
        raise ValueError(f"{where} expected {name} to be at least {least}, received {shown(value)}.{fix and ' ' + fix}")
    return number


def checked_sequence(where: str, items: Any) -> Any:
    """A sequence, of which a list is copied.

    Raises:
        TypeError: If it has no length or no items by index, or is a Series or DataFrame of pandas.
    """
    _refuse_frame(where, items)
    held: Any = tuple(cast("list[Any]", items)) if isinstance(items, list) else items
    by_index = hasattr(held, "__len__") and hasattr(held, "__getitem__") and not hasattr(held, "_stages")
    if isinstance(held, Mapping) or not by_index:
        raise TypeError(
            f"{where} expected a sequence (a list, or anything with len() and [i]), received {type(items).__name__}. "
            "Use Data.from_items(list(items)), or Data.from_iterable(loader) for a loader."
        )
    return held


def checked_batch_size(where: str, value: Any, *others: Any) -> int:
    """The number of rows of a batch.

    Args:
        where: The method of Data.
        value: The number.
        *others: The argument after it, ``shuffle``.

    Raises:
        TypeError: If it is not an int, or one of both is an array.
        ValueError: If it is below 1.
    """
    for name, given in zip(("batch_size to be an int", "shuffle to be a bool"), (value, *others), strict=False):
        if getattr(given, "ndim", 0) > 0:
            raise TypeError(
                f"{where} expected {name}, received {tree.describe(given)}. The arrays are one argument: "
                f"{where}((x, y){', 5' if where.endswith('folds') else ''}, batch_size=64)."
            )
    return checked_count(where, "batch_size", value, 1)


def checked_loader(where: str, source: Any) -> Any:
    """A loader, or a function that makes one.

    Raises:
        TypeError: If it is neither iterable nor callable, or is a Series or DataFrame of pandas.
    """
    _refuse_frame(where, source)
    if isinstance(source, Mapping) or not (hasattr(source, "__iter__") or callable(source)):
        raise TypeError(
            f"{where} expected a loader, or a function without arguments that returns one, received "
            f"{type(source).__name__}. Use Data.batches for a dict of arrays, Data.repeat(n, item) for one item."
        )
    return source


def checked_pipelines(where: str, sources: Sequence[Any], kind: type) -> None:
    """Check the pipelines that one is made of.

    Args:
        where: The method of Data, with the names of its arguments.
        sources: What was given.
        kind: The class of pipelines.

    Raises:
        TypeError: If one is not a pipeline, or some of them have ``local`` and others not.
        ValueError: If there is none.
    """
    for k, source in enumerate(sources):
        if not isinstance(source, kind):
            raise TypeError(
                f"{where} expected pipelines, received {tree.describe(source)} as source {k} (counted from 0). Make a "
                "Data of it first, Data.from_items(items) or Data.from_iterable(loader)"
                + (f"; of a list of pipelines pass the pipelines, {where}." if "*" in where else ".")
            )
    if not sources:
        raise ValueError(f"{where} expected at least one pipeline, received none.")
    local = ["local" in source._node.rows for source in sources]
    if any(local) and not all(local):
        raise TypeError(
            f"{where} expected .local(s) in all of its sources or in none, and source {local.index(False)} (counted "
            f"from 0) has none. Write it once, after this stage: {where.partition('(')[0]}(...).local(s)."
        )


def checked_weights(where: str, weights: Any, n: int, of: str, name: str = "weights") -> np.ndarray[Any, Any]:
    """Weights as a float64 array [n].

    Args:
        where: The method of Data, with the names of its arguments.
        weights: What was given.
        n: How many there must be.
        of: What each of them belongs to.
        name: The name of the argument.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If there are not ``n`` of them, one is negative or not finite, or all are 0.
    """
    try:
        array = np.array(weights, np.float64)
    except (TypeError, ValueError):
        raise TypeError(
            f"{where} expected {name} to be numbers, one for each {of}, received {tree.describe(weights)}. Write "
            f"{name}=[0.8, 0.2]."
        ) from None
    if array.shape != (n,):
        fix = f"{name}={name}[:, 0]." if array.shape == (n, 1) else f"{name}=np.ones({n}) for equal ones."
        raise ValueError(
            f"{where} expected one weight for each {of}, shape [{n}], received shape {list(array.shape)}. Write {fix}"
        )
    never = "is never drawn" if name == "weights" else "does not count"
    wrong = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
    if wrong.size:
        raise ValueError(
            f"{where} expected {name} that are finite and at least 0, received {float(array[wrong[0]])} at "
            f"{wrong[0]}. Write {name}=np.maximum({name}, 0), or 0 for a {of} that {never}."
        )
    if not array.any():
        raise ValueError(
            f"{where} expected a weight above 0, received {n} of 0. Write {name}=np.ones({n}) for equal ones."
        )
    return array


def _refuse_frame(where: str, value: Any) -> None:
    """Refuse a Series or DataFrame of pandas or its like, whose ``[i]`` finds a label or a column."""
    if not (hasattr(value, "iloc") and hasattr(value, "loc")):
        return
    fix = "Data.from_items(series.to_numpy())"
    if hasattr(value, "columns"):
        fix = (
            'Data.batches((frame[["a", "b"]].to_numpy(np.float32), frame["y"].to_numpy()), batch_size=64), or for rows '
            'as dicts Data.from_items(frame.to_dict("records"))'
        )
    raise TypeError(
        f"{where} expected items by their number, received a {type(value).__name__}, which finds labels and columns. "
        f"Write {fix}."
    )


def function_text(where: str, f: Any, takes: str = "") -> str:
    """The name, file and line of a function.

    Args:
        where: The method of Data.
        f: What was given.
        takes: The arguments with which it will be called; "" where that is not checked.

    Raises:
        TypeError: If it is not callable, or not with these arguments.
    """
    if not callable(f):
        raise TypeError(
            f"{where} expected a function, received {shown(f)}. Pass the function itself, {where}(f), not f(x)."
        )
    if takes:
        _check_takes(where, f, takes)
    return locate(f).replace("`", "")


def _check_takes(where: str, f: Any, takes: str) -> None:
    """Refuse a function that cannot be called with these arguments before it is called with the first item."""
    try:
        signature = inspect.signature(f)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*takes.split(", "))
    except TypeError:
        *first, last = takes.split(", ")
        call = where if where.startswith("Data.") else f"data.{where}"
        fix = f"{call}(lambda {takes}: ...)"
        if last == "item" and len(signature.parameters) > len(first) + 1:
            fix = f"{call}(lambda {takes}: f({', '.join([*first, '*item'])})): an item (x, y) is one argument"
        own = ", ".join(signature.parameters)
        raise TypeError(
            f"{where} calls its function with ({takes}), and {locate(f)} takes ({own}). Write {fix}."
        ) from None


def no_index(where: str, pipeline: str) -> TypeError:
    """The exception for a shuffle or a sample of items that have no index."""
    verb = where.partition("(")[0]
    return TypeError(
        f"{where} needs items by index, which this pipeline does not have: {pipeline}. {verb.capitalize()} before "
        f"prefetch or filter; collect a small stream, Data.from_items(list(data)).{where}; or let the loader {verb}."
    )


def moved_weights(stage: str) -> ValueError:
    """The exception for a sample of items whose order is random."""
    return ValueError(
        f"sample(weights, n) expected items in an order that does not depend on the pass, received them after {stage}: "
        "weight i would belong to another item in each pass. Sample first, the draws are in random order already: "
        "Data.from_arrays(x, y).sample(weights, n).batch(64)."
    )


def moved_lengths(stage: str) -> ValueError:
    """The exception for lengths of items whose order is random."""
    return ValueError(
        f"bucket(lengths, edges, batch_size) expected items in an order that does not depend on the pass, received "
        f"them after {stage}: length i would belong to another row in each pass. Pass a function from row to length, "
        "bucket(lambda row: len(row[0]), edges, batch_size)."
    )


def no_length(pipeline: str) -> TypeError:
    """The exception for ``len`` where the source has none."""
    return TypeError(
        f"the length of this pipeline is not known, because its source has no len(), or a filter leaves "
        f"items out: {pipeline}. Use a source with a length, Data.from_items(list(source)), or count the items while "
        "iterating."
    )


def not_picklable(pipeline: str) -> TypeError:
    """The exception for pickling a pipeline."""
    return TypeError(
        f"Data cannot be pickled, because its stages are closures: {pipeline}. Pickle the function that builds it, "
        "and call it in the other process: def make_data(): return Data.from_fn(1000, read).batch(64)."
    )
