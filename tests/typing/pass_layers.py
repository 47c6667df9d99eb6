"""Models compose where the kinds of output and input agree."""

from typing import Any, assert_type

import jax
import jax.numpy as jnp

from kaun import Context, Layer, Vars, layers
from kaun.layers import Float, Int

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
