"""Linen modules as layers, compared with the loop of Flax's docs: `module.apply` in a jitted step, and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, interop, rng, tree

nn = pytest.importorskip("flax.linen")


class Net(nn.Module):
    norm: bool = True
    rate: float = 0.4

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train)(x) if self.norm else x
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(x))
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(nn.Dense(16)(x)))
        return nn.Dense(3)(x)


def theirs(model, task, start, keys_of):
    """The losses of the documented loop, and the variables after it."""
    params, rest = start.params, start.state

    @jax.jit
    def train_step(params, rest, opt_state, x, y, key):
        def loss_fn(params):
            logits, updates = model.apply(
                {"params": params, **rest}, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
            )
            return task.loss(logits, y), updates

        (value, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            steps, opt_state = task.optimizer.update(grads, opt_state, params)
        return value, optax.apply_updates(params, steps), updates, opt_state

    losses, opt_state = [], task.optimizer.init(params)
    for i, (x, y) in enumerate(task.batches):
        value, params, rest, opt_state = train_step(params, rest, opt_state, x, y, keys_of(i)[0])
        losses.append(float(value))
    return losses, {"params": params, **rest}


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("norm", [False, True])
def test_trains_as_by_its_own_loop(task, norm, rate):
    # Bitwise: both differentiate and update by the same operations in one XLA program for each step.
    model = Net(norm, rate)
    layer = interop.linen(model, task.x[0])
    run = task.run(layer)
    losses, variables = theirs(model, task, run.start.vars, run.keys)
    assert run.losses == losses
    exported = interop.export(layer, run.end.vars)
    assert jax.tree.structure(exported) == jax.tree.structure(variables)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, exported, variables))
    predicted = jax.jit(lambda v, x: model.apply(v, x, train=False))(exported, task.x[0])
    np.testing.assert_array_equal(predicted, run.trainer.predict(run.end, task.x[0]))


def test_dropout_drops(task):
    first = [task.run(interop.linen(Net(rate=rate), task.x[0])).losses for rate in (0.4, 0.0)]
    assert first[0] != first[1]


@pytest.mark.parametrize("shape", [False, True])
def test_weights_are_those_of_its_own_init(shape):
    sample = jax.ShapeDtypeStruct((1, 6), jnp.float32) if shape else jnp.ones((1, 6))
    layer = interop.linen(Net(), sample)
    with rng.scope(5):
        variables = layer.init()
    with rng.scope(5):
        expected = Net().init(rng.next_key(), jnp.ones((1, 6)), train=False)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables.params, expected["params"]))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables.state, {"batch_stats": expected["batch_stats"]}))
    assert {"Dense_0.kernel", "BatchNorm_0.scale"} <= set(tree.flatten(variables.params)[0])
    assert set(tree.flatten(variables.state)[0]) == {"batch_stats.BatchNorm_0.mean", "batch_stats.BatchNorm_0.var"}


def test_in_half_precision_statistics_stay_in_float32():
    layer = interop.linen(Net(), jnp.ones((1, 6)))
    variables = layer.init(dtype=jnp.bfloat16)
    assert {a.dtype.name for a in jax.tree.leaves(variables.params)} == {"bfloat16"}
    assert {a.dtype.name for a in jax.tree.leaves(variables.state)} == {"float32"}
    with rng.scope(0), jax.numpy_dtype_promotion("standard"):
        _, after = layer.apply(variables, jnp.ones((4, 6), jnp.bfloat16), training=True)
    assert not tree.difference(variables, after)


class ByField(nn.Module):
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5)(nn.Dense(64)(x), deterministic=self.deterministic)


def test_the_switch_may_be_a_field():
    layer = interop.linen(ByField(), jnp.ones((1, 2)))
    variables = layer.init()
    with rng.scope(0):
        y, _ = layer.apply(variables, jnp.ones((1, 2)), training=True)
    assert (y == 0).any() and not (layer.apply(variables, jnp.ones((1, 2)))[0] == 0).any()


class Noisy(nn.Module):
    """Draws in evaluation too, from streams of other names."""

    @nn.compact
    def __call__(self, x, train: bool):
        weight = self.param("weight", nn.initializers.ones, ())
        draw = lambda stream: jax.random.normal(self.make_rng(stream), x.shape)
        return jnp.stack(
            [weight * x, draw("dropout" if train else "other"), draw("noise"), draw("noise"), draw("more")]
        )


def test_streams_are_fed_from_the_scope():
    layer = interop.linen(Noisy(), jnp.zeros(3))
    variables = layer.init()

    def drawn(seed, training):
        with rng.scope(seed):
            return layer.apply(variables, jnp.zeros(3), training=training)[0]

    for training in (True, False):
        assert jnp.array_equal(drawn(0, training), drawn(0, training))
        assert not (drawn(0, training)[1:] == drawn(1, training)[1:]).any()
        assert len(np.unique(drawn(0, training)[1:])) == 12


class Unswitched(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(2, name="first")(x))
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


class Inside(nn.Module):
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Sequential([nn.Dense(2), Unswitched(name="block")])(x)


@pytest.mark.parametrize(("module", "where"), [(Unswitched, "Dropout_0"), (Inside, "block.Dropout_0")])
def test_dropout_that_nobody_switches_is_refused_in_evaluation(module, where):
    """A model ported from a script that only trained: its predictions were another at each call."""
    layer = interop.linen(module(), jnp.ones((1, 2)))
    text = (
        rf"linen\({module.__name__}\): '{where}' draws from the stream 'dropout' in evaluation mode, so dropout would "
        r"stay on in predict\. .* write nn\.Dropout\(rate, deterministic=not train\)\. .* self\.make_rng\(\"noise\"\)\."
    )
    with rng.scope(0), pytest.raises(ValueError, match=text):
        layer.apply(layer.init(), jnp.ones((1, 2)))
    with rng.scope(0):
        layer.apply(layer.init(), jnp.ones((1, 2)), training=True)


def test_a_module_that_draws_from_the_stream_of_dropout_itself_is_refused_too():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x) * jax.random.uniform(self.make_rng("dropout"))

    layer = interop.linen(Own(), jnp.ones((1, 2)))
    with rng.scope(0), pytest.raises(ValueError, match=r"linen\(Own\): 'Own' draws from the stream 'dropout'"):
        layer.apply(layer.init(), jnp.ones((1, 2)))


def test_evaluation_without_randomness_needs_no_scope():
    layer = interop.linen(Net(), jnp.ones((1, 6)))
    variables = layer.init()
    with rng.scope(0):
        assert jax.jit(lambda v, x: layer.apply(v, x)[0])(variables, jnp.ones((2, 6))).shape == (2, 3)


class Words(nn.Module):
    """Its call tells what it was given."""

    @nn.compact
    def __call__(self, x, mask, scale=3.0, *, is_training, inference=None):
        WORDS.append((mask, scale, is_training, inference))
        return nn.Dense(1)(x)


WORDS = []


def test_switches_and_context_reach_the_call():
    layer = interop.linen(Words(), jnp.ones((1, 1)), ctx=Context(mask=0))
    variables = layer.init()
    assert WORDS.pop() == (0, 3.0, False, True)
    for training in (True, False):
        layer.apply(variables, jnp.ones((1, 1)), training=training, ctx=Context(mask=1, other=2))
        assert WORDS.pop() == (1, 3.0, training, not training)
    layer.apply(variables, jnp.ones((1, 1)), ctx=Context(mask=1, scale=4))
    assert WORDS.pop()[:2] == (1, 4)
    with pytest.raises(kaun.errors.MissingContext, match=r"Context has no 'mask'; it has nothing\. Pass it as fit\("):
        interop.linen(Words(), jnp.ones((1, 1))).init()


class Collects(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "h", x)
        self.sow("losses", "l2", (x**2).sum())
        calls = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
        if self.is_mutable_collection("counts") and not self.is_initializing():
            calls.value += 1
        return nn.Dense(1)(x)


def test_unknown_collections_are_state_and_what_is_sown_is_not():
    layer = interop.linen(Collects(), jnp.ones((1, 1)), drop=("intermediates", "losses"))
    variables = layer.init()
    assert set(tree.flatten(variables.state)[0]) == {"counts.calls"}
    with rng.scope(0):
        _, after = layer.apply(variables, jnp.ones((1, 1)), training=True)
    assert after.state["counts"]["calls"] == 1
    assert layer.apply(after, jnp.ones((1, 1)))[1].state["counts"]["calls"] == 1
    growing = interop.linen(Collects(), jnp.ones((1, 1)))
    text = (
        r"(?s)^linen\(Collects\) changed the structure of its state in a call:\n  losses\.l2\.1: expected nothing, found "
        r"float32\[\]\nIf it is a collection that the module sows, interop\.linen\(module, x, keep=\[\.\.\.\]\) returns it "
        r"with the output, \(y, \{\.\.\.\}\), so that the loss can add it; drop=\[\.\.\.\] discards it\."
    )
    with rng.scope(0), pytest.raises(ValueError, match=text):
        growing.apply(growing.init(), jnp.ones((1, 1)), training=True)


@pytest.mark.parametrize("keep", ["losses", ("losses",)])
def test_what_is_sown_and_kept_is_part_of_the_output(keep):
    """The load balancing of a mixture of experts is sown: `drop=` threw it away, and the experts collapsed."""
    layer = interop.linen(Collects(), jnp.ones((1, 1)), keep=keep)
    trainer = kaun.Trainer(model=layer, optimizer=optax.sgd(0.1))
    with rng.scope(0):
        state = trainer.init()
    assert set(tree.flatten(state.vars.state)[0]) == {"counts.calls"}
    loss = lambda output: output[0].mean() + 3 * sum(jax.tree.leaves(output[1]["losses"]))
    value, after = trainer.step(state, jnp.full((2, 1), 2.0), loss=loss)
    y, sown = trainer.predict(state, jnp.full((2, 1), 2.0))
    assert jax.tree.map(float, sown) == {"losses": {"l2": (8.0,)}}
    np.testing.assert_allclose(value, y.mean() + 24, rtol=1e-6)
    assert after.vars.state["counts"]["calls"] == 1
    assert set(interop.export(layer, after.vars)) == {"params", "counts"}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            {"keep": "params"},
            r"linen\(drop=\['intermediates'\], keep=\['params'\]\): .*'params' is the parameters\. Write",
        ),
        (
            {"keep": ["a", "b"], "drop": ["b"]},
            r"linen\(drop=\['b'\], keep=\['a', 'b'\]\): .*'b' is in drop= too\. Write",
        ),
    ],
)
def test_collections_that_cannot_be_kept_are_refused(words, text):
    with pytest.raises(ValueError, match=text):
        interop.linen(Collects(), jnp.ones((1, 1)), **words)


def test_a_kept_collection_in_which_nothing_is_sown_is_refused():
    layer = interop.linen(Net(), jnp.ones((1, 2)), keep="loses")
    text = r"linen\(Net\) sowed nothing in 'loses', which keep= names\. Name a collection that it sows: self\.sow\('loses', "
    with rng.scope(0), pytest.raises(ValueError, match=text):
        layer.apply(layer.init(), jnp.ones((2, 2)), training=True)


class Fixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


def test_a_model_without_a_switch_says_how_to_add_one():
    layer = interop.linen(Fixed(), jnp.ones((2, 1)))
    with pytest.raises(Exception, match="Cannot update variable") as caught:
        layer.apply(layer.init(), jnp.ones((2, 1)))
    hint, part = caught.value.__notes__[-2:]
    assert "linen(Fixed) was run in evaluation mode" in hint
    assert part == "In the part 'BatchNorm_0', a BatchNorm, of linen(Fixed)."
    assert "train: bool, and write nn.BatchNorm(use_running_average=not train)." in hint


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model")))(x)

    def twice(self, x):
        return 2 * x


def test_partitioned_weights_are_plain_arrays():
    layer = interop.linen(Partitioned(), jnp.ones((1, 3)))
    variables = layer.init()
    assert isinstance(variables.params["Dense_0"]["kernel"], jax.Array)
    np.testing.assert_array_equal(layer.apply(variables, jnp.ones((1, 3)))[0], [[3.0, 3.0]])


def test_a_method_by_name_or_as_a_function():
    x = jnp.ones((1, 3))
    assert interop.linen(Partitioned(), x, method="twice").apply(kaun.Vars({}, {}, jnp.float32), x)[0].sum() == 6
    layer = interop.linen(Partitioned(), x, method=lambda module, x, train: (module(x), train))
    with rng.scope(0):
        (y, train), _ = layer.apply(layer.init(), x, training=True)
    assert y.shape == (1, 2) and train is True


class Empty(nn.Module):
    pass


def nnx_module():
    from flax import nnx

    return nnx.Linear(1, 1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: object(),
            r"linen expected a flax\.linen\.Module, received object\. Write interop\.linen\(Model\(\), x\)\.",
        ),
        (lambda: Net, r"received the class Net\. Pass an instance: interop\.linen\(Net\(\.\.\.\), x\)\."),
        (nnx_module, r"received Linear, an NNX module\. Write interop\.flax_nnx\(module\)\."),
        (Empty, r"linen\(Empty\) has no __call__, .* interop\.linen\(module, x, method=\"encode\"\)"),
    ],
)
def test_what_is_no_module_is_refused(make, text):
    with pytest.raises(TypeError, match=text):
        interop.linen(make(), jnp.ones(1))


@pytest.mark.parametrize("kind", [dict, tuple, list])
def test_several_inputs_in_one_value_name_the_method_that_takes_them(kind):
    """`__call__(self, a, b, train)` with (a, b) as x: "Context has no 'b'", and the method without the mode."""

    class Pair(nn.Module):
        @nn.compact
        def __call__(self, a, b, train: bool):
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(1)(a) + b)

    a, b = jnp.ones((2, 3)), jnp.ones((2, 1))
    x = {"a": a, "b": b} if kind is dict else kind([a, b])
    received, passed = (
        ("a dict with that name", "a=x['a'], b=x['b']") if kind is dict else (f"a {kind.__name__} of 2", "*x")
    )
    text = f"method=lambda module, x, train: module({passed}, train=train)"
    with pytest.raises(TypeError) as caught:
        interop.linen(Pair(), x)
    assert str(caught.value) == (
        "linen(Pair) takes 'b' as an argument of its own, and a layer has one input, here "
        f"{received}. Write interop.linen(module, x, {text})."
    )
    model = interop.linen(Pair(), x, method=eval(text.removeprefix("method=")))
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
        state = trainer.init()
    assert trainer.predict(state, x).shape == (2, 1)
    # A Context has the argument, and the pair is the first one.
    assert interop.linen(Pair(), (a, b), ctx=Context(b=b)).name == "linen(Pair)"
