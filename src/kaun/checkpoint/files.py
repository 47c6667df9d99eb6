"""A pytree as one safetensors file with readable keys, and back, exactly."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from kaun._jax import is_traced
from kaun._messages import plain, quoted
from kaun._paths import local_path
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.safetensors_header import (
    DTYPES,
    Place,
    Take,
    UnreadDtype,
    header,
    in_order,
    read_array,
    read_places,
    skip_array,
    taker,
)
from kaun.tree import describe, difference, flatten, is_array, is_key, is_weak

__all__ = [
    "Differences", "check_template", "decode", "encode", "load", "read_arrays", "restore", "save", "serialize",
    "write_safetensors",
]  # fmt: skip

T = TypeVar("T")

_SCALARS = (bool, int, float)
_STORED = {"bool": np.dtype(np.bool_), "int": np.dtype(np.int64), "float": np.dtype(np.float64)}
_LISTED = 20


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Write a pytree as one safetensors file, whose keys are the readable paths of the leaves: ``0.weight``.

    Leaves may be JAX and NumPy arrays (bool, integers of 8 to 64 bits, float16, float32, float64, bfloat16,
    float8_e4m3fn, float8_e5m2, float8_e8m0fnu, complex64), typed PRNG keys, and Python's bool, int and float. The
    containers, weak types, and whether an array is JAX's or NumPy's are not in the file; ``load`` takes them from its
    template. The file has no checksums: ``load`` detects a truncated file and a damaged header, but not flipped bits in
    the values. (The checkpoints of a ``Directory`` have checksums.)

    Args:
        path: The file. Its folder must exist. An existing file is replaced atomically: a reader, or a crash, finds the
            old file or the new one, never a part.
        tree: Any pytree: ``Vars``, a ``TrainState``, optimizer states, dicts. None is structure and takes no space.

    Raises:
        TypeError: If such a file cannot hold a leaf, or the dtype of a leaf.
        ValueError: If two leaves have the same readable path, or an int does not fit in 64 bits.
        OSError: If the file cannot be written (FileNotFoundError if its folder does not exist).

    Examples:
        >>> import tempfile, jax.numpy as jnp
        >>> from kaun import checkpoint
        >>> params = [{"weight": jnp.ones((2, 3))}, {"weight": jnp.ones((3, 1))}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(f"{folder}/model.safetensors", params)
        ...     loaded = checkpoint.load(f"{folder}/model.safetensors", like=params)
        >>> loaded[1]["weight"].shape
        (3, 1)
    """
    write_safetensors("checkpoint.save", _as_path(path, "save(path, tree)"), flatten(tree)[0])


def write_safetensors(where: str, target: Path, leaves: Mapping[str, Any], note: tuple[str, str] | None = None) -> None:
    """Write leaves as a file, or replace one atomically.

    Args:
        where: The function that was called, for messages.
        target: The file.
        leaves: The leaves by name.
        note: The entry of metadata. Default: kaun's, which says which leaves are not arrays.
    """
    pieces = serialize(leaves, where, note)
    disk = Disk()
    with _replacing(where, target, disk) as file:
        for piece in pieces:
            disk.write(file, piece)


