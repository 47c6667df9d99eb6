"""Weights in the hub's safetensors format: reading them, and putting them into a model under kaun's names."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from kaun import tree
from kaun.checkpoint import read_safetensors
from kaun.interop.rules import Array, Rule, drop, mapped, rename, split, transpose, unmatched
from kaun.layers.core import Vars

__all__ = ["Rule", "drop", "into", "load", "rename", "split", "transpose"]

_INDEX = "model.safetensors.index.json"
_LISTED = 20  # lines of each kind in an error


def load(path: str | os.PathLike[str]) -> dict[str, Array]:
    """The arrays of a safetensors file, or of a hub folder of them, by name.

    Arguments:
        path: a file; or a folder with ``model.safetensors``, or with ``model.safetensors.index.json`` and the files
            that it names (which may not lie outside of the folder); or such an index.

    Each array is NumPy's, of the shape and dtype in the file (bfloat16 and float8 too, with JAX's dtypes), and in
    memory once. What the header says is checked against the file before anything is read: dtypes, shapes, sizes, and
    that the arrays fill the file without a gap. Pickles (``.bin``, ``.pt``) are never read.

    Raises:
        ValueError: when a file is damaged or not a safetensors file, has a dtype that JAX has not, or an index and its
            files do not agree.
        FileNotFoundError: when there is no such file, or no weights in the folder (the message lists what is there).
        TypeError: when ``path`` is no path.

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
    file = _inside(place) if place.is_dir() else place
    if not file.name.endswith(".index.json"):
        return _read(file)
    weights: dict[str, Array] = {}
    for name, expected in _shards(file).items():
        part = _read(file.parent / name)
        if part.keys() != expected:
            wrong = sorted(part.keys() ^ expected)
            raise ValueError(
                f"safetensors.load: {str(file)!r} and {name!r} do not agree on {len(wrong)} names, {wrong[:3]}. They "
                "are of two models, or one is cut short. Get both anew."
            )
        weights |= part
    return weights


def into(
    vars: Vars, weights: Mapping[str, Any], mapping: Sequence[Rule] = (), *, strict: bool = True, cast: bool = False
) -> Vars:
    """The variables with the weights in the place of their own values.

    Arguments:
        vars: variables of the model: ``model.init()``, or a tree of ``jax.ShapeDtypeStruct`` in a ``Vars``. Only their
            structure, shapes and dtypes count, except for what ``strict=False`` keeps.
        weights: arrays by name, as ``load`` returns them.
        mapping: rules, applied to all weights in their order, each to what those before it made. In the end a name is
            the path of a leaf in ``vars.params`` or in ``vars.state``: ``0.weight``.
        strict: whether each leaf must get a weight, each weight must be used, and each ``transpose`` must match
            something, default True. With False the leaves without a weight keep their values, and weights without a
            leaf are left out; a weight of another shape or dtype is an error all the same, and so is it when no weight
            fits at all.
        cast: whether floating weights may be given the leaf's floating dtype, default False. Never another kind.

    Typed PRNG keys in ``vars`` keep their values: no weights file holds any.

    Returns:
        ``Vars`` with JAX arrays, on the devices of those they replace where these were chosen; where a leaf is
        NumPy's, with NumPy's.

    Raises:
        ValueError: when weights and leaves do not fit each other (a table lists them all), two weights get one name, a
            rule cannot be applied, or a cast would overflow.
        TypeError: when ``vars`` is no ``Vars``, or ``mapping`` holds anything but rules.

    >>> import jax.numpy as jnp, numpy as np
    >>> from kaun import layers
    >>> from kaun.interop import safetensors
    >>> weights = {"fc.weight": np.ones((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)}
    >>> mapping = [safetensors.rename("fc.{x}", "{x}"), safetensors.transpose("weight")]
    >>> trained = safetensors.into(layers.linear(3, 2).init(dtype=jnp.float32), weights, mapping)
    >>> trained.params["weight"].shape
    (3, 2)
    """
    if not isinstance(vars, Vars):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"safetensors.into expected kaun.Vars first, received {type(vars).__name__}. Pass what model.init(...) "
            "returns, or a trainer's state.vars."
        )
    leaves = _leaves(vars)
    named, origins, idle = mapped(weights, mapping)
    wrong = _misfits(leaves, named, origins, strict=strict, cast=cast)
    if wrong:
        # A misspelled rule shows in the names; which one it is, only here.
        rules = "".join(f"\n  {mapping[i]}" for i in idle)
        raise ValueError(wrong + (f"\nRules that matched nothing:{rules}" if rules else ""))
    for place in idle:
        if strict and mapping[place].needed:
            raise ValueError(unmatched(place, weights, mapping))

    def put(name: str, leaf: Any) -> Any:
        return _made(name, named[name], leaf) if name in named else leaf

    return vars.replace(params=tree.map_with_path(put, vars.params), state=tree.map_with_path(put, vars.state))


