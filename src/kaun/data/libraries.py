"""Loaders of other libraries: facts about them, their epochs, states and generators; those that would fork are refused.

None of these libraries is imported here: an object of one exists only where it is imported already.
"""

from __future__ import annotations

import multiprocessing
import random
import secrets
import sys
from typing import Any, cast

import numpy as np

from kaun.data.convert import as_arrays, is_of

__all__ = [
    "generator_state", "has_exact_state", "is_generator", "is_huggingface_stream", "loader_facts",
    "parts_that_make_items", "refuse_forks", "set_epoch", "torch_generators",
]  # fmt: skip


def refuse_forks(loader: Any, stage: str) -> None:
    """Refuse a PyTorch loader that would fork its workers from this process, in which JAX runs threads.

    Raises:
        RuntimeError: If it would; the message lists the other ways to start them.
    """
    if not is_of("torch.utils.data", "DataLoader", loader) or not loader.num_workers:
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
    names = ("sampler", "batch_sampler", "dataset") if is_of("torch.utils.data", "DataLoader", loader) else ()
    parts = [getattr(loader, name) for name in names]
    parts += [getattr(loader.batch_sampler, "sampler", None)] if names else []
    for part in {id(part): part for part in parts}.values():
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def is_huggingface_stream(loader: Any) -> bool:
    """Whether a loader is an ``IterableDataset`` of Hugging Face."""
    return is_of("datasets", "IterableDataset", loader)


def has_exact_state(loader: Any) -> bool:
    """Whether ``load_state_dict(state_dict())`` of a loader continues with its next item.

    Hugging Face documents two exceptions for its streams: a shuffle buffer is filled again with other items, and
    batched maps of arrow tables may lose a batch.
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


def parts_that_make_items(loader: Any) -> tuple[Any, ...]:
    """The parts of a loader that make its items, perhaps in other processes and not one after the other."""
    if not is_of("torch.utils.data", "DataLoader", loader):
        return ()
    return loader.dataset, loader.collate_fn


def is_generator(value: Any) -> bool:
    """Whether a value is a generator of random numbers, whose state changes with each draw."""
    kinds = (np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)
    return isinstance(value, kinds) or is_of("torch", "Generator", value)


def generator_state(generator: Any) -> Any:
    """The state of a generator of NumPy, Python or PyTorch, as a tree of numbers and arrays."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.BitGenerator):
        return generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    if isinstance(generator, random.SystemRandom):
        return secrets.token_bytes()  # it has none, and never draws the same numbers
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state().numpy()


def torch_generators(loader: Any) -> list[Any]:
    """The generators from which a ``DataLoader`` of PyTorch draws the order of each pass; none of any other loader."""
    if not is_of("torch.utils.data", "DataLoader", loader):
        return []
    found = [loader.generator or cast("Any", sys.modules["torch"]).default_generator]
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    found += [getattr(sampler, "generator", None) for sampler in samplers]
    return list({id(generator): generator for generator in found if generator is not None}.values())


def loader_facts(source: Any) -> dict[str, Any]:
    """What is known of a loader besides type and length: JSON values by name, and under "arrays" a tree of arrays."""
    if is_of("torch.utils.data", "DataLoader", source):
        return _of_torch(source)
    if is_of("datasets", "Dataset", source):
        return {"fingerprint": source._fingerprint}  # the library's own digest of content and transforms
    if is_of("grain", "MapDataset", source) or is_of("grain", "IterDataset", source):
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
    if is_of("torch.utils.data", "TensorDataset", dataset):
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
