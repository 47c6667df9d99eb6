"""Haiku functions as layers, compared with the loop of its docs: `transformed.apply` in a jitted step, and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, interop, rng, tree

hk = pytest.importorskip("haiku")


@pytest.fixture(autouse=True)
def as_haiku_expects():
    """Its dropout multiplies a mask of bools with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def network(norm=True, rate=0.4):
    def forward(x, is_training):
        x = hk.Linear(16)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training) if norm else x
        x = jax.nn.relu(x)
        x = hk.dropout(hk.next_rng_key(), rate, x) if is_training and rate else x
        x = jax.nn.relu(hk.Linear(16)(x))
        x = hk.dropout(hk.next_rng_key(), rate, x) if is_training and rate else x
        return hk.Linear(3)(x)

    return forward


def theirs(transformed, task, start, keys_of):
    """The losses of the documented loop, and params and state after it."""
    params, state = start.params, start.state

    @jax.jit
    def train_step(params, state, opt_state, key, x, y):
        def loss_fn(params):
            logits, after = transformed.apply(params, state, key, x, is_training=True)
            return task.loss(logits, y), after

        (value, after), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = task.optimizer.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), after, opt_state

    losses, opt_state = [], task.optimizer.init(params)
    for i, (x, y) in enumerate(task.batches):
        value, params, state, opt_state = train_step(params, state, opt_state, keys_of(i)[0], x, y)
        losses.append(float(value))
    return losses, (params, state)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("norm", [False, True])
def test_trains_as_by_its_own_loop(task, norm, rate):
    # Bitwise: both differentiate and update by the same operations in one XLA program for each step.
    transformed = hk.transform_with_state(network(norm, rate))
    layer = interop.haiku(transformed, task.x[0])
    run = task.run(layer)
    losses, after = theirs(transformed, task, run.start.vars, run.keys)
    assert run.losses == losses
    exported = interop.export(layer, run.end.vars)
    assert jax.tree.structure(exported) == jax.tree.structure(after)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, exported, after))
    predicted = jax.jit(lambda p, s, x: transformed.apply(p, s, None, x, is_training=False)[0])(*exported, task.x[0])
    np.testing.assert_array_equal(predicted, run.trainer.predict(run.end, task.x[0]))


def test_dropout_drops(task):
    make = lambda rate: interop.haiku(hk.transform_with_state(network(rate=rate)), task.x[0])
    assert task.run(make(0.4)).losses != task.run(make(0.0)).losses


@pytest.mark.parametrize("shape", [False, True])
def test_weights_are_those_of_its_own_init(shape):
    transformed = hk.transform_with_state(network())
    sample = jnp.zeros((1, 6)) if shape else jnp.ones((1, 6))
    layer = interop.haiku(transformed, jax.ShapeDtypeStruct((1, 6), jnp.float32) if shape else sample)
    with rng.scope(5):
        variables = layer.init()
    with rng.scope(5):
        params, state = transformed.init(rng.next_key(), sample, is_training=True)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, (variables.params, variables.state), (params, state)))
    assert "linear_1.w" in tree.flatten(variables.params)[0]
    assert "batch_norm/~/mean_ema.average" in tree.flatten(variables.state)[0]


def test_in_half_precision_statistics_stay_in_float32():
    layer = interop.haiku(hk.transform_with_state(network()), jnp.ones((1, 6)))
    variables = layer.init(dtype=jnp.bfloat16)
    assert {a.dtype.name for a in jax.tree.leaves(variables.params)} == {"bfloat16"}
    assert {a.dtype.name for a in jax.tree.leaves(variables.state)} == {"float32", "int32"}
    x = jnp.ones((4, 6), jnp.bfloat16)
    with rng.scope(0), jax.numpy_dtype_promotion("standard"):
        y, after = layer.apply(variables, x, training=True)
        assert (y.dtype, layer.apply(after, x)[0].dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert not tree.difference(variables, after)


@pytest.mark.parametrize(
    "transformed",
    [
        hk.transform(lambda x: hk.Linear(2)(x)),
        hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2)(x))),
        hk.transform_with_state(lambda x: hk.Linear(2)(x)),
        hk.without_apply_rng(hk.transform_with_state(lambda x: hk.Linear(2)(x))),
    ],
)
def test_every_kind_of_transformed_function(transformed):
    layer = interop.haiku(transformed, jnp.ones((1, 3)))
    variables = layer.init()
    exported = interop.export(layer, variables)
    assert (type(exported) is tuple) == isinstance(transformed, hk.TransformedWithState)
    w, b = (variables.params["linear"][name] for name in ("w", "b"))
    for training in (True, False):
        with rng.scope(0):
            y, after = layer.apply(variables, jnp.ones((1, 3)), training=training)
        np.testing.assert_array_equal(y, jnp.ones((1, 3)) @ w + b[None])
        assert after.state == {}