def _inside(folder: Path) -> Path:
    """The file or the index of a hub folder."""
    both = [folder / _INDEX, folder / "model.safetensors"]
    present = [file for file in both if file.is_file()]
    if len(present) == 1:
        return present[0]
    if present:
        raise ValueError(
            f"safetensors.load: {str(folder)!r} has {both[1].name!r} and {_INDEX!r}. Say which one, "
            f"load({str(both[1])!r})."
        )
    names = sorted(file.name for file in folder.iterdir())
    raise FileNotFoundError(
        f"safetensors.load: {str(folder)!r} has neither {both[1].name!r} nor {_INDEX!r}, only {names[:_LISTED]}. Name "
        "the file itself, load('folder/name.safetensors')."
    )


def _shards(index: Path) -> dict[str, set[str]]:
    """The files of an index, and the names of the arrays that each must have."""
    files: dict[str, set[str]] = {}
    for name, file in _object(index, _object(index, index.read_bytes()).get("weight_map"), "'weight_map'").items():
        # The name comes out of a file that someone sent: as a path it could lead anywhere.
        if not isinstance(file, str) or file in ("", ".", "..") or any(mark in file for mark in "/\\:\0"):
            raise ValueError(
                f"safetensors.load: {str(index)!r} has {name!r} in {file!r}, which is not the plain name of a file "
                "beside it. Put the file there, and its name into the index."
            )
        files.setdefault(file, set()).add(name)
    return files


def _read(file: Path) -> dict[str, Array]:
    with file.open("rb") as opened:
        if opened.peek(4).startswith((b"PK\3\4", b"\x80")):
            _refuse_pickle(file, opened.peek(8)[:8])
        try:
            return read_safetensors(opened)
        except ValueError as err:
            raise _damaged(file, str(err)) from err


def _refuse_pickle(file: Path, first: bytes) -> None:
    # A header of a safetensors file may begin with the same bytes, which are its length.
    if int.from_bytes(first, "little") > file.stat().st_size:
        raise ValueError(
            f"safetensors.load: {str(file)!r} is not a safetensors file but seems to be a pickle, as torch.save writes "
            "it. Reading one can run any code, so kaun never does. Convert it with torch, where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
        )


def _object(file: Path, value: Any, what: str = "its text") -> dict[str, Any]:
    """An object of JSON, read from bytes or found inside of another."""
    if isinstance(value, bytes):
        try:
            value = json.loads(value.decode(), object_pairs_hook=_once)
        except (ValueError, RecursionError) as err:
            raise _damaged(file, f"{what} is not JSON, {err}") from err
    if not isinstance(value, dict):
        raise _damaged(file, f"{what} is no JSON object but {type(value).__name__}")
    return cast("dict[str, Any]", value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands in it twice")
    return made


def _damaged(file: Path, what: str) -> ValueError:
    kind = "index" if file.name.endswith(".json") else "file"
    return ValueError(f"safetensors.load: {str(file)!r} is damaged or not a safetensors {kind}: {what}.")


def _leaves(vars: Vars) -> dict[str, Any]:
    params, state = tree.flatten(vars.params)[0], tree.flatten(vars.state)[0]
    both = [name for name in params if name in state]
    if both:
        raise ValueError(f"safetensors.into: {both[0]!r} is a leaf of params and of state. Rename one of the two.")
    leaves = {**params, **state}
    for name, leaf in leaves.items():
        if not (tree.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)):
            raise TypeError(
                f"safetensors.into: leaf {name!r} of vars is a {type(leaf).__name__}; weights replace arrays. Make an "
                "array of it."
            )
    return {name: leaf for name, leaf in leaves.items() if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)}


