"""Arrays on several devices: kaun's convolution of them, and their way through a file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kaun import checkpoint
from kaun._kernels import ConvConfig, convolve


def placed(count):
    """Shardings of axis 0 over so many devices, and of whole copies on each."""
    mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())


@pytest.mark.parametrize(("n_in", "n_out", "groups"), [(4, 8, 1), (1, 8, 1), (4, 8, 2), (4, 4, 4)])
def test_gradients_of_a_convolution(n_in, n_out, groups):
    rows, everywhere = placed(2)
    g = np.random.default_rng(0)
    x, w = (g.normal(size=s).astype(np.float32) for s in ((4, 6, 6, n_in), (3, 3, n_in // groups, n_out)))
    loss = lambda x, w: (convolve(x, w, ConvConfig((1, 1), (1, 1), ((1, 1), (1, 1))), groups) ** 2).sum()
    slopes = jax.jit(jax.grad(loss, (0, 1)))
    found = slopes(jax.device_put(x, rows), jax.device_put(w, everywhere))
    for a, b in zip(found, slopes(x, w), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert len(found[0].sharding.device_set) == 2


def test_sharded_arrays_come_back_sharded(tmp_path):
    rows, everywhere = placed(4)
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    keys = jax.random.split(jax.random.key(0), 4)
    tree = {"rows": jax.device_put(values, rows), "all": jax.device_put(values, everywhere)}
    tree["keys"] = jax.device_put(keys, rows)
    checkpoint.save(tmp_path / "arrays.safetensors", tree)
    loaded = checkpoint.load(tmp_path / "arrays.safetensors", like=tree)
    for name, leaf in loaded.items():
        assert leaf.sharding.is_equivalent_to(tree[name].sharding, leaf.ndim), (name, leaf.sharding)
        assert bool(jnp.all(leaf == tree[name])), name
    one = checkpoint.load(tmp_path / "arrays.safetensors", like={**tree, "rows": jnp.asarray(values)})["rows"]
    assert len(one.devices()) == 1 and np.array_equal(one, values)
