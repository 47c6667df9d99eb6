"""The models, optimizers and comparisons that every law is tried on."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, rng


def _mlp():
    return layers.sequential([layers.linear(5, 8), layers.tanh(), layers.linear(8, 3)])


def _norms():
    parts = [layers.linear(5, 8), layers.batch_norm(8), layers.relu(), layers.dropout(0.5), layers.linear(8, 3)]
    return layers.sequential(parts)


def _cnn():
    parts = [
        layers.conv2d(1, 4, (3, 3), stride=2),
        layers.batch_norm(4),
        layers.relu(),
        layers.max_pool2d(2),
        layers.dropout(0.25),
        layers.flatten(),
        layers.linear(16, 3),
    ]
    return layers.sequential(parts)


def _attend(dropout):
    return layers.residual(
        layers.layer_norm(8) >> layers.multi_head_attention(8, 2, is_causal=True, rope=True, dropout=dropout)
    )


def _attention():
    return layers.embedding(11, 8) >> _attend(0.1) >> layers.linear(8, 11)


def _transformer():
    """For the long form: compiling it costs as much as compiling all the others."""
    more = layers.sequential([layers.layer_norm(8), layers.linear(8, 16), layers.gelu(), layers.linear(16, 8)])
    return layers.embedding(11, 8) >> _attend(0.1) >> layers.residual(more) >> _attend(0.0) >> layers.linear(8, 11)


def _wide():
    """Too large to be packed (kaun.packing), which the others are not."""
    return layers.sequential([layers.linear(5, 1024), layers.batch_norm(1024), layers.relu(), layers.linear(1024, 3)])


def _module():
    """Layers that are applied twice, and copies in a loop."""
    parts = {
        "first": layers.linear(5, 8), "norm": layers.batch_norm(8), "drop": layers.dropout(0.25),
        "blocks": layers.repeat(layers.residual(layers.linear(8, 8) >> layers.dropout(0.25)), 2),
        "last": layers.linear(8, 3),
    }  # fmt: skip

    def forward(m, x):
        x = m.drop(m.norm(m.first(x)))
        return m.last(m.drop(m.norm(m.blocks(x))))

    return layers.module(parts, forward)


MODELS = {
    "wide": _wide,
    "mlp": _mlp,
    "norms": _norms,
    "cnn": _cnn,
    "attention": _attention,
    "module": _module,
    "transformer": _transformer,
}

OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw_schedule": lambda: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 20)),
    "nesterov": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=3),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "ema": lambda: optax.chain(optax.sgd(1e-2), optax.ema(0.9)),
}


def _arrays(model, n=18, seed=0):
    """Inputs and integer labels for one of MODELS."""
    g = np.random.default_rng(seed)
    if model in ("attention", "transformer"):
        return g.integers(0, 11, (n, 6), dtype=np.int32), g.integers(0, 11, (n, 6), dtype=np.int32)
    shape = (n, 8, 8, 1) if model == "cnn" else (n, 5)
    return g.normal(size=shape).astype(np.float32), g.integers(0, 3, n, dtype=np.int32)


def _data(model, n=18, batch_size=6, epochs=2, seed=3):
    """Shuffled batches with a fresh closure for each."""
    with rng.scope(seed):
        batches = Data.batches(_arrays(model, n), batch_size=batch_size, shuffle=True)
    return batches.map(lambda b: (b[0], lambda out: losses.cross_entropy_sparse(out, b[1]))).epochs(epochs)


def _fresh(model, optimizer="adam", seed=7):
    """A trainer that has compiled nothing yet, and its state."""
    with rng.scope(seed):
        trainer = kaun.Trainer(model=MODELS[model](), optimizer=OPTIMIZERS[optimizer]())
        return trainer, trainer.init(dtype=jnp.float32)


# Trainers and states are values, so the tests of a session share them, and what they have compiled.
_trainer = functools.cache(_fresh)


def _bytes(tree):
    """Every leaf of a tree as bytes, keys included; what `==` should mean here."""
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    plain = [jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a for a in leaves]
    return str(treedef), [(str(np.asarray(a).dtype), np.shape(a), np.asarray(a).tobytes()) for a in plain]


def _fold(trainer, state, data, **options):
    """The states and losses of `step` folded over data, the reference that `fit` is held against."""
    states, found = [], []
    for x, loss, *ctx in data:
        value, state = trainer.step(state, x, loss=loss, ctx=ctx[0] if ctx else None, **options)
        states.append(state)
        found.append(float(value))
    return states, found


@pytest.fixture(scope="session")
def zoo():
    return SimpleNamespace(
        arrays=_arrays,
        data=_data,
        trainer=_trainer,
        fresh=_fresh,
        bytes=_bytes,
        fold=_fold,
        models=MODELS,
        optimizers=OPTIMIZERS,
    )