def load(path: str | os.PathLike[str], like: T, *, cast: bool = False) -> T:
    """Return the tree of a safetensors file in the structure of a template, every leaf exactly as it was saved.

    The file is read into memory and not kept open. This takes about as much memory as the file has bytes, and for a
    moment twice that of a leaf that is cast.

    Args:
        path: A file that ``save`` or another program wrote.
        like: The template: a tree of the structure, shapes and dtypes to load, for example a new ``trainer.init()``.
            Its values do not matter. For a JAX array or a ``jax.ShapeDtypeStruct`` in it a JAX array is returned (with
            the leaf's weak type, and on its devices if these were chosen), for a NumPy array a NumPy array, and for a
            Python scalar a Python scalar.
        cast: Whether floating arrays may be converted to the precision of the template, as NumPy's ``astype`` does it.
            The kind never changes: no float becomes an integer, and no integer becomes a float or another integer.
            Default False: dtypes must be equal.

    Returns:
        The tree.

    Raises:
        ValueError: If a leaf is missing, unexpected, or of another shape or dtype (one message lists them all, and
            nothing is loaded), when a cast would overflow, or if the file is damaged or not a safetensors file.
        TypeError: If ``like`` has a leaf that is neither an array nor a Python scalar.
        OSError: If the file cannot be read.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp
        >>> from kaun import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(f"{folder}/w.safetensors", {"w": jnp.ones(2)})
        ...     half = {"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}
        ...     checkpoint.load(f"{folder}/w.safetensors", like=half, cast=True)
        {'w': Array([1, 1], dtype=bfloat16)}
    """
    file = _as_path(path, "load(path, like=tree)")
    wanted, structure = flatten(like)
    check_template(wanted)
    with file.open("rb") as opened:
        try:
            arrays, differences = read_arrays(*taker(opened), wanted, cast=cast)
            found = {place.name: decode(place, array) for place, array in arrays}
            del arrays  # so that a leaf is freed below, once it was converted
        except UnreadDtype as err:
            raise ValueError(f"checkpoint.load: {str(file)!r} cannot be read: {err}.") from err
        except ValueError as err:
            raise ValueError(f"checkpoint.load: {str(file)!r} is damaged or not a safetensors file: {err}.") from err
    if differences.lines:
        cast_it = "\nTo convert between floating dtypes: checkpoint.load(path, like=..., cast=True)."
        raise ValueError(
            f"checkpoint.load: {str(file)!r} does not match `like`, nothing was loaded:{differences.listing()}\n"
            "Make `like` in the same way as the saved tree (same model, same optimizer), or save and load the same "
            "part of it." + (cast_it if differences.castable else "")
        )
    return jax.tree.unflatten(structure, [restore(name, found.pop(name), leaf) for name, leaf in wanted.items()])


def _as_path(path: Any, call: str) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"checkpoint.{call} expected a path first, received {type(path).__name__}.")
    return local_path(f"checkpoint.{call}", path)


def check_template(wanted: Mapping[str, Any]) -> None:
    """Raise TypeError for a leaf of a template that no file can fill."""
    for name, leaf in wanted.items():
        if not (is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) or type(leaf) in _SCALARS):
            raise TypeError(
                f"checkpoint.load: {_leaf(name)} of `like` is a {type(leaf).__name__}; a leaf is an array, a "
                "jax.ShapeDtypeStruct, a bool, an int or a float. Remove it from `like`."
            )


def encode(name: str, leaf: Any, where: str = "checkpoint.save") -> tuple[np.ndarray[Any, Any], str | None]:
    """A leaf as the array that the file holds, and the kind of leaf if it is not an array."""
    kind = type(leaf).__name__
    if type(leaf) in _SCALARS:
        if kind == "int" and not -(2**63) <= leaf < 2**63:
            raise ValueError(
                f"{where}: {_leaf(name)} is the int {leaf}, which does not fit in 64 bits. Save it in parts, "
                "divmod(n, 2**62)."
            )
        return np.asarray(leaf, _STORED[kind]), kind
    if not is_array(leaf) or isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(
            f"{where}: {_leaf(name)} is a {kind}; a file holds JAX and NumPy arrays, typed keys, bool, int and "
            "float. Remove it from the tree, or convert it to arrays."
        )
    try:
        if is_key(leaf):
            return np.asarray(jax.random.key_data(leaf)), f"key {jax.random.key_impl(leaf)}"
        # In C order, as the format requires. (np.ascontiguousarray would give a scalar an axis.)
        array = np.asarray(leaf, order="C")
    except Exception as err:
        err.add_note(f"{where} was reading {_leaf(name)}.")
        raise
    if array.dtype.newbyteorder("=") not in DTYPES.values():
        raise TypeError(
            f"{where}: {_leaf(name)} is {describe(leaf)}, a dtype that a safetensors file cannot hold. Convert "
            f"it to one of {', '.join(str(dtype) for dtype in DTYPES.values())}: leaf.astype(...)."
        )
    return (array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))), None


