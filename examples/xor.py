"""XOR, the smallest program: a model, an optimizer, and one batch that is used in every step.

Run it with: python examples/xor.py
"""

import jax
import jax.numpy as jnp
import optax

import kaun
from kaun import Data, layers, losses, rng


def main(*, steps=1000, seed=42):
    x = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]], jnp.float32)
    y = jnp.array([[0], [1], [1], [0]], jnp.float32)

    # Inside the scope, the random weights depend only on the seed.
    with rng.scope(seed):
        model = layers.sequential([layers.linear(2, 4), layers.tanh(), layers.linear(4, 1)])
        trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.01))
        state = trainer.init(dtype=jnp.float32)

    # An item of data is an input and a loss: a function of the model's output that captures the labels.
    data = Data.repeat(steps, (x, lambda logits: losses.binary_cross_entropy(logits, y)))
    state = trainer.fit(state, data)

    predicted = jax.nn.sigmoid(trainer.predict(state, x))
    for (a, b), p in zip(x.tolist(), predicted[:, 0].tolist(), strict=True):
        print(f"{a:.0f} xor {b:.0f} = {p:.3f}")
    return trainer, state


if __name__ == "__main__":
    main()
