"""Equinox modules as layers, compared with the loop of its docs: `eqx.filter_jit`, `eqx.filter_value_and_grad`, `jax.vmap`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kaun
from kaun import Context, interop, layers, rng, tree

eqx = pytest.importorskip("equinox")


@pytest.fixture(autouse=True)
def as_equinox_expects():
    """Its batch norm takes a power of a float and a count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Net(eqx.Module):
    stack: list[eqx.nn.Linear]
    drop: eqx.nn.Dropout
    activation: Callable
    table: jax.Array
    width: int = eqx.field(static=True)

    def __init__(self, rate, key):
        keys = jax.random.split(key, 3)
        self.stack = [eqx.nn.Linear(a, b, key=k) for a, b, k in zip((6, 16, 16), (16, 16, 3), keys, strict=True)]
        self.drop, self.activation, self.table, self.width = eqx.nn.Dropout(rate), jax.nn.relu, jnp.arange(3), 16

    def __call__(self, x, *, key=None):
        first, second = (None, None) if key is None else jax.random.split(key)
        x = self.drop(self.activation(self.stack[0](x)), key=first)
        return self.stack[2](self.drop(self.activation(self.stack[1](x)), key=second))


class Normed(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, rate, mode, key):
        one, two = jax.random.split(key)
        self.first, self.last = eqx.nn.Linear(6, 16, key=one), eqx.nn.Linear(16, 3, key=two)
        self.norm, self.drop = eqx.nn.BatchNorm(16, "batch", mode=mode), eqx.nn.Dropout(rate)

    def __call__(self, x, state, *, key=None):
        x, state = self.norm(self.first(x), state)
        return self.last(self.drop(jax.nn.relu(x), key=key)), state


