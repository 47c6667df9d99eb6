"""A table of a trainer's layers with shapes and sizes, and the cost of a compiled step, without running anything."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import _html, rng, tree
from kaun._calls import explained
from kaun._engine import StepInputs, check_input, find_step
from kaun._loss import Loss
from kaun._step import abstract_vars, apply_model, parse_precision, trainable_part
from kaun.context import Context
from kaun.data import check_context, check_loss
from kaun.layers.core import Layer, Vars, short_name
from kaun.layers.path import Part, origin, watched, watched_parts
from kaun.layers.path import path as path_here
from kaun.state import TrainState
from kaun.train import Trainer
from kaun.tree import format_bytes

__all__ = ["Cost", "Row", "Summary", "summary"]

HEAD = ("path", "layer", "output", "parameters", "bytes")
SHARDED = ("bytes each", "spec")


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of a ``Summary``.

    Parameters of layers inside it are not counted. Parameters that two layers share count for the first.

    Attributes:
        path: The path of the layer in the model.
        layer: The layer's name.
        output: The dtype and shape of its output, as text.
        parameters: How many numbers its parameters have.
        bytes: The memory of its parameters and its state.
        device_bytes: The memory of these on each device; None where the trainer has no ``sharding``.
        spec: The ``PartitionSpec`` of each array that is spread over devices, by its name, as text.
    """

    path: str
    layer: str
    output: str
    parameters: int
    bytes: int
    device_bytes: int | None = None
    spec: str = ""


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one compiled training step, as XLA estimates it; with a ``sharding`` that of each device.

    Attributes:
        flops: Floating-point operations; the body of a loop (``microbatches``) counts once.
        arguments: The bytes of state and batch.
        outputs: The bytes of the new state.
        temporaries: The bytes of temporary memory.
    """

    flops: float
    arguments: int
    outputs: int
    temporaries: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """A table of the layers of a trainer's model, and totals. It prints as text, and with ``rich.print`` in color.

    Attributes:
        rows: A ``Row`` for each layer, in the order in which they are applied.
        parameters: How many numbers the parameters have, trained or frozen.
        trained: How many of them are trained.
        state: How many numbers the layers' state has.
        bytes: The memory of parameters and state.
        optimizer_bytes: The memory of the optimizer's state.
        device_bytes: The memory of parameters, state and optimizer's state on each device; None where the trainer has
            no ``sharding``.
        devices: How many devices its sharding has, 1 without one.
        cost: The cost of a compiled step; None if no loss was given.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import layers
        >>> model = layers.sequential([layers.linear(2, 4), layers.tanh(), layers.linear(4, 1)])
        >>> kaun.summary(kaun.Trainer(model=model, optimizer=optax.adam(0.01)), jnp.ones((8, 2)))
        path  layer         output         parameters  bytes
        0     linear(2, 4)  float32[8, 4]          12     48
        1     tanh()        float32[8, 4]           0      0
        2     linear(4, 1)  float32[8, 1]           5     20
        17 parameters (68 B), all of them train; the optimizer's state takes 140 B.
    """

    rows: tuple[Row, ...]
    parameters: int
    trained: int
    state: int
    bytes: int
    optimizer_bytes: int
    cost: Cost | None
    device_bytes: int | None = None
    devices: int = 1

    def __repr__(self) -> str:
        table = [self._head(), *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                c.rjust(w) if _is_count(i) else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        return "\n".join([*(line.rstrip() for line in lines), *self._totals()])

    def _repr_html_(self) -> str:
        rows = [(r.path, r.layer, r.output, r.parameters, r.bytes, r.device_bytes, r.spec) for r in self.rows]
        table = _html.table(self._head(), [row[: len(self._head())] for row in rows], most=1000)
        return _html.document("Summary", table, _html.preformatted("\n".join(self._totals())))

    def __rich__(self) -> Any:
        console, table_module = (importlib.import_module(f"rich.{name}") for name in ("console", "table"))
        table = table_module.Table()
        for i, name in enumerate(self._head()):
            table.add_column(name, justify="right" if _is_count(i) else "left")
        for row in self.rows:
            table.add_row(*_cells(row))
        return console.Group(table, *self._totals())

    def _head(self) -> tuple[str, ...]:
        return HEAD if self.device_bytes is None else (*HEAD, *SHARDED)

    def _totals(self) -> list[str]:
        train = "all of them train" if self.trained == self.parameters else f"{self.trained:,} of them train"
        kept = f" and {self.state:,} numbers of state" if self.state else ""
        lines = [
            f"{self.parameters:,} parameters{kept} ({format_bytes(self.bytes)}), {train}; the optimizer's state takes "
            f"{format_bytes(self.optimizer_bytes)}."
        ]
        if self.device_bytes is not None:
            whole = format_bytes(self.bytes + self.optimizer_bytes)
            lines.append(f"Each of {self.devices} devices has {format_bytes(self.device_bytes)} of these {whole}.")
        if self.cost is not None:
            c = self.cost
            each = "A compiled step" if self.device_bytes is None else "A compiled step, on each device"
            lines.append(
                f"{each}: {c.flops:.3g} FLOPs; {format_bytes(c.arguments)} of state and batch in, "
                f"{format_bytes(c.outputs)} out, {format_bytes(c.temporaries)} of temporaries."
            )
        return lines


@explained("summary")
def summary(trainer: Trainer[Any, Any], x: Any, loss: Loss | None = None, *, ctx: Context | None = None) -> Summary:
    """Summarize a trainer's layers with their shapes and sizes, and the cost of a compiled step. Nothing is run.

    Args:
        trainer: A ``Trainer``.
        x: An input: arrays, or their shapes and dtypes (``jax.ShapeDtypeStruct``).
        loss: A function of the model's output, as for ``step``. With it a training step is compiled for this input,
            and the summary has XLA's analysis of it. Default: none.
        ctx: A Context for the layers. Default: an empty one.

    Raises:
        TypeError: If an argument has a type that ``step`` would refuse.
        ValueError: If the input has a shape that ``step`` would refuse.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import layers, losses
        >>> trainer = kaun.Trainer(model=layers.linear(20, 30), optimizer=optax.sgd(0.1))
        >>> table = kaun.summary(trainer, jnp.ones((10, 20)), lambda y: losses.mse(y, jnp.zeros((10, 30))))
        >>> table.parameters, table.cost.flops > 2 * 2 * 10 * 20 * 30
        (630, True)
    """
    if not isinstance(trainer, Trainer):  # pyright: ignore[reportUnnecessaryIsInstance]
        received = tree.describe(trainer)
        made = "kaun.Trainer(model=model, optimizer=optax.adam(1e-3))" if isinstance(trainer, Layer) else "trainer"
        raise TypeError(f"summary expected a kaun.Trainer, received {received}. Write summary({made}, x).")
    if isinstance(x, (tuple, list)) and all(n is None or isinstance(n, int) for n in x):
        shape = tuple(n or 32 for n in x)
        raise TypeError(
            f"summary expected an input, received the shape {tuple(x)}. Write kaun.summary(trainer, "
            f"jax.ShapeDtypeStruct({shape}, jnp.float32)), with the axis of the batch."
        )
    check_input(x)
    ctx = check_context(ctx) or Context()
    policy = parse_precision(trainer.precision)
    dtype = jnp.dtype(policy.params if policy else jnp.float32)
    vars = abstract_vars(trainer.model, dtype)
    state = jax.eval_shape(lambda vars: _fresh(trainer, vars), vars)
    where = None if trainer.sharding is None else trainer.sharding.of(state)
    run = lambda vars, x, ctx: apply_model(policy, trainer.model, vars, x, ctx, False)
    rows = _rows(vars, run, x, ctx, None if where is None else where.vars)
    trained = trainable_part(trainer.trainable, vars.params)
    return Summary(
        rows=rows, parameters=_count(vars.params), trained=_count(trained), state=_count(vars.state),
        bytes=_bytes(vars), optimizer_bytes=_bytes(state.opt_state),
        cost=None if loss is None else _cost(trainer, state, StepInputs(_zeros(x), check_loss(loss), ctx)),
        device_bytes=None if where is None else _bytes((state.vars, state.opt_state), (where.vars, where.opt_state)),
        devices=1 if trainer.sharding is None else trainer.sharding.mesh.size,
    )  # fmt: skip


def _fresh(trainer: Trainer[Any, Any], vars: Vars) -> Any:
    with rng.scope(0):
        return trainer.make_state(vars)


def _rows(vars: Any, run: Callable[..., Any], x: Any, ctx: Context, where: Any) -> tuple[Row, ...]:
    table = _Table(vars, where)

    def applied(vars: Vars, x: Any, ctx: Context) -> Any:
        with rng.scope(0), watched(table.watch):
            return run(vars, x, ctx)[0]

    jax.eval_shape(applied, vars, x, ctx)
    return tuple(table.rows)


class _Table:
    """Collects the rows of a model's layers while they are applied.

    Args:
        vars: The model's variables, as shapes and dtypes.
        where: The placement of each, None if they are not placed.
    """

    def __init__(self, vars: Any, where: Any) -> None:
        self._kinds = _by_name(vars)
        self._where: dict[str, Any] | None = None if where is None else _by_name(where)
        self._paths: dict[int, str] = {}  # of leaves that are not in a row yet
        self._known: dict[int, str] = {}
        self._depth = 0
        self.rows: list[Row] = []

    def watch(self, layer: Layer[Any, Any], vars: Vars, run: Callable[[], Any]) -> Any:
        params, state = tree.flatten(vars.params)[0], tree.flatten(vars.state)[0]
        if self._depth == 0:
            named = [*params.items(), *((f"state {p}", a) for p, a in state.items())]
            self._known = {id(leaf): name for name, leaf in named}
            self._paths = dict(self._known)
            self._held = [leaf for _, leaf in named]  # kept alive, because ids of deleted objects are used again
        at, before = len(self.rows), path_here()
        where = self._path(params) or before
        self._depth += 1
        try:
            with watched_parts(lambda part: self._watch_part(part, where, params, state)):
                result = run()
        finally:
            self._depth -= 1
        output = result[0] if isinstance(result, tuple) else result
        self._add(at, where, short_name(layer), output, [*params.values(), *state.values()])
        return result

    def _watch_part(
        self, part: Part, where: str, params: dict[str, Any], state: dict[str, Any]
    ) -> Callable[[Any], None]:
        """Begin the row of a part of a layer that is a model of another library; the layer has these variables."""
        at, inside = len(self.rows), f"{part.path}."
        below = lambda path: path.partition(".")[2] if part.collections else path
        leaves = [leaf for path, leaf in params.items() if path.startswith(inside)]
        leaves += [leaf for path, leaf in state.items() if below(path).startswith(inside)]
        path = f"{where}.{part.path}" if where else part.path
        return lambda output: self._add(at, path, part.kind, output, leaves)

    def _add(self, at: int, path: str, layer: str, output: Any, leaves: list[Any]) -> None:
        """Add a row before those of the layers inside it, if it has leaves that no other row has, or none is inside."""
        own = [name for leaf in leaves if (name := self._paths.pop(origin(leaf), None))]
        if own or at == len(self.rows):
            kinds = [(name, self._kinds[name]) for name in own]
            count = sum(_count(kind) for name, kind in kinds if not name.startswith("state "))
            text = ", ".join(f"{p}: {d}" if p else d for p, d in _described(output))
            row = Row(path, layer, text, count, sum(_bytes(kind) for _, kind in kinds))
            self.rows.insert(at, row if self._where is None else self._placed(row, kinds, self._where))

    def _placed(self, row: Row, kinds: list[tuple[str, Any]], where: dict[str, Any]) -> Row:
        spread = [(name, where[name].spec) for name, _ in kinds if not where[name].is_fully_replicated]
        spec = ", ".join(f"{name.removeprefix(f'{row.path}.')} {spec}" for name, spec in spread)
        return dataclasses.replace(row, device_bytes=sum(_bytes(kind, where[name]) for name, kind in kinds), spec=spec)

    def _path(self, params: dict[str, Any]) -> str:
        if not params:
            return ""
        inner, leaf = next(iter(params.items()))
        return self._known.get(origin(leaf), "").removesuffix(inner).rstrip(".")


def _described(output: Any) -> list[tuple[str, str]]:
    return [(path, tree.describe(leaf)) for path, leaf in tree.flatten(output)[0].items()]


def _cost(trainer: Trainer[Any, Any], state: Any, inputs: StepInputs) -> Cost:
    compiled = _lowered(trainer, state, inputs).compile()
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return Cost(
        flops=float((analysis or {}).get("flops", 0.0)), arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes, temporaries=memory.temp_size_in_bytes,
    )  # fmt: skip


def _zeros(x: Any) -> Any:
    zero = lambda a: np.zeros(a.shape, a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a
    return jax.tree_util.tree_map(zero, x)


def _cells(row: Row) -> tuple[str, ...]:
    cells = row.path, row.layer, row.output, f"{row.parameters:,}", f"{row.bytes:,}"
    return cells if row.device_bytes is None else (*cells, f"{row.device_bytes:,}", row.spec)


def _is_count(column: int) -> bool:
    return 3 <= column <= 5


def _by_name(vars: Any) -> dict[str, Any]:
    return tree.flatten(vars.params)[0] | {f"state {p}": a for p, a in tree.flatten(vars.state)[0].items()}


def _count(value: Any) -> int:
    return sum(int(np.prod(a.shape)) for a in jax.tree_util.tree_leaves(value))


def _bytes(value: Any, where: Any = None) -> int:
    """The bytes of arrays; with their placements those on each device."""
    leaves = jax.tree_util.tree_leaves(value)
    shapes = [a.shape for a in leaves]
    if where is not None:
        shapes = [w.shard_shape(shape) for w, shape in zip(jax.tree_util.tree_leaves(where), shapes, strict=True)]
    return sum(int(np.prod(shape)) * a.dtype.itemsize for a, shape in zip(leaves, shapes, strict=True))


def _lowered(trainer: Trainer[Any, Any], state: TrainState, inputs: StepInputs) -> Any:
    """Return a training step of a trainer as it goes to the compiler; the state may be shapes and dtypes."""
    leaves, structure = jax.tree_util.tree_flatten((state.vars, state.opt_state, state.step))
    programs = trainer._programs  # pyright: ignore[reportPrivateUsage]
    traced = find_step(programs, structure, leaves, state.key, inputs, True)
    if trainer.sharding is None:
        return traced.step.lower(leaves, state.key, inputs.leaves)
    place = lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
    placed = map(
        place, leaves, jax.tree_util.tree_leaves(trainer.sharding.of((state.vars, state.opt_state, state.step)))
    )
    program = traced.program("step unpacked", (False,) * len(inputs.leaves))
    assert traced.placing is not None
    item = traced.placing.put_item(inputs.owned())
    return program.jitted.lower(list(placed), place(state.key, trainer.sharding.replicated), np.uint32(1), item)
