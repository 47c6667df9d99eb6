"""The loops that one would write by hand: ``jax.jit``, donated arguments, optax, and stock operations of JAX."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bench import networks
from bench.runners import Session
from bench.workloads import HEADS, WIDTH, Workload


def dense(workload: Workload):
    activation = jnp.tanh if workload.binary else jax.nn.relu

    def forward(params, x):
        for layer in params[:-1]:
            x = activation(x @ layer["weight"] + layer["bias"])
        return x @ params[-1]["weight"] + params[-1]["bias"]

    return forward


def cnn(workload: Workload):
    """Channels first: the layout of the operations' own defaults."""

    def block(x, layer):
        x = lax.conv(x, layer["weight"], (1, 1), "SAME") + layer["bias"][:, None, None]
        return lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

    def forward(params, x):
        x = block(block(x, params[0]), params[1])
        x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params[2]["weight"] + params[2]["bias"])
        return x @ params[3]["weight"] + params[3]["bias"]

    return forward


def gpt(workload: Workload):
    def norm(layer, x):
        x = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * layer["weight"] + layer["bias"]

    def attention(block, x):
        q, k, v = (jnp.reshape(x @ block[key], (*x.shape[:2], HEADS, WIDTH // HEADS)) for key in "qkv")
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(WIDTH // HEADS)
        logits = jnp.where(jnp.tri(x.shape[1], dtype=bool), logits, -jnp.inf)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)
        return y.reshape(x.shape) @ block["out"]

    def forward(params, tokens):
        x = params["tokens"][tokens] + params["positions"]
        for block in params["blocks"]:
            x = x + attention(block, norm(block["norm1"], x))
            hidden = jax.nn.gelu(norm(block["norm2"], x) @ block["up"]["weight"] + block["up"]["bias"])
            x = x + hidden @ block["down"]["weight"] + block["down"]["bias"]
        return norm(params["norm"], x) @ params["head"]["weight"] + params["head"]["bias"]

    return forward


def loss_of(workload: Workload):
    if workload.binary:
        return lambda output, y: optax.sigmoid_binary_cross_entropy(output, y).mean()
    return lambda output, y: optax.softmax_cross_entropy_with_integer_labels(output, y).mean()


def forward_of(workload: Workload):
    if workload.model in networks.NAMES:
        return networks.module(workload.model).hand
    return {"dense": dense, "cnn": cnn, "gpt": gpt}[workload.model](workload)


def channels_first(layers):
    """The weights of ``cnn`` for images [channels, height, width]; the third layer reads them flattened."""
    first, second, third, last = layers
    turned = [{**layer, "weight": layer["weight"].transpose(3, 2, 0, 1)} for layer in (first, second)]
    rows = third["weight"].reshape(7, 7, 32, 128).transpose(2, 0, 1, 3).reshape(-1, 128)
    return [*turned, {**third, "weight": rows}, last]


def weights_of(workload: Workload):
    made = workload.weights()
    return jax.tree.map(jnp.array, channels_first(made) if workload.model == "cnn" else made)


def data_of(workload: Workload):
    """The rows as the forward pass takes them; of a batch that repeats device arrays, as one would write it."""
    x, y = workload.data()
    if workload.model == "cnn":
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return (jnp.asarray(x), jnp.asarray(y)) if workload.repeats else (x, y)


def parts(workload: Workload):
    """The objective, one step (not yet compiled), and the state to start from."""
    forward, loss = forward_of(workload), loss_of(workload)
    optimizer = optax.adam(workload.rate)
    objective = lambda params, x, y: loss(forward(params, x), y)

    def step(params, opt_state, x, y):
        value, gradient = jax.value_and_grad(objective)(params, x, y)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = weights_of(workload)
    return objective, step, (params, optimizer.init(params))


def looped(workload: Workload, sync: bool) -> Session:
    objective, step, (params, opt_state) = parts(workload)
    (x, y), order = data_of(workload), workload.order()
    step = jax.jit(step, donate_argnums=(0, 1))
    evaluate = jax.jit(objective)

    def run(steps):
        nonlocal params, opt_state
        for a, b in workload.batches(x, y, order[:steps]):
            params, opt_state, value = step(params, opt_state, a, b)
            if sync:
                float(value)
        jax.block_until_ready(params)

    return Session(run, lambda: float(evaluate(params, x[: workload.batch], y[: workload.batch])))


def unsynced(workload: Workload) -> Session:
    return looped(workload, sync=False)


def synced(workload: Workload) -> Session:
    return looped(workload, sync=True)


def scanned(workload: Workload) -> Session:
    """All steps in one compiled scan; the rows are on the device and gathered there."""
    objective, step, (params, opt_state) = parts(workload)
    (x, y), order = jax.device_put(data_of(workload)), jnp.asarray(workload.order())
    evaluate = jax.jit(objective)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params, opt_state, x, y, order):
        def body(carry, rows):
            batch = (x, y) if workload.repeats else (x[rows], y[rows])
            *carry, value = step(*carry, *batch)
            return tuple(carry), value

        return lax.scan(body, (params, opt_state), order)

    def run(steps):
        nonlocal params, opt_state
        (params, opt_state), values = train(params, opt_state, x, y, order[:steps])
        float(values[-1])
        jax.block_until_ready(params)

    return Session(run, lambda: float(evaluate(params, x[: workload.batch], y[: workload.batch])))
