"""What made a step not finite: the step run once more, one operation at a time."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import linecache
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from kaun import tree
from kaun._engine import Event, FailedStep, Origin, Replay, as_arrays, origin_of, trace_step
from kaun._jax import Frame, Operation
from kaun._loss import is_library
from kaun._messages import in_kaun
from kaun._step import Settings, train_step
from kaun.errors import NonFiniteLoss
from kaun.layers.path import path as path_here
from kaun.layers.path import watched
from kaun.train import Trainer, settings_of

__all__ = ["Explanation", "explain"]

_STEP = train_step.__code__.co_filename
_PYTHON = str(Path(os.__file__).parent) + os.sep
_LAYER = re.compile(r"layer<([^>]*)>")
_LISTED = 10  # rows, in the text


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What made a step not finite. It prints as text.

    Attributes:
        step: The number of the step in its fit.
        part: What of the step is not finite first: ``"loss"``, ``"gradient"`` or ``"update"``; None if the step is
            finite when it runs one operation at a time.
        leaf: The parameter, or the leaf of the state, that the update makes not finite; None elsewhere.
        given: What was not finite before the step, such as ``"x"``; None if an operation made it.
        operation: The name of JAX's operation that made it; for one of a derivative, the operation that is derived.
        derivative: Whether it was made in the derivative of that operation.
        file: The file of that operation: the user's innermost, or a library's where it is in no code of the user.
        line: The line in that file.
        layer: The path of the layer; ``""`` for the whole model, None outside of the model.
        rows: The rows of the batch that are not finite there; None where the array has no row for each example.
        refused: What a layer or loss of kaun says of the values of the item, where it sees them; None if nothing.
        text: All of it in words.
    """

    step: int
    part: str | None
    leaf: str | None
    given: str | None
    operation: str | None
    derivative: bool
    file: str | None
    line: int | None
    layer: str | None
    rows: tuple[int, ...] | None
    refused: str | None
    text: str

    def __repr__(self) -> str:
        return self.text


def explain(trainer: Trainer[Any, Any], error: BaseException) -> Explanation:
    """Say which operation made a step not finite, in which line and layer, and for which rows of the batch.

    Runs the failing step once more, with the same state, item and random numbers, one operation at a time and not
    compiled: the forward pass and the loss; if these are finite the gradient; then the update. Each operation is
    compiled on its own, so it takes seconds for a large model.

    Args:
        trainer: The trainer whose ``fit`` raised the error.
        error: The ``NonFiniteLoss``.

    Returns:
        An ``Explanation``, which prints as text. Its ``operation``, ``file``, ``line``, ``layer`` and ``rows`` are that
        text's parts.

    Raises:
        TypeError: If the error is another one than ``NonFiniteLoss``.
        ValueError: If the error does not hold its step, or the state is another model's.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import layers, rng
        >>> with rng.scope(0):
        ...     trainer = kaun.Trainer(model=layers.fn(jnp.log) >> layers.linear(2, 1), optimizer=optax.sgd(0.1))
        ...     state = trainer.init()
        >>> x = jnp.array([[1.0, 2.0], [3.0, -4.0], [5.0, 6.0]])
        >>> try:
        ...     trainer.fit(state, [(x, jnp.mean)])
        ... except kaun.errors.NonFiniteLoss as error:
        ...     found = kaun.explain(trainer, error)
        >>> found.part, found.operation, found.layer, found.rows
        ('loss', 'log', 'left', (1,))
    """
    failed = _failed_step(error)
    settings = settings_of(trainer)
    settings.spec.check(failed.carry[0])
    with jax.debug_nans(False), jax.debug_infs(False):
        refused = failed.refused(settings)
        part, leaf, origin, replay = _search(settings, failed)
    assert isinstance(error, NonFiniteLoss)
    head = f"Step {error.step}: {_head(error, part, leaf)}"
    lines = [head] if refused is None else [head, f"A check of kaun refuses its item: {refused}"]
    if origin is None:
        lines.append(
            "Run one operation at a time it is finite. The compiled step rounds in other places: a number is at the "
            "edge of what its dtype can hold, or of what an operation is defined for."
        )
        nothing = (None, None, None, False, None, None, None, None)
        return Explanation(error.step, None, *nothing, _text(refused), "\n".join(lines))
    rows = _rows(origin, failed, settings)
    found = _find(origin.event, replay, derived=part == "gradient")
    lines += _words(origin, found, rows, failed, replay)
    event = origin.event
    return Explanation(
        error.step, part, leaf, event.given, None if event.given is not None else found.name, found.derivative,
        found.file, found.line, found.layer, rows, _text(refused), "\n".join(lines),
    )  # fmt: skip


