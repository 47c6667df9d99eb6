"""The way back refuses what it cannot bring back. What comes back is tested with each library."""

import jax.numpy as jnp
import optax
import pytest

import kaun
from kaun import Layer, Vars, interop, layers


class Doubled:
    """An adapter of its own, as those of the package are made."""

    def init(self, *, dtype):
        return Vars(params={"w": jnp.ones(2, dtype)}, state={}, dtype=dtype)

    def apply(self, vars, x, /, *, training, ctx):
        return 2 * vars.params["w"] * x, vars

    def export(self, vars):
        return vars.params["w"]


def doubled():
    adapter = Doubled()
    return Layer(init=adapter.init, apply=adapter.apply)


def test_it_asks_the_adapter():
    layer = doubled()
    exported = interop.export(layer, layer.init().replace(params={"w": jnp.zeros(2)}))
    assert exported.tolist() == [0, 0]


def test_what_cannot_be_brought_back_is_refused():
    layer, linear = doubled(), layers.linear(1, 1)
    variables = layer.init()
    state = kaun.Trainer(model=layer, optimizer=optax.sgd(0.1)).init()
    with pytest.raises(
        TypeError, match=r"a kaun\.Vars, received TrainState\. Write interop\.export\(model, state\.vars\)"
    ):
        interop.export(layer, state)
    text = r"(?s)expected a layer that interop made .*, received linear\(1, 1\)\. .* interop\.export\(part, vars\.replace\("
    with pytest.raises(TypeError, match=text):
        interop.export(linear, linear.init())
    with pytest.raises(TypeError, match="expected a layer that interop made"):
        interop.export(layer >> linear, variables)
    text = r"^export expected the variables of layer, received others:\n  w: expected float32\[2\], found float32\[3\]$"
    with pytest.raises(ValueError, match=text.replace("  w:", "  params.w:")):
        interop.export(layer, variables.replace(params={"w": jnp.ones(3)}))
