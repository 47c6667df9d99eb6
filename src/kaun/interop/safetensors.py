"""Weights in the safetensors format of the Hugging Face hub: read, put into a model, and written back."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun._calls import explained
from kaun._messages import plain, quoted
from kaun._paths import local_path
from kaun.checkpoint import write_safetensors
from kaun.interop.mapping import COMPARED, LONGEST, mapped, unmapped, unmatched
from kaun.interop.reading import file_of, read_file, shard, shards
from kaun.interop.rules import Array, Rule, copy, drop, rename, split, stack, transpose
from kaun.layers.core import Vars

__all__ = ["Rule", "copy", "drop", "into", "load", "rename", "save", "split", "stack", "transpose"]

_LISTED = 20  # lines of each kind in an error


@explained("interop.safetensors.load")
def load(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read the arrays of a safetensors file, or of a folder of the Hugging Face hub.

    The header is checked against the file before anything is read: dtypes, shapes, sizes, and that the arrays fill the
    file without a gap. Each array is in memory once. Pickles (``.bin``, ``.pt``) are never read.

    Args:
        path: A file; or a folder with ``model.safetensors``, or with ``model.safetensors.index.json`` and the files
            that it names; or such an index. A folder without these two may have one such file or index of another name,
            such as ``adapter_model.safetensors``. An index gives names of files in its folder, never paths. Links in
            the folder are followed wherever they lead: the hub's cache consists of links.

    Returns:
        NumPy arrays by name, with the shapes and dtypes in the file (bfloat16 and float8 are JAX's dtypes).

    Raises:
        ValueError: If a file is damaged or not a safetensors file, has a dtype that JAX does not have, or an index and
            its files do not agree, or a header or an index has more than 32 MB or 250,000 arrays.
        FileNotFoundError: If there is no such file, or the folder has no weights (the message lists its files).
        TypeError: If ``path`` is not a path.

    Examples:
        >>> import tempfile, numpy as np
        >>> from kaun import checkpoint
        >>> from kaun.interop import safetensors
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(f"{folder}/model.safetensors", {"fc": {"weight": np.ones((2, 3), np.float32)}})
        ...     weights = safetensors.load(folder)
        >>> {name: array.shape for name, array in weights.items()}
        {'fc.weight': (2, 3)}
    """
    if not isinstance(path, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"safetensors.load(path) expected a path, received {type(path).__name__}.")
    place = Path(path)
    file = file_of(place) if place.is_dir() else place
    if not file.name.endswith(".index.json"):
        return read_file(file)
    weights: dict[str, Array] = {}
    for name, expected in shards(file).items():
        part = read_file(shard(file, name))
        if part.keys() != expected:
            wrong = sorted(part.keys() ^ expected)
            raise ValueError(
                f"safetensors.load: {str(file)!r} and {quoted(name)} do not agree on {len(wrong)} names, "
                f"[{', '.join(map(quoted, wrong[:3]))}]. They belong to two models, or one is incomplete. Download "
                "both again."
            )
        weights |= part
    return weights


@explained("interop.safetensors.into")
def into(
    vars: Vars, weights: Mapping[str, Any], mapping: Sequence[Rule] = (), *, strict: bool = True, cast: bool = False
) -> Vars:
    """Return the variables with their values replaced by the weights.

    Typed PRNG keys in ``vars`` keep their values, because no weights file has any.

    Args:
        vars: Variables of the model: ``model.init()``, or a ``Vars`` with leaves ``jax.ShapeDtypeStruct``. Only their
            structure, shapes and dtypes are used, except for the values that ``strict=False`` keeps.
        weights: Arrays by name, as ``load`` returns them.
        mapping: Rules, applied in order, each to the result of those before it. Afterwards a name must be the path of a
            leaf in ``vars.params`` or ``vars.state``, such as ``0.weight``. Default: no rules.
        strict: Whether each leaf must get a weight, each weight must be used, and each ``transpose`` must match a
            weight. With False, leaves without a weight keep their values and weights without a leaf are ignored; a
            weight with another shape or dtype is still an error, and so is a mapping after which no weight fits.
            Default: True.
        cast: Whether floating weights are cast to the floating dtype of the leaf; other kinds of dtypes are never cast.
            Default: False.

    Returns:
        A ``Vars`` with JAX arrays, on the device of the array that each replaces if that was committed to one. NumPy
        leaves are replaced by NumPy arrays.

    Raises:
        ValueError: If weights and leaves do not fit each other (a table lists all of them), two weights get the same
            name, a rule cannot be applied, or a cast would overflow.
        TypeError: If ``vars`` is not a ``Vars``, or ``mapping`` has an element that is not a rule.

    Examples:
        >>> import jax.numpy as jnp, numpy as np
        >>> from kaun import layers
        >>> from kaun.interop import safetensors
        >>> weights = {"fc.weight": np.ones((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)}
        >>> mapping = [safetensors.rename("fc.{x}", "{x}"), safetensors.transpose("weight")]
        >>> trained = safetensors.into(layers.linear(3, 2).init(dtype=jnp.float32), weights, mapping)
        >>> trained.params["weight"].shape
        (3, 2)
    """
    leaves = _leaves("into", vars)
    named, origins, unused = mapped(weights, mapping)
    wrong = _misfits(leaves, named, origins, strict=strict, cast=cast)
    if wrong:
        # The table shows that a name is wrong, but not which rule is misspelled.
        rules = "".join(f"\n  {mapping[i]}" for i in unused)
        raise ValueError(wrong + (f"\nRules that matched nothing:{rules}" if rules else ""))
    for index in unused:
        if strict and mapping[index].needed:
            raise ValueError(unmatched(index, weights, mapping))

    def put(name: str, leaf: Any) -> Any:
        return _replacement(name, named[name], leaf) if name in named else leaf

    return vars.replace(params=tree.map_with_path(put, vars.params), state=tree.map_with_path(put, vars.state))