def _failed_step(error: Any) -> FailedStep:
    if not isinstance(error, NonFiniteLoss):
        received = type(error).__name__ if isinstance(error, BaseException) else tree.describe(error)
        raise TypeError(
            f"explain expected a NonFiniteLoss that fit raised, received {received}: it explains numbers that are not "
            "finite, and nothing else. Write except kaun.errors.NonFiniteLoss as err: print(kaun.explain(trainer, err))"
        )
    if error.kaun_step is None:
        raise ValueError(
            "This NonFiniteLoss does not hold its step: a pickled one does not take the item along, whose loss is a "
            "closure. Call explain where fit raised it."
        )
    return error.kaun_step


def _search(settings: Settings, failed: FailedStep) -> tuple[str | None, str | None, Origin | None, Replay]:
    """Replay a step, and return what of it is not finite first, the leaf that an update made so, and its origin."""

    def scoped(layer: Any, vars: Any, run: Any) -> Any:
        with jax.named_scope(f"layer<{path_here()}>"):
            return run()

    leaves, structure = jax.tree_util.tree_flatten(failed.carry)
    # Updated in any case, so that the update can be looked at.
    step = functools.partial(train_step, dataclasses.replace(settings, on_nonfinite="ignore"))
    with watched(scoped):
        traced = trace_step(step, "ignore", structure, leaves, failed.key, failed.inputs, True)
    names = [*_leaf_names(failed.carry), "the run's key", *failed.inputs.names()]
    values = [*leaves, failed.key, *as_arrays(failed.inputs.leaves)]
    replay, before = Replay(), 1 + len(traced.places)
    groups = [[0], [before + len(leaves) + 1], range(before, before + len(leaves))]
    found = replay.run(traced.jaxpr, list(zip(names, values, strict=True)), groups)
    for part, events in zip(("loss", "gradient"), found, strict=False):
        if events[0] is not None:
            return part, None, origin_of(events[0]), replay
    after = next(iter(found))
    known = {event.given for event in map(replay.given, leaves, names) if event is not None}
    made = [(origin_of(e), name) for e, name in zip(after, names, strict=False) if e is not None and name not in known]
    if not made:
        return None, None, None, replay
    origin, leaf = min(made, key=lambda pair: pair[0].event.number)
    return "update", leaf, origin, replay


def _leaf_names(carry: Any) -> list[str]:
    vars, opt_state, _ = carry
    kinds = (("parameter", vars.params), ("layer state", vars.state), ("optimizer state", opt_state))
    paths = [(kind, path) for kind, part in kinds for path, _ in jax.tree_util.tree_flatten_with_path(part)[0]]
    return [*[f"{kind} {tree.path_name(path)!r}" for kind, path in paths], "the number of steps"]


def _head(error: NonFiniteLoss, part: str | None, leaf: str | None) -> str:
    if part == "gradient":
        named = ", ".join(map(repr, error.parameters)) or "its parameters"
        return f"the loss is {error.loss:g}, and its gradient is not finite for {named}."
    if part == "update":
        return f"the loss is {error.loss:g}, its gradient is finite, and the update makes {leaf} not finite."
    return f"the loss is {error.loss:g}."


class _Found(NamedTuple):
    """Where an operation is.

    Attributes:
        name: Its name; for one of a derivative that of the operation which is derived.
        derivative: Whether it is one of a derivative.
        file: Its file.
        line: Its line.
        layer: The path of its layer.
        where: The part of the step, in words.
    """

    name: str
    derivative: bool
    file: str | None
    line: int | None
    layer: str | None
    where: str


def _find(event: Event, replay: Replay, derived: bool) -> _Found:
    if not event.operations:
        return _Found("", False, None, None, None, "")
    frames = _frames(event.operations)
    own = [frame for frame in frames if not _is_library(frame.file)]
    outside = [frame for frame in frames if "jax" not in _package(frame.file)]
    file, line, _ = next(iter((own or outside)[-1:]), (None, None, None))
    scopes = [found[-1] for operation in event.operations if (found := _LAYER.findall(operation.scopes))]
    first = _derived_operation(event.operations[-1], replay) if derived else event.operations[-1]
    derivative = derived and (first is not event.operations[-1] or "transpose(" in first.scopes)
    return _Found(first.name, derivative, file, line, *_part(frames, scopes))


