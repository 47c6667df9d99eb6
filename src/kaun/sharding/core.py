"""Sharding: where the arrays of a run lie, as a value. ``put`` places an array."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kaun import tree
from kaun._calls import shown
from kaun._jax import is_traced
from kaun.sharding.rules import ByMember, ByPath, Rule, Shape, everywhere

__all__ = [
    "Sharding",
    "added_gradient",
    "automatic_mesh",
    "check_axis",
    "check_sharding",
    "gathered",
    "item_placement",
    "processes_of",
    "put",
    "spread_rows",
    "state_placements",
]


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Where the arrays of a run lie: a value that ``data_parallel``, ``fsdp`` and ``by_path`` make.

    Shardings with equal fields are equal. The optimizer's arrays lie as the parameter whose whole path ends theirs, if
    they have its shape, also behind further axes. Any other array lies as the rule says for its shape and an empty
    path.

    Args:
        mesh: The devices, a ``jax.sharding.Mesh``. One of explicit axes, the default of ``jax.make_mesh``, is taken
            over with automatic axes: layers, optimizers and losses are written for those.
        rows: The mesh axes over which axis 0 of a batch lies, a tuple; empty, the default, if each device has all rows.
        rule: A function of a parameter's path (``"0.weight"``) and shape to its ``PartitionSpec``. Default: everywhere.
        gather: The mesh axis along which parameters are gathered where the loss uses them, as ``fsdp(gather=True)``
            does; None leaves it to the compiler.

    Attributes:
        mesh: As the argument, with automatic axes.
        rows: As the argument.
        rule: As the argument.
        gather: As the argument.

    Raises:
        TypeError: If ``mesh`` is not a mesh, or ``rule`` not a function.
        ValueError: If the mesh has no axis of that name.

    Examples:
        >>> import jax, optax, kaun
        >>> from kaun import layers, sharding
        >>> where = sharding.data_parallel()
        >>> where.rows, where == sharding.data_parallel()
        (('data',), True)
        >>> state = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1)).init()
        >>> where.of(state).vars.params["weight"].spec
        P()
    """

    mesh: Mesh
    rows: tuple[str, ...] = ()
    rule: Rule = everywhere
    gather: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"sharding expected a jax.sharding.Mesh, received {shown(self.mesh)}. Write "
                "mesh=sharding.mesh(data=-1)."
            )
        if not callable(self.rule):
            raise TypeError(
                f"Sharding(rule=...) expected a function (path, shape) -> PartitionSpec, received {shown(self.rule)}. "
                "Use sharding.fsdp() or sharding.by_path({pattern: spec}, mesh)."
            )
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "mesh", automatic_mesh(self.mesh))
        for name in (*self.rows, *([] if self.gather is None else [self.gather])):
            check_axis(self.mesh, name)
        _check_once("rows", self.rows)

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        rule = getattr(self.rule, "__name__", None) or repr(self.rule)
        gather = "" if self.gather is None else f", gather={self.gather!r}"
        return f"Sharding(mesh({axes}), rows={self.rows}, rule={rule}{gather})"

    @property
    def replicated(self) -> NamedSharding:
        """The placement of an array that each device has as a whole."""
        return _named(self.mesh, PartitionSpec())

    @property
    def spread(self) -> NamedSharding:
        """The placement of an array whose axis 0 lies over ``rows``."""
        return _named(
            self.mesh, PartitionSpec(self.rows if len(self.rows) > 1 else self.rows[0] if self.rows else None)
        )

    def of(self, state: Any) -> Any:
        """Return the placement of each array of a state.

        Args:
            state: A ``TrainState``, a ``Vars``, or any pytree with a ``Vars`` inside; its leaves may be shapes.

        Returns:
            The same pytree with a ``jax.sharding.NamedSharding`` in place of each leaf.

        Raises:
            TypeError: If there are no variables in it.
            ValueError: If a pattern of ``by_path`` matches no parameter, or an axis of one does not divide.
        """
        leaves, structure = jax.tree_util.tree_flatten(state)
        return structure.unflatten(state_placements(self, structure, leaves))


def put(leaf: Any, where: NamedSharding) -> jax.Array:
    """Return an array placed on devices, also of other processes; one that lies there is returned as it is.

    Args:
        leaf: An array of JAX or NumPy, typed keys too, or a number. Where the devices are those of several processes,
            each process has to give the same values.
        where: The placement.

    Examples:
        >>> import numpy as np
        >>> from kaun import sharding
        >>> where = sharding.data_parallel().spread
        >>> rows = sharding.put(np.ones((8, 2), np.float32), where)
        >>> rows.shape, rows.sharding == where, sharding.put(rows, where) is rows
        ((8, 2), True, True)
    """
    if isinstance(leaf, jax.Array):
        if leaf.committed and leaf.sharding == where:
            return leaf
        if where.is_fully_addressable:
            return jax.device_put(leaf, where)
        if tree.is_key(leaf):  # device_put refuses typed keys onto devices of other processes
            words = put(jax.random.key_data(leaf), where)
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
        if not leaf.is_fully_addressable:
            return jax.device_put(leaf, where)
    elif where.is_fully_addressable:
        return jax.device_put(leaf, where)
    # device_put would compare the values over all processes, by a collective operation for each array.
    host = np.asarray(leaf)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def state_placements(sharding: Sharding, structure: Any, leaves: Sequence[Any]) -> tuple[NamedSharding, ...]:
    """Return the placement of each leaf of a state, as ``Sharding.of``; found again in microseconds."""
    return _state_placements(sharding, structure, tuple([np.shape(leaf) for leaf in leaves]))