def serialize(
    leaves: Mapping[str, Any], where: str = "checkpoint.save", note: tuple[str, str] | None = None
) -> list[memoryview]:
    """The bytes of a safetensors file of these leaves, in pieces: the header, then each array.

    The pieces are views of the arrays' own memory where that is on the host, so they must be used before it changes.
    """
    if "__metadata__" in leaves:
        raise ValueError(f"{where}: '__metadata__' is a reserved key of safetensors files. Rename that leaf.")
    for leaf in leaves.values():
        if isinstance(leaf, jax.Array) and not (is_traced(leaf) or is_key(leaf) or leaf.is_deleted()):
            leaf.copy_to_host_async()  # all of them at once, before the first is waited for
    encoded = {name: encode(name, leaf, where) for name, leaf in leaves.items()}
    arrays = {name: array for name, (array, _) in encoded.items()}
    kinds = {name: kind for name, (_, kind) in encoded.items() if kind}
    head = header(arrays, note or ("kaun", json.dumps(kinds)), where)
    return [memoryview(head), *(arrays[name].reshape(-1).view(np.uint8).data for name in in_order(arrays))]


def _leaf(name: str) -> str:
    return f"leaf {quoted(name)}" if name else "the tree itself"


@contextlib.contextmanager
def _replacing(where: str, target: Path, disk: Disk) -> Generator[int, None, None]:
    """A temporary file, open for writing, which replaces the target when the block ends without an exception."""
    target = target.resolve()  # of a link, the file it leads to is replaced, not the link
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"{where}: the folder {str(target.parent)!r} does not exist. Make it first: "
            f"pathlib.Path({str(target.parent)!r}).mkdir(parents=True)."
        )
    if target.is_dir():
        raise IsADirectoryError(
            f"{where}: {str(target)!r} is a folder. Name a file in it: {str(target / 'model.safetensors')!r}."
        )
    temporary = target.parent / f".kaun-{secrets.token_hex(8)}.tmp"
    try:
        try:
            file = disk.create(temporary)
            try:
                if target.exists():
                    temporary.chmod(target.stat().st_mode)
                yield file
                disk.sync(file)
            finally:
                disk.close(file)
        except OSError as err:
            text = f"{where} could not write {str(target)!r}, nothing was changed: {err.strerror or err}."
            raise OSError(err.errno, text) from err
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    disk.sync_folder(target.parent)


class Differences(NamedTuple):
    """How the leaves of a file differ from those of a template.

    Attributes:
        lines: One line for each leaf that differs; empty if none does.
        too_wide: Whether one needs 64 bits and x64 is off.
        castable: Whether one is a float of another precision.
    """

    lines: list[str]
    too_wide: bool
    castable: bool

    def listing(self) -> str:
        """The lines under each other, at most 20 of them, and how to get 64 bits where they are missing."""
        more = len(self.lines) - _LISTED
        shown = [*map(plain, self.lines[:_LISTED]), *([f"... and {more} more"] if more > 0 else [])]
        fix = 'For 64 bits: jax.config.update("jax_enable_x64", True), or a NumPy leaf in `like`.'
        return "".join(f"\n  {line}" for line in shown) + (f"\n{fix}" if self.too_wide else "")


def read_arrays(
    take: Take, size: int, wanted: Mapping[str, Any] | None = None, *, cast: bool = False, start: str = ""
) -> tuple[list[tuple[Place, np.ndarray[Any, Any]]], Differences]:
    """The arrays of a file; none is read if their header shows that they do not match the template.

    Args:
        take: Reads the next bytes of the file, from its beginning.
        size: How many bytes the file has.
        wanted: The leaves of the template by name, None to read any.
        cast: Whether floating dtypes may differ.
        start: Only arrays whose names begin with this are returned and compared; the others are skipped.

    Raises:
        ValueError: If the header is damaged, or an array is not what its kind of leaf is stored as.
    """
    places = read_places(take, size)
    words = _key_words(wanted or {})
    for place in places:
        _check_kind(place, words)
    differences = Differences([], too_wide=False, castable=False)
    if wanted is not None:
        found = {place.name: _spec(place) for place in places if place.name.startswith(start)}
        differences = _differences(wanted, found, cast)
    arrays: list[tuple[Place, np.ndarray[Any, Any]]] = []
    for place in places if not differences.lines else ():
        if place.name.startswith(start):
            arrays.append((place, read_array(take, place)))
        else:
            skip_array(take, place)
    return arrays, differences


