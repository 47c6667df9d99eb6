"""Pytrees with readable paths: flatten, compare and describe them, and copy arrays that may change."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from kaun._jax import is_traced

__all__ = [
    "abbreviated",
    "bytes_in",
    "describe",
    "difference",
    "false_for_all",
    "flatten",
    "format_bytes",
    "is_array",
    "is_key",
    "is_real",
    "is_real_scalar",
    "is_weak",
    "map_with_path",
    "number_text",
    "numbers_in",
    "on_host",
    "path_name",
    "placement",
    "readable",
    "short_repr",
    "snapshot",
    "strong",
]

_LISTED = 20  # paths, in a message
_MOST_LINES = 60  # of a repr


def path_name(path: Sequence[Any]) -> str:
    """The readable form of a JAX key path: its keys joined by dots, such as ``"0.weight"``."""
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """Flatten a pytree: its leaves by readable path, in JAX's order, and its structure.

    Raises:
        ValueError: If two leaves have the same readable path, as in ``{"a.b": x, "a": {"b": y}}``.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {path_name(path): leaf for path, leaf in pairs}
    if len(leaves) < len(pairs):
        by_name: dict[str, list[str]] = {}
        for path, _ in pairs:
            by_name.setdefault(path_name(path), []).append("tree" + jax.tree_util.keystr(path))
        name, same = next((name, same) for name, same in by_name.items() if len(same) > 1)
        raise ValueError(f"{len(same)} leaves have the same path, {name!r}: {' and '.join(same)}. Rename a key.")
    return leaves, treedef


def false_for_all(call: str, kind: str, function: str, paths: Sequence[str], fix: str) -> str:
    """The message for a function of paths that chooses none of them.

    Args:
        call: The call with the argument, such as ``"lora(where=...)"``.
        kind: What the paths are those of, in the plural.
        function: The function's name and place.
        paths: All paths; the first 20 are listed.
        fix: The argument as it could be, as code.
    """
    more = f"\n  and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    listed = "".join(f"\n  {path!r}" for path in paths[:_LISTED])
    return (
        f"{call} expected a function that is True for some of the model's {kind}, received {function}, which is False "
        f"for all of them. The paths are{listed}{more}\nWrite {fix}, for example."
    )