@functools.lru_cache(maxsize=256)
def _state_placements(sharding: Sharding, structure: Any, shapes: tuple[Shape, ...]) -> tuple[NamedSharding, ...]:
    abstract = structure.unflatten([jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes])
    params = _specs(sharding, _variables(abstract).params)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(abstract)[0]]
    specs = [_spec(sharding.rule, params, path, shape) for path, shape in zip(paths, shapes, strict=True)]
    return tuple([_named(sharding.mesh, spec) for spec in specs])


def gathered(sharding: Sharding | None, vars: Any) -> Any:
    """Return variables as the loss uses them in a program: parameters whole along the mesh axis ``gather``."""
    if sharding is None or sharding.gather is None:
        return vars
    return vars.replace(params=_whole(sharding, (sharding.gather,), vars.params, vars.params))


def added_gradient(sharding: Sharding | None, params: Any, gradient: Any) -> Any:
    """Return a gradient in a program as its norm is computed of it: on the devices of a CPU whole along ``rows``.

    There XLA adds a whole gradient over the devices, also where each then keeps its part. Norms of the parts would be
    added over the devices, too, and in between XLA does not add the gradients of all parameters at once: of three
    layers under ``fsdp`` in 4 operations in place of 1, in each of which all devices wait for each other. Other
    devices may add no more than their parts, and have no memory for whole gradients.

    Args:
        sharding: The sharding.
        params: All parameters.
        gradient: The gradient of those that train.
    """
    if sharding is None or isinstance(sharding.rule, ByMember) or sharding.mesh.devices.flat[0].platform != "cpu":
        return gradient
    return _whole(sharding, sharding.rows, params, gradient)


def _whole(sharding: Sharding, axes: tuple[str, ...], params: Any, values: Any) -> Any:
    """Return arrays in a program that lie as parameters do, but whole along some mesh axes."""
    specs = _specs(sharding, params)
    leave = lambda names: tuple([n for n in names if n not in axes]) or None
    out = lambda entry: leave(entry) if isinstance(entry, tuple) else None if entry in axes else entry

    def whole(path: Any, leaf: Any) -> Any:
        spec = PartitionSpec(*map(out, specs[path][1]))
        same = spec == specs[path][1]
        return leaf if same else jax.lax.with_sharding_constraint(leaf, _named(sharding.mesh, spec))

    return jax.tree_util.tree_map_with_path(whole, values)


def item_placement(sharding: Sharding, shape: Shape, length: int | None) -> tuple[NamedSharding, bool]:
    """Return the placement of an array of an item, and whether axis 0 holds the rows of its batch.

    Rows that the devices do not divide are put everywhere, and spread inside the program, which pads them.

    Args:
        sharding: The sharding.
        shape: The array's shape.
        length: The number of rows of the batch, None if it has none.
    """
    rows = bool(sharding.rows) and bool(shape) and shape[0] == length
    count = math.prod(sharding.mesh.shape[name] for name in sharding.rows)
    return sharding.spread if rows and shape[0] % count == 0 else sharding.replicated, rows


def processes_of(sharding: Sharding | None, arrays: Any) -> tuple[int, ...]:
    """Return the numbers of the processes over which arrays lie, or will lie; none in a program of one process.

    Args:
        sharding: Where they will lie, None where they stay.
        arrays: A pytree of arrays; others, and those that are traced, lie nowhere.
    """
    if jax.process_count() == 1:
        return ()
    leaves = [leaf for leaf in jax.tree_util.tree_leaves(arrays) if isinstance(leaf, jax.Array) and not is_traced(leaf)]
    found = sharding.mesh.devices.flat if sharding else {device for leaf in leaves for device in leaf.devices()}
    return tuple(sorted({device.process_index for device in found}))


def spread_rows(sharding: Sharding | None, leaf: jax.Array) -> jax.Array:
    """Return an array in a program with its rows spread; XLA pads them where the devices do not divide them."""
    if sharding is None or not sharding.rows:
        return leaf
    return jax.lax.with_sharding_constraint(leaf, sharding.spread)


def check_sharding(sharding: Any, where: str = "Trainer(sharding=...)") -> None:
    """Check an argument that is a sharding or None.

    Raises:
        TypeError: If it is neither None nor a ``Sharding``.
    """
    if sharding is not None and not isinstance(sharding, Sharding):
        is_mesh = isinstance(sharding, Mesh)  # which can be called
        called = ". Did you forget to call it?" if callable(sharding) and not is_mesh else "."
        given = "mesh" if is_mesh else ""
        raise TypeError(
            f"{where} expected a kaun.sharding.Sharding, received {shown(sharding)}{called} Write "
            f"sharding.data_parallel({given}), or sharding.fsdp({given})."
        )
    if sharding is not None and isinstance(sharding.rule, ByMember):
        raise ValueError(
            "Trainer(sharding=sharding.members()): a trainer has one model and no members. Write "
            "kaun.Ensemble(trainer, n, sharding=sharding.members())."
        )


