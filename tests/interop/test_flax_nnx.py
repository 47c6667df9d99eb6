"""NNX modules as layers, compared with NNX's own loop: `nnx.jit`, `nnx.value_and_grad`, `nnx.Optimizer`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kaun
from kaun import Context, interop, layers, rng, tree

nnx = pytest.importorskip("flax.nnx")


class Net(nnx.Module):
    def __init__(self, norm=True, rate=0.4, seed=0):
        rngs = nnx.Rngs(seed)
        self.stack = nnx.List([nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)])
        self.head = nnx.Linear(16, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs) if norm else nnx.data(None)
        self.drop1, self.drop2 = nnx.Dropout(rate, rngs=rngs), nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        x = self.stack[0](x)
        x = x if self.norm is None else self.norm(x)
        x = self.drop1(nnx.relu(x))
        return self.head(self.drop2(nnx.relu(self.stack[1](x))))


def theirs(model, task, before_step):
    """The losses of NNX's documented loop, in which the model is trained."""
    model.train()
    optimizer = nnx.Optimizer(model, task.optimizer, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, x, y):
        value, grads = nnx.value_and_grad(lambda m: task.loss(m(x), y))(model)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, grads)
        return value

    losses = []
    for i, (x, y) in enumerate(task.batches):
        before_step(i)
        losses.append(float(train_step(model, optimizer, x, y)))
    return losses


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("norm", [False, True])
def test_trains_as_by_its_own_loop(task, norm, rate):
    # Bitwise: both differentiate and update by the same operations in one XLA program for each step.
    model = Net(norm, rate)
    layer = interop.flax_nnx(model)
    run = task.run(layer)

    def same_keys(step):
        (key,) = run.keys(step)
        for i, drop in enumerate((model.drop1, model.drop2)):
            drop.rngs.key.set_value(jax.random.fold_in(key, i))
            drop.rngs.count.set_value(jnp.zeros((), jnp.uint32))

    assert run.losses == theirs(model, task, same_keys)
    ours = interop.export(layer, run.end.vars)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m, (nnx.Param, nnx.BatchStat))) for m in (ours, model)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dropout_drops(task):
    assert task.run(interop.flax_nnx(Net(rate=0.4))).losses != task.run(interop.flax_nnx(Net(rate=0.0))).losses


def test_the_exported_module_predicts_the_same(task):
    model = Net()
    layer = interop.flax_nnx(model)
    run = task.run(layer)
    ours = interop.export(layer, run.end.vars)
    assert type(ours) is Net and not ours.drop1.deterministic
    ours.eval()
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(ours, task.x[0]), run.trainer.predict(run.end, task.x[0]))
    # The module that was given is as it was.
    np.testing.assert_array_equal(model.head.kernel[...], run.start.vars.params["head"]["kernel"])
    assert not model.norm.mean[...].any() and ours.norm.mean[...].any()


def test_the_layer_keeps_the_values_that_it_was_made_with():
    model = Net()
    layer = interop.flax_nnx(model)
    before = layer.init()
    model.head.kernel.set_value(jnp.zeros((16, 3)))
    model.norm.mean.set_value(jnp.ones(16))
    model.drop1.rngs.count.set_value(jnp.ones((), jnp.uint32))
    after = layer.init()
    assert jax.tree.all(jax.tree.map(jnp.array_equal, before, after))
    assert interop.export(layer, after).drop1.rngs.count[...] == 0


def test_checkpoints(task, tmp_path):
    layer = interop.flax_nnx(Net())
    state = task.run(layer).end
    kaun.checkpoint.save(tmp_path / "net", state)
    trainer = kaun.Trainer(model=layer, optimizer=task.optimizer)
    loaded = kaun.checkpoint.load(tmp_path / "net", like=trainer.init())
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded, state))


def test_params_and_state_are_plain_and_named_as_in_nnx():
    model = Net()
    variables = interop.flax_nnx(model).init()
    expected = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.structure(variables.params) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables.params, expected))
    assert {"stack.0.kernel", "norm.scale", "head.bias"} <= set(tree.flatten(variables.params)[0])
    assert set(tree.flatten(variables.state)[0]) == {"norm.mean", "norm.var"}


def test_in_half_precision_statistics_stay_in_float32():
    layer = interop.flax_nnx(Net())
    variables = layer.init(dtype=jnp.bfloat16)
    assert {a.dtype.name for a in jax.tree.leaves(variables.params)} == {"bfloat16"}
    assert {a.dtype.name for a in jax.tree.leaves(variables.state)} == {"float32"}
    with rng.scope(0), jax.numpy_dtype_promotion("standard"):
        _, after = layer.apply(variables, jnp.ones((4, 6), jnp.bfloat16), training=True)
    assert not tree.difference(variables, after)


