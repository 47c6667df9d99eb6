"""Models compose where the kinds of output and input agree."""

from typing import Any, assert_type

import jax
import jax.numpy as jnp

from kaun import Context, Layer, Vars, layers
from kaun.layers import Float, Int, Module

classifier = layers.embedding(10, 4) >> layers.linear(4, 2)
assert_type(classifier, Layer[Int, Float])
assert_type(layers.compose(layers.embedding(10, 4), layers.linear(4, 2)), Layer[Int, Float])

mlp = layers.sequential([layers.linear(2, 4), layers.tanh(), layers.dropout(0.1), layers.linear(4, 1)])
assert_type(mlp, Layer[Float, Float])
assert_type(layers.embedding(10, 2) >> mlp, Layer[Int, Float])
assert_type(layers.residual(layers.linear(3, 3)), Layer[Float, Float])

cnn = layers.sequential(
    [
        layers.conv2d(1, 8),
        layers.batch_norm(8),
        layers.relu(),
        layers.max_pool2d((2, 2)),
        layers.flatten(),
        layers.linear(128, 10, weight_init=jax.nn.initializers.he_normal()),
    ]
)
assert_type(cnn, Layer[Float, Float])

attention = layers.sequential([layers.layer_norm(8), layers.multi_head_attention(8, 2, is_causal=True)])
assert_type(layers.embedding(100, 8) >> layers.residual(attention) >> layers.linear(8, 100), Layer[Int, Float])

# Any function fits anywhere.
assert_type(layers.linear(2, 4) >> layers.fn(jnp.sin) >> layers.linear(4, 1), Layer[Float, Float])


def init(*, dtype: Any) -> Vars:
    return Vars(params={"scale": jnp.ones((), dtype)}, state={}, dtype=dtype)


def apply(vars: Vars, x: Any, /, *, training: bool, ctx: Context) -> tuple[Any, Vars]:
    return x * vars.params["scale"], vars


scale: Layer[Float, Float] = Layer(init=init, apply=apply, name="scale()")
model = scale >> layers.relu()
variables = model.init(dtype=jnp.float32)
assert_type(variables, Vars)
output, after = model.apply(variables, jnp.ones(3), training=True, ctx=Context())
assert_type(after, Vars)

# An embedding may stand first; names in place of positions change no kind.
assert_type(layers.sequential([layers.embedding(10, 4), layers.linear(4, 2)]), Layer[Int, Float])
assert_type(layers.sequential({"words": layers.embedding(10, 4), "out": layers.linear(4, 2)}), Layer[Int, Float])
assert_type(layers.sequential({"hidden": layers.linear(2, 4), "sine": layers.fn(jnp.sin)}), Layer[Float, Float])


# The kinds of a module are those of forward's annotations.
def images(m: Module, x: jax.Array) -> jax.Array:
    for block in m.blocks:
        x = x + block(x)
    return m.heads["main"](x) if m.training else x


def tokens(m: Module, x: Int) -> jax.Array:
    places = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape)
    return (m.words(x) + m.places(places)) @ m.params["words"]["weight"].T


def pair(m: Module, x: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return m.left(x["left"]), x["right"]


vision = layers.module({"blocks": [layers.linear(4, 4)], "heads": {"main": layers.relu()}}, images, name="vision")
assert_type(vision, Layer[Float, Float])
words = layers.module({"words": layers.embedding(10, 4), "places": layers.embedding(8, 4)}, tokens)
assert_type(words, Layer[Int, Float])
assert_type(words >> layers.linear(10, 4) >> vision, Layer[Int, Float])
assert_type(
    layers.module({"left": layers.linear(2, 2)}, pair), Layer[dict[str, jax.Array], tuple[jax.Array, jax.Array]]
)
assert_type(layers.module({"a": layers.linear(4, 4)}, lambda m, x: x + m.a(x)), Layer[Float, Float])
assert_type(layers.repeat(vision, 3, remat=True), Layer[Float, Float])
assert_type(layers.parameter((1, 4)) >> layers.relu(), Layer[Any, Float])
adapted = layers.lora(words, 2, where=lambda path: path.endswith("words.weight"))
assert_type(layers.merge_lora(adapted, adapted.init()), Vars)

# Lists that were put together, and layers of other kinds.
hidden = [layers.linear(4, 4) for _ in range(2)]
assert_type(layers.sequential(hidden), Layer[Float, Float])
assert_type(layers.sequential([layers.embedding(10, 4), *hidden, layers.relu()]), Layer[Int, Float])
both = [layers.embedding(10, 4), layers.linear(4, 2)]
assert_type(layers.sequential(both), Layer[Int, Float])
two_inputs = layers.module({"left": layers.linear(2, 2)}, pair)
assert_type(layers.sequential([two_inputs, layers.fn(jnp.sin)]), Layer[Any, Any])

# Functions without annotations.
assert_type(layers.fn(lambda x: x.reshape(len(x), -1)), Layer[Any, Any])
assert_type(layers.module({"a": layers.linear(2, 2)}, lambda m, x: (m.a(x), x)), Layer[Float, tuple[Any, jax.Array]])
