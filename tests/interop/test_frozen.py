"""Fine-tuning a part of a model of another library: the frozen part runs as in predict, or kaun says that it cannot.

A pretrained backbone with batch norm and dropout is frozen by ``Trainer(trainable=...)``, and a new head trains. Training
normalized by the batch and dropped, and predict used statistics that never moved (NNX, Equinox) or moved though the
part was frozen (Linen, Haiku): a loss of 0.34 in training, of 2.36 in predict on the same data.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import interop, losses, rng

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)


def mse(output):
    return losses.mse(output, jnp.asarray(Y))


@pytest.fixture(autouse=True)
def as_the_libraries_expect():
    with jax.numpy_dtype_promotion("standard"):
        yield


def nnx_model(by_argument=False):
    nnx = pytest.importorskip("flax.nnx")

    class Encoder(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, train=None):
            mode = {} if train is None else {"deterministic": not train}
            norm = {} if train is None or by_argument != "all" else {"use_running_average": not train}
            return self.drop(self.norm(self.linear(x), **norm), **mode)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.encoder, self.head = Encoder(rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.encoder(x))

    class ByArgument(Net):
        def __call__(self, x, train):
            return self.head(self.encoder(x, train))

    return interop.flax_nnx((ByArgument if by_argument else Net)(nnx.Rngs(0)))


def linen_model():
    nn = pytest.importorskip("flax.linen")

    class Encoder(nn.Module):
        train: bool

        @nn.compact
        def __call__(self, x):
            x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=self.train)
            x = nn.BatchNorm(use_running_average=not self.train)(x)
            return nn.Dropout(0.5)(x, not self.train)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = Encoder(train, name="encoder")(x)
            return nn.Dense(2, name="head")(nn.BatchNorm(use_running_average=not train, name="encoder_2")(x))

    return interop.linen(Net(), X)


def equinox_model(by_argument=False):
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        encoder: list
        drop: eqx.nn.Dropout
        head: eqx.nn.Linear

        def __init__(self, key):
            linear, norm = eqx.nn.Linear(3, 4, key=key), eqx.nn.BatchNorm(4, "batch", mode="batch")
            self.encoder = [eqx.nn.SpectralNorm(linear, "weight", key=key), norm, eqx.nn.Dropout(0.5)]
            self.drop, self.head = eqx.nn.Dropout(0.0), eqx.nn.Linear(4, 2, key=key)

        def __call__(self, x, state, key):
            x, state = self.encoder[0](x, state)
            x, state = self.encoder[1](x, state)
            return self.head(self.drop(self.encoder[2](x, key=key), key=key)), state

    class ByArgument(Net):
        def __call__(self, x, state, key, inference):
            mode = {"inference": inference} if by_argument == "all" else {}
            x, state = self.encoder[0](x, state)
            x, state = self.encoder[1](x, state, **mode)
            return self.head(self.encoder[2](x, key=key, inference=inference)), state

    return interop.equinox(*eqx.nn.make_with_state(ByArgument if by_argument else Net)(jax.random.key(0)))


def haiku_model():
    hk = pytest.importorskip("haiku")

    class Encoder(hk.Module):
        def __call__(self, x, is_training):
            x = hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training)
            return hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x

    def forward(x, is_training):
        x = Encoder(name="encoder")(x, is_training)
        return hk.Linear(2, name="head")(hk.BatchNorm(True, True, 0.9, name="encoder_2")(x, is_training))

    return interop.haiku(hk.transform_with_state(forward), X)


MODELS = {
    "nnx": nnx_model, "nnx by argument": lambda: nnx_model("dropout"), "linen": linen_model, "equinox": equinox_model,
    "equinox by argument": lambda: equinox_model("dropout"), "haiku": haiku_model,
}  # fmt: skip


def head_of(model):
    """A trainer of the head, and a state with statistics as of a pretrained model."""
    with rng.scope(0):
        trainer = kaun.Trainer(
            model=model, optimizer=optax.sgd(0.1), trainable=lambda path: "encoder" not in path, on_nonfinite="ignore"
        )
        state = trainer.init()
    move = lambda a: a + 0.5 if jnp.issubdtype(a.dtype, jnp.floating) else a
    return trainer, state.replace(vars=state.vars.replace(state=jax.tree.map(move, state.vars.state)))


@pytest.mark.parametrize("name", MODELS)
def test_a_frozen_part_of_another_librarys_model_runs_as_in_predict(name):
    trainer, state = head_of(MODELS[name]())
    value, after = trainer.step(state, X, loss=mse)
    np.testing.assert_allclose(value, mse(trainer.predict(state, X)), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after.vars.state, state.vars.state)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, a, b: ("encoder" in str(path), bool((a != b).any())), state.vars.params, after.vars.params
    )
    assert set(jax.tree.leaves(moved, is_leaf=lambda a: isinstance(a, tuple))) == {
        (True, False), (False, True),
    }  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_part_that_trains_runs_in_training_mode(name):
    """The other way round, the encoder trains under a frozen head: its statistics move, and its dropout is on."""
    with rng.scope(0):
        trainer = kaun.Trainer(model=MODELS[name](), optimizer=optax.sgd(0.1), trainable=lambda path: "encoder" in path)
        state = trainer.init()
    value, after = trainer.step(state, X, loss=mse)
    assert abs(float(value) - float(mse(trainer.predict(state, X)))) > 1e-3
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.vars.state, after.vars.state)
    assert any(jax.tree.leaves(changed))


@pytest.mark.parametrize("lift", ["remat", "jit", "scan"])
def test_a_frozen_part_under_a_lifted_transformation_of_linen(lift):
    """Blocks under ``nn.remat``, ``nn.jit`` or ``nn.scan`` return copies of their state, changed or not."""
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        train: bool

        @nn.compact
        def __call__(self, x, _=None):
            x = nn.BatchNorm(use_running_average=not self.train)(nn.Dense(3)(x))
            return nn.Dropout(0.5, deterministic=not self.train)(x), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True, "dropout": True}}
            block = nn.scan(Block, **axes, length=2) if lift == "scan" else getattr(nn, lift)(Block)
            return nn.Dense(2, name="head")(block(train, name="encoder")(x, None)[0])

    trainer, state = head_of(interop.linen(Net(), X))
    value, after = trainer.step(state, X, loss=mse)
    np.testing.assert_allclose(value, mse(trainer.predict(state, X)), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after.vars.state, state.vars.state)


def test_a_frozen_part_under_hk_remat():
    """A rematerialized block returns a copy of its state, changed or not."""
    hk = pytest.importorskip("haiku")

    class Encoder(hk.Module):
        def __call__(self, x, is_training):
            norm = hk.BatchNorm(True, True, 0.9)
            return hk.remat(lambda x: norm(hk.Linear(3)(x), is_training))(x)

    def forward(x, is_training):
        return hk.Linear(2, name="head")(Encoder(name="encoder")(x, is_training))

    trainer, state = head_of(interop.haiku(hk.transform_with_state(forward), X))
    value, after = trainer.step(state, X, loss=mse)
    np.testing.assert_allclose(value, mse(trainer.predict(state, X)), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after.vars.state, state.vars.state)


def unswitched_linen():
    nn = pytest.importorskip("flax.linen")

    class Center(nn.Module):
        @nn.compact
        def __call__(self, x, learning):
            mean = self.variable("stats", "mean", lambda: jnp.zeros(3))
            if learning and not self.is_initializing():
                mean.value = x.mean(0)
            return (x - mean.value[None]) * self.param("scale", nn.initializers.ones, (3,))[None]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            return nn.Dense(2)(Center(name="encoder")(x, learning=train))

    return interop.linen(Net(), X)


def unswitched_haiku():
    hk = pytest.importorskip("haiku")

    class Center(hk.Module):
        def __call__(self, x, learning):
            mean = hk.get_state("mean", (3,), init=jnp.zeros)
            if learning:
                hk.set_state("mean", x.mean(0))
            return (x - mean[None]) * hk.get_parameter("scale", (3,), init=jnp.ones)[None]

    return interop.haiku(
        hk.transform_with_state(lambda x, is_training: hk.Linear(2)(Center(name="encoder")(x, is_training))), X
    )


@pytest.mark.parametrize(
    ("make", "part", "state", "code"),
    [
        (
            unswitched_linen,
            "encoder",
            r'\(Cannot update variable "mean" in "/encoder"',
            r"interop\.linen\(backbone, x\)",
        ),
        (unswitched_haiku, "encoder", "'encoder/mean'", r"interop\.haiku\(backbone, x\)"),
        (lambda: nnx_model("all"), "encoder.norm", "'encoder.norm.mean'", r"interop\.flax_nnx\(backbone\)"),
        (
            lambda: equinox_model("all"),
            "encoder.1",
            "'encoder.1.batch_counter'",
            r"interop\.equinox\(backbone\)",
        ),
    ],
)
def test_a_frozen_part_whose_mode_kaun_cannot_switch_is_refused(make, part, state, code):
    """A module that updates statistics under a switch with a name of its own, or by an argument of its call."""
    trainer, start = head_of(make())
    text = (
        rf"has a frozen part, '{part}', which must run as in predict, but a call in training changes its state {state}"
        rf".*, and nothing that kaun can set .*\n    model = {code} >> .*\n    trainer = Trainer\(model=model, trainable="
    )
    with pytest.raises(ValueError, match=text):
        trainer.step(start, X, loss=mse)


def test_the_two_layers_of_the_refusals_text_do_it():
    nn = pytest.importorskip("flax.linen")

    class Center(nn.Module):
        @nn.compact
        def __call__(self, x, learning, train):
            mean = self.variable("stats", "mean", lambda: jnp.zeros(3))
            if learning or train:
                mean.value = x.mean(0)
            return (x - mean.value[None]) * self.param("scale", nn.initializers.ones, (3,))[None]

    backbone = interop.linen(Center(), X, method=lambda module, x, train: module(x, train, train))
    model = backbone >> interop.linen(nn.Dense(2), X)
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1), trainable=lambda path: path.startswith("right."))
        state = trainer.init()
    value, after = trainer.step(state, X, loss=mse)
    np.testing.assert_allclose(value, mse(trainer.predict(state, X)), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after.vars.state, state.vars.state)
