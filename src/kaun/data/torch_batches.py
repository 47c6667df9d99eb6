"""The batches of a map-style ``DataLoader`` of PyTorch by their indices: a resumed run reads none of those it skips."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["SkippedBatches"]


class SkippedBatches:
    """One pass of a loader that goes through its sampler alone at first.

    The generator of the loader is drawn from as ``iter(loader)`` draws: once for the seed of the workers, and then by
    the sampler. So the rest of this pass, and all later ones, are those of a pass that was read.

    Args:
        loader: The loader.

    Attributes:
        indices: Iterates the indices of each batch.
    """

    indices: Iterator[Any]

    def __init__(self, loader: Any) -> None:
        torch: Any = sys.modules["torch"]
        self._loader = loader
        self._name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        self._generator: Any = torch.default_generator if loader.generator is None else loader.generator
        self.indices = iter(getattr(loader, self._name))
        self._before = self._generator.get_state()
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)

    @classmethod
    def of(cls, loader: Any) -> SkippedBatches | None:
        """The batches of a loader, None where it has no sampler or iterates in its own way."""
        data: Any = sys.modules.get("torch.utils.data")
        if data is None or not isinstance(loader, data.DataLoader):
            return None
        own = type(loader).__iter__ is not data.DataLoader.__iter__
        return None if own or isinstance(loader.dataset, data.IterableDataset) else cls(loader)

    def rest(self) -> Any:
        """A loader of the batches whose indices were not taken."""
        loader, now = copy.copy(self._loader), self._generator.get_state()
        # DataLoader refuses a new sampler, because its own attributes depend on it. This one has the same batches.
        object.__setattr__(loader, self._name, _Rest(self.indices, self._generator, now))
        loader._iterator = None
        self._generator.set_state(self._before)
        return loader


class _Rest:
    """The indices that are left. The generator is set to the state after those before them when the first is taken."""

    def __init__(self, indices: Iterator[Any], generator: Any, state: Any) -> None:
        self._indices, self._generator, self._state = indices, generator, state

    def __iter__(self) -> Iterator[Any]:
        self._generator.set_state(self._state)
        yield from self._indices
