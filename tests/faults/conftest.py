"""Small states to save, disks that do not wait, and which cases of a sweep run: all of them under the `slow` mark."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kaun import Trainer, layers, rng
from kaun.checkpoint.disk import Disk

OPERATIONS = (
    *("make_folder", "create", "write", "sync", "close", "sync_folder", "rename", "remove", "remove_folder"),
    *("entries", "open", "read", "free"),
)


class Killed(BaseException):
    """The process is gone: nothing that it would do after this is done."""


class Quick(Disk):
    """Without waiting for the disk: what a loss of power does is simulated."""

    def sync(self, file):
        pass

    def sync_folder(self, path):
        pass


class Cases:
    """All cases of a sweep in the long form, and in the short form some of each kind, always the same; prints how many."""

    def __init__(self, long):
        self.long = long

    def some(self, cases, short, kind=lambda case: None):
        """All cases, or in the short form `short` of each kind."""
        cases, kinds, draw = list(cases), {}, random.Random(0)
        for case in cases:
            kinds.setdefault(kind(case), []).append(case)
        some = [case for same in kinds.values() for case in draw.sample(same, min(short, len(same)))]
        chosen = cases if self.long else sorted(some)
        print(f"\nfaults: {len(chosen)} of {len(cases)} cases, of {len(kinds)} kinds")
        return chosen


@pytest.fixture(scope="session", params=["short", pytest.param("long", marks=pytest.mark.slow)])
def cases(request):
    return Cases(long=request.param == "long")


@pytest.fixture(scope="session")
def quick_disk():
    return Quick


@pytest.fixture(scope="session")
def state_of():
    """A small state, another one for each seed."""

    @functools.cache
    def state_of(seed):
        with rng.scope(seed):
            trainer = Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
            return trainer.init(dtype=jnp.float32).replace(step=jnp.int32(seed))

    return state_of


@pytest.fixture(scope="session")
def bytes_of():
    """A state as bytes: equal for equal states only."""

    def raw(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        return array.dtype.name, array.shape, array.tobytes()

    return lambda state: (str(jax.tree.structure(state)), *(raw(leaf) for leaf in jax.tree.leaves(state)))


@pytest.fixture(scope="session")
def stopping(quick_disk):
    """Makes a disk that stops at one of its operations, counted from 0; None: never."""

    def wrapped(name):
        real = getattr(quick_disk, name)

        def operation(self, *arguments):
            number = len(self.done)
            self.done.append(name)
            if self.dead or (number == self.at and self.how != "error"):
                if number == self.at and self.how == "half" and name == "write":
                    file, data = arguments
                    real(self, file, data[: len(data) // 2])
                self.dead = True
                if name == "close":
                    real(self, *arguments)  # as the system does for the dead
                raise Killed
            if number == self.at:
                self.failed = name
                if name == "close":
                    real(self, *arguments)
                raise OSError(28, "No space left on device")
            return real(self, *arguments)

        return operation

    kind = type("Stopping", (quick_disk,), {name: wrapped(name) for name in OPERATIONS})

    def make(at, how):
        disk = kind()
        disk.at, disk.how, disk.done, disk.dead, disk.failed = at, how, [], False, None
        return disk

    return make


@pytest.fixture(scope="session")
def killed():
    """What is raised where a disk of ``stopping`` kills the process."""
    return Killed


@pytest.fixture(scope="session")
def kinds_of_operations():
    return set(OPERATIONS)
