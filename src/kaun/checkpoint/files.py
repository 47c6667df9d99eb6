"""A pytree as one safetensors file with readable keys, and back, exactly."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from kaun._calls import public
from kaun._jax import is_traced
from kaun._paths import local_path
from kaun.checkpoint.disk import Disk
from kaun.checkpoint.encoding import (
    Differences,
    check_template,
    compare,
    decode,
    encode,
    host_array,
    is_spread,
    restore,
)
from kaun.checkpoint.group import Group, several_processes
from kaun.checkpoint.safetensors_header import (
    Memory,
    Place,
    Take,
    UnreadDtype,
    header,
    in_order,
    read_array,
    read_places,
    taker,
)
from kaun.tree import flatten, is_key

__all__ = [
    "copy",
    "load",
    "read_arrays",
    "save",
    "serialize",
    "write_arrays",
    "write_safetensors",
]

T = TypeVar("T")
_PIECE = 16 << 20


@public
def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Write a pytree as one safetensors file, whose keys are the readable paths of the leaves: ``0.weight``.

    Leaves may be JAX and NumPy arrays (bool, integers of 8 to 64 bits, float16, float32, float64, bfloat16,
    float8_e4m3fn, float8_e5m2, float8_e8m0fnu, complex64), typed PRNG keys, and Python's bool, int and float. The
    containers, weak types, and whether an array is JAX's or NumPy's are not in the file; ``load`` takes them from its
    template. The file has no checksums: ``load`` detects a truncated file and a damaged header, but not flipped bits in
    the values. (The checkpoints of a ``Directory`` have checksums.)

    In a program of several processes all of them have to call this. Process 0 writes the file, which is there when the
    call returns in any of them; the others give it their shards, one leaf after the other.

    Args:
        path: The file. Its folder must exist. An existing file is replaced atomically: a reader, or a crash, finds the
            old file or the new one, never a part.
        tree: Any pytree: ``Vars``, a ``TrainState``, optimizer states, dicts. None is structure and takes no space.

    Raises:
        TypeError: If such a file cannot hold a leaf, or the dtype of a leaf.
        ValueError: If two leaves have the same readable path, or an int does not fit in 64 bits.
        OSError: If the file cannot be written (FileNotFoundError if its folder does not exist).
        FailedElsewhere: If another process fails, or does not call this in time.

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
    _, pieces = serialize(leaves, where, note)
    if several_processes():
        _write_in_first(where, target, pieces)
    else:
        _write(where, target, pieces)


def _write(where: str, target: Path, pieces: Iterable[memoryview]) -> None:
    disk = Disk()
    with _replacing(where, target, disk) as file:
        for piece in pieces:
            disk.write(file, piece)


def write_arrays(
    where: str, target: Path, places: Iterable[Place], read: Callable[[str], np.ndarray[Any, Any]]
) -> None:
    """Write arrays that are read one after the other as a file; the same bytes as of ``checkpoint.save``."""
    arrays = {place.name: place for place in places}
    kinds = {name: place.kind for name, place in arrays.items() if place.kind}
    head = header(arrays, ("kaun", json.dumps(kinds)), where)
    rest = (read(name).reshape(-1).view(np.uint8).data for name in in_order(arrays))
    _write(where, target, itertools.chain([memoryview(head)], rest))


def copy(where: str, target: Path, source: Path) -> None:
    """Write a file with the bytes of another one."""
    with source.open("rb") as file:
        _write(where, target, iter(lambda: memoryview(file.read(_PIECE)), memoryview(b"")))


def _write_in_first(where: str, target: Path, pieces: Iterable[memoryview]) -> None:
    """Write a file in process 0 of several. The others give it their shards, one leaf after the other."""
    group = Group("save", f"{where}, which every process has to call,")
    # Without it, a process that does not come would leave the others in an operation of the devices.
    group.gather(lambda: None)

    def act() -> None:
        try:
            if group.index == 0:
                _write(where, target, pieces)
        finally:
            for _ in pieces:  # also after an error: the others wait for the shards of this process
                pass

    group.gather(act)


@public
def load(path: str | os.PathLike[str], like: T, *, cast: bool = False) -> T:
    """Return the tree of a safetensors file in the structure of a template, every leaf exactly as it was saved.

    The file is read into memory and not kept open. This takes about as much memory as the file has bytes, and for a
    moment twice that of a leaf that is cast.

    Args:
        path: A file that ``save`` or another program wrote.
        like: The template: a tree of the structure, shapes and dtypes to load, for example a new ``trainer.init()``.
            Its values do not matter. For a JAX array or a ``jax.ShapeDtypeStruct`` in it a JAX array is returned (with
            the leaf's weak type, and on its devices if these were chosen, also on those of other processes), for a
            NumPy array a NumPy array, and for a Python scalar a Python scalar.
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
        name = call.partition("(")[0]
        given = "state" if name == "save" else "like=trainer.init()"
        fix = f'Write checkpoint.{name}("digits.safetensors", {given}).'
        raise TypeError(f"checkpoint.{call} expected a path first, received {type(path).__name__}. {fix}")
    return local_path(f"checkpoint.{call}", path)


def serialize(
    leaves: Mapping[str, Any], where: str = "checkpoint.save", note: tuple[str, str] | None = None
) -> tuple[int, Iterator[memoryview]]:
    """How many bytes a safetensors file of these leaves has, and the bytes in pieces: the header, then each array.

    The pieces are views of the arrays' own memory where that is on the host, so they must be used before it changes.
    """
    if "__metadata__" in leaves:
        raise ValueError(f"{where}: '__metadata__' is a reserved key of safetensors files. Rename that leaf.")
    for leaf in leaves.values():
        on_device = isinstance(leaf, jax.Array) and not (is_traced(leaf) or is_key(leaf) or leaf.is_deleted())
        if on_device and not is_spread(leaf):
            leaf.copy_to_host_async()  # all of them at once, before the first is waited for
    encoded = {name: encode(name, leaf, where) for name, leaf in leaves.items()}
    arrays = {name: array for name, (array, _) in encoded.items()}
    kinds = {name: kind for name, (_, kind) in encoded.items() if kind}
    head = header(arrays, note or ("kaun", json.dumps(kinds)), where)
    return len(head) + sum(array.nbytes for array in arrays.values()), _pieces(head, arrays, where)


def _pieces(head: bytes, arrays: Mapping[str, Any], where: str) -> Iterator[memoryview]:
    yield memoryview(head)
    for name in in_order(arrays):
        yield host_array(name, arrays[name], where).reshape(-1).view(np.uint8).data


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


def read_arrays(
    take: Take,
    size: int,
    wanted: Mapping[str, Any] | None = None,
    *,
    cast: bool = False,
    start: str = "",
    later: Take | None = None,
    skip: Callable[[int], None] | None = None,
) -> tuple[list[tuple[Place, np.ndarray[Any, Any]]], Differences]:
    """The arrays of a file; none is read if their header shows that they do not match the template.

    Args:
        take: Reads the next bytes of the file, from its beginning.
        size: How many bytes the file has.
        wanted: The leaves of the template by name, None to read any.
        cast: Whether floating dtypes may differ.
        start: Only arrays whose names begin with this are returned and compared.
        later: As ``take``, for the arrays: it may return before their bytes are there.
        skip: Skips so many bytes, those of the other arrays.

    Raises:
        ValueError: If the header is damaged, or an array is not what its kind of leaf is stored as.
    """
    places, memory = read_places(take, size), Memory(size)
    compared = places if wanted is None else [place for place in places if place.name.startswith(start)]
    differences = compare(compared, wanted, cast=cast)
    arrays: list[tuple[Place, np.ndarray[Any, Any]]] = []
    for place in places if not differences.lines else ():
        if place.name.startswith(start):
            arrays.append((place, read_array(later or take, place, memory)))
        elif skip is not None:
            skip(place.stop - place.start)
    return arrays, differences
