"""Leaves of a tree as the arrays of a file, and back: how they differ from a template, where they are put."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kaun._jax import is_traced
from kaun._messages import plain, quoted
from kaun.checkpoint.safetensors_header import DTYPES, Place
from kaun.sharding import put
from kaun.tree import describe, difference, is_array, is_key, is_weak

__all__ = [
    "Differences", "assemble", "check_template", "compare", "decode", "encode", "host_array", "is_elsewhere",
    "is_spread", "restore", "starts_of",
]  # fmt: skip

_SCALARS = (bool, int, float)
_STORED = {"bool": np.dtype(np.bool_), "int": np.dtype(np.int64), "float": np.dtype(np.float64)}
_LISTED = 20


def check_template(wanted: Mapping[str, Any]) -> None:
    """Raise TypeError for a leaf of a template that no file can fill."""
    for name, leaf in wanted.items():
        if not (is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) or type(leaf) in _SCALARS):
            raise TypeError(
                f"checkpoint.load: {_leaf(name)} of `like` is a {type(leaf).__name__}; a leaf is an array, a "
                "jax.ShapeDtypeStruct, a bool, an int or a float. Remove it from `like`."
            )


def encode(name: str, leaf: Any, where: str = "checkpoint.save") -> tuple[Any, str | None]:
    """A leaf as the array that the file holds, and the kind of leaf if it is not an array.

    An array that is spread over several devices stays there, so that ``host_array`` collects one after the other.
    """
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
    key = is_key(leaf)
    try:
        array = jax.random.key_data(leaf) if key else leaf
        array = array if is_spread(array) else np.asarray(array, order="C")
    except Exception as err:
        err.add_note(_was_reading(where, name))
        raise
    if key:
        return array, f"key {jax.random.key_impl(leaf)}"
    if array.dtype.newbyteorder("=") not in DTYPES.values():
        raise TypeError(
            f"{where}: {_leaf(name)} is {describe(leaf)}, a dtype that a safetensors file cannot hold. Convert "
            f"it to one of {', '.join(str(dtype) for dtype in DTYPES.values())}: leaf.astype(...)."
        )
    return (array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))), None


def is_spread(array: Any) -> bool:
    """Whether a value is an array that lies on several devices."""
    return isinstance(array, jax.Array) and not is_traced(array) and len(array.sharding.device_set) > 1


def is_elsewhere(array: jax.Array) -> bool:
    """Whether a part of an array lies on devices of other processes alone, so that it cannot be read here."""
    return not array.is_fully_addressable and not array.is_fully_replicated


def host_array(name: str, array: Any, where: str) -> np.ndarray[Any, Any]:
    """An array that ``encode`` returned, on the host, in C order as the format requires.

    Shards that other processes have come over the devices, so all processes have to call this in the same order.
    """
    if isinstance(array, np.ndarray):
        return array
    try:
        if is_elsewhere(array):
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(array, tiled=True), order="C")
        if array.is_fully_replicated:
            return np.asarray(array.addressable_data(0), order="C")
        # Not np.asarray(array): JAX would keep that copy as long as the array.
        whole = np.empty(array.shape, array.dtype)
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                whole[shard.index] = np.asarray(shard.data)
        return whole
    except Exception as err:
        err.add_note(_was_reading(where, name))
        raise


def starts_of(index: tuple[slice, ...], ndim: int) -> tuple[int, ...]:
    """Where a shard begins on each axis; an array of keys has one axis more as the file holds it."""
    return tuple(part.start or 0 for part in index) + (0,) * (ndim - len(index))


def _was_reading(where: str, name: str) -> str:
    return f"{where} was reading {_leaf(name)}."


def _leaf(name: str) -> str:
    return f"leaf {quoted(name)}" if name else "the tree itself"


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


def compare(places: Iterable[Place], wanted: Mapping[str, Any] | None, *, cast: bool = False) -> Differences:
    """How the arrays of a checkpoint differ from the leaves of a template, None for any.

    Raises:
        ValueError: If an array is not what its kind of leaf is stored as.
    """
    places = list(places)
    words = _key_words(wanted or {})
    for place in places:
        _check_kind(place, words)
    if wanted is None:
        return Differences([], too_wide=False, castable=False)
    return _differences(wanted, {place.name: _spec(place) for place in places}, cast)


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
    where = _placement(like)
    if where is None or where.is_fully_addressable:
        return _as_weak_as(like, jax.device_put(value, where))
    return _as_weak_as(like, put(value, where))


def _placement(like: Any) -> Any:
    """The sharding on which a leaf of a template has to lie, None if none was chosen for it."""
    placed = isinstance(like, jax.ShapeDtypeStruct) or (isinstance(like, jax.Array) and like.committed)
    return like.sharding if placed else None


def _as_weak_as(like: Any, made: jax.Array) -> jax.Array:
    """The array in the weak type of the template, if that has one."""
    if not is_weak(like):
        return made
    # A strong type instead of a weak one would compile the step again, and promote bfloat16 parameters to float32.
    weak = jnp.full(like.shape, np.zeros((), like.dtype).item())
    return weak.at[...].set(made) if weak.dtype == like.dtype else made


def assemble(place: Place, like: Any, region: Callable[[tuple[slice, ...]], np.ndarray[Any, Any]]) -> Any:
    """A leaf of the kind that ``like`` is, of which only the regions are read that the devices of this process need.

    Args:
        place: Its dtype, shape and kind in the file.
        like: The template.
        region: Reads a region of it, one slice for each axis of the array in the file.
    """
    where = _placement(like)
    if where is None or len(where.device_set) == 1:
        whole = region(tuple(slice(0, n) for n in place.shape))
        return restore(place.name, decode(place, whole), like)
    rest = (slice(None),) * (len(place.shape) - len(like.shape))  # the words of keys
    piece = lambda index: decode(place, region((*index[: len(like.shape)], *rest)))
    return _as_weak_as(like, jax.make_array_from_callback(like.shape, where, piece))


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