def refuse_set_mesh() -> None:
    """Refuse to place arrays under ``jax.set_mesh`` of explicit axes.

    Raises:
        ValueError: If there is such a mesh: JAX refuses operations on arrays of automatic axes there.
    """
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        raise ValueError(
            "Trainer(sharding=...) was used under jax.set_mesh with a mesh of explicit axes, and says itself where "
            "arrays lie, on automatic axes. Leave jax.set_mesh out, or set a mesh of automatic axes: "
            "jax.set_mesh(trainer.sharding.mesh)."
        )


def check_axis(mesh: Mesh, name: Any) -> None:
    """Check that a mesh has an axis.

    Raises:
        ValueError: If it has none of that name.
    """
    if name not in mesh.axis_names:
        names = ", ".join(map(repr, mesh.axis_names))
        raise ValueError(
            f"sharding: the mesh has no axis {name!r}; its axes are {names}. Name one of these, or make a mesh with "
            f"that axis: sharding.mesh({name}=-1)."
        )


def _variables(abstract: Any) -> Any:
    is_vars = lambda node: all(hasattr(node, name) for name in ("params", "state", "dtype", "replace"))
    found = next(filter(is_vars, jax.tree_util.tree_leaves(abstract, is_leaf=is_vars)), None)
    if found is None:
        raise TypeError(
            f"Sharding.of expected a TrainState or a Vars, received {type(abstract).__name__} without variables. Write "
            "where.of(trainer.init())."
        )
    return found


def _specs(sharding: Sharding, params: Any) -> Mapping[Any, tuple[Shape, PartitionSpec]]:
    """The shape and the spec of each parameter, by its JAX key path."""
    pairs = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [tree.path_name(path) for path, _ in pairs]
    if isinstance(sharding.rule, ByPath):
        sharding.rule.check(names)
    found: dict[Any, tuple[Shape, PartitionSpec]] = {}
    for (path, leaf), name in zip(pairs, names, strict=True):
        spec = sharding.rule(name, leaf.shape)
        _check_divides(sharding.mesh, name, leaf.shape, spec)
        found[path] = leaf.shape, spec
    return found


def _spec(
    rule: Rule, params: Mapping[Any, tuple[Shape, PartitionSpec]], path: tuple[Any, ...], shape: Shape
) -> PartitionSpec:
    """The spec of a leaf of a state: that of the parameter whose path ends its own, behind further axes."""
    for start in range(len(path) + 1):
        own, spec = params.get(path[start:], (None, PartitionSpec()))
        before = 0 if own is None else len(shape) - len(own)
        if own is not None and before >= 0 and shape[before:] == own:
            return PartitionSpec(*[None] * before, *spec) if any(spec) else PartitionSpec()
    return rule("", shape)


def _check_divides(mesh: Mesh, path: str, shape: Shape, spec: PartitionSpec) -> None:
    if len(spec) > len(shape):
        raise ValueError(
            f"sharding: the rule gives {path!r} of shape {shape} the spec {spec}, which has more entries than the "
            "array has axes."
        )
    named: tuple[Any, ...] = ()
    for i, entry in enumerate(spec):
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        for name in names:
            check_axis(mesh, name)
        named += names
        count = math.prod(mesh.shape[name] for name in names)
        if shape[i] % count:
            listed = " and ".join(map(repr, names))
            raise ValueError(
                f"sharding: axis {i} of {path!r}, shape {shape}, has length {shape[i]}, and the mesh axis {listed} has "
                f"size {count}, which does not divide it. Give that parameter another spec, PartitionSpec() for "
                "everywhere, or use a mesh whose axis divides it."
            )
    _check_once(f"the spec {spec} of {path!r}", named)


def _check_once(what: str, names: Sequence[Any]) -> None:
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ValueError(
            f"sharding: {what} names the mesh axis {twice[0]!r} twice, and an axis of a mesh spreads one axis of an "
            "array. Name it once."
        )


@functools.lru_cache(maxsize=1024)
def _named(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """One object for equal placements, because arrays of unequal specs would compile a program again."""
    entries = [_over_several(mesh, entry) for entry in spec]
    while entries and entries[-1] is None:
        entries.pop()
    return NamedSharding(mesh, PartitionSpec(*entries))


def _over_several(mesh: Mesh, entry: Any) -> Any:
    """An entry of a spec without mesh axes of one device: XLA leaves them out too."""
    names = [name for name in (entry if isinstance(entry, tuple) else (entry,)) if name and mesh.shape[name] > 1]
    return None if not names else names[0] if len(names) == 1 else tuple(names)


@functools.lru_cache(maxsize=64)
def automatic_mesh(mesh: Any) -> Mesh:
    """Return the mesh of the same devices with automatic axes."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
