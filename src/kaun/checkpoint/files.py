"""A pytree as one safetensors file with readable keys, and back, exactly."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from kaun.checkpoint.safetensors_header import DTYPES
from kaun.tree import describe, difference, flatten, is_array

__all__ = [
    "STORED",
    "WIDER",
    "check_template",
    "decode",
    "encode",
    "is_key",
    "listing",
    "load",
    "mismatches",
    "restore",
    "save",
]

T = TypeVar("T")

_SCALARS = (bool, int, float)
STORED = {"bool": np.dtype(np.bool_), "int": np.dtype(np.int64), "float": np.dtype(np.float64)}
_LISTED = 20
WIDER = 'For 64 bits: jax.config.update("jax_enable_x64", True), or a NumPy leaf in `like`.'


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a pytree as one safetensors file, whose keys are the readable paths of the leaves: ``0.weight``.

    Leaves may be JAX and NumPy arrays (bool, integers of 8 to 64 bits, float16, float32, float64, bfloat16,
    float8_e4m3fn, float8_e5m2, float8_e8m0fnu, complex64), typed PRNG keys and Python's bool, int and float.

    Arguments:
        path: the file. Its folder must exist. A file that is there is replaced in one move: a reader, or a crash, finds
            the old file or the new one, never a part.
        tree: any pytree: ``Vars``, a ``TrainState``, optimizer states, dicts. None is structure and takes no space.

    What only ``like`` can say (the containers, which leaves are NumPy's, weak types) is not in the file. There are no
    checksums: ``load`` notices a file cut short and a damaged header, not flipped bits in the numbers.

    Raises:
        TypeError: for a leaf, or a dtype of a leaf, that such a file cannot hold.
        ValueError: when two leaves have one readable path, or an int does not fit in 64 bits.
        OSError: when the file cannot be written (FileNotFoundError: its folder does not exist).

    >>> import tempfile, jax.numpy as jnp
    >>> from kaun import checkpoint
    >>> params = [{"weight": jnp.ones((2, 3))}, {"weight": jnp.ones((3, 1))}]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save(f"{folder}/model.safetensors", params)
    ...     loaded = checkpoint.load(f"{folder}/model.safetensors", like=params)
    >>> loaded[1]["weight"].shape
    (3, 1)
    """
    target = _as_path(path, "save(path, tree)")
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    kinds: dict[str, str] = {}
    for name, leaf in flatten(tree)[0].items():
        tensors[name], kind = encode(name, leaf)
        if kind:
            kinds[name] = kind
    if "__metadata__" in tensors:
        raise ValueError("checkpoint.save: '__metadata__' is a reserved key of safetensors files. Rename that leaf.")
    # One entry: the library writes several in an order of its own, and equal trees should give equal files.
    metadata = {"kaun": json.dumps(kinds)}
    with _replacing(target) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as err:
            raise OSError(f"checkpoint.save could not write {str(target)!r}, nothing was changed: {err}.") from err


