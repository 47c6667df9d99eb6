"""Flax NNX with the training step of its docs, ``nnx.jit``, ``nnx.value_and_grad``, ``nnx.Optimizer``, or in kaun."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bench import networks
from bench.runners import Session, by_hand, by_kaun
from bench.workloads import BLOCKS, HEADS, LENGTH, VOCAB, WIDTH, Workload
from kaun import interop


class Dense(nnx.Module):
    def __init__(self, workload, rngs):
        pairs = list(zip(workload.sizes, workload.sizes[1:], strict=False))
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])
        self.activation = nnx.tanh if workload.binary else nnx.relu

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)

    def load(self, weights):
        for layer, values in zip(self.layers, weights, strict=True):
            fill(layer, values)


class CNN(nnx.Module):
    def __init__(self, workload, rngs):
        self.conv1 = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, kernel_size=(3, 3), rngs=rngs)
        self.linear1 = nnx.Linear(7 * 7 * 32, 128, rngs=rngs)
        self.linear2 = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv1(x)), window_shape=(2, 2), strides=(2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), window_shape=(2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return self.linear2(nnx.relu(self.linear1(x)))

    def load(self, weights):
        for layer, values in zip((self.conv1, self.conv2, self.linear1, self.linear2), weights, strict=True):
            fill(layer, values)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, use_bias=False, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    def load(self, values):
        for name in ("norm1", "norm2", "up", "down"):
            fill(getattr(self, name), values[name])
        split = (WIDTH, HEADS, WIDTH // HEADS)
        for name, key in (("query", "q"), ("key", "k"), ("value", "v")):
            put(getattr(self.attention, name).kernel, values[key].reshape(split))
        put(self.attention.out.kernel, values["out"].reshape(HEADS, WIDTH // HEADS, WIDTH))


class GPT(nnx.Module):
    def __init__(self, workload, rngs):
        self.tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        mask = nnx.make_causal_mask(tokens)
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1])[None])
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))

    def load(self, weights):
        put(self.tokens.embedding, weights["tokens"])
        put(self.positions.embedding, weights["positions"])
        for block, values in zip(self.blocks, weights["blocks"], strict=True):
            block.load(values)
        fill(self.norm, weights["norm"])
        fill(self.head, weights["head"])


def put(variable, value):
    if variable.shape != value.shape:
        raise ValueError(f"expected a weight of shape {variable.shape}, received {value.shape}")
    variable.set_value(jnp.array(value))


def fill(layer, values):
    put(layer.scale if isinstance(layer, nnx.LayerNorm) else layer.kernel, values["weight"])
    put(layer.bias, values["bias"])


def made(workload: Workload):
    if workload.model in networks.NAMES:
        return networks.module(workload.model).nnx(workload.weights())
    model = {"dense": Dense, "cnn": CNN, "gpt": GPT}[workload.model](workload, nnx.Rngs(0))
    model.load(workload.weights())
    return model


def as_layer(workload: Workload):
    layer = interop.flax_nnx(made(workload))
    return layer, layer.init(dtype=jnp.float32)


in_kaun = functools.partial(by_kaun.session, model_of=as_layer)


def session(workload: Workload) -> Session:
    model = made(workload)
    optimizer = nnx.Optimizer(model, optax.adam(workload.rate), wrt=nnx.Param)
    loss = by_hand.loss_of(workload)
    (x, y), order = by_hand.data_of(workload) if workload.repeats else workload.data(), workload.order()

    @nnx.jit
    def train_step(model, optimizer, x, y):
        def loss_fn(model):
            return loss(model(x), y)

        value, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return value

    def run(steps):
        for a, b in workload.batches(x, y, order[:steps]):
            train_step(model, optimizer, a, b)
        jax.block_until_ready(nnx.state(model))

    evaluate = nnx.jit(lambda model, x, y: loss(model(x), y))
    return Session(run, lambda: float(evaluate(model, x[: workload.batch], y[: workload.batch])))
