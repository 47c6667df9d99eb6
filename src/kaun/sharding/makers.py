"""The functions that make a ``Sharding`` or a mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from kaun._calls import public, shown
from kaun.sharding.core import Sharding, check_axis, check_sharding
from kaun.sharding.rules import ByMember, ByPath, Fsdp, everywhere

__all__ = ["by_path", "data_parallel", "fsdp", "members", "mesh"]

AxisNames = str | Sequence[str]


@public
def data_parallel(mesh: Mesh | None = None, *, rows: AxisNames | None = None) -> Sharding:
    """Make a sharding with the whole state on each device, and the rows of a batch spread over the devices.

    Each step sums the gradients of the devices, by one all-reduce.

    Args:
        mesh: The devices. Default: all devices, on one axis ``"data"``.
        rows: The mesh axes over which the rows lie. Default: all axes.

    Raises:
        TypeError, ValueError: As ``Sharding``.

    Examples:
        >>> from kaun import layers, sharding
        >>> where = sharding.data_parallel()
        >>> where.rows, where.of(layers.linear(2, 1).init()).params["weight"].spec
        (('data',), P())
    """
    whole = Sharding(_all_devices() if mesh is None else mesh)
    return Sharding(whole.mesh, whole.mesh.axis_names if rows is None else _names(rows))


@public
def fsdp(
    mesh: Mesh | None = None,
    *,
    axis: str | None = None,
    min_size: int = 65536,
    rows: AxisNames | None = None,
    gather: bool = False,
) -> Sharding:
    """Make a sharding with large parameters spread over devices, and with them the optimizer's arrays.

    A parameter is spread along its longest axis that the mesh axis divides. The device memory of the state shrinks with
    the number of devices; each step exchanges parameters or activations, whichever the compiler finds smaller.

    Args:
        mesh: The devices. Default: all devices, on one axis ``"data"``.
        axis: The mesh axis over which parameters lie. Default: the mesh's one axis.
        min_size: How many numbers a parameter has at least that is spread. Smaller ones are on each device.
        rows: The mesh axes over which the rows of a batch lie. Default: ``axis``. All axes of a mesh of two make
            replicas of shards.
        gather: Whether the loss always gathers whole parameters. By default the compiler chooses by size. It takes the
            memory of all gathered parameters at once, unless the layers are in ``layers.remat``.

    Raises:
        TypeError, ValueError: As ``Sharding``; also if ``axis`` is left out for a mesh of several axes.

    Examples:
        >>> from kaun import sharding
        >>> where = sharding.fsdp(min_size=1000)
        >>> where.rule("weight", (64, 32)), where.rule("bias", (32,))
        (P('data',), P())
    """
    whole = Sharding(_all_devices() if mesh is None else mesh)
    axis = _one_axis("fsdp", whole.mesh, axis)
    if isinstance(min_size, bool) or not isinstance(min_size, (int, np.integer)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"sharding.fsdp(min_size=...) expected a number of elements, an int, received {shown(min_size)}."
        )
    rule = Fsdp(axis, whole.mesh.shape[axis], min_size)
    return Sharding(whole.mesh, (axis,) if rows is None else _names(rows), rule, axis if gather else None)


@public
def by_path(
    specs: Mapping[str, PartitionSpec],
    mesh: Mesh,
    *,
    rows: AxisNames = ("data",),
    otherwise: Sharding | None = None,
) -> Sharding:
    """Make a sharding in which the parameters' paths decide: tensor parallelism, for example.

    Args:
        specs: Patterns of paths with their ``PartitionSpec``, such as ``{"*.q_proj.*": PartitionSpec(None, "model")}``.
            A ``*`` stands for any characters. The first pattern that matches a path counts. Of a spec that is longer
            than the parameter has axes the last entries count, so that a bias lies as the last axis of its weight.
        mesh: The devices, such as ``sharding.mesh(data=-1, model=4)``.
        rows: The mesh axes over which the rows of a batch lie. Default: ``"data"``.
        otherwise: A sharding on the same mesh, for the parameters that no pattern matches. Default: everywhere.

    Raises:
        TypeError, ValueError: As ``Sharding``; also if a spec is not a ``PartitionSpec``, or ``otherwise`` is on
            another mesh. When a state is placed: if a pattern matches no parameter, or an axis does not divide.

    Examples:
        >>> from jax.sharding import PartitionSpec as P
        >>> from kaun import sharding
        >>> where = sharding.by_path({"0.*": P(None, "model"), "1.weight": P("model")}, sharding.mesh(data=-1, model=1))
        >>> where.rule("0.weight", (8, 16)), where.rule("0.bias", (16,)), where.rule("1.bias", (2,))
        (P(None, 'model'), P('model',), P())
    """
    whole = Sharding(mesh)
    if not isinstance(specs, Mapping) or not specs:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"sharding.by_path expected a dict of patterns and specs, received {shown(specs)}. Write "
            'by_path({"*.weight": PartitionSpec(None, "model")}, mesh).'
        )
    for pattern, spec in specs.items():
        if not isinstance(spec, PartitionSpec):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"sharding.by_path expected a jax.sharding.PartitionSpec for {pattern!r}, received "
                f"{shown(spec)}. Write "
                'PartitionSpec(None, "model"), with a mesh axis or None for each axis of the parameter.'
            )
        for entry in spec:
            for name in entry if isinstance(entry, tuple) else () if entry is None else (entry,):
                check_axis(whole.mesh, name)
    check_sharding(otherwise, "sharding.by_path(otherwise=...)")
    if otherwise is not None and otherwise.mesh != whole.mesh:
        raise ValueError(
            f"sharding.by_path: otherwise is a sharding on another mesh, {otherwise.mesh}, than {whole.mesh}. Make it "
            'with the same one: otherwise=sharding.fsdp(mesh, axis="data").'
        )
    rest = everywhere if otherwise is None else otherwise.rule
    gather = None if otherwise is None else otherwise.gather
    return Sharding(whole.mesh, _names(rows), ByPath(tuple(specs.items()), rest), gather)


@public
def members(mesh: Mesh | None = None, *, axis: str | None = None) -> Sharding:
    """Make a sharding for a ``kaun.Ensemble``, with the members spread over the devices.

    Members do not exchange anything, so the devices do not either. The number of members must be a multiple of the
    number of devices on the axis.

    Args:
        mesh: The devices. Default: all devices, on one axis ``"data"``.
        axis: The mesh axis over which the members lie. Default: the mesh's one axis.

    Raises:
        TypeError, ValueError: As ``fsdp``.

    Examples:
        >>> import jax, optax, kaun
        >>> from kaun import layers, sharding
        >>> trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
        >>> many = kaun.Ensemble(trainer, 4 * jax.device_count(), sharding=sharding.members())
        >>> many.init().vars.params["weight"].shape[1:]
        (2, 1)
    """
    whole = Sharding(_all_devices() if mesh is None else mesh)
    return Sharding(whole.mesh, (), ByMember(_one_axis("members", whole.mesh, axis)))


def _one_axis(maker: str, mesh: Mesh, axis: str | None) -> str:
    """The axis that was given, or the mesh's one axis."""
    if axis is None:
        if len(mesh.axis_names) > 1:
            names = ", ".join(map(repr, mesh.axis_names))
            what = "the members" if maker == "members" else "the parameters"
            raise ValueError(
                f"sharding.{maker}: the mesh has the axes {names}, and which of them {what} are spread over was not "
                f"given. Write {maker}(mesh, axis={mesh.axis_names[-1]!r})."
            )
        axis = str(*mesh.axis_names)
    check_axis(mesh, axis)
    return axis