def _misfits(
    leaves: dict[str, Any], named: dict[str, Array], origins: dict[str, str], *, strict: bool, cast: bool
) -> str:
    """The table of all that does not fit, empty when everything does."""
    missing = [name for name in leaves if name not in named]
    unexpected = [name for name in named if name not in leaves]
    both = [name for name in leaves if name in named]
    shapes = [name for name in both if leaves[name].shape != named[name].shape]
    dtypes = [name for name in both if name not in shapes and not _may_become(named[name], leaves[name], cast)]
    if strict or not both:
        failing = missing + unexpected
    else:
        # What has no value of its own cannot keep it.
        missing = [name for name in missing if isinstance(leaves[name], jax.ShapeDtypeStruct)]
        failing, unexpected = missing, []
    if not failing and not shapes and not dtypes:
        return ""
    describe = tree.describe
    groups = [
        [("missing", n, describe(leaves[n]), "", _near(n, leaves, named, unexpected)) for n in missing[:_LISTED]],
        [("unexpected", n, "", describe(named[n]), _came(n, origins)) for n in unexpected[:_LISTED]],
        [("wrong shape", n, describe(leaves[n]), describe(named[n]), _turned(n, leaves, named)) for n in shapes],
        [("wrong dtype", n, describe(leaves[n]), describe(named[n]), _came(n, origins)) for n in dtypes],
    ]
    counts = [len(missing), len(unexpected), len(shapes), len(dtypes)]
    lines = _table([("", "name", "expected", "found", ""), *(row for rows in groups for row in rows[:_LISTED])])
    words = ("missing", "unexpected", "of a wrong shape", "of a wrong dtype")
    total = ", ".join(f"{count} {word}" for count, word in zip(counts, words, strict=True) if count)
    more = f"\n  (of each kind the first {_LISTED})" if max(counts) > _LISTED else ""
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
        fix += "\nFor shapes: transpose(pattern) in the mapping, or a model of the sizes that the weights have."
    if dtypes:
        fix += "\nTo convert between floating dtypes: into(..., cast=True); or model.init(dtype=...) with the weights'."
    return fix


def _may_become(weight: Array, leaf: Any, cast: bool) -> bool:
    floats = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (weight.dtype, leaf.dtype))
    return weight.dtype.newbyteorder("=") == leaf.dtype or (cast and floats)


def _near(name: str, leaves: dict[str, Any], named: dict[str, Array], unexpected: list[str]) -> str:
    fitting = [other for other in unexpected if sorted(named[other].shape) == sorted(leaves[name].shape)]
    near = difflib.get_close_matches(name, fitting, n=2, cutoff=0.4)
    return f"near: {', '.join(near)}" if near else ""


def _came(name: str, origins: dict[str, str]) -> str:
    return f"from: {origins[name]}" if origins[name] != name else ""


def _turned(name: str, leaves: dict[str, Any], named: dict[str, Array]) -> str:
    return f"transpose({name!r})?" if leaves[name].shape == named[name].shape[::-1] else ""


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    spaced = ("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in spaced)


def _made(name: str, weight: Array, leaf: Any) -> Any:
    """A copy of the weight as the kind of array that the leaf is; what is written to the weight later stays out."""
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
            f"safetensors.into: {lost} of the {weight.size} values of {name!r} do not fit {np.dtype(leaf.dtype).name}. "
            f"Make the model with init(dtype=jnp.{weight.dtype.name}), or scale them first."
        )
    if isinstance(leaf, np.generic):
        return value[()]
    if isinstance(leaf, np.ndarray):
        return value
    chosen = isinstance(leaf, jax.ShapeDtypeStruct) or leaf.committed
    return jax.device_put(value, leaf.sharding if chosen else None)