def load(path: str | os.PathLike[str], like: T, *, cast: bool = False) -> T:
    """The tree of a safetensors file in the structure of ``like``, leaf by leaf exactly what was saved.

    Arguments:
        path: a file that ``save`` (or any other program) wrote.
        like: a tree of the structure, shapes and dtypes to load: a fresh ``trainer.init()``, say. Its values are not
            looked at. Where its leaf is a JAX array or a ``jax.ShapeDtypeStruct``, a JAX array comes back (with the
            leaf's weak type, and on its devices if those were chosen); where NumPy's, NumPy's; where a Python scalar,
            that.
        cast: whether floating arrays may change their precision, as NumPy's ``astype`` does it. Never the kind: no
            float becomes an integer, no integer a float or another integer. Default False: dtypes must be the same.

    Raises:
        ValueError: when any leaf is missing, unexpected, or of another shape or dtype (one message lists them all, and
            nothing is loaded), when a cast would overflow, or when the file is damaged or not a safetensors file.
        TypeError: when ``like`` has a leaf that is neither an array nor a Python scalar.
        OSError: when the file cannot be read.

    The file is read whole and not kept open. In memory this takes about twice its size for a moment.

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
    found = _read(file)
    _must_match(file, wanted, found, cast)
    # Popped one by one, so that no more than one leaf is in memory twice.
    return jax.tree.unflatten(structure, [restore(name, found.pop(name), leaf) for name, leaf in wanted.items()])


def _as_path(path: Any, call: str) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"checkpoint.{call} expected a path first, received {type(path).__name__}.")
    return Path(path)


def check_template(wanted: Mapping[str, Any]) -> None:
    """Raises TypeError for a leaf of a template that no file can fill."""
    for name, leaf in wanted.items():
        if not (is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) or type(leaf) in _SCALARS):
            raise TypeError(
                f"checkpoint.load: {_leaf(name)} of `like` is a {type(leaf).__name__}; a leaf is an array, a "
                "jax.ShapeDtypeStruct, a bool, an int or a float. Take it out of `like`."
            )


def encode(name: str, leaf: Any) -> tuple[np.ndarray[Any, Any], str | None]:
    """A leaf as the array that the file holds, and what else it takes to make the leaf again from that."""
    kind = type(leaf).__name__
    if type(leaf) in _SCALARS:
        if kind == "int" and not -(2**63) <= leaf < 2**63:
            raise ValueError(
                f"checkpoint.save: {_leaf(name)} is the int {leaf}, which does not fit in 64 bits. Save it in parts, "
                "divmod(n, 2**62)."
            )
        return np.asarray(leaf, STORED[kind]), kind
    if not is_array(leaf) or isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(
            f"checkpoint.save: {_leaf(name)} is a {kind}; a file holds JAX and NumPy arrays, typed keys, bool, int and "
            "float. Take it out of the tree, or make arrays of it."
        )
    try:
        if is_key(leaf):
            return np.asarray(jax.random.key_data(leaf)), f"key {jax.random.key_impl(leaf)}"
        # safetensors writes an array's raw buffer whatever its strides. (np.ascontiguousarray would give 0-d an axis.)
        array = np.asarray(leaf, order="C")
    except Exception as err:
        err.add_note(f"checkpoint.save was reading {_leaf(name)}.")
        raise
    if array.dtype.newbyteorder("=") not in DTYPES.values():
        raise TypeError(
            f"checkpoint.save: {_leaf(name)} is {describe(leaf)}, a dtype that a safetensors file cannot hold. Convert "
            f"it to one of {', '.join(str(dtype) for dtype in DTYPES.values())}: leaf.astype(...)."
        )
    return (array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))), None


def _leaf(name: str) -> str:
    return f"leaf {name!r}" if name else "the tree itself"


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys."""
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@contextlib.contextmanager
def _replacing(target: Path) -> Generator[Path, None, None]:
    """A temporary file in the target's folder, which becomes the target when the block ends well."""
    target = target.resolve()  # of a link, the file it leads to is replaced, not the link
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"checkpoint.save: the folder {str(target.parent)!r} does not exist. Make it first: "
            f"pathlib.Path({str(target.parent)!r}).mkdir(parents=True)."
        )
    if target.is_dir():
        raise IsADirectoryError(
            f"checkpoint.save: {str(target)!r} is a folder. Name a file in it: {str(target / 'model.safetensors')!r}."
        )
    temporary = target.parent / f".kaun-{secrets.token_hex(8)}.tmp"
    try:
        temporary.touch(exist_ok=False)
        mode = (target if target.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(mode)  # the library makes its files readable to their owner alone
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name != "nt":
        # The move itself is on disk only when the folder is.
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(file: Path) -> dict[str, Any]:
    """The leaves of a file by name: NumPy arrays, typed keys and Python scalars."""
    raw = file.read_bytes()
    try:
        entries = deserialize(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        noted = dict(json.loads((header.get("__metadata__") or {}).get("kaun", "{}")))
        kinds = {name: str(kind) for name, kind in noted.items()}
        found = {name: _decode(name, entry, kinds.pop(name, None)) for name, entry in entries}
        if kinds:
            raise ValueError(f"it describes leaves that it does not hold, {list(kinds)}")
    except (SafetensorError, ValueError, TypeError) as err:
        raise ValueError(f"checkpoint.load: {str(file)!r} is damaged or not a safetensors file: {err}.") from err
    return found


def _decode(name: str, entry: dict[str, Any], kind: str | None) -> Any:
    code, shape = entry["dtype"], entry["shape"]
    if code not in DTYPES:
        raise ValueError(f"{_leaf(name)} is of dtype {code}, which kaun does not read")
    return decode(name, np.frombuffer(entry["data"], DTYPES[code]).reshape(shape), kind)


def decode(name: str, array: np.ndarray[Any, Any], kind: str | None) -> Any:
    """The leaf that ``encode`` made an array of.

    Raises:
        ValueError: when the array is not what that kind of leaf is stored as.
    """
    if kind is None:
        return array
    if kind.startswith("key "):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=kind.removeprefix("key "))
    if kind not in STORED or array.dtype != STORED[kind] or array.shape != ():
        raise ValueError(f"{_leaf(name)} is marked as {kind!r} and holds {describe(array)}")
    return array.item()


def _must_match(file: Path, wanted: dict[str, Any], found: dict[str, Any], cast: bool) -> None:
    floats = [name for name in wanted if name in found and _is_float(wanted[name]) and _is_float(found[name])]
    compared = dict(found)
    if cast:
        compared |= {name: jax.ShapeDtypeStruct(found[name].shape, wanted[name].dtype) for name in floats}
    lines, too_wide = mismatches(wanted, compared)
    if not lines:
        return
    fix = "Make `like` as the saved tree was made (same model, same optimizer), or save and load the same part of it."
    if too_wide:
        fix += f"\n{WIDER}"
    if not cast and any(wanted[name].dtype != found[name].dtype for name in floats):
        fix += "\nTo convert between floating dtypes: checkpoint.load(path, like=..., cast=True)."
    raise ValueError(
        f"checkpoint.load: {str(file)!r} does not match `like`, nothing was loaded:{listing(lines)}\n{fix}"
    )


def mismatches(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[list[str], bool]:
    """One line for each leaf that a file cannot fill, and whether one is for want of 64 bits."""
    lines = difference(dict(wanted), dict(found))
    too_wide = [name for name, leaf in wanted.items() if _needs_x64(leaf)]
    lines += [f"{name}: expected {describe(wanted[name])}, which JAX cannot make while x64 is off" for name in too_wide]
    return lines, bool(too_wide)


def listing(lines: Sequence[str]) -> str:
    """Lines under each other for a message, cut where they are many."""
    shown = [*lines[:_LISTED], *([f"... and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else [])]
    return "".join(f"\n  {line}" for line in shown)


def _is_float(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _needs_x64(leaf: Any) -> bool:
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return False
    return jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype


def restore(name: str, value: Any, like: Any) -> Any:
    """What a file holds as the kind of leaf that ``like`` is."""
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
    if not getattr(like, "weak_type", False):
        return made
    # A strong type in a weak one's place compiles the step again, and promotes: bfloat16 parameters would turn float32.
    weak = jnp.full(like.shape, np.zeros((), like.dtype).item())
    return weak.at[...].set(made) if weak.dtype == like.dtype else made


def _converted(name: str, value: np.ndarray[Any, Any], dtype: Any) -> np.ndarray[Any, Any]:
    """The array in another byte order or, where that was asked for, another precision."""
    with np.errstate(over="ignore", invalid="ignore"):
        made = value.astype(dtype)
    lost = int(np.count_nonzero(np.isfinite(value) & ~np.isfinite(made)))
    if lost:
        raise ValueError(
            f"checkpoint.load: {lost} of the {value.size} values of {_leaf(name)} do not fit {np.dtype(dtype).name}. "
            f"Load it as it is, a jnp.{value.dtype.name} leaf in `like`, and scale it before converting."
        )
    return made
