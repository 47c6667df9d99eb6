"""Models of other libraries where a layer is expected: the message names the adapter."""

import jax
import optax
import pytest

import kaun
from kaun import layers

OPTIMIZER = optax.sgd(0.1)


def nnx_module():
    nnx = pytest.importorskip("flax.nnx")
    return nnx.Linear(2, 1, rngs=nnx.Rngs(0))


def linen_module():
    return pytest.importorskip("flax.linen").Dense(1)


def equinox_module():
    return pytest.importorskip("equinox").nn.Linear(2, 1, key=jax.random.key(0))


def haiku_transformed():
    hk = pytest.importorskip("haiku")
    return hk.transform(lambda x: hk.Linear(1)(x))


@pytest.mark.parametrize(
    ("make", "write"),
    [
        (nnx_module, "interop.flax_nnx(module)."),
        (linen_module, "interop.linen(module, sample), with an input as sample."),
        (lambda: type(linen_module()), "interop.linen(module, sample), with an input as sample."),
        (equinox_module, "interop.equinox(module)."),
        (haiku_transformed, "interop.haiku(hk.transform_with_state(forward), sample), with forward a function that makes "
         "and applies the module."),
    ],
)  # fmt: skip
def test_a_model_of_another_library_names_its_adapter(make, write):
    module = make()
    with pytest.raises(TypeError) as caught:
        kaun.Trainer(model=module, optimizer=OPTIMIZER)
    assert str(caught.value).endswith(f"rite model={write}")
    with pytest.raises(TypeError) as caught:
        layers.sequential([layers.linear(2, 2), module])
    assert str(caught.value).endswith(f"rite {write}")
