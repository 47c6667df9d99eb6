"""The methods of ``Data`` for several processes and devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from kaun.data.base import Pipeline
from kaun.data.local import assemble_node, checked_sharding, local_node
from kaun.sharding import Sharding

if TYPE_CHECKING:
    from kaun.data.pipeline import Data

__all__ = ["Placed"]

T = TypeVar("T", covariant=True)


class Placed(Pipeline[T]):
    """The part of ``Data`` that knows where rows lie."""

    __slots__ = ()

    def local(self, s: Sharding) -> Data[T]:
        """The same batches, of which each process reads only the rows that its devices have.

        Which rows are in a batch, and their order, is that of one process: a function of key and pass. With two
        processes each reads half of the rows of ``batches``, ``folds``, ``batch(n)`` and ``bucket(lengths, ...)``. It
        comes after the stage that makes batches and before those that work on them: ``map(f)`` gets the rows of this
        process. ``assemble(s)`` makes whole batches of them again, and is needed before ``with_loss``, ``fit``,
        ``evaluate`` and ``predict``. A batch whose rows the devices do not divide is read by every process. For a
        loader that is already split by process leave ``local`` out.

        Args:
            s: The sharding of the trainer.

        Returns:
            The batches; in one process with all of their rows.

        Raises:
            TypeError: If ``s`` is not a ``Sharding``, or the pipeline is not one of batches whose rows are read by
                index: of a loader, without batches, or after ``map``. The message says what to write.
            ValueError: If no device of ``s`` belongs to this process.

        Examples:
            >>> import numpy as np
            >>> from kaun import Data, losses, sharding
            >>> s = sharding.data_parallel()
            >>> x, y = np.zeros((6, 2), np.float32), np.zeros((6, 1), np.float32)
            >>> train = Data.batches((x, y), batch_size=4).local(s).map(lambda b: (b[0] + 1, b[1])).assemble(s)
            >>> [(x.shape, float(x.mean())) for x, y in train]
            [((4, 2), 1.0), ((2, 2), 1.0)]
            >>> train = train.with_loss(losses.mse)
        """
        checked = checked_sharding("local(s)", s)
        return self._then(local_node(self._node, self._stages, repr(self), checked), ".local(s)")

    def assemble(self, s: Sharding) -> Data[Any]:
        """The items as JAX arrays on the devices of all processes: whole batches, made of the rows of each process.

        It also brings batches to the devices ahead of time: put ``prefetch(2)`` after it. An array whose axis 0 has
        the rows of the batch that this process has is a part of a global array, which lies as ``s`` says, or
        everywhere where the devices do not divide its rows. Any other array is put everywhere, and has to be the same
        in all processes. Numbers and strings stay as they are.

        After ``local(s)`` the rows of this process are those that ``local`` left. Items of a loader
        (``Data.from_iterable``) are taken as split by process already: each process gives as many rows, and a batch is
        those of all processes, in the order of the devices. Of any other pipeline each process has whole batches.

        Args:
            s: The sharding of the trainer, and of ``local``.

        Raises:
            TypeError: If ``s`` is not a ``Sharding``; in iteration, if items have a loss already.
            ValueError: If no device of ``s`` belongs to this process; in iteration, if an item has no array with the
                rows of this process, ``local`` got another sharding, or a loader gives rows that the devices of its
                process do not divide.

        Examples:
            >>> import numpy as np
            >>> from kaun import Data, sharding
            >>> s = sharding.data_parallel()
            >>> batches = Data.batches(np.arange(8.0), batch_size=8).assemble(s).prefetch(2)
            >>> [(batch.shape, batch.sharding == s.spread) for batch in batches]
            [((8,), True)]
        """
        stage = ".assemble(s)"
        return self._then(assemble_node(self._node, self._stages, stage, checked_sharding("assemble(s)", s)), stage)