class Tied(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(6, 6, rngs=nnx.Rngs(0))
        self.first = nnx.Linear(6, 6, rngs=nnx.Rngs(1))
        self.again = self.first

    def __call__(self, x):
        return self.embed.attend(self.again(self.first(self.embed(x))))


def test_shared_variables_stay_shared():
    model = Tied()
    layer = interop.flax_nnx(model)
    variables = layer.init()
    assert set(tree.flatten(variables.params)[0]) == {"embed.embedding", "first.bias", "first.kernel"} or set(
        tree.flatten(variables.params)[0]
    ) == {"embed.embedding", "again.bias", "again.kernel"}
    doubled = variables.replace(params=jax.tree.map(lambda a: 2 * a, variables.params))
    exported = interop.export(layer, doubled)
    assert exported.first is exported.again
    x = jnp.arange(6)
    np.testing.assert_array_equal(layer.apply(doubled, x)[0], exported(x))
    assert not jnp.array_equal(layer.apply(doubled, x)[0], model(x))


class Words(nnx.Module):
    """Its call tells what it was given."""

    def __init__(self):
        self.linear = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        self.seen = []

    def __call__(self, x, mask, scale=3.0, *, train, deterministic=None, unknown="default"):
        WORDS.append((mask, scale, train, deterministic, unknown))
        return self.linear(x)


WORDS = []


def test_switches_and_context_reach_the_call():
    layer = interop.flax_nnx(Words())
    variables = layer.init()
    for training in (True, False):
        layer.apply(variables, jnp.ones((1, 1)), training=training, ctx=Context(mask=1, other=2))
        assert WORDS.pop() == (1, 3.0, training, not training, "default")
    layer.apply(variables, jnp.ones((1, 1)), ctx=Context(mask=1, scale=4))
    assert WORDS.pop()[:2] == (1, 4)
    with pytest.raises(kaun.errors.MissingContext, match=r"Context has no 'mask'; it has 'scale'\. Pass it as fit\("):
        layer.apply(variables, jnp.ones((1, 1)), ctx=Context(scale=4))


class Noisy(nnx.Module):
    """Draws in evaluation too."""

    def __init__(self):
        self.rngs = nnx.Rngs(noise=0, other=0)
        self.weight = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return x + self.weight[...] * jax.random.normal(self.rngs.noise(), x.shape)


def test_streams_are_fed_from_the_scope():
    layer = interop.flax_nnx(Noisy())
    variables, x = layer.init(), jnp.zeros(3)

    def drawn(seed, training):
        with rng.scope(seed):
            return layer.apply(variables, x, training=training)[0]

    for training in (True, False):
        assert jnp.array_equal(drawn(0, training), drawn(0, training))
        assert not jnp.array_equal(drawn(0, training), drawn(1, training))


def test_evaluation_without_randomness_needs_no_scope():
    layer = interop.flax_nnx(Net())
    variables = layer.init()
    with rng.scope(0):
        y = jax.jit(lambda v, x: layer.apply(v, x)[0])(variables, jnp.ones((2, 6)))
        first = rng.next_key()
    with rng.scope(0):
        assert rng.next_key() == first  # none was drawn
    assert y.shape == (2, 3)


class Fixed(nnx.Module):
    """What its user set to evaluation, by argument of the constructor or by ``eval()``, and what was not set."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.9, deterministic=True, rngs=rngs)
        self.encoder = nnx.Sequential(nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.9, rngs=rngs))
        self.encoder.eval()
        self.free, self.attend = nnx.BatchNorm(3, rngs=rngs), nnx.MultiHeadAttention(1, 3, dropout_rate=0.5, rngs=rngs)

    def __call__(self, x):
        return self.encoder(self.drop(self.norm(x)))

    def unset(self, x):
        return self.free(x), self.attend.deterministic


def test_what_the_user_set_to_evaluation_stays_there_in_training():
    """A pretrained encoder with fixed statistics: training normalized by the batch, with 90 % dropout."""
    layer = interop.flax_nnx(Fixed())
    variables, x = layer.init(), jnp.arange(12.0).reshape(4, 3)
    with rng.scope(0):
        y, after = layer.apply(variables, x, training=True)
    np.testing.assert_array_equal(y, layer.apply(variables, x)[0])
    jax.tree.map(np.testing.assert_array_equal, after.state, variables.state)
    assert not interop.export(layer, after).free.use_running_average
    with rng.scope(0):
        (y, deterministic), after = interop.flax_nnx(Fixed(), method="unset").apply(variables, x, training=True)
    assert deterministic is False and (after.state["free"]["mean"] != 0).all()
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)


class Forced(nnx.Module):
    def __init__(self):
        self.inner = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))])

    def __call__(self, x):
        return self.inner[1](self.inner[0](x), deterministic=False)


def test_dropout_that_stays_on_in_evaluation_is_refused():
    layer = interop.flax_nnx(Forced())
    text = (
        r"flax_nnx\(Forced\): 'inner\.1' draws in evaluation mode, so dropout would stay on in predict: .* Leave that"
    )
    with rng.scope(0), pytest.raises(ValueError, match=text):
        layer.apply(layer.init(), jnp.ones((1, 2)))
    with rng.scope(0):
        layer.apply(layer.init(), jnp.ones((1, 2)), training=True)


class ByArgument(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x, *, rngs=None):
        return self.drop(self.linear(x), rngs=rngs)


def test_streams_by_argument():
    layer = interop.flax_nnx(ByArgument())
    variables, x = layer.init(), jnp.ones((2, 2))
    with rng.scope(0):
        y, _ = layer.apply(variables, x, training=True)
    with rng.scope(0):
        model = interop.export(layer, variables)
        np.testing.assert_array_equal(y, model(x, rngs=nnx.Rngs(rng.next_key())))
    np.testing.assert_array_equal(
        layer.apply(variables, x)[0], variables.params["linear"]["kernel"].sum(0)[None].repeat(2, 0)
    )


def test_split_streams_get_keys_in_their_shape():
    class Many(nnx.Module):
        def __init__(self):
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
            self.drop.rngs = self.drop.rngs.split(4)
            self.weight = nnx.Param(jnp.ones(()))

        def __call__(self, x):
            keys = self.drop.rngs.key[...]
            return self.weight[...] * jax.vmap(lambda key: jax.random.uniform(key))(keys)

    layer = interop.flax_nnx(Many())
    with rng.scope(0):
        y, _ = layer.apply(layer.init(), jnp.ones(()), training=True)
    assert len(set(y.tolist())) == 4


class Counter(nnx.Module):
    def __init__(self):
        self.weight, self.calls = nnx.Param(jnp.ones(())), nnx.Variable(jnp.zeros((), jnp.int32))
        self.table = jnp.arange(3.0)

    def __call__(self, x):
        self.calls[...] += 1
        return x * self.weight[...] + self.table.sum()

    def grow(self, x):
        self.more = nnx.Variable(x)
        return x

    def reshape(self, x):
        self.calls.set_value(jnp.zeros(2, jnp.int32))
        return x

    def lose(self, x):
        del self.calls
        return x

    def look(self, x):
        self.seen = nnx.Intermediate(x)
        return x


def test_other_variables_and_arrays_are_state():
    layer = interop.flax_nnx(Counter())
    variables = layer.init()
    y, after = layer.apply(variables, jnp.ones(()), training=True)
    assert (y, after.state["calls"], variables.state["calls"]) == (4, 1, 0)
    assert interop.export(layer, after).calls[...] == 1
    y, after = interop.flax_nnx(Counter(), method="look").apply(variables, jnp.ones(()))
    assert set(tree.flatten(after)[0]) == set(tree.flatten(variables)[0])


def test_a_method_by_name_or_as_a_function():
    layer = interop.flax_nnx(Counter(), method=lambda module, x, *, train: (module(x), train))
    variables = layer.init()
    assert layer.apply(variables, jnp.ones(()), training=True)[0] == (4, True)
    assert layer.apply(variables, jnp.ones(()))[0] == (4, False)


def test_in_a_composition(task):
    model = interop.flax_nnx(nnx.Linear(6, 8, rngs=nnx.Rngs(0))) >> layers.relu() >> layers.linear(8, 3)
    run = task.run(model)
    assert set(tree.flatten(run.end.vars.params)[0]) == {
        "left.left.bias", "left.left.kernel", "right.bias", "right.weight",
    }  # fmt: skip
    assert repr(interop.flax_nnx(nnx.Linear(6, 8, rngs=nnx.Rngs(0)))) == "flax_nnx(Linear)"


def linen_module():
    import flax.linen as nn

    return nn.Dense(3)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: object(), r"flax_nnx expected an nnx\.Module, received object\. Write interop\.flax_nnx\(Model\(nnx"),
        (
            lambda: Net,
            r"received the class Net\. Pass an instance: interop\.flax_nnx\(Net\(\.\.\., rngs=nnx\.Rngs\(0\)\)\)",
        ),
        (linen_module, r"received Dense, a Linen module\. Write interop\.linen\(module, x\)\."),
        (nnx.Module, r"flax_nnx\(Module\) has no __call__, .* interop\.flax_nnx\(module, method=\"encode\"\)"),
    ],
)
def test_what_is_no_module_is_refused(make, text):
    with pytest.raises(TypeError, match=text):
        interop.flax_nnx(make())


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("grow", r"flax_nnx\(Counter\) made 'more' in its call, .* Make all variables in __init__; "),
        ("lose", r"flax_nnx\(Counter\) removed 'calls' in its call"),
        (
            "reshape",
            r"(?s)changed the structure of its state in a call:\n  calls: expected int32\[\], found int32\[2\]\nMake the",
        ),
    ],
)
def test_a_call_that_changes_the_variables_is_refused(method, text):
    layer = interop.flax_nnx(Counter(), method=method)
    with pytest.raises(ValueError, match=text):
        layer.apply(layer.init(), jnp.ones(()), training=True)