def noisy(x):
    weight = hk.get_parameter("weight", (), init=jnp.ones)
    return weight * x + jax.random.normal(hk.next_rng_key(), x.shape)


def test_keys_come_from_the_scope():
    layer = interop.haiku(hk.transform(noisy), jnp.zeros(3))
    variables = layer.init()

    def drawn(seed, training):
        with rng.scope(seed):
            return layer.apply(variables, jnp.zeros(3), training=training)[0]

    with pytest.warns(UserWarning, match="asks for a random key in evaluation mode"):
        drawn(0, False)
    for training in (True, False):
        assert jnp.array_equal(drawn(0, training), drawn(0, training))
        assert not (drawn(0, training) == drawn(1, training)).any()


def test_dropout_that_nobody_switches_is_warned_of_once_at_the_users_line():
    """Haiku's dropout is a function with a key, which kaun cannot tell from noise that belongs to predict."""
    forward = lambda x: hk.dropout(hk.next_rng_key(), 0.5, hk.Linear(4)(x))
    trainer = kaun.Trainer(model=interop.haiku(hk.transform(forward), jnp.ones((1, 2))), optimizer=optax.sgd(0.1))
    state = trainer.init()
    text = (
        r"haiku\(x\) asks for a random key in evaluation mode\. If that is for dropout, dropout stays on in predict: give"
        r" .* is_training, and write hk\.dropout\(hk\.next_rng_key\(\), rate, x\) if is_training else x\."
    )
    with pytest.warns(UserWarning, match=text) as caught:
        trainer.predict(state, jnp.ones((2, 2)))
        trainer.predict(state, jnp.ones((3, 2)))  # compiled again
    assert [each.filename for each in caught] == [__file__]


def test_evaluation_without_randomness_needs_no_scope():
    layer = interop.haiku(hk.transform_with_state(network()), jnp.ones((1, 6)))
    variables = layer.init()
    with rng.scope(0):
        assert jax.jit(lambda v, x: layer.apply(v, x)[0])(variables, jnp.ones((2, 6))).shape == (2, 3)


def test_another_error_in_evaluation_is_not_taken_for_a_missing_key():
    def fails(x):
        if hk.running_init():
            return hk.Linear(1)(x)
        raise ValueError("mine")

    layer = interop.haiku(hk.transform(fails), jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="mine"):
        layer.apply(layer.init(), jnp.ones((1, 1)))


WORDS = []


def words(x, mask, scale=3.0, *, train, deterministic=None):
    WORDS.append((mask, scale, train, deterministic))
    return hk.Linear(1)(x)


def test_switches_and_context_reach_the_call():
    layer = interop.haiku(hk.transform(words), jnp.ones((1, 1)), ctx=Context(mask=0))
    variables = layer.init()
    assert WORDS.pop() == (0, 3.0, True, False)
    for training in (True, False):
        with rng.scope(0):
            layer.apply(variables, jnp.ones((1, 1)), training=training, ctx=Context(mask=1, other=2))
        assert WORDS.pop() == (1, 3.0, training, not training)
    layer.apply(variables, jnp.ones((1, 1)), ctx=Context(mask=1, scale=4))
    assert WORDS.pop()[:2] == (1, 4)
    with pytest.raises(kaun.errors.MissingContext, match=r"Context has no 'mask'; it has nothing\. Pass it as fit\("):
        interop.haiku(hk.transform(words), jnp.ones((1, 1))).init()


def test_a_state_that_changes_its_form_is_refused():
    def grows(x):
        if hk.running_init():
            hk.get_state("seen", (), init=jnp.zeros)
        hk.set_state("seen", x)
        return hk.Linear(1)(x)

    layer = interop.haiku(hk.transform_with_state(grows), jnp.ones((1, 1)))
    text = r"(?s)haiku\(.*\) changed the structure of its state in a call:\n  ~\.seen: expected .*\nGive hk\.get_state and hk\.set"
    with rng.scope(0), pytest.raises(ValueError, match=text):
        layer.apply(layer.init(), jnp.ones((2, 1)), training=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            3,
            r"haiku expected a function transformed by hk\.transform or hk\.transform_with_state, received int\. Write",
        ),
        (noisy, r"received function\. Write interop\.haiku\(hk\.transform_with_state\(noisy\), x\)\."),
    ],
)
def test_what_is_not_transformed_is_refused(value, text):
    with pytest.raises(TypeError, match=text):
        interop.haiku(value, jnp.ones((1, 1)))
