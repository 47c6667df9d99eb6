"""Objects of other libraries: their tensors as arrays, facts about their loaders, loaders that would fork refused.

None of these libraries is imported here: an object of one exists only where it is imported already.
"""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "as_arrays", "as_tensor", "generator_state", "has_exact_state", "is_generator", "is_huggingface_stream",
    "is_tensor", "loader_facts", "parts_that_make_items", "refuse_forks", "set_epoch",
    "torch_generators",
]  # fmt: skip

_MOST_TYPES = 4096
_AS_BITS = frozenset(["bfloat16", "float8_e4m3fn", "float8_e5m2"])  # NumPy's own dtypes have none of these


def as_arrays(value: Any) -> Any:
    """A tree with the tensors of other libraries converted to arrays; the same object where there are none.

    Tensors of PyTorch on the CPU and what has ``numpy()`` become NumPy arrays, what has only ``__dlpack__`` a JAX
    array, in the same memory where the library can do that. Dicts, other mappings (which become dicts), tuples, lists
    and dataclasses, registered as a pytree or not, are searched for tensors.

    Raises:
        TypeError: for a tensor that is not dense.
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
    if _is_of("torch", "Tensor", value):
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


def _is_of(module: str, name: str, value: Any) -> bool:
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


# Loaders


def refuse_forks(loader: Any, stage: str) -> None:
    """Refuse a PyTorch loader that would fork its workers from this process, in which JAX runs threads.

    Raises:
        RuntimeError: with the other ways to start them.
    """
    if not _is_of("torch.utils.data", "DataLoader", loader) or not loader.num_workers:
        return
    context = loader.multiprocessing_context
    # Reading the default must not fix it (allow_none); the first of all is the default where none was set.
    default = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if (context.get_start_method() if context is not None else default) == "fork":
        n = loader.num_workers
        raise RuntimeError(
            f"{stage} has num_workers={n} and would fork its workers from this process. JAX runs threads in it, so a "
            f"forked worker can hang. Use another start method, DataLoader(..., num_workers={n}, "
            'multiprocessing_context="forkserver") (or "spawn"), and put the code of the script under '
            'if __name__ == "__main__":. Or load in this process, num_workers=0, and in another thread, '
            "Data.from_iterable(loader).prefetch(2)."
        )


def set_epoch(loader: Any, epoch: int) -> None:
    """Call ``set_epoch(epoch)`` of a loader, or of its samplers and data set, where they have it."""
    if callable(getattr(loader, "set_epoch", None)):
        loader.set_epoch(epoch)
        return
    names = ("sampler", "batch_sampler", "dataset") if _is_of("torch.utils.data", "DataLoader", loader) else ()
    parts = [getattr(loader, name) for name in names]
    parts += [getattr(loader.batch_sampler, "sampler", None)] if names else []
    for part in {id(part): part for part in parts}.values():
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def is_huggingface_stream(loader: Any) -> bool:
    """Whether a loader is an ``IterableDataset`` of Hugging Face."""
    return _is_of("datasets", "IterableDataset", loader)


def has_exact_state(loader: Any) -> bool:
    """Whether ``load_state_dict(state_dict())`` of a loader continues with its next item.

    Hugging Face documents two exceptions for its streams: a shuffle buffer is filled again with other items, and batched
    maps of arrow tables may lose a batch.
    """
    if not hasattr(loader, "state_dict") or not hasattr(loader, "load_state_dict"):
        return False
    waiting = [loader._ex_iterable] if is_huggingface_stream(loader) else []
    for stage in waiting:
        of_tables = getattr(getattr(stage, "formatting", None), "format_type", None) == "arrow"
        if "Shuffled" in type(stage).__name__ or (of_tables and getattr(stage, "batched", False)):
            return False
        inner = getattr(stage, "ex_iterable", None)
        waiting += [*getattr(stage, "ex_iterables", ()), *([] if inner is None else [inner])]
    return True


def torch_generators(loader: Any) -> list[Any]:
    """The generators from which a ``DataLoader`` of PyTorch draws the order of each pass; none of any other loader."""
    if not _is_of("torch.utils.data", "DataLoader", loader):
        return []
    found = [loader.generator or cast("Any", sys.modules["torch"]).default_generator]
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    found += [getattr(sampler, "generator", None) for sampler in samplers]
    return list({id(generator): generator for generator in found if generator is not None}.values())


def loader_facts(source: Any) -> dict[str, Any]:
    """What is known of a loader besides type and length: JSON values by name, and under "arrays" a tree of arrays."""
    if _is_of("torch.utils.data", "DataLoader", source):
        return _of_torch(source)
    if _is_of("datasets", "Dataset", source):
        return {"fingerprint": source._fingerprint}  # the library's own digest of content and transforms
    if _is_of("grain", "MapDataset", source) or _is_of("grain", "IterDataset", source):
        return {"stages": _of_grain(source)}
    return {}


def _of_torch(loader: Any) -> dict[str, Any]:
    dataset, generator = loader.dataset, loader.generator
    found = {
        "dataset": type(dataset).__qualname__,
        "batch_size": loader.batch_size,
        "drop_last": bool(loader.drop_last),
        "sampler": type(loader.sampler).__qualname__,
        "seed": None if generator is None else int(generator.initial_seed()),
    }
    if _is_of("torch.utils.data", "TensorDataset", dataset):
        found["arrays"] = as_arrays(dataset.tensors)
    return found


def _of_grain(dataset: Any) -> list[str]:
    """The stages of a dataset, the source first, with the seed where one has a seed; without files and lines."""
    found: list[str] = []
    while dataset is not None:
        seed = getattr(dataset, "_seed", None)
        text = "" if " at 0x" in str(dataset) else str(dataset).partition(" @ ")[0]
        found.append((text or type(dataset).__qualname__) + (f" seed={int(seed)}" if seed is not None else ""))
        parents = getattr(dataset, "_parents", ())
        dataset = parents[0] if parents else None
    return found[::-1]
