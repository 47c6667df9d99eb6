"""Tensors of other libraries as arrays.

None of these libraries is imported here: an object of one exists only where it is imported already.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_arrays", "as_tensor", "is_of", "is_tensor"]

_MOST_TYPES = 4096
_AS_BITS = frozenset(["bfloat16", "float8_e4m3fn", "float8_e5m2"])  # NumPy's own dtypes have none of these


def as_arrays(value: Any) -> Any:
    """A tree with the tensors of other libraries converted to arrays; the same object where there are none.

    Tensors of PyTorch on the CPU and what has ``numpy()`` become NumPy arrays, what has only ``__dlpack__`` a JAX
    array, in the same memory where the library can do that. Dicts, other mappings (which become dicts), tuples, lists
    and dataclasses, registered as a pytree or not, are searched for tensors.

    Raises:
        TypeError: If a tensor is not dense.
    """
    convert = _HANDLERS.get(type(value), _handler)
    if convert is _handler:
        convert = _handler(value)
    return value if convert is None else convert(value)


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor of another library."""
    return _handler(value) in (_from_torch, _from_numpy, _from_dlpack)


def as_tensor(array: np.ndarray[Any, Any]) -> Any:
    """A tensor of PyTorch with the values of an array, in the same memory."""
    return cast("Any", sys.modules["torch"]).from_numpy(array)


def _handler(value: Any) -> Callable[[Any], Any] | None:
    """How values of this type become arrays, None for what stays as it is; decided once for a type."""
    kind = type(value)
    if kind not in _HANDLERS:
        while len(_HANDLERS) >= _MOST_TYPES:
            _HANDLERS.pop(next(reversed(_HANDLERS)), None)
        _HANDLERS[kind] = _classify(kind, value)
    return _HANDLERS[kind]


def _classify(kind: type, value: Any) -> Callable[[Any], Any] | None:
    if isinstance(value, (jax.Array, np.ndarray, np.generic, str, bytes, type)):
        return None
    if is_of("torch", "Tensor", value):
        return _from_torch
    if isinstance(value, Mapping):
        return _mapping
    if isinstance(value, (tuple, list)):
        return _sequence
    if callable(getattr(kind, "numpy", None)) and hasattr(value, "dtype") and hasattr(value, "shape"):
        return _from_numpy
    if dataclasses.is_dataclass(kind):
        return _dataclass
    return _from_dlpack if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__") else None


def is_of(module: str, name: str, value: Any) -> bool:
    """Whether a value is of a class of a library, which is not imported for that."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)


def _from_torch(tensor: Any) -> Any:
    torch: Any = sys.modules["torch"]
    if tensor.layout != torch.strided:
        raise TypeError(
            f"Data expected dense tensors, received a {str(tensor.layout).removeprefix('torch.')} tensor of shape "
            f"{list(tensor.shape)}. Convert it in the loader, tensor.to_dense()."
        )
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    name = str(tensor.dtype).removeprefix("torch.")
    if name in _AS_BITS:
        bits = torch.int16 if tensor.element_size() == 2 else torch.uint8
        return tensor.view(bits).numpy().view(jnp.dtype(name))
    return tensor.numpy()


def _from_numpy(tensor: Any) -> Any:
    return tensor.numpy()


def _from_dlpack(tensor: Any) -> Any:
    return jnp.from_dlpack(tensor)


def _all_stay(values: Iterable[Any]) -> bool:
    # Not all(...), which takes three times as long: this runs for every item.
    for value in values:  # noqa: SIM110
        if _HANDLERS.get(type(value), _handler) is not None:
            return False
    return True


def _mapping(value: Mapping[Any, Any]) -> Any:
    if _all_stay(value.values()):
        return value
    found = {key: as_arrays(part) for key, part in value.items()}
    return value if all(found[key] is part for key, part in value.items()) else found


def _sequence(value: Sequence[Any]) -> Any:
    if _all_stay(value):
        return value
    found = [as_arrays(part) for part in value]
    if all(a is b for a, b in zip(found, value, strict=True)):
        return value
    if isinstance(value, tuple):
        return cast("Any", value)._make(found) if hasattr(value, "_fields") else tuple(found)
    return found


def _dataclass(value: Any) -> Any:
    before = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
    found = {name: as_arrays(part) for name, part in before.items()}
    if all(found[name] is part for name, part in before.items()):
        return value
    made = copy.copy(value)
    for name, part in found.items():
        object.__setattr__(made, name, part)  # also of a frozen dataclass
    return made


_HANDLERS: dict[type, Callable[[Any], Any] | None] = {
    **dict.fromkeys((bool, int, float, complex, str, bytes, type(None), np.ndarray), None),
    dict: _mapping,
    tuple: _sequence,
    list: _sequence,
}
