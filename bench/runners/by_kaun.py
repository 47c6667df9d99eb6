"""kaun's loop, with its own layers or around the hand-written forward pass."""

import functools
import warnings

import jax
import jax.numpy as jnp
import optax

import kaun
from bench import networks
from bench.runners import Session, by_hand
from bench.workloads import BLOCKS, HEADS, LENGTH, VOCAB, WIDTH, Workload
from kaun import Data, Layer, Vars, layers, losses, reports, rng


def dense(workload: Workload):
    activation = layers.tanh if workload.binary else layers.relu
    pairs = list(zip(workload.sizes, workload.sizes[1:], strict=False))
    stack = [layer for a, b in pairs for layer in (layers.linear(a, b), activation())]
    params = [part for layer in workload.weights() for part in (layer, {})]
    return layers.sequential(stack[:-1]), params[:-1]


def cnn(workload: Workload):
    model = layers.sequential(
        [
            *(layers.conv2d(1, 16), layers.relu(), layers.max_pool2d(2)),
            *(layers.conv2d(16, 32), layers.relu(), layers.max_pool2d(2)),
            *(layers.flatten(), layers.linear(7 * 7 * 32, 128), layers.relu(), layers.linear(128, 10)),
        ]
    )
    a, b, c, d = workload.weights()
    return model, [a, {}, {}, b, {}, {}, {}, c, {}, d]


def positions():
    """A learned vector for each position, added to what comes in."""

    def init(*, dtype):
        weight = 0.02 * jax.random.normal(rng.next_key(), (LENGTH, WIDTH), dtype)
        return Vars(params={"weight": weight}, state={}, dtype=dtype)

    def apply(vars, x, *, training, ctx):
        return x + vars.params["weight"][None], vars

    return Layer(init=init, apply=apply, name="positions()")


def gpt(workload: Workload):
    def block():
        attention = layers.multi_head_attention(WIDTH, HEADS, is_causal=True)
        mlp = [layers.linear(WIDTH, 4 * WIDTH), layers.gelu(), layers.linear(4 * WIDTH, WIDTH)]
        return [
            layers.residual(layers.sequential([layers.layer_norm(WIDTH), attention])),
            layers.residual(layers.sequential([layers.layer_norm(WIDTH), *mlp])),
        ]

    blocks = [layer for _ in range(BLOCKS) for layer in block()]
    model = layers.embedding(VOCAB, WIDTH, scale=False) >> layers.sequential(
        [positions(), *blocks, layers.layer_norm(WIDTH), layers.linear(WIDTH, VOCAB)]
    )
    w = workload.weights()

    def below(block):
        attention = {f"{key}_proj": {"weight": block[key]} for key in ("q", "k", "v", "out")}
        return [{"inner": [block["norm1"], attention]}, {"inner": [block["norm2"], block["up"], {}, block["down"]]}]

    middle = [part for block in w["blocks"] for part in below(block)]
    right = [{"weight": w["positions"]}, *middle, w["norm"], w["head"]]
    return model, {"left": {"weight": w["tokens"]}, "right": right}


def own(workload: Workload):
    """kaun's layers and their initial variables."""
    if workload.model in networks.NAMES:
        model, params = networks.module(workload.model).kaun(workload.weights())
    else:
        model, params = {"dense": dense, "cnn": cnn, "gpt": gpt}[workload.model](workload)
    shapes = jax.eval_shape(lambda: in_scope(model.init))
    if jax.tree.leaves(shapes.state):
        shapes = in_scope(model.init)
    return model, shapes.replace(params=jax.tree.map(jnp.array, params))


def in_scope(init):
    with rng.scope(0):
        return init(dtype=jnp.float32)


def wrapped(workload: Workload):
    """A Layer around the hand-written forward pass, and its initial variables."""
    forward, params = by_hand.forward_of(workload), by_hand.weights_of(workload)
    shapes = jax.eval_shape(lambda: params)

    def init(*, dtype):
        return Vars(params=jax.tree.map(lambda a: jnp.zeros(a.shape, dtype), shapes), state={}, dtype=dtype)

    def apply(vars, x, *, training, ctx):
        return forward(vars.params, x), vars

    return Layer(init=init, apply=apply, name=workload.name), Vars(params=params, state={}, dtype=jnp.float32)


def items(workload: Workload, x, y):
    loss = losses.binary_cross_entropy if workload.binary else losses.cross_entropy_sparse
    if workload.repeats:
        return Data.repeat(workload.steps, (x, lambda output: losses.binary_cross_entropy(output, y)))
    with rng.scope(0):  # the key of Workload.order
        return Data.batches((x, y), batch_size=workload.batch, shuffle=True).with_loss(loss)


def session(workload: Workload, report=None, model_of=own, hand_over=True) -> Session:
    model, variables = model_of(workload)
    trainer = kaun.Trainer(model=model, optimizer=optax.adam(workload.rate))
    with rng.scope(1):
        states = [trainer.make_state(variables)]
    del variables
    x, y = by_hand.data_of(workload) if model_of is wrapped or workload.repeats else workload.data()
    data = items(workload, x, y)
    loss = by_hand.loss_of(workload)

    def run(steps):
        # Passed on, so that only fit refers to the previous state: the memory of one, as by hand.
        kept = None if hand_over else states[0]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fit received a pass")  # every measurement trains in one order
            taken = data if steps == workload.steps else data.take(steps)
            states.append(trainer.fit(states.pop(), taken, report=report))
        del kept
        jax.block_until_ready(states[0].vars)

    forward = jax.jit(functools.partial(model.apply, training=True))

    def check():
        output, _ = forward(states[0].vars, x[: workload.batch])
        return float(loss(output, y[: workload.batch]))

    return Session(run, check)


def no_report(workload: Workload) -> Session:
    return session(workload)


def held(workload: Workload) -> Session:
    """With the state from before in the caller's hands until ``fit`` is done, as in ``state = fit(state, x)``."""
    return session(workload, hand_over=False)


def every_hundred(workload: Workload) -> Session:
    seen = []
    return session(workload, report=reports.every(100, lambda step, loss, state: seen.append(loss)))


def each_step(workload: Workload) -> Session:
    seen = []
    return session(workload, report=lambda step, loss, state: seen.append(loss))


by_hand_inside = functools.partial(session, model_of=wrapped)
