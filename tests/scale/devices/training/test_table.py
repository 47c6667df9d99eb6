"""The acceptance table on one process: losses, folds, bytes, placements, over the shardings and optimizers."""

import functools

import jax
import numpy as np
import optax
import pytest

import kaun
from kaun import layers, losses, rng

SHORT = ["data", "tensor and fsdp"]
NAMES = [*SHORT, *[pytest.param(n, marks=pytest.mark.slow) for n in ("fsdp", "gather", "replicas", "tensor")]]
SGD = optax.sgd(0.1)
OPTIMIZERS = {
    "sgd": SGD,
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw of a schedule": optax.adamw(optax.cosine_decay_schedule(1e-2, 100)),
    "lion": optax.lion(1e-3),
    "muon": optax.contrib.muon(1e-2),
    "prodigy": optax.contrib.prodigy(),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "lbfgs": optax.lbfgs(memory_size=3),
    "flatten": optax.flatten(optax.adam(1e-2)),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2), 3),
    "partition": optax.partition(
        {"a": optax.adam(1e-2), "b": optax.sgd(0.1)},
        lambda params: jax.tree.map(lambda a: "a" if a.ndim > 1 else "b", params),
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "schedule_free": optax.contrib.schedule_free_sgd(0.1),
    "clipped rmsprop": optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(1e-3)),
    "plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=2)),
}
FEW = ("adafactor",)


@pytest.fixture(scope="module")
def run(kit):
    """A trainer by the names of its sharding and its optimizer, with the losses and the state of its fit."""

    @functools.cache
    def made(name, optimizer="adam", count=8):
        trainer, state, data = kit.trainer_of(name, OPTIMIZERS[optimizer], count)
        found, end = kit.fit(trainer, state, data)
        return trainer, state, data, found, end

    return made


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_one_device(kit, run, name):
    trainer, start, _, found, end = run(name)
    _, one_start, _, expected, one_end = run("none")
    assert len(found) == 8 and kit.content(start) == kit.content(one_start)
    kit.close(found, expected)
    for a, b in zip(jax.tree.leaves(end.vars), jax.tree.leaves(one_end.vars), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert len(trainer.compilations) == 2  # one for each length of a batch


@pytest.mark.parametrize("name", NAMES)
def test_fit_is_the_fold_of_step_and_nothing_moves(kit, run, name):
    trainer, start, data, _, end = run(name)
    folded = kit.fold(trainer, start, data)
    assert kit.content(end) == kit.content(folded)
    for state in (start, end, folded):
        assert kit.misplaced(trainer, state) == []


@pytest.fixture(scope="module")
def single_steps(kit):
    """By optimizer 104 steps of one device, ragged batches: the state before each, its item, and its loss."""

    @functools.cache
    def made(optimizer):
        trainer, state, _ = kit.trainer_of("none", OPTIMIZERS[optimizer])
        with rng.scope(0):
            data = kaun.Data.batches((kit.X, kit.Y), kit.BATCH, shuffle=True)
        steps = []
        for x, loss in data.with_loss(losses.cross_entropy_sparse).epochs(26):
            value, after = trainer.step(state, x, loss=loss)
            steps.append((state, x, loss, value))
            state = after
        assert len(steps) == 104
        return steps

    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "fsdp"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_each_step_from_the_state_of_one_device_has_its_loss(kit, single_steps, name, count, optimizer):
    """At most 2.5e-7 was seen. From their own states rounding grows step by step."""
    trainer, _, _ = kit.trainer_of(name, OPTIMIZERS[optimizer], count)
    steps = single_steps(optimizer)
    kit.close([trainer.step(state, x, loss=loss)[0] for state, x, loss, _ in steps], [step[3] for step in steps])


@pytest.mark.parametrize("name", ["fsdp", *[pytest.param(n, marks=pytest.mark.slow) for n in ("data", "tensor")]])
@pytest.mark.parametrize("optimizer", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS])
def test_any_optimizer(kit, name, optimizer):
    """The state drifted to other devices in one step with adafactor, lbfgs and flatten, before it was pinned."""
    trainer, start, data = kit.trainer_of(name, OPTIMIZERS[optimizer])
    _, one, _ = kit.trainer_of("none", OPTIMIZERS[optimizer])
    assert kit.content(start) == kit.content(one)
    data = data.take(3)
    end, folded = trainer.fit(start, data), kit.fold(trainer, start, data)
    assert kit.content(end) == kit.content(folded)
    assert kit.misplaced(trainer, start) == kit.misplaced(trainer, end) == kit.misplaced(trainer, folded) == []
    assert [c.where for c in trainer.compilations] == ["fit", "step"]


