"""Equinox with the training step of its docs, ``eqx.filter_jit``, ``eqx.filter_value_and_grad``, or in kaun."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from bench.runners import Session, by_hand, by_kaun
from bench.workloads import BLOCKS, HEADS, LENGTH, VOCAB, WIDTH, Workload
from kaun import interop

KEY = jax.random.key(0)  # every weight is replaced


def linear(values):
    made = eqx.nn.Linear(*values["weight"].shape, key=KEY)
    return put(lambda m: (m.weight, m.bias), made, values["weight"].T, values["bias"])


def conv(values):
    out, into = values["weight"].shape[:2]
    made = eqx.nn.Conv2d(into, out, kernel_size=3, padding=1, key=KEY)
    return put(lambda m: (m.weight, m.bias), made, values["weight"], values["bias"][:, None, None])


def norm(values):
    return put(lambda m: (m.weight, m.bias), eqx.nn.LayerNorm(WIDTH), values["weight"], values["bias"])


def put(where, module, *values):
    found = [a.shape for a in where(module)]
    if found != [v.shape for v in values]:
        raise ValueError(f"expected weights of shapes {found}, received {[v.shape for v in values]}")
    return eqx.tree_at(where, module, tuple(map(jnp.array, values)))


def dense(workload: Workload):
    activation = eqx.nn.Lambda(jnp.tanh if workload.binary else jax.nn.relu)
    stack = [part for values in workload.weights() for part in (linear(values), activation)]
    return eqx.nn.Sequential(stack[:-1])


def cnn(workload: Workload):
    a, b, c, d = by_hand.channels_first(workload.weights())
    relu, pool = eqx.nn.Lambda(jax.nn.relu), eqx.nn.MaxPool2d(kernel_size=2, stride=2)
    stack = [conv(a), relu, pool, conv(b), relu, pool, eqx.nn.Lambda(jnp.ravel), linear(c), relu, linear(d)]
    return eqx.nn.Sequential(stack)


class Block(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, values):
        self.norm1, self.norm2 = norm(values["norm1"]), norm(values["norm2"])
        self.up, self.down = linear(values["up"]), linear(values["down"])
        projections = lambda m: tuple(p.weight for p in (m.query_proj, m.key_proj, m.value_proj, m.output_proj))
        made = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=KEY)
        self.attention = put(projections, made, *(values[key].T for key in ("q", "k", "v", "out")))

    def __call__(self, x, mask):
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h, mask=mask)
        hidden = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm2)(x)))
        return x + jax.vmap(self.down)(hidden)


class GPT(eqx.Module):
    tokens: eqx.nn.Embedding
    positions: jax.Array
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, workload):
        w = workload.weights()
        self.tokens = eqx.nn.Embedding(VOCAB, WIDTH, weight=jnp.array(w["tokens"]))
        self.positions = jnp.array(w["positions"])
        self.blocks = [Block(values) for values in w["blocks"]]
        self.norm, self.head = norm(w["norm"]), linear(w["head"])
        assert len(self.blocks) == BLOCKS
        assert len(self.positions) == LENGTH

    def __call__(self, tokens):
        mask = jnp.tri(len(tokens), dtype=bool)
        x = jax.vmap(self.tokens)(tokens) + self.positions
        for block in self.blocks:
            x = block(x, mask)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


def made(workload: Workload):
    return {"dense": dense, "cnn": cnn, "gpt": GPT}[workload.model](workload)


def as_layer(workload: Workload):
    layer = interop.equinox(made(workload))
    return layer, layer.init(dtype=jnp.float32)


in_kaun = functools.partial(by_kaun.session, model_of=as_layer)


def session(workload: Workload) -> Session:
    model = made(workload)
    optim = optax.adam(workload.rate)
    opt_state = optim.init(eqx.filter(model, eqx.is_array))
    loss = by_hand.loss_of(workload)
    (x, y), order = by_hand.data_of(workload), workload.order()

    def loss_fn(model, x, y):
        return loss(jax.vmap(model)(x), y)

    @eqx.filter_jit
    def make_step(model, opt_state, x, y):
        value, grads = eqx.filter_value_and_grad(loss_fn)(model, x, y)
        updates, opt_state = optim.update(grads, opt_state, eqx.filter(model, eqx.is_array))
        model = eqx.apply_updates(model, updates)
        return model, opt_state, value

    def run(steps):
        nonlocal model, opt_state
        for a, b in workload.batches(x, y, order[:steps]):
            model, opt_state, _ = make_step(model, opt_state, a, b)
        jax.block_until_ready(eqx.filter(model, eqx.is_array))

    evaluate = eqx.filter_jit(loss_fn)
    return Session(run, lambda: float(evaluate(model, x[: workload.batch], y[: workload.batch])))
