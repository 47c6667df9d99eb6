"""Layers that are computed again in the backward pass: the same numbers in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, Data, layers, losses, rng
from kaun.layers import Layer

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)


def mse(output):
    return losses.mse(output, jnp.asarray(Y))


def block(wrap, d=4):
    inner = layers.sequential(
        [layers.linear(d, 2 * d), layers.batch_norm(2 * d), layers.gelu(), layers.dropout(0.5), layers.linear(2 * d, d)]
    )
    return layers.residual(wrap(inner))


def trained(model, **options):
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=options.pop("optimizer", optax.adam(0.1)), **options)
        return trainer, trainer.init()


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), a, b)


@pytest.mark.parametrize(
    ("policy", "trainable"),
    [
        (jax.checkpoint_policies.dots_saveable, None),
        pytest.param(None, None, marks=pytest.mark.slow),
        pytest.param(jax.checkpoint_policies.dots_saveable, lambda path: "inner.1" not in path, marks=pytest.mark.slow),
    ],
)
def test_it_trains_as_the_layer_inside(policy, trainable):
    """Dropout inside and after it, and running statistics; whole, and with a policy and a batch norm that is frozen.

    XLA may fuse the two programs in another way; on one machine they were bitwise equal with jaxlib 0.10, not with 0.12.
    """
    runs = []
    for wrap in (lambda inner: inner, lambda inner: layers.remat(inner, policy)):
        model = layers.sequential([block(wrap), layers.dropout(0.3)])
        trainer, state = trained(model, trainable=trainable, optimizer=optax.sgd(0.1))
        seen = []
        end = trainer.fit(state, Data.repeat(3, (X, mse)), report=lambda step, loss, state: seen.append(loss))
        runs.append((seen, end.vars))
    assert len(set(runs[0][0])) == 3
    assert_close(*runs)


def test_gradients_and_keys_are_those_of_the_layer_inside_without_a_trainer():
    make = lambda wrap: wrap(layers.linear(4, 4) >> layers.dropout(0.5)) >> layers.dropout(0.3)
    plain, again = make(lambda inner: inner), make(layers.remat)
    variables = plain.init()

    def gradient(model):
        loss = lambda params: mse(model.apply(variables.replace(params=params), X, training=True)[0])
        with rng.scope(3):
            return jax.value_and_grad(loss)(variables.params), rng.next_key()

    (one, first), (two, second) = gradient(plain), gradient(again)
    assert first == second  # as many keys were drawn
    assert_equal(one, two)  # without jit each operation is a program, so XLA fuses nothing


def test_it_keeps_the_input_alone():
    """The bytes that the forward pass leaves for the backward pass, beside parameters and keys."""

    def kept(wrap):
        deep = layers.sequential(
            [wrap(layers.sequential([layers.linear(4, 64), layers.gelu(), layers.linear(64, 4)]))] * 4
        )
        variables, x = deep.init(), jnp.ones((256, 4))
        _, backward = jax.vjp(lambda params: deep.apply(variables.replace(params=params), x)[0], variables.params)
        return sum(a.nbytes for a in jax.tree.leaves(backward) if a.shape[:1] == (256,))

    assert kept(layers.remat) == 4 * 256 * 4 * 4  # the input of each block
    assert kept(lambda inner: inner) > 20 * kept(layers.remat)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA:CPU of jaxlib 0.10 computes all blocks again at once")
def test_a_step_needs_less_temporary_memory():
    deep = lambda wrap: layers.sequential([block(wrap, 16) for _ in range(4)])
    cost = lambda wrap: kaun.summary(trained(deep(wrap))[0], np.ones((1024, 16), np.float32), jnp.mean).cost.temporaries
    assert cost(layers.remat) < 0.6 * cost(lambda inner: inner)


def test_paths_tables_and_exports_are_those_of_the_layer_inside():
    plain, again = (
        layers.sequential([wrap(layers.linear(4, 4)), layers.linear(4, 4)]) for wrap in (lambda a: a, layers.remat)
    )
    assert repr(layers.remat(layers.linear(2, 1))) == "remat(\n  linear(2, 1),\n)"
    (one, a), (two, b) = trained(plain), trained(again)
    assert_equal(a.vars, b.vars)
    assert repr(kaun.summary(one, X)) == repr(kaun.summary(two, X))
    np.testing.assert_array_equal(one.predict(a, X), two.predict(a, X))
    with pytest.raises(TypeError, match=r"linear\(4, 4\) at '0' expected float32\[\.\.\., 4\]"):
        two.predict(b, X.astype(np.int32))


def test_a_context_reaches_the_layer_inside_and_microbatches_go_around():
    def apply(vars, x, *, training, ctx):
        return x * ctx["scale"], vars

    inner = layers.linear(4, 4) >> Layer(
        init=lambda *, dtype: layers.relu().init(dtype=dtype), apply=apply, name="scaled"
    )
    ctx = Context(scale=np.linspace(0, 1, 8, dtype=np.float32)[:, None].repeat(4, 1))
    results = []
    for wrap in (lambda inner: inner, layers.remat):
        trainer, state = trained(wrap(inner), microbatches=2, optimizer=optax.sgd(0.1))
        results.append(trainer.step(state, X, loss=mse, ctx=ctx))
    assert_close((results[0][0], results[0][1].vars), (results[1][0], results[1][1].vars))


def test_microbatches_take_a_state_that_does_not_change():
    """A frozen batch norm under remat: its state is the same arrays, by which microbatches tell."""
    trainer, state = trained(block(layers.remat), trainable=lambda path: "inner.1" not in path, microbatches=2)
    _, after = trainer.step(state, X, loss=mse)
    assert_equal(after.vars.state, state.vars.state)


def test_nested_and_in_another_transformation():
    once = layers.remat(layers.sequential([layers.linear(4, 4), layers.dropout(0.5)]))
    variables = once.init()
    results = []
    for each in (once, layers.remat(once)):
        with rng.scope(1):
            results.append(jax.vmap(lambda x, each=each: each.apply(variables, x, training=True)[0])(X))
    np.testing.assert_array_equal(*results)
    with rng.scope(0), pytest.raises(RuntimeError, match="frozen into the compiled program"):
        jax.jit(lambda x: once.apply(variables, x, training=True)[0])(X)


def test_checkpoint_itself_around_dropout_is_refused_by_name_of_the_layer():
    drop = layers.dropout(0.5)
    run = jax.checkpoint(lambda x: drop.apply(drop.init(), x, training=True)[0])
    with (
        rng.scope(0),
        pytest.raises(RuntimeError, match=r"In the place of jax\.checkpoint around a layer write layers\.remat\("),
    ):
        run(X)


def test_a_layer_that_changes_the_structure_of_its_state_is_refused_as_without():
    grows = Layer(
        init=lambda *, dtype: kaun.Vars({"w": jnp.ones((), dtype)}, {"a": jnp.zeros(())}, dtype),
        apply=lambda vars, x, *, training, ctx: (x * vars.params["w"], vars.replace(state={**vars.state, "b": x})),
    )
    trainer, state = trained(layers.remat(grows))
    with pytest.raises(TypeError, match=r"vars\.state\.b|state\.b"):
        trainer.step(state, X, loss=mse)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((jnp.sin,), r"remat expected layers, received sin\. For a plain function write layers\.fn\(jnp\.sin\)\."),
        ((layers.relu(), "dots"), r"remat\(policy=\.\.\.\) expected None or a function of jax\.checkpoint_policies, received 'dots'\. Write policy=jax"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, text):
    with pytest.raises(TypeError, match=text):
        layers.remat(*arguments)
