"""A language model of bytes: embedding, one LSTM, linear head."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.networks import uniform

VOCAB, WIDTH, HIDDEN = 256, 64, 128


def weights(g):
    lstm = {"weight_ih": uniform(g, WIDTH, HIDDEN, (WIDTH, 4 * HIDDEN))}
    lstm |= {"weight_hh": uniform(g, HIDDEN, HIDDEN, (HIDDEN, 4 * HIDDEN))}
    lstm |= {key: np.zeros(4 * HIDDEN, np.float32) for key in ("bias_ih", "bias_hh")}
    head = {"weight": uniform(g, HIDDEN, VOCAB, (HIDDEN, VOCAB)), "bias": np.zeros(VOCAB, np.float32)}
    return [{"weight": 0.1 * g.standard_normal((VOCAB, WIDTH), np.float32)}, lstm, head]


def hand(params, x):
    embedding, lstm, head = params

    def step(before, inputs):
        h, c = before
        i, f, g, o = jnp.split(inputs + h @ lstm["weight_hh"] + lstm["bias_hh"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    inputs = embedding["weight"][x] @ lstm["weight_ih"] + lstm["bias_ih"]
    zeros = jnp.zeros((len(x), HIDDEN))
    _, y = lax.scan(step, (zeros, zeros), inputs.swapaxes(0, 1))
    return y.swapaxes(0, 1) @ head["weight"] + head["bias"]


def kaun(weights):
    from kaun import layers

    embedding = layers.embedding(VOCAB, WIDTH, scale=False)
    return layers.sequential([embedding, layers.lstm(WIDTH, HIDDEN), layers.linear(HIDDEN, VOCAB)]), weights


def torch(weights):
    from torch import nn

    from bench.runners.by_torch import linear, parameter, tensor

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            embedding, lstm, head = weights
            self.embedding = nn.Embedding.from_pretrained(tensor(embedding["weight"]), freeze=False)
            self.lstm, self.head = nn.LSTM(WIDTH, HIDDEN, batch_first=True), linear(head)
            for key, values in lstm.items():
                setattr(self.lstm, f"{key}_l0", parameter(values.T))

        def forward(self, x):
            return self.head(self.lstm(self.embedding(x))[0])

    return Model()


def nnx(weights):
    from flax import nnx

    from bench.runners.by_nnx import fill, put

    class Model(nnx.Module):
        def __init__(self, rngs):
            embedding, lstm, head = weights
            self.embedding = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(WIDTH, HIDDEN, rngs=rngs), rngs=rngs)
            self.head = nnx.Linear(HIDDEN, VOCAB, rngs=rngs)
            put(self.embedding.embedding, embedding["weight"])
            put(self.lstm.cell.dense_i.kernel, lstm["weight_ih"])
            put(self.lstm.cell.dense_h.kernel, lstm["weight_hh"])
            fill(self.head, head)

        def __call__(self, x):
            return self.head(self.lstm(self.embedding(x)))

    return Model(nnx.Rngs(0))