def _key_words(wanted: Mapping[str, Any]) -> dict[str, int]:
    """The kinds of keys that may be read, JAX's own and those of the template, and how many words each key has."""
    keys = [leaf for leaf in wanted.values() if is_key(leaf)]
    words = {"key threefry2x32": 2, "key rbg": 4, "key unsafe_rbg": 4}
    return words | {f"key {jax.random.key_impl(key)}": jax.random.key_data(key).shape[-1] for key in keys}


def _check_kind(place: Place, words: Mapping[str, int]) -> None:
    """Raise ValueError unless an array has the dtype and shape of its kind of leaf; no other kind reaches JAX."""
    stored = _STORED.get(place.kind or "", np.void)  # dtype("float64") == None is true
    if place.kind is None or (place.dtype == stored and place.shape == ()):
        return
    if place.dtype != np.uint32 or place.shape[-1:] != (words.get(place.kind),):
        what = f"{place.dtype.name}{list(place.shape)}"
        raise ValueError(f"{_leaf(place.name)} is marked as {quoted(place.kind)} and holds {what}")


def _spec(place: Place) -> Any:
    """What ``decode`` makes of an array, without its values."""
    plain = jax.ShapeDtypeStruct(place.shape, place.dtype)
    if place.kind is None:
        return plain
    if place.kind in _STORED:
        return decode(place, np.zeros((), place.dtype))
    return jax.eval_shape(lambda words: decode(place, words), plain)


def decode(place: Place, array: Any) -> Any:
    """The leaf that ``encode`` made an array of: the array itself, typed PRNG keys, or a Python scalar."""
    if place.kind is None:
        return array
    if place.kind in _STORED:
        return array.item()
    return jax.random.wrap_key_data(jnp.asarray(array), impl=place.kind.removeprefix("key "))


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any], cast: bool) -> Differences:
    floats = [name for name in wanted if name in found and _is_float(wanted[name]) and _is_float(found[name])]
    castable = not cast and any(wanted[name].dtype != found[name].dtype for name in floats)
    if cast:
        found = {**found, **{n: jax.ShapeDtypeStruct(found[n].shape, wanted[n].dtype) for n in floats}}
    lines = difference(dict(wanted), dict(found))
    too_wide = [name for name, leaf in wanted.items() if _needs_x64(leaf)]
    lines += [f"{name}: expected {describe(wanted[name])}, which JAX cannot make while x64 is off" for name in too_wide]
    return Differences(lines, bool(too_wide), castable)


def _is_float(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _needs_x64(leaf: Any) -> bool:
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return False
    return jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype


def restore(name: str, value: Any, like: Any) -> Any:
    """A leaf of a file, converted to the kind of leaf that ``like`` is."""
    if type(like) in _SCALARS:
        return value
    if isinstance(value, np.ndarray) and value.dtype != like.dtype:
        value = _converted(name, value, like.dtype)
    if isinstance(like, np.generic):
        return value[()]
    if isinstance(like, np.ndarray):
        return value
    placed = isinstance(like, jax.ShapeDtypeStruct) or like.committed
    made = jax.device_put(value, like.sharding if placed else None)
    if not is_weak(like):
        return made
    # A strong type instead of a weak one would compile the step again, and promote bfloat16 parameters to float32.
    weak = jnp.full(like.shape, np.zeros((), like.dtype).item())
    return weak.at[...].set(made) if weak.dtype == like.dtype else made


def _converted(name: str, value: np.ndarray[Any, Any], dtype: Any) -> np.ndarray[Any, Any]:
    """The array in another byte order or, with ``cast``, another precision."""
    with np.errstate(over="ignore", invalid="ignore"):
        made = value.astype(dtype)
    lost = int(np.count_nonzero(np.isfinite(value) & ~np.isfinite(made)))
    if lost:
        raise ValueError(
            f"checkpoint.load: {lost} of the {value.size} values of {_leaf(name)} do not fit {np.dtype(dtype).name}. "
            f"Load it as it is, a jnp.{value.dtype.name} leaf in `like`, and scale it before converting."
        )
    return made
