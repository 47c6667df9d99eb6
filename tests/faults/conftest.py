"""Small states to save, disks that do not wait, and how long the tests may take: KAUN_FAULTS=long for all cases."""

import functools
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kaun import Trainer, layers, rng
from kaun.checkpoint.disk import Disk


class Quick(Disk):
    """Without waiting for the disk: what a loss of power does is simulated."""

    def sync(self, file):
        pass

    def sync_folder(self, path):
        pass


class Cases:
    """All cases in the long form, and some of them, always the same ones, in the quick form; prints how many."""

    def __init__(self):
        self.long = os.environ.get("KAUN_FAULTS") == "long"

    def some(self, cases, quick):
        cases = list(cases)
        chosen = cases if self.long else sorted(random.Random(0).sample(cases, min(quick, len(cases))))
        print(f"\nfaults: {len(chosen)} of {len(cases)} cases")
        return chosen


@pytest.fixture(scope="session")
def cases():
    return Cases()


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