def _part(frames: Sequence[Frame], scopes: Sequence[str]) -> tuple[str | None, str]:
    """Return the path of the layer, and the part of a step, in words."""
    inside = {"/".join(Path(frame.file).parts[-2:]) for frame in frames if in_kaun(frame.file)}
    if "_loss/trace.py" in inside:
        return None, "in the loss"
    if "_step/optimizer.py" in inside:
        return None, "in the optimizer's update"
    if scopes:
        return scopes[-1], f"in layer {scopes[-1]!r}" if scopes[-1] else "in the model"
    return None, "in the square of the gradient" if "_step/nonfinite.py" in inside else "in the step"


def _frames(operations: Sequence[Operation]) -> list[Frame]:
    """Return the calls that led from the step to an operation, the outermost first."""
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
    rule = (i for i, frame in enumerate(frames) if frame.file.endswith(os.path.join("interpreters", "ad.py")))
    return tuple(frames[: next(rule, len(frames))])


def _package(file: str) -> str:
    """Return the package of a file among those that are installed, "" for another one."""
    parts = Path(file).parts
    index = max((i for i, part in enumerate(parts) if part in ("site-packages", "dist-packages")), default=-1)
    return parts[index + 1].removesuffix(".py") if 0 <= index < len(parts) - 1 else ""


def _is_library(file: str) -> bool:
    package = _package(file)
    return is_library(package) if package else in_kaun(file) or file.startswith(_PYTHON)


def _rows(origin: Origin, failed: FailedStep, settings: Settings) -> tuple[int, ...] | None:
    examples, parts = failed.inputs.examples, settings.microbatches
    for event in (origin.event, *([origin.became_nan] if origin.became_nan else [])):
        if examples and event.shape[:1] == (examples,):
            return event.rows
        if examples and parts > 1 and event.turn is not None and event.shape[:1] == (examples // parts,):
            return tuple(row + event.turn * (examples // parts) for row in event.rows)
    return None


def _words(
    origin: Origin, found: _Found, rows: tuple[int, ...] | None, failed: FailedStep, replay: Replay
) -> list[str]:
    event = origin.event
    if event.given is not None:
        lines = [f"{event.given} is not finite before the step: {event.value:g}{_at(event)}."]
    else:
        derivative = f"In the derivative of {_name(found.name)}, " if found.derivative else ""
        lines = [f"{derivative}{_made(event)}, {found.where}{_source(found)}"]
    if origin.became_nan is not None:
        other = _find(origin.became_nan, replay, derived=False)
        lines.append(f"That became nan: {_made(origin.became_nan)}, {other.where}{_source(other)}")
    if rows is not None:
        more = f", and {len(rows) - _LISTED} more" if len(rows) > _LISTED else ""
        listed = ", ".join(map(str, rows[:_LISTED])) + more
        lines.append(f"Rows of the batch that are not finite there: {listed} ({len(rows)} of {failed.inputs.examples}).")
    if found.derivative:
        lines.append(
            "JAX computes a derivative for every element, also for those that jnp.where leaves out afterwards. Replace "
            "their arguments first: jnp.sqrt(jnp.where(x > 0, x, 1.0))."
        )
    return lines


def _made(event: Event) -> str:
    name = event.operations[-1].name
    of = " and ".join(_number(v) for v in event.operands)
    if name == "select_n":
        of = " and ".join(_number(v) for v in event.operands[1:])
    to = f" to {event.dtype}" if name == "convert_element_type" else ""
    text = f"{_name(name)}{to}{' of ' + of if of else ''} gave {_number(event.value)}{_at(event)}"
    return text[0].upper() + text[1:]


def _name(operation: str) -> str:
    return {"select_n": "`select_n` (jnp.where)", "gather": "`gather` (indexing)"}.get(operation, f"`{operation}`")


def _number(value: Any) -> str:
    return f"{value:g}" if not isinstance(value, complex) else str(value)


def _at(event: Event) -> str:
    return f" at {list(event.place)}" if event.place else ""


def _source(found: _Found) -> str:
    if found.file is None or found.line is None:
        return "."
    code = linecache.getline(found.file, found.line).strip()
    return f", {Path(found.file).name}:{found.line}" + (f"\n    {code}" if code else "")


def _text(refused: ValueError | None) -> str | None:
    return None if refused is None else str(refused)
