"""What made a step not finite: the step run once more, one operation at a time."""

from __future__ import annotations

import dataclasses
import functools
import linecache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kaun import tree
from kaun._calls import explained
from kaun._engine import (
    LAYER,
    Event,
    FailedStep,
    Origin,
    Replay,
    Source,
    StepInputs,
    as_arrays,
    origin_of,
    source_of,
    trace_step,
)
from kaun._step import Settings, state_paths, train_step
from kaun.errors import NonFiniteLoss
from kaun.layers.path import path as path_here
from kaun.layers.path import watched
from kaun.train import Trainer, settings_of

__all__ = ["Explanation", "explain"]

_LISTED = 10  # rows, in the text
_FINITE = (
    "Run one operation at a time it is finite. The compiled step rounds in other places: a number is at the edge of "
    "what its dtype can hold, or of what an operation is defined for."
)
_DERIVATIVES = (
    "JAX computes a derivative for every element, also for those that jnp.where leaves out afterwards. Replace their "
    "arguments first: jnp.sqrt(jnp.where(x > 0, x, 1.0))."
)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What made a step not finite. It prints as text.

    Attributes:
        step: The number of the step in its fit.
        part: What of the step is not finite first: ``"loss"``, ``"gradient"`` or ``"update"``; None if the step is
            finite when it runs one operation at a time.
        leaf: The path of the leaf that the update makes not finite: ``"params.weight"``; None elsewhere.
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


