"""Keras on JAX: ``model.fit``. It shuffles by its own key, so it gets the rows in the order of the others."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import functools

import keras
import numpy as np
from keras import layers

from bench.runners import Session
from bench.workloads import BLOCKS, HEADS, LENGTH, VOCAB, WIDTH, Workload


def flat(values):
    return [values["weight"], values["bias"]]


def dense(workload: Workload):
    activation = "tanh" if workload.binary else "relu"
    stack = [layers.Dense(n, activation=activation) for n in workload.sizes[1:-1]]
    model = keras.Sequential([keras.Input((workload.sizes[0],)), *stack, layers.Dense(workload.sizes[-1])])
    return model, [a for layer in workload.weights() for a in flat(layer)]


def cnn(workload: Workload):
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            *(layers.Conv2D(16, 3, padding="same", activation="relu"), layers.MaxPooling2D(2)),
            *(layers.Conv2D(32, 3, padding="same", activation="relu"), layers.MaxPooling2D(2)),
            *(layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10)),
        ]
    )
    return model, [a for layer in workload.weights() for a in flat(layer)]


class Positions(layers.Layer):
    def build(self, shape):
        self.weight = self.add_weight(shape=(LENGTH, WIDTH), name="weight")

    def call(self, x):
        return x + self.weight


def gpt(workload: Workload):
    gelu = functools.partial(keras.ops.gelu, approximate=True)
    norm = functools.partial(layers.LayerNormalization, epsilon=1e-5)
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = Positions()(layers.Embedding(VOCAB, WIDTH)(tokens))
    for _ in range(BLOCKS):
        h = norm()(x)
        x = x + layers.MultiHeadAttention(HEADS, WIDTH // HEADS, use_bias=False)(h, h, use_causal_mask=True)
        h = layers.Dense(4 * WIDTH, activation=gelu)(norm()(x))
        x = x + layers.Dense(WIDTH)(h)
    model = keras.Model(tokens, layers.Dense(VOCAB)(norm()(x)))
    w = workload.weights()
    values, split = [w["tokens"], w["positions"]], (WIDTH, HEADS, WIDTH // HEADS)
    for b in w["blocks"]:
        values += [*flat(b["norm1"]), *(b[key].reshape(split) for key in "qkv")]
        values += [b["out"].reshape(HEADS, WIDTH // HEADS, WIDTH), *flat(b["norm2"]), *flat(b["up"]), *flat(b["down"])]
    return model, [*values, *flat(w["norm"]), *flat(w["head"])]


def session(workload: Workload) -> Session:
    model, values = {"dense": dense, "cnn": cnn, "gpt": gpt}[workload.model](workload)
    model.set_weights(values)
    del values
    if workload.binary:
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
    else:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # optax's epsilon; Keras' own default is ten times it
    model.compile(optimizer=keras.optimizers.Adam(workload.rate, epsilon=1e-8), loss=loss)
    (x, y), batch = workload.data(), workload.batch
    rows = workload.order().reshape(-1)
    ordered = np.ascontiguousarray(x[rows]), np.ascontiguousarray(y[rows])

    def run(steps):
        a, b = (values[: steps * batch] for values in ordered)
        model.fit(a, b, batch_size=batch, epochs=1, shuffle=False, verbose=0)

    return Session(run, lambda: float(model.evaluate(x[:batch], y[:batch], batch_size=batch, verbose=0)))
