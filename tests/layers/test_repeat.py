"""Copies of a layer run by one loop: the values of separate layers, and what depends on paths, keys and state."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, Layer, Vars, layers, losses, rng, tree

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def mse(output):
    return losses.mse(output, jnp.zeros((8, 4)))


def block():
    return layers.residual(
        layers.sequential([layers.linear(4, 6), layers.batch_norm(6), layers.tanh(), layers.linear(6, 4)])
    )


def stacked(parts):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def trained(model, **options):
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1), **options)
        return trainer, trainer.init()


@pytest.mark.parametrize("remat", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_step_is_that_of_separate_layers_with_the_same_weights(remat):
    """Initial values, loss, gradients by the update, and the running statistics of each copy."""
    separate, before = trained(layers.sequential([block()] * 3))
    expected, after = separate.step(before, X, loss=mse)
    trainer, state = trained(layers.repeat(block(), 3, remat))
    jax.tree.map(np.testing.assert_array_equal, state.vars.params, stacked(before.vars.params))
    loss, ours = trainer.step(state, X, loss=mse)
    close(loss, expected)
    jax.tree.map(close, ours.vars.params, stacked(after.vars.params))
    jax.tree.map(close, ours.vars.state, stacked(after.vars.state))
    assert len(np.unique(ours.vars.state["inner"][1]["running_var"], axis=0)) == 3


def test_each_copy_and_each_step_draws_its_own_masks_as_functions_of_the_key():
    model = layers.repeat(layers.fn(lambda x: x + 0.0) >> layers.dropout(0.5), 3)
    variables, ones = model.init(), jnp.ones((64,))

    def drawn(seed, before=0):
        with rng.scope(seed):
            for _ in range(before):
                rng.next_key()
            y, _ = model.apply(variables, ones, training=True)
            return np.asarray(y), rng.next_key()

    (first, after), (again, _), (other, _), (later, _) = drawn(0), drawn(0), drawn(1), drawn(0, 1)
    np.testing.assert_array_equal(first, again)
    assert set(first) == {0.0, 8.0}
    assert not np.array_equal(first, other) and not np.array_equal(first, later)
    kept = (first != 0).mean()
    assert 0.02 < kept < 0.3, "three equal masks would keep half"
    with rng.scope(0):
        rng.next_key()
        assert after == rng.next_key(), "one key is taken from the scope for all copies"


def test_without_randomness_no_key_is_drawn():
    model = layers.repeat(layers.dropout(0.5), 3)
    variables = model.init()
    with rng.scope(0):
        y = jax.jit(lambda x: model.apply(variables, x)[0])(X)
        first = rng.next_key()
        with pytest.raises(RuntimeError, match="frozen into the compiled program"):
            jax.jit(lambda x: model.apply(variables, x, training=True)[0])(X)
    np.testing.assert_array_equal(y, X)
    with rng.scope(0):
        assert first == rng.next_key()


def test_frozen_parts_and_microbatches():
    """A frozen norm keeps its state in every copy, by which microbatches accept it; the rest trains."""
    trainable = lambda path: not path.startswith("inner.1.")
    trainer, state = trained(layers.repeat(block(), 3), trainable=trainable, microbatches=2)
    _, after = trainer.step(state, X, loss=mse)
    jax.tree.map(np.testing.assert_array_equal, after.vars.state, state.vars.state)
    jax.tree.map(np.testing.assert_array_equal, after.vars.params["inner"][1], state.vars.params["inner"][1])
    assert not np.array_equal(after.vars.params["inner"][0]["weight"], state.vars.params["inner"][0]["weight"])
    moves, state = trained(layers.repeat(block(), 3), microbatches=2)
    with pytest.raises(ValueError, match=r"the model's state 'inner\.1\.running_mean', .* changes in training"):
        moves.step(state, X, loss=mse)


def test_precision_context_and_the_summary():
    reads = Layer(
        init=lambda *, dtype: Vars({}, {}, dtype), apply=lambda vars, x, *, training, ctx: (x * ctx["scale"], vars)
    )
    model = layers.sequential([layers.repeat(layers.linear(4, 4) >> reads, 2), layers.linear(4, 4)])
    trainer, state = trained(model, precision="mixed_bfloat16")
    loss, _ = trainer.step(state, X, loss=mse, ctx=Context(scale=np.float32(0.0)))
    assert loss == 0.0
    table = kaun.summary(trainer, X, ctx=Context(scale=np.float32(1.0)))
    assert [(row.path, row.layer, row.parameters) for row in table.rows] == [
        ("0.left", "linear(4, 4)", 40), ("0.right", "layer", 0), ("1", "linear(4, 4)", 20),
    ]  # fmt: skip
    assert repr(layers.repeat(layers.relu(), 3, remat=True)) == "repeat(\n  relu(),\n  3,\n  remat=True,\n)"


def test_any_tree_and_numpy_variables():
    both = layers.module({"a": layers.linear(4, 4)}, lambda m, x: {"u": m.a(x["u"]), "n": x["n"] + 1})
    model = layers.repeat(both, 5)
    variables = jax.tree.map(np.asarray, model.init())
    y, _ = model.apply(variables, {"u": X, "n": 0})
    assert int(y["n"]) == 5 and y["u"].shape == X.shape


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_convolutions_keep_little_for_the_backward_pass(kind):
    """What a loop keeps is written to memory: not the shifted copies of an image that the gradient is made of."""
    layer, shape = {"dense": (layers.linear(8, 8), (4, 8)), "conv": (layers.conv2d(8, 8), (2, 6, 6, 8))}[kind]
    model, x = layers.repeat(layer >> layers.tanh(), 3), jnp.ones(shape)
    variables = model.init()
    _, backward = jax.vjp(lambda params: model.apply(variables.replace(params=params), x)[0], variables.params)
    kept = sum(a.size for a in jax.tree.leaves(backward) if a.shape[:1] == (3,) and a.shape not in WEIGHTS)
    assert kept <= 3 * 3 * x.size


WEIGHTS = {(3, 8, 8), (3, 8), (3, 3, 3, 8, 8)}


@pytest.mark.slow
def test_compile_time_does_not_grow_with_the_number_of_copies():
    d = 16
    attend = layers.residual(
        layers.sequential([layers.layer_norm(d), layers.multi_head_attention(d, 2), layers.dropout(0.1)])
    )
    mlp = layers.residual(
        layers.sequential([layers.layer_norm(d), layers.linear(d, d), layers.gelu(), layers.linear(d, d)])
    )
    x = np.ones((2, 8, d), np.float32)
    seconds = {2: [], 24: []}
    for n in [2, 24, 2, 24]:
        trainer, state = trained(layers.repeat(attend >> mlp, n))
        start = time.process_time()
        trainer.step(state, x, loss=lambda y: (y**2).mean())
        seconds[n].append(time.process_time() - start)
    assert min(seconds[24]) < 1.5 * min(seconds[2])


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (layers.linear(4, 5), r"linear\(4, 5\) at '0' under repeat gets its own output as input, .*\n  the tree: expected float32\[8, 4\], found float32\[8, 5\]\nPut layers that change them before or after it, layers\.sequential\(\[first, layers\.repeat"),
        (layers.fn(lambda x: (x, x)), r"fn\(<lambda>\) at '0' under repeat .*\n  the tree: expected float32\[8, 4\], found nothing"),
    ],
)  # fmt: skip
def test_a_layer_that_changes_its_input_is_refused(layer, text):
    model = layers.sequential([layers.repeat(layer, 2)])
    with pytest.raises(ValueError, match=text):
        model.apply(model.init(), X)


def test_what_it_is_made_of_and_other_variables():
    with pytest.raises(TypeError, match=r"repeat expected layers, received relu\. Call it: layers\.relu\(\)\.$"):
        layers.repeat(layers.relu, 2)
    with pytest.raises(ValueError, match=r"repeat\(n=\.\.\.\) expected an int of at least 1, received 0"):
        layers.repeat(layers.relu(), 0)
    three, two = layers.repeat(layers.linear(4, 4), 3), layers.repeat(layers.linear(4, 4), 2)
    text = r"repeat has 2 copies, and expected a first axis of 2 in each array of its variables, received float32\[3, 4\] at 'params\.bias'"
    with pytest.raises(ValueError, match=text):
        two.apply(three.init(), X)
    with pytest.raises(ValueError, match=r"linear\(4, 4\) expected float32\[\.\.\., 4\], received float32\[8, 3\]"):
        two.apply(two.init(), X[:, :3])
    assert list(tree.flatten(two.init())[0]) == ["params.bias", "params.weight"]