@explained("interop.safetensors.save")
def save(
    path: str | os.PathLike[str], vars: Vars, mapping: Sequence[Rule] = (), *, like: Mapping[str, Any] | None = None
) -> None:
    """Write variables as a safetensors file with the names and the layout of the hub: the inverse of ``into``.

    Each rule is undone, the last one first: renamed weights get their old names, transposed ones their old axes, the
    parts of a ``split`` are concatenated, a ``stack`` becomes single layers, and the two arrays of a ``copy``, which
    must be equal, become one. What ``into`` makes of the file with the same mapping are these variables again, bit for
    bit; ``transformers`` reads the file. Typed PRNG keys in ``vars`` are not written.

    A rule does not say which names it was applied to. Without ``like`` each name that a template fits counts as made
    by that rule: the inverse of ``rename("{*x}.gamma", "{*x}.weight")`` calls every weight gamma. Pass ``like`` where a
    template also fits names that its rule did not make, and where a mapping drops weights.

    Args:
        path: The file. Its folder must exist. An existing file is replaced atomically, as by ``checkpoint.save``.
        vars: The variables of the model, such as a trainer's ``state.vars``.
        mapping: The rules with which ``into`` reads the file.
        like: Weights of the hub by name, as ``load`` returns them. The file gets their names, and the weights among
            them that the mapping drops. With ``{}`` dropped weights are left out. Default: none, and a mapping that
            drops weights is an error.

    Raises:
        ValueError: If the mapping cannot be undone, or the arrays of a ``copy`` differ.
        TypeError: If ``vars`` is not a ``Vars`` of arrays, or the file cannot hold the dtype of one.
        OSError: If the file cannot be written (FileNotFoundError if its folder does not exist).

    Examples:
        >>> import tempfile, jax.numpy as jnp
        >>> from kaun import layers
        >>> from kaun.interop import safetensors
        >>> variables = layers.linear(3, 2).init(dtype=jnp.float32)
        >>> mapping = [safetensors.rename("fc.{x}", "{x}"), safetensors.transpose("weight")]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     safetensors.save(f"{folder}/model.safetensors", variables, mapping)
        ...     weights = safetensors.load(folder)
        >>> {name: array.shape for name, array in weights.items()}
        {'fc.bias': (2,), 'fc.weight': (2, 3)}
    """
    if not isinstance(path, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"safetensors.save(path, vars, mapping) expected a path first, received {type(path).__name__}.")
    leaves = _leaves("save", vars)
    for name, leaf in leaves.items():
        if not tree.is_array(leaf):
            raise TypeError(
                f"safetensors.save: leaf {name!r} of vars is a {type(leaf).__name__}, which has no values. Pass a "
                "trainer's state.vars, or what safetensors.into returns."
            )
    written = unmapped({name: np.asarray(leaf) for name, leaf in leaves.items()}, mapping, like)
    # transformers 4 refuses a file without this entry.
    write_safetensors("safetensors.save", local_path("safetensors.save", path), written, ("format", "pt"))


def _leaves(where: str, vars: Any) -> dict[str, Any]:
    if not isinstance(vars, Vars):
        place = "first" if where == "into" else "second"
        raise TypeError(
            f"safetensors.{where} expected kaun.Vars {place}, received {type(vars).__name__}. Pass what "
            "model.init(...) returns, or a trainer's state.vars."
        )
    params, state = tree.flatten(vars.params)[0], tree.flatten(vars.state)[0]
    both = [name for name in params if name in state]
    if both:
        raise ValueError(f"safetensors.{where}: {both[0]!r} is a leaf of params and of state. Rename one of the two.")
    leaves = {**params, **state}
    for name, leaf in leaves.items():
        if not (tree.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)):
            raise TypeError(
                f"safetensors.{where}: leaf {name!r} of vars is a {type(leaf).__name__}, not an array. Write "
                "jnp.asarray(leaf)."
            )
    return {name: leaf for name, leaf in leaves.items() if not tree.is_key(leaf)}