INITS = {
    "normal": jax.nn.initializers.normal(0.02),
    "glorot": jax.nn.initializers.glorot_uniform(),
    "truncated": jax.nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal"),
    "orthogonal": jax.nn.initializers.orthogonal(),
    "own": lambda key, shape, dtype: jax.random.normal(key, shape, dtype) * 0.3 + 0.1,
}


def test_init_is_that_of_one_device_to_the_byte_and_so_is_the_next_key(kit):
    """Fused into one program `normal` and the last one differ in last bits."""
    model = layers.sequential([layers.linear(24, 24, weight_init=init) for init in INITS.values()])
    found = []
    for name in ("none", "fsdp"):
        with rng.scope(7):
            rng.next_key()
            trainer = kaun.Trainer(model=model, optimizer=optax.adamw(1e-3), sharding=kit.sharding_of(name))
            first = trainer.init()
            second = trainer.make_state(jax.tree.map(np.asarray, trainer.init().vars))
            found.append((kit.content(first), kit.content(second), kit.content(rng.next_key())))
    assert found[0] == found[1]
    assert kit.misplaced(trainer, first) == kit.misplaced(trainer, second) == []
    assert len(first.opt_state[0].mu[0]["weight"].sharding.spec) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "fsdp", "gather", "replicas", "heads", "heads and fsdp"])
def test_a_transformer(kit, name):
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from kaun import Data, sharding

    block = layers.sequential(
        [
            layers.residual(
                layers.sequential(
                    [layers.layer_norm(32), layers.multi_head_attention(32, 4, is_causal=True, bias=True)]
                )
            ),
            layers.residual(
                layers.sequential([layers.layer_norm(32), layers.linear(32, 64), layers.gelu(), layers.linear(64, 32)])
            ),
        ]
    )
    model = layers.sequential([layers.embedding(64, 32), block, block, layers.layer_norm(32), layers.linear(32, 64)])
    specs = {"*_proj.*": P(None, "model"), "*.1.inner.1.*": P(None, "model"), "*.1.inner.3.weight": P("model")}
    specs = {"*.out_proj.weight": P("model"), "*.out_proj.bias": P(), **specs}
    mesh = kit.mesh_of(8, data=2, model=4)
    where = {
        "heads": lambda: sharding.by_path(specs, mesh),
        "heads and fsdp": lambda: sharding.by_path(
            specs, mesh, otherwise=sharding.fsdp(mesh, axis="data", min_size=64)
        ),
    }.get(name, lambda: kit.sharding_of(name))()
    x = jnp.asarray(np.random.default_rng(0).integers(0, 64, (64, 12)), jnp.int32)
    found, trainers = [], []
    for each in (None, where):
        trainer = kaun.Trainer(model=model, optimizer=optax.adamw(1e-3), sharding=each)
        with rng.scope(0):
            state = trainer.init()
            data = Data.batches((np.asarray(x), np.asarray(x)[:, ::-1].copy()), 16).epochs(3)
        data = data.with_loss(losses.cross_entropy_sparse)
        values, end = kit.fit(trainer, state, data)
        found.append(values)
        trainers.append((trainer, state, data, end))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6 * 12)
    trainer, state, data, end = trainers[1]
    assert len(trainer.compilations) == 1
    (alone, now, *_), pairs = trainers[0], []
    for item, loss in data:  # each step from one state, as the table says
        value, after = alone.step(now, item, loss=loss)
        pairs.append((float(trainer.step(now, item, loss=loss)[0]), float(value)))
        now = after
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-6)
    assert kit.content(end) == kit.content(kit.fold(trainer, state, data))
    assert kit.misplaced(trainer, end) == []
