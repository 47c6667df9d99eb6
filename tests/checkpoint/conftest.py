"""Small states, and a disk that does not wait."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kaun import Trainer, layers, rng
from kaun.checkpoint.disk import Disk


class Quick(Disk):
    """Without waiting for the disk: nothing here takes the power away."""

    def sync(self, file):
        pass

    def sync_folder(self, path):
        pass


def bits(leaf):
    """Everything about a leaf but where it lives: its kind, dtype, shape, weak type, and bytes."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key", jax.random.key_impl(leaf), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes()
    if isinstance(leaf, jax.Array):
        return "jax", leaf.dtype, leaf.shape, leaf.weak_type, leaf.committed, np.asarray(leaf).tobytes()
    if isinstance(leaf, (np.ndarray, np.generic)):
        return type(leaf), leaf.dtype, leaf.shape, leaf.tobytes()
    return type(leaf), np.asarray(leaf).tobytes()


@pytest.fixture(scope="session")
def same():
    def same(a, b):
        return jax.tree.structure(a) == jax.tree.structure(b) and [bits(x) for x in jax.tree.leaves(a)] == [
            bits(x) for x in jax.tree.leaves(b)
        ]

    return same


@pytest.fixture(scope="session")
def make():
    """A state of a small model, another one for each seed."""

    def make(seed, width=2, optimizer=None):
        with rng.scope(seed):
            trainer = Trainer(model=layers.linear(width, 1), optimizer=optimizer or optax.sgd(0.1, momentum=0.9))
            return trainer.init(dtype=jnp.float32).replace(step=jnp.int32(seed))

    return make


@pytest.fixture(scope="session")
def disk():
    return Quick()
