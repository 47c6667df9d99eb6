"""Filled rows of padded batches in modules of other libraries that keep statistics of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import Context, interop, rng

X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
MASK = np.arange(5) < 3


def linen(takes):
    nn = pytest.importorskip("flax.linen")

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            return nn.BatchNorm(use_running_average=not train)(x)

    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool, row_mask=None):
            mask = None if row_mask is None else row_mask[:, None]
            return nn.BatchNorm(use_running_average=not train)(x, mask=mask)

    return interop.linen(Masked() if takes else Plain(), X)


def nnx(takes):
    nnx = pytest.importorskip("flax.nnx")

    class Masked(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x, row_mask=None):
            return self.norm(x, mask=None if row_mask is None else row_mask[:, None])

    return interop.flax_nnx(Masked() if takes else nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


def haiku(takes):
    hk = pytest.importorskip("haiku")
    return interop.haiku(
        hk.transform_with_state(lambda x, is_training: hk.BatchNorm(True, True, 0.9)(x, is_training)), X
    )


def equinox(takes):
    eqx = pytest.importorskip("equinox")
    return interop.equinox(*eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch"))


def applied(model, training=True):
    with rng.scope(0):
        variables = model.init(dtype=jnp.float32)

    @jax.jit
    def run(variables, key):
        with rng.scope(key), jax.numpy_dtype_promotion("standard"):
            return model.apply(variables, X, training=training, ctx=Context(row_mask=MASK))

    return run(variables, jax.random.key(0))


@pytest.mark.parametrize("make", [linen, nnx, haiku, equinox])
def test_statistics_of_filled_rows_are_refused(make):
    model = make(False)
    with pytest.raises(ValueError, match=r"changes its state '.*' in training and would count the filled rows of a padded batch, "
                       r"because its call does not take row_mask\. .*drop_last=True"):  # fmt: skip
        applied(model)
    applied(model, training=False)


@pytest.mark.parametrize("make", [linen, nnx])
def test_a_call_that_takes_the_mask_leaves_them_out(make):
    after = applied(make(True))[1]
    (mean,) = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(after.state) if "mean" in str(path)]
    share = np.asarray(mean) / X[:3].mean(axis=0)
    assert np.allclose(share, share[0], rtol=1e-5) and 0 < share[0] < 1
