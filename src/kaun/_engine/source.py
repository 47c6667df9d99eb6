"""Where in the user's code an operation of a traced step is: file, line and layer."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kaun._engine.replay import Event, Replay
from kaun._jax import Frame, Operation
from kaun._loss import is_library
from kaun._messages import in_kaun
from kaun._step import train_step

__all__ = ["LAYER", "Source", "line_of", "source_of"]

LAYER = "layer<{}>"
"""The form of the names of scopes that say which layer an operation is in."""
_LAYER = re.compile(LAYER.format("([^>]*)"))

_STEP = train_step.__code__.co_filename
_PYTHON = str(Path(os.__file__).parent) + os.sep
_RULES = str(Path("interpreters") / "ad.py")  # JAX's file that calls the rules of derivatives


class Source(NamedTuple):
    """Where an operation is.

    Attributes:
        name: Its name; for one of a derivative that of the operation which is derived.
        derivative: Whether it is one of a derivative.
        file: The user's innermost file, or a library's where it is in no code of the user; None if there is neither.
        line: The line in it.
        layer: The path of its layer, ``""`` for the whole model; None outside of the model.
        where: The part of the step, in words.
    """

    name: str
    derivative: bool
    file: str | None
    line: int | None
    layer: str | None
    where: str


def source_of(event: Event, replay: Replay, *, derivative: bool = False) -> Source:
    """Return where the operation is that made an array.

    Args:
        event: The array.
        replay: What ran the operation.
        derivative: Whether the array is part of the gradient, so that the operation may be one of a derivative.
    """
    frames = _frames(event.operations)
    own = [frame for frame in frames if not _is_library(frame.file)]
    outside = [frame for frame in frames if "jax" not in _package(frame.file)]
    file, line, _ = next(iter((own or outside)[-1:]), (None, None, None))
    last = event.operations[-1]
    first = _derived_operation(last, replay) if derivative else last
    derivative = derivative and (first is not last or "transpose(" in last.scopes)
    return Source(first.name, derivative, file, line, *_part(event.operations))


def line_of(operation: Operation) -> str:
    """Return the user's file and line of an operation of the step, "" where it is in no code of the user."""
    own = [frame for frame in _frames([operation]) if not _is_library(frame.file)]
    return f"{Path(own[-1].file).name}:{own[-1].line}" if own else ""


def _part(operations: Sequence[Operation]) -> tuple[str | None, str]:
    """Return the path of the layer, and the part of the step, in words."""
    frames = itertools.chain.from_iterable(_frames([operation]) for operation in operations)
    inside = {"/".join(Path(frame.file).parts[-2:]) for frame in frames if in_kaun(frame.file)}
    if "_loss/trace.py" in inside:
        return None, "in the loss"
    if "_step/optimizer.py" in inside:
        return None, "in the optimizer's update"
    layers = [found[-1] for operation in operations if (found := _LAYER.findall(operation.scopes))]
    if layers:
        return layers[-1], f"in layer {layers[-1]!r}" if layers[-1] else "in the model"
    return None, "in the square of the gradient" if "_step/watch.py" in inside else "in the step"


def _frames(operations: Sequence[Operation]) -> list[Frame]:
    """Return the calls that led from the step to an operation, given after the calls around it, the outermost first."""
    found = operations[0].frames
    for outer, inner in itertools.pairwise(operations):
        if outer.name in ("jit", "pjit") and _is_library(outer.file):
            break  # it was traced once for all that call it, and its inner lines are those of the first
        found = inner.frames
    last = max((i for i, frame in enumerate(found) if frame.file == _STEP), default=-1)
    return found[last + 1 :]


def _derived_operation(operation: Operation, replay: Replay) -> Operation:
    """Return the operation of whose derivative one is a part: the first that ran of those that one call made."""
    key = _call(operation)
    return next((other for other in replay.operations.values() if _call(other) == key), operation)


def _call(operation: Operation) -> tuple[Frame, ...]:
    """Return the frames of an operation without those of the rule of a derivative."""
    frames = _frames([operation])
    rule = (i for i, frame in enumerate(frames) if frame.file.endswith(_RULES))
    return tuple(frames[: next(rule, len(frames))])


def _package(file: str) -> str:
    """Return the package of a file among those that are installed, "" for another one."""
    parts = Path(file).parts
    index = max((i for i, part in enumerate(parts) if part in ("site-packages", "dist-packages")), default=-1)
    return parts[index + 1].removesuffix(".py") if 0 <= index < len(parts) - 1 else ""


def _is_library(file: str) -> bool:
    package = _package(file)
    return is_library(package) if package else in_kaun(file) or file.startswith(_PYTHON)