def abbreviated(text: str, whole: str) -> str:
    """A text of many lines without those in the middle, as NumPy abbreviates arrays; ``whole`` says what shows all."""
    lines = text.splitlines()
    left = len(lines) - _MOST_LINES
    if left > 0:
        lines[_MOST_LINES // 2 : -_MOST_LINES // 2] = [f"  ... {left} lines more: {whole} ..."]
    return "\n".join(lines)


def map_with_path(f: Callable[[str, Any], Any], tree: Any) -> Any:
    """The pytree with leaves ``f(path, leaf)``; the path is in readable form."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: f(path_name(path), leaf), tree)


def is_array(value: Any) -> bool:
    """Whether a value is an array of JAX (also a traced one) or of NumPy, or a NumPy scalar."""
    return isinstance(value, (jax.Array, np.ndarray, np.generic))


def is_key(value: Any) -> bool:
    """Whether a value is an array of typed PRNG keys (a traced one too)."""
    return is_array(value) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def is_weak(value: Any) -> bool:
    """Whether a value is an array of a weak type. An array of typed PRNG keys has no attribute that tells."""
    return bool(getattr(value, "weak_type", False))


def is_real(value: Any) -> bool:
    """Whether a value is a real number or an array of them, of any shape (a traced one too). Bools are numbers."""
    if is_array(value):
        return any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))
    return isinstance(value, (bool, int, float))


def is_real_scalar(value: Any) -> bool:
    """Whether a value is a real number, or an array of shape () that holds one (a traced one too)."""
    return is_real(value) and getattr(value, "shape", ()) == ()


def host_scalar(value: Any) -> jax.Array:
    """A real scalar as the reports get it: in its own dtype, or in float32 or int32 where NumPy lacks that dtype."""
    array = jnp.asarray(value)
    if array.dtype.kind in "biu" or array.dtype in (jnp.float32, jnp.float64):
        return array.astype(array.dtype)  # without a weak type
    return array.astype(jnp.int32 if jnp.issubdtype(array.dtype, jnp.integer) else jnp.float32)


def format_bytes(count: int) -> str:
    """A number of bytes for readers, in decimal units and three significant digits: ``1.65 KB``."""
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if float(f"{size:.3g}") < 1000:
            return f"{count} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def numbers_in(tree: Any) -> int:
    """How many numbers the arrays of a tree hold, also where they are traced or were deleted."""
    return sum(math.prod(getattr(leaf, "shape", ())) for leaf in jax.tree_util.tree_leaves(tree))


def bytes_in(tree: Any) -> int:
    """How many bytes the arrays of a tree take, likewise."""
    leaves = [leaf for leaf in jax.tree_util.tree_leaves(tree) if hasattr(leaf, "dtype")]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def number_text(array: Any) -> str:
    """A number in an array, or the lowest and the highest of several; in words where it cannot be read right away."""
    if is_traced(array):
        return "traced"
    if isinstance(array, jax.Array) and array.is_deleted():
        return "deleted"
    here = not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated
    if not (is_array(array) and here and array.size) or is_key(array):
        return describe(array)
    numbers = np.asarray(array)
    low, high = (f"{end:g}" if numbers.dtype.kind == "f" else f"{end}" for end in (numbers.min(), numbers.max()))
    return low if low == high else f"{low} to {high}"


def short_repr(record: Any) -> str:
    """The repr of a named tuple with scalars as numbers, other arrays as shapes, and trees as how much they hold."""
    shown: list[str] = []
    for name, value in zip(record._fields, record, strict=True):
        if getattr(value, "shape", None) == ():
            shown.append(f"{name}={number_text(value)}")
        elif is_array(value):
            shown.append(f"{name}={describe(value)}")
        else:
            leaves = jax.tree_util.tree_leaves(value)
            shown.append(f"{name}=<{numbers_in(value)} numbers>" if leaves else f"{name}={value!r}")
    return f"{type(record).__name__}({', '.join(shown)})"


def describe(value: Any) -> str:
    """A short description of a value: ``float32[3, 4]`` for arrays, otherwise the name of the type."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        return f"{jnp.dtype(value.dtype).name if _is_plain(value.dtype) else value.dtype}{list(value.shape)}"
    return type(value).__name__


def _is_plain(dtype: Any) -> bool:
    return not jnp.issubdtype(dtype, jax.dtypes.extended)


def placement(value: Any) -> str:
    """Where an array lies, in words: ``"on one device"``, ``"on all 8 devices"``, ``"spread over data along axis 1"``.

    An array that was put on a device is named with it, ``"on one device (cpu:3)"``: others may be moved to any.
    """
    sharding = getattr(value, "sharding", None)
    if sharding is None or sharding.num_devices == 1:
        devices = sharding.device_set if sharding is not None and value.committed else ()
        return "on one device" + "".join(f" ({device.platform}:{device.id})" for device in devices)
    if sharding.is_fully_replicated:
        return f"on all {sharding.num_devices} devices"
    if not isinstance(sharding, NamedSharding):
        return f"spread over {sharding.num_devices} devices"
    axes = [(i, names if isinstance(names, tuple) else (names,)) for i, names in enumerate(sharding.spec) if names]
    along = lambda i: f" along axis {i}" if i else ""
    return "spread over " + ", ".join(f"{' and '.join(map(str, names))}{along(i)}" for i, names in axes)


def difference(expected: Any, found: Any) -> list[str]:
    """Compare two trees: a line for each leaf that differs, with its path and the expected and found shape and dtype.

    The list is empty if paths, shapes and dtypes are equal; the types of the containers are not compared.
    """
    left, right = ({p or "the tree": v for p, v in flatten(t)[0].items()} for t in (expected, found))
    lines = [f"{p}: expected {describe(v)}, found nothing" for p, v in left.items() if p not in right]
    lines += [f"{p}: expected nothing, found {describe(v)}" for p, v in right.items() if p not in left]
    both = [(p, describe(left[p]), describe(right[p])) for p in left if p in right]
    return lines + [f"{p}: expected {a}, found {b}" for p, a, b in both if a != b]


def snapshot(value: Any) -> Any:
    """Return a copy of a NumPy array, and any other value itself.

    XLA reads NumPy memory after a call has returned, so a later write would change a step already dispatched. With
    ``jnp.array(copy=True)`` in place of ``np.array`` later writes were still seen. A masked array keeps its mask.
    """
    if type(value) is np.ndarray:
        return np.array(value)
    if isinstance(value, np.ma.MaskedArray):
        return value.copy()
    return np.array(value) if isinstance(value, np.ndarray) else value


def on_host(array: Any) -> np.ndarray[Any, Any]:
    """Return the values of an array, as ``readable`` finds them."""
    return np.asarray(readable(array))


def readable(value: Any) -> Any:
    """Return an array whose values this process can read: itself, unless parts of it lie on devices of other processes.

    Then it is put on all devices, and each process has to call this for the same array. Any other value is returned.
    """
    if _process_count() == 1 or not isinstance(value, jax.Array):
        return value
    if value.is_fully_addressable or value.is_fully_replicated:
        return value
    return _everywhere(cast("Any", value.sharding).mesh)(value)


_process_count = functools.cache(jax.process_count)  # asked for each array that is read; it cannot change


@functools.lru_cache(maxsize=64)
def _everywhere(mesh: Any) -> Any:
    """The compiled function that puts an array on all devices of a mesh."""
    return jax.jit(lambda array: array, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def strong(leaf: Any) -> jax.Array:
    """A leaf as a JAX array without a weak type, which would change in the first step and compile it a second time."""
    array = jnp.asarray(snapshot(leaf))
    return jax.lax.convert_element_type(array, array.dtype) if is_weak(array) else array