@public
def mesh(**axes: int) -> Mesh:
    """Make a mesh of all devices with named axes, such as ``mesh(data=-1, model=4)``.

    Args:
        **axes: The size of each axis by name; -1, for one of them, takes what is left.

    Raises:
        ValueError: If the sizes do not make up the number of devices.

    Examples:
        >>> import jax
        >>> from kaun import sharding
        >>> dict(sharding.mesh(data=-1, model=1).shape) == {"data": jax.device_count(), "model": 1}
        True
    """
    count, sizes = jax.device_count(), list(axes.values())
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size != 0 for size in sizes)  # pyright: ignore[reportUnnecessaryIsInstance]
    known = math.prod(size for size in sizes if size > 0) if whole else 0
    open_axes = sum(size < 0 for size in sizes) if whole else 0
    fits = known > 0 and open_axes <= 1 and (count % known == 0 if open_axes else count == known)
    if not axes or not fits or any(size < -1 for size in sizes):
        given = ", ".join(f"{name}={size!r}" for name, size in axes.items())
        raise ValueError(
            f"sharding.mesh({given}) expected sizes that multiply to the number of devices, {count}, or one -1 that "
            f"takes what the others leave. Write sharding.mesh(data=-1), or take some devices only: "
            'jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]).'
        )
    shape = tuple([size if size > 0 else count // known for size in sizes])
    return jax.make_mesh(shape, tuple(axes), axis_types=(AxisType.Auto,) * len(shape))


def _all_devices() -> Mesh:
    return mesh(data=-1)


def _names(rows: AxisNames) -> tuple[str, ...]:
    return (rows,) if isinstance(rows, str) else tuple(rows)
