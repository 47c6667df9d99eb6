"""fit against loops written by hand with jax.jit and optax: the reference that needs no library of layers at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, rng

STEPS = 50


def train_by_hand(optimizer, params, state, forward, loss, items):
    """The loop of optax's documentation, with layer state as an auxiliary output."""

    @jax.jit
    def step(params, opt_state, state, x, y):
        def objective(params):
            out, after = forward(params, state, x)
            return loss(out, y), after

        (value, state_after), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state, state_after

    opt_state, values = optimizer.init(params), []
    for x, y in items:
        value, params, opt_state, state = step(params, opt_state, state, x, y)
        values.append(float(value))
    return values, params, state


def mlp(params, state, x):
    hidden = jnp.tanh(x @ params[0]["weight"] + params[0]["bias"])
    return hidden @ params[2]["weight"] + params[2]["bias"], state


def normed(params, state, x):
    x = x @ params[0]["weight"]  # no bias: its gradient would be zero but for rounding, which adam blows up
    mean, var = x.mean(0), x.var(0)
    after = [
        {},
        {
            "running_mean": 0.99 * state[1]["running_mean"] + 0.01 * mean,
            "running_var": 0.99 * state[1]["running_var"] + 0.01 * var,
        },
        {},
        {},
    ]
    x = (x - mean) / jnp.sqrt(var + 1e-5) * params[1]["weight"] + params[1]["bias"]
    return jax.nn.relu(x) @ params[3]["weight"] + params[3]["bias"], after


def conv(params, state, x):
    x = jax.lax.conv_general_dilated(x, params[0]["weight"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jax.nn.relu(x + params[0]["bias"])
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(x.shape[0], -1) @ params[4]["weight"] + params[4]["bias"], state


CASES = {
    "mlp": (lambda: [layers.linear(6, 8), layers.tanh(), layers.linear(8, 3)], mlp, (6,)),
    "batch_norm": (
        lambda: [layers.linear(6, 8, bias=False), layers.batch_norm(8), layers.relu(), layers.linear(8, 3)],
        normed,
        (6,),
    ),
    "cnn": (
        lambda: [layers.conv2d(1, 4), layers.relu(), layers.max_pool2d(2), layers.flatten(), layers.linear(36, 3)],
        conv,
        (6, 6, 1),
    ),
}
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.05),
    "adam": lambda: optax.adam(1e-2),
    "adamw_cosine": lambda: optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS), weight_decay=0.1),
    "clipped_momentum": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.9)),
}


# Each model and each optimizer; the other pairs are in the long form.
SHORT = {("mlp", "adamw_cosine"), ("mlp", "clipped_momentum"), ("batch_norm", "adam"), ("cnn", "sgd")}
PAIRS = [
    pytest.param(case, optimizer, marks=[] if (case, optimizer) in SHORT else pytest.mark.slow)
    for case in CASES
    for optimizer in OPTIMIZERS
]


@pytest.mark.parametrize(("case", "optimizer"), PAIRS)
def test_fifty_steps_agree_with_a_loop_by_hand(case, optimizer):
    make, forward, shape = CASES[case]
    g = np.random.default_rng(0)
    x, y = g.normal(size=(STEPS, 8, *shape)).astype(np.float32), g.integers(0, 3, (STEPS, 8))
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.sequential(make()), optimizer=OPTIMIZERS[optimizer]())
        state = trainer.init()
    data = Data.from_arrays(x, y).with_loss(losses.cross_entropy_sparse)
    found = []
    end = trainer.fit(state, data, report=lambda step, loss, state: found.append(loss))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        values, params, layer_state = train_by_hand(
            trainer.optimizer,
            state.vars.params,
            state.vars.state,
            forward,
            lambda out, y: optax.softmax_cross_entropy_with_integer_labels(out, y).mean(),
            zip(x, y, strict=True),
        )
    np.testing.assert_allclose(found, values, rtol=2e-5, atol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    jax.tree.map(close, end.vars.params, params)
    jax.tree.map(close, end.vars.state, layer_state)