def theirs(model, state, task, key_of):
    """The losses of the documented loop, and model and state after it."""

    def loss_fn(model, state, x, y, keys):
        if state is None:
            return task.loss(jax.vmap(model)(x, key=keys), y), None
        spread = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        if keys is not None:
            one = lambda x, state, key: model(x, state, key=key)
            spread = jax.vmap(one, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
            logits, state = spread(x, state, keys)
        else:
            logits, state = spread(x, state)
        return task.loss(logits, y), state

    @eqx.filter_jit
    def make_step(model, state, opt_state, x, y, key):
        keys = jax.random.split(key, len(x))
        (value, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, state, x, y, keys)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = task.optimizer.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return value, eqx.apply_updates(model, updates), state, opt_state

    losses, opt_state = [], task.optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    for i, (x, y) in enumerate(task.batches):
        value, model, state, opt_state = make_step(model, state, opt_state, x, y, key_of(i)[0])
        losses.append(float(value))
    return losses, model, state


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_trains_as_by_its_own_loop(task, rate):
    # Bitwise: both differentiate and update by the same operations in one XLA program for each step.
    model = Net(rate, jax.random.key(0))
    layer = interop.equinox(model)
    run = task.run(layer)
    losses, trained, _ = theirs(model, None, task, run.keys)
    assert run.losses == losses
    exported = interop.export(layer, run.end.vars)
    assert eqx.tree_equal(exported, trained) and not eqx.tree_equal(exported, model)
    predict = eqx.filter_jit(lambda m, x: jax.vmap(eqx.nn.inference_mode(m))(x))
    np.testing.assert_array_equal(predict(exported, task.x[0]), run.trainer.predict(run.end, task.x[0]))


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_batch_norm_trains_as_by_its_own_loop(task, mode, rate):
    # Bitwise, as above.
    model, state = eqx.nn.make_with_state(Normed)(rate, mode, jax.random.key(0))
    layer = interop.equinox(model, state)
    run = task.run(layer)
    losses, trained, after = theirs(model, state, task, run.keys)
    assert run.losses == losses
    exported, moved = interop.export(layer, run.end.vars)
    assert eqx.tree_equal(exported, trained)
    assert jax.tree.structure(moved) == jax.tree.structure(after)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    spread = lambda m, s, x: jax.vmap(m, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, s)[0]
    predicted = eqx.filter_jit(spread)(eqx.nn.inference_mode(exported), moved, task.x[0])
    np.testing.assert_array_equal(predicted, run.trainer.predict(run.end, task.x[0]))


def test_dropout_drops(task):
    first = [task.run(interop.equinox(Net(rate, jax.random.key(0)))).losses for rate in (0.4, 0.0)]
    assert first[0] != first[1]


def test_what_the_user_set_to_inference_stays_there_in_training():
    module, state = eqx.nn.make_with_state(Normed)(0.9, "batch", jax.random.key(0))
    fixed = eqx.tree_at(lambda m: (m.norm, m.drop), module, replace_fn=eqx.nn.inference_mode)
    layer = interop.equinox(fixed, state)
    variables, x = layer.init(), jnp.arange(12.0).reshape(2, 6)
    with rng.scope(0):
        y, after = layer.apply(variables, x, training=True)
    np.testing.assert_array_equal(y, layer.apply(variables, x)[0])
    jax.tree.map(np.testing.assert_array_equal, after.state, variables.state)


def test_params_and_state_are_plain_and_named_by_attributes():
    model = Net(0.4, jax.random.key(0))
    variables = interop.equinox(model).init()
    assert variables.params["stack"][0]["weight"] is model.stack[0].weight
    assert set(tree.flatten(variables.params)[0]) == {f"stack.{i}.{w}" for i in range(3) for w in ("weight", "bias")}
    assert set(tree.flatten(variables.state)[0]) == {"table"}
    normed = interop.equinox(Normed(0.4, "ema", jax.random.key(0))).init()
    assert set(tree.flatten(normed.state)[0]) == {
        "norm.ema_first_time_index", "norm.ema_state_index.0", "norm.ema_state_index.1",
    }  # fmt: skip
    assert set(tree.flatten(normed.params)[0]) == {
        "first.bias", "first.weight", "last.bias", "last.weight", "norm.bias", "norm.weight",
    }  # fmt: skip


def test_a_state_apart_or_inside_is_the_same():
    apart = interop.equinox(*eqx.nn.make_with_state(Normed)(0.4, "batch", jax.random.key(0)))
    inside = interop.equinox(Normed(0.4, "batch", jax.random.key(0)))
    one, two = apart.init(), inside.init()
    assert not tree.difference(one, two)
    x = jnp.arange(12.0).reshape(2, 6)
    with rng.scope(0):
        y, after = apart.apply(one, x, training=True)
    with rng.scope(0):
        np.testing.assert_array_equal(y, inside.apply(two, x, training=True)[0])
    assert after.state["norm"]["batch_counter"] == 1


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_half_precision_is_for_params_and_state(mode):
    layer = interop.equinox(Normed(0.4, mode, jax.random.key(0)))
    variables = layer.init(dtype=jnp.bfloat16)
    assert {a.dtype.name for a in jax.tree.leaves(variables.params)} == {"bfloat16"}
    x = jnp.ones((4, 6), jnp.bfloat16)
    with rng.scope(0), jax.numpy_dtype_promotion("standard"):
        y, after = layer.apply(variables, x, training=True)
        assert (y.dtype, layer.apply(after, x)[0].dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert not tree.difference(variables, after)


def test_shared_weights_stay_shared():
    key = jax.random.key(0)

    class Tied(eqx.Module):
        both: eqx.nn.Shared

        def __init__(self):
            pair = (eqx.nn.Embedding(6, 4, key=key), eqx.nn.Linear(4, 6, use_bias=False, key=key))
            self.both = eqx.nn.Shared(pair, where=lambda p: p[1].weight, get=lambda p: p[0].weight)

        def __call__(self, x):
            embedding, linear = self.both()
            return linear(embedding(x))

    layer = interop.equinox(Tied())
    variables = layer.init()
    assert set(tree.flatten(variables.params)[0]) == {"both.pytree.0.weight"}
    doubled = variables.replace(params=jax.tree.map(lambda a: 2 * a, variables.params))
    x = jnp.arange(6)
    np.testing.assert_array_equal(layer.apply(doubled, x)[0], 4 * layer.apply(variables, x)[0])
    np.testing.assert_array_equal(layer.apply(doubled, x)[0], jax.vmap(interop.export(layer, doubled))(x))


class Words(eqx.Module):
    weight: jax.Array

    def __init__(self):
        self.weight = jnp.ones(())

    def __call__(self, x, mask, scale=3.0, *, inference, key=None):
        WORDS.append((jnp.shape(mask), jnp.shape(scale), inference, key is None))
        return self.weight * x * mask * scale

    def draws(self, x, key):
        return self.weight * x + jax.random.normal(key, x.shape)


WORDS = []


def test_switches_context_and_keys_reach_the_call():
    layer = interop.equinox(Words())
    variables, x = layer.init(), jnp.ones((2, 3))
    mask = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    with rng.scope(0):
        layer.apply(variables, x, training=True, ctx=Context(mask=mask, other=2))
    assert WORDS.pop() == ((3,), (), False, False)
    y, _ = layer.apply(variables, x, ctx=Context(mask=mask, scale=jnp.array(2.0)))
    assert WORDS.pop() == ((3,), (), True, True)
    np.testing.assert_array_equal(y, 2 * mask)
    with pytest.raises(kaun.errors.MissingContext, match=r"Context has no 'mask'; it has nothing\. Pass it as fit\("):
        layer.apply(variables, x)


def test_keys_are_one_for_each_example_and_drawn_in_evaluation_where_they_must_be():
    layer = interop.equinox(Words(), method="draws")
    variables, x = layer.init(), jnp.zeros((4, 3))
    for training in (True, False):
        with rng.scope(0):
            y, _ = layer.apply(variables, x, training=training)
        assert len(np.unique(y)) == 12
        with rng.scope(0):
            keys = jax.random.split(rng.next_key(), 4)
        np.testing.assert_array_equal(y, jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys))


def test_evaluation_without_randomness_needs_no_scope():
    layer = interop.equinox(Net(0.4, jax.random.key(0)))
    variables = layer.init()
    with rng.scope(0):
        assert jax.jit(lambda v, x: layer.apply(v, x)[0])(variables, jnp.ones((2, 6))).shape == (2, 3)


def test_a_frozen_part_stays_as_it_was_given_in_training():
    model = eqx.nn.inference_mode(Net(0.4, jax.random.key(0)))
    layer = interop.equinox(model)
    with rng.scope(0):
        y, _ = layer.apply(layer.init(), jnp.ones((2, 6)), training=True)
    np.testing.assert_array_equal(y[0], y[1])


def test_without_vmap_the_module_gets_all():
    layer = interop.equinox(Words(), vmap=False, method=lambda module, x: module.weight * x.sum())
    assert layer.apply(layer.init(), jnp.ones((2, 3)))[0] == 6
    drawing = interop.equinox(Words(), vmap=False, method="draws")
    with rng.scope(0):
        y, _ = drawing.apply(drawing.init(), jnp.zeros(3), training=True)
    with rng.scope(0):
        np.testing.assert_array_equal(y, jax.random.normal(rng.next_key(), (3,)))


def test_inputs_may_be_trees_and_any_callable_pytree_is_a_model():
    layer = interop.equinox(jax.tree_util.Partial(lambda w, pair: w * (pair["a"] + pair["b"]), jnp.array(2.0)))
    y, _ = layer.apply(layer.init(), {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))})
    np.testing.assert_array_equal(y, np.full((2, 3), 4.0))