@explained("kaun.explain")
def explain(trainer: Trainer[Any, Any], error: BaseException) -> Explanation:
    """Say which operation made a step not finite, in which line and layer, and for which rows of the batch.

    Runs the failing step once more, with the same state, item and random numbers, one operation at a time and not
    compiled as a whole: the forward pass and the loss; if these are finite the gradient; then the update. Each
    operation is compiled on its own, which takes seconds, and callbacks to the host are called again. Of several
    processes each has to call it.

    Args:
        trainer: The trainer whose ``fit`` raised the error.
        error: The ``NonFiniteLoss``.

    Returns:
        An ``Explanation``, which prints as text. Its ``operation``, ``file``, ``line``, ``layer`` and ``rows`` are that
        text's parts.

    Raises:
        TypeError: If the error is another one than ``NonFiniteLoss``.
        ValueError: If the error does not hold its step or comes from ``flush``, or the state is another model's.

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
    if not isinstance(trainer, Trainer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"explain expected a Trainer first, received {tree.describe(trainer)}. Write explain(trainer, err), with "
            "the trainer that an Ensemble was made of."
        )
    failed = _failed_step(error)
    settings = settings_of(trainer)
    settings.spec.check(failed.carry[0])
    with jax.debug_nans(False), jax.debug_infs(False):
        refused = failed.refused(settings)
        part, leaf, origin, replay = _search(settings, failed)
    assert isinstance(error, NonFiniteLoss)
    if part == "update" and error.parameters and settings.accumulate > 1:  # the penalty's, added in the update
        part, leaf = "gradient", None
    lines = [f"Step {error.step}: {_head(error, part, leaf)}"]
    lines += [] if refused is None else [f"A check of kaun refuses its item: {refused}"]
    if origin is None:
        lines.append(_FINITE)
        nothing = (None, None, None, None, False, None, None, None, None)
        return Explanation(error.step, *nothing, _text(refused), "\n".join(lines))
    event, given = origin.event, origin.event.given
    made = event if given is None else origin.became_nan
    source = None if made is None else source_of(made, replay, derivative=part == "gradient")
    if source is not None and source.layer is not None:
        whole = functools.partial(_in_batch, examples=failed.inputs.examples or 0, parts=settings.microbatches)
        later = origin.became_nan
        origin = Origin(whole(origin.event), None if later is None else whole(later))
    rows = _rows(origin, failed.inputs)
    lines += _words(origin, source, rows, failed, replay)
    found = (None, False, None, None, None) if source is None else source[:5]
    return Explanation(error.step, part, leaf, given, *found, rows, _text(refused), "\n".join(lines))


def _failed_step(error: Any) -> FailedStep:
    if not isinstance(error, NonFiniteLoss):
        received = type(error).__name__ if isinstance(error, BaseException) else tree.describe(error)
        raise TypeError(
            f"explain expected a NonFiniteLoss that fit raised, received {received}: it explains numbers that are not "
            "finite, and nothing else. Write except kaun.errors.NonFiniteLoss as err: print(kaun.explain(trainer, err))"
        )
    if error.kaun_flush:
        raise ValueError(
            "This NonFiniteLoss comes from flush, which runs no item: loss and gradient of each item in the window "
            "were finite, and explain has no step to run. Look at the learning rate after as many updates as "
            "err.kaun_state.opt_state counts, and if the trainer has a penalty, at its gradient: "
            "jax.grad(penalty)(err.kaun_state.vars.params)."
        )
    if error.kaun_step is None:
        raise ValueError(
            "This NonFiniteLoss does not hold its step: a pickled one does not take the item along, whose loss is a "
            "closure, and lr_range and update_statistics run steps of other trainers. Call explain where fit raised it."
        )
    return error.kaun_step


def _search(settings: Settings, failed: FailedStep) -> tuple[str | None, str | None, Origin | None, Replay]:
    """Replay a step, and return what of it is not finite first, the leaf that an update made so, and its origin."""

    def scoped(layer: Any, vars: Any, run: Any) -> Any:
        with jax.named_scope(LAYER.format(path_here())):
            return run()

    leaves, structure = jax.tree_util.tree_flatten(failed.carry)
    # Updated in any case, so that the update can be looked at.
    step = functools.partial(train_step, dataclasses.replace(settings, on_nonfinite="ignore"))
    with watched(scoped):
        traced = trace_step(step, "ignore", False, structure, leaves, failed.key, failed.inputs, training=True)
    vars, opt_state, _ = failed.carry
    names = [*state_paths(vars, opt_state), "the number of steps", "the run's key", *failed.inputs.names()]
    values = [*leaves, failed.key, *as_arrays(failed.inputs.leaves)]
    replay, first = Replay(), 1 + traced.layout.results
    groups = [[0], [first + len(leaves) + 1], range(first, first + len(leaves))]
    found = replay.run(traced.jaxpr, list(zip(names, values, strict=True)), groups)
    for part, events in zip(("loss", "gradient"), found, strict=False):
        if events[0] is not None:
            return part, None, origin_of(events[0]), replay
    after = next(iter(found))
    known = {name for name, leaf in zip(names, leaves, strict=False) if replay.given(leaf, name) is not None}
    origins = [(origin_of(event), name) for event, name in zip(after, names, strict=False) if event is not None]
    # What is infinite from the start stays so: nothing of this step is the reason.
    made = [(o, name) for o, name in origins if name not in known or o.event.given is None or o.became_nan is not None]
    if not made:
        return None, None, None, replay
    origin, leaf = min(made, key=lambda pair: pair[0].event.number)
    return "update", leaf, origin, replay


def _head(error: NonFiniteLoss, part: str | None, leaf: str | None) -> str:
    if part == "gradient":
        counted = f"{len(error.parameters)} parameters" if len(error.parameters) > 1 else repr(*error.parameters)
        return f"the loss is {error.loss:g}, and its gradient is not finite for {counted}."
    if part == "update":
        return f"the loss is {error.loss:g}, its gradient is finite, and the update makes {leaf!r} not finite."
    return f"the loss is {error.loss:g}."


def _in_batch(event: Event, examples: int, parts: int) -> Event:
    """Return the event of an array of a layer with the rows and the place of the whole batch, if it is of one part."""
    parts = min(parts, examples)
    if parts <= 1 or event.turn is None or not event.shape:
        return event
    size, longer = divmod(examples, parts)
    if event.shape[0] == size:
        part = event.turn + longer  # of the loop over the parts that have a row less than the first ones
    elif event.shape[0] == size + 1 and longer:
        part = event.turn
    else:
        return event
    place = (event.place[0] * parts + part, *event.place[1:])
    rows = tuple(row * parts + part for row in event.rows)
    return dataclasses.replace(event, rows=rows, place=place, shape=(examples, *event.shape[1:]))


def _counted(inputs: StepInputs) -> list[bool]:
    """Return for each row of the batch whether it is one of the data; the others fill the batch."""
    mask = inputs.row_mask
    return [True] * (inputs.examples or 0) if mask is None else tree.on_host(inputs.leaves[mask]).astype(bool).tolist()


def _rows(origin: Origin, inputs: StepInputs) -> tuple[int, ...] | None:
    """Return the rows that are not finite, without those that fill the batch, unless these alone are not finite."""
    examples, counted = inputs.examples, _counted(inputs)
    for event in (origin.event, *([origin.became_nan] if origin.became_nan else [])):
        if examples and event.shape[:1] == (examples,):
            return tuple(row for row in event.rows if counted[row]) or event.rows
    return None


def _words(
    origin: Origin, source: Source | None, rows: tuple[int, ...] | None, failed: FailedStep, replay: Replay
) -> list[str]:
    event, later, lines = origin.event, origin.became_nan, list[str]()
    if event.given is not None:
        lines.append(f"{event.given} is not finite before the step: {_number(event.value)}{_at(event)}.")
    elif source is not None:
        derivative = f"In the derivative of {_name(source.name)}, " if source.derivative else ""
        lines.append(f"{derivative}{_made(event)}, {_place(source)}")
    if later is not None:
        lines.append(f"That became nan: {_made(later)}, {_place(source_of(later, replay))}")
    if rows:
        more = f", and {len(rows) - _LISTED} more" if len(rows) > _LISTED else ""
        listed = ", ".join(map(str, rows[:_LISTED])) + more
        known = _counted(failed.inputs)
        counted = f"{len(rows)} of {sum(known) if known[rows[0]] else len(known)}"
        lines.append(f"Rows of the batch that are not finite there: {listed} ({counted}).")
    return [*lines, _DERIVATIVES] if source is not None and source.derivative else lines


def _made(event: Event) -> str:
    name = event.operations[-1].name
    of = " and ".join(_number(v) for v in event.operands)
    if name == "select_n":
        of = " and ".join(_number(v) for v in event.operands[1:])
    to = f" to {event.dtype}" if name == "convert_element_type" else ""
    ends = " (float16 ends at 65504)" if event.dtype == np.float16 and not event.nan else ""
    return f"{_name(name)}{to}{' of ' + of if of else ''} gave {_number(event.value)}{_at(event)}{ends}"


def _name(operation: str) -> str:
    return {"select_n": "`select_n` (jnp.where)", "gather": "`gather` (indexing)"}.get(operation, f"`{operation}`")


def _number(value: Any) -> str:
    return str(value) if np.iscomplexobj(value) else f"{float(value):g}"


def _at(event: Event) -> str:
    return f" at {list(event.place)}" if event.place else ""


def _place(source: Source) -> str:
    if source.file is None or source.line is None:
        return f"{source.where}."
    code = linecache.getline(source.file, source.line).strip()
    return f"{source.where}, {Path(source.file).name}:{source.line}" + (f"\n    {code}" if code else "")


def _text(refused: ValueError | None) -> str | None:
    return None if refused is None else str(refused)