def _misfits(
    leaves: dict[str, Any], named: dict[str, Array], origins: dict[str, str], *, strict: bool, cast: bool
) -> str:
    """A table of all weights and leaves that do not fit each other; empty if all fit."""
    missing = [name for name in leaves if name not in named]
    unexpected = [name for name in named if name not in leaves]
    both = [name for name in leaves if name in named]
    shapes = [name for name in both if leaves[name].shape != named[name].shape]
    dtypes = [name for name in both if name not in shapes and not _may_become(named[name], leaves[name], cast)]
    if strict or not both:
        failing = missing + unexpected
    else:
        # A ShapeDtypeStruct has no value that could be kept.
        missing = [name for name in missing if isinstance(leaves[name], jax.ShapeDtypeStruct)]
        failing, unexpected = missing, []
    if not failing and not shapes and not dtypes:
        return ""
    describe = tree.describe
    groups = [
        [("missing", n, describe(leaves[n]), "", _near(n, leaves, named, unexpected)) for n in missing[:_LISTED]],
        [("unexpected", n, "", describe(named[n]), _old_name(n, origins)) for n in unexpected[:_LISTED]],
        [("wrong shape", n, describe(leaves[n]), describe(named[n]), _turned(n, leaves, named)) for n in shapes],
        [("wrong dtype", n, describe(leaves[n]), describe(named[n]), _old_name(n, origins)) for n in dtypes],
    ]
    counts = [len(missing), len(unexpected), len(shapes), len(dtypes)]
    lines = _table([("", "name", "expected", "found", ""), *(row for rows in groups for row in rows[:_LISTED])])
    words = ("missing", "unexpected", "of a wrong shape", "of a wrong dtype")
    total = ", ".join(f"{count} {word}" for count, word in zip(counts, words, strict=True) if count)
    more = f"\n  (the first {_LISTED} of each kind)" if max(counts) > _LISTED else ""
    return (
        f"safetensors.into: the weights do not fit the variables, nothing was loaded; {total}:\n{lines}{more}"
        f"{_fixes(failing, shapes, dtypes, strict)}"
    )


def _fixes(failing: list[str], shapes: list[str], dtypes: list[str], strict: bool) -> str:
    fix = ""
    if failing:
        fix += "\nFor names: rename(pattern, template), split(pattern, into, axis), or drop(pattern) in the mapping"
        fix += "; or strict=False, to load what fits." if strict else "."
    if shapes:
        fix += "\nFor shapes: transpose(pattern) in the mapping, or a model with the sizes of the weights."
    if dtypes:
        fix += "\nTo convert between floating dtypes: into(..., cast=True), or model.init(dtype=...) with the dtype of "
        fix += "the weights."
    return fix


def _may_become(weight: Array, leaf: Any, cast: bool) -> bool:
    floats = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (weight.dtype, leaf.dtype))
    return weight.dtype.newbyteorder("=") == leaf.dtype or (cast and floats)


def _near(name: str, leaves: dict[str, Any], named: dict[str, Array], unexpected: list[str]) -> str:
    shape = sorted(leaves[name].shape)
    fitting = (other for other in unexpected if len(other) <= LONGEST and sorted(named[other].shape) == shape)
    near = difflib.get_close_matches(name, itertools.islice(fitting, COMPARED), n=2, cutoff=0.4)
    return f"near: {', '.join(near)}" if near else ""


def _old_name(name: str, origins: dict[str, str]) -> str:
    return f"from: {origins[name]}" if origins[name] != name else ""


def _turned(name: str, leaves: dict[str, Any], named: dict[str, Array]) -> str:
    return f"transpose({name!r})?" if leaves[name].shape == named[name].shape[::-1] else ""


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    rows = [tuple(map(plain, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    spaced = ("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in spaced)


def _replacement(name: str, weight: Array, leaf: Any) -> Any:
    """A copy of the weight as the kind of array that the leaf is; later writes to the weight do not change it."""
    if not isinstance(leaf, (np.ndarray, np.generic)) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        raise ValueError(
            f"safetensors.into: leaf {name!r} is {tree.describe(leaf)}, which JAX cannot make while x64 is off. Set "
            'jax.config.update("jax_enable_x64", True), or make the model with dtype=jnp.float32.'
        )
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.array(weight, dtype=leaf.dtype, order="C")
    lost = 0
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        lost = int(np.count_nonzero(np.isfinite(weight) & ~np.isfinite(value)))
    if lost:
        raise ValueError(
            f"safetensors.into: {lost} of the {weight.size} values of {quoted(name)} overflow in "
            f"{np.dtype(leaf.dtype).name}. Make the model with init(dtype=jnp.{weight.dtype.name}), or scale them "
            "first."
        )
    if isinstance(leaf, np.generic):
        return value[()]
    if isinstance(leaf, np.ndarray):
        return value
    chosen = isinstance(leaf, jax.ShapeDtypeStruct) or leaf.committed
    return jax.device_put(value, leaf.sharding if chosen else None)