class Keyed(eqx.Module):
    """Has a random key of its own, which is an array that no one trains."""

    linear: eqx.nn.Linear
    key: jax.Array

    def __call__(self, x):
        return self.linear(x) + jax.random.normal(self.key, (3,))


def test_a_key_inside_a_module_is_state_that_stays(task):
    model = Keyed(eqx.nn.Linear(6, 3, key=jax.random.key(0)), jax.random.key(1))
    layer = interop.equinox(model)
    run = task.run(layer)
    assert run.end.vars.state["key"] == model.key
    assert interop.export(layer, run.end.vars).key == model.key


def test_in_a_composition(task):
    mlp = eqx.nn.MLP(6, 8, 8, 1, key=jax.random.key(0))
    run = task.run(interop.equinox(mlp) >> layers.relu() >> layers.linear(8, 3))
    assert "left.left.layers.0.weight" in tree.flatten(run.end.vars.params)[0]
    assert repr(interop.equinox(mlp)) == "equinox(MLP)"


class Odd(eqx.Module):
    index: eqx.nn.StateIndex
    weight: jax.Array

    def __init__(self):
        self.index, self.weight = eqx.nn.StateIndex(jnp.zeros(())), jnp.ones(())

    def __call__(self, x):
        return x

    def shrinks(self, x, state):
        return x, eqx.nn.State({})


def test_what_is_no_module_is_refused():
    both = eqx.nn.make_with_state(Normed)(0.4, "batch", jax.random.key(0))
    for make, error, text in [
        (
            lambda: interop.equinox(both),
            TypeError,
            r"received a tuple\. .*\(\*eqx\.nn\.make_with_state\(Model\)\(key\)\)",
        ),
        (
            lambda: interop.equinox(Net),
            TypeError,
            r"received the class Net\. Pass an instance: interop\.equinox\(Net\(",
        ),
        (lambda: interop.equinox(both[0], 3), TypeError, r"expected an eqx\.nn\.State, received int\. Write"),
        (
            lambda: interop.equinox(both[0]),
            ValueError,
            r"a Normed without its eqx\.nn\.State: .*_state\(Normed\)\(key\)\)",
        ),
        (
            lambda: interop.equinox(object()),
            TypeError,
            r"equinox\(object\) has no __call__, .*\(module, method=\"encode\"\)",
        ),
        (lambda: interop.equinox(Odd()), TypeError, r"equinox\(Odd\) has an eqx\.nn\.State, and its call takes no arg"),
    ]:
        with pytest.raises(error, match=text):
            make()


def test_what_goes_wrong_in_a_call_is_told():
    layer = interop.equinox(Net(0.4, jax.random.key(0)))
    for training in (True, False):
        text = (
            r"equinox\(Net\) expected a batch, \[batch, \.\.\.\], received float32\[\]: it is vmapped over axis 0\. Add"
        )
        with rng.scope(0), pytest.raises(ValueError, match=text):
            layer.apply(layer.init(), jnp.ones(()), training=training)
    layer = interop.equinox(Odd(), method="shrinks")
    text = r"equinox\(Odd\) expected PyTreeDef.* as the state after its call, received PyTreeDef.*\. Return the eqx"
    with pytest.raises(ValueError, match=text):
        layer.apply(layer.init(), jnp.ones((1, 1)), training=True)
