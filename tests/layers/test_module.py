"""A layer out of named layers and a function: shared calls, state in their order, keys, paths, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Context, Layer, Vars, layers, losses, rng, tree
from kaun.layers.module import attributes_read

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)


def mse(output):
    return losses.mse(output, jnp.asarray(Y))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def parts():
    return {"dense": layers.linear(4, 4), "norm": layers.batch_norm(4), "drop": layers.dropout(0.5)}


def apply_each(m, x, calls):
    for call in calls:
        x = getattr(m, call)(x)
    return x


def by_hand(calls, vars, x, *, training):
    """The same calls, each with its variables, the state threaded in their order."""
    state = dict(vars.state)
    for key in calls:
        below = Vars(params=vars.params[key], state=state[key], dtype=vars.dtype)
        x, after = parts()[key].apply(below, x, training=training)
        state[key] = after.state
    return x, state


@given(calls=st.lists(st.sampled_from(["dense", "norm", "drop"]), min_size=1, max_size=6), training=st.booleans())
@settings(max_examples=15, deadline=None)
def test_calls_in_any_order_and_number_are_those_of_the_layers(calls, training):
    model = layers.module(parts(), functools.partial(apply_each, calls=calls))
    with rng.scope(0):
        variables = model.init()
    with rng.scope(1):
        y, after = model.apply(variables, X, training=training)
    with rng.scope(1):
        expected, state = by_hand(calls, variables, X, training=training)
    assert_equal(y, expected)
    assert_equal(after, variables.replace(state=state))


def test_a_norm_that_is_applied_twice_moves_twice_and_dropout_draws_again():
    masks = []

    def forward(m, x):
        masks.extend(m.drop(jnp.ones_like(x)) for _ in range(2))
        return m.norm(m.norm(x) + 1.0)

    model = layers.module({"norm": layers.batch_norm(4, momentum=0.5), "drop": layers.dropout(0.5)}, forward)
    _, after = model.apply(model.init(), X, training=True)
    mean = X.mean(axis=0)
    np.testing.assert_allclose(after.state["norm"]["running_mean"], 0.5 * (0.5 * mean) + 0.5 * 1.0, rtol=1e-5)
    assert not np.array_equal(*masks)


def test_one_set_of_parameters_for_all_calls():
    model = layers.module({"dense": layers.linear(4, 4)}, lambda m, x: m.dense(jnp.tanh(m.dense(x))))
    variables = model.init()

    def plain(params, x):
        dense = lambda x: x @ params["dense"]["weight"] + params["dense"]["bias"][None]
        return mse(dense(jnp.tanh(dense(x))))

    loss = lambda params: mse(model.apply(variables.replace(params=params), X)[0])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, jax.grad(loss)(variables.params), jax.grad(plain)(variables.params, X))


def test_in_order_it_is_sequential_bit_for_bit():
    """Initial values, a training step with dropout, and the state."""
    inner = [layers.linear(4, 4), layers.batch_norm(4), layers.tanh(), layers.dropout(0.5), layers.linear(4, 4)]
    names = ["a", "b", "c", "d", "e"]
    ours = layers.module(dict(zip(names, inner, strict=True)), lambda m, x: m.e(m.d(m.c(m.b(m.a(x))))))
    runs = []
    for model in (ours, layers.sequential(inner), layers.sequential(dict(zip(names, inner, strict=True)))):
        with rng.scope(0):
            trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
            state = trainer.init()
        loss, after = trainer.step(state, X, loss=mse)
        trainer.step(after, X, loss=mse)
        assert len(trainer.compilations) == 1
        runs.append((float(loss), [np.asarray(leaf) for leaf in jax.tree.leaves((state.vars, after.vars))]))
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])


def test_parts_in_lists_and_dicts():
    def forward(m, x):
        for block in m.blocks:
            x = x + block(x)
        return m.heads["main"](m.blocks[0](x)) + sum(head(x) for head in m.heads["more"])

    linear = layers.linear(4, 4)
    nested = {"blocks": (linear, linear), "heads": {"main": layers.relu(), "more": [linear]}}
    model = layers.module(nested, forward)
    variables = model.init()
    paths = list(tree.flatten(variables.params)[0])
    assert paths[:3] == ["blocks.0.bias", "blocks.0.weight", "blocks.1.bias"]
    assert paths[4:] == ["heads.more.0.bias", "heads.more.0.weight"]
    assert variables.state == {"blocks": [{}, {}], "heads": {"main": {}, "more": [{}]}}
    y, after = model.apply(variables, X)
    assert y.shape == X.shape and after.state == variables.state
    with pytest.raises(ValueError, match=r"linear\(4, 4\) at 'blocks\.0' expected float32\[\.\.\., 4\]"):
        model.apply(variables, X[:, :3])
    fewer = layers.module({**nested, "blocks": [linear]}, forward)
    with pytest.raises(ValueError, match=r"module has 1 layers, received variables with params list of 2 and state"):
        fewer.apply(variables, X)


def test_what_forward_reads_besides():
    """The parameters, whether it trains, the context, and another context for one call."""
    seen = []

    def forward(m, x):
        seen.append((m.training, sorted(m.ctx)))
        masked = m.reads(x, ctx=m.ctx.set("scale", 3.0 * m.ctx["scale"]))
        return m.reads(x) + masked + m.params["dense"]["weight"].sum() * m.dense(x)

    reads = Layer(
        init=lambda *, dtype: Vars({}, {}, dtype),
        apply=lambda vars, x, *, training, ctx: (x * ctx["scale"], vars),
    )
    model = layers.module(
        {"dense": layers.linear(4, 4, weight_init=jax.nn.initializers.zeros), "reads": reads}, forward
    )
    y, _ = model.apply(model.init(), X, training=True, ctx=Context(scale=jnp.float32(2.0)))
    np.testing.assert_array_equal(y, 8.0 * X)
    assert seen == [(True, ["scale"])]


def test_modules_inside_modules_and_errors_with_paths():
    inner = layers.module({"conv1": layers.linear(4, 3), "act": layers.relu()}, lambda m, x: m.act(m.conv1(x)), "block")
    model = layers.module({"encoder": inner, "head": layers.linear(3, 1)}, lambda m, x: m.head(m.encoder(x)), "net")
    assert repr(model) == (
        'net({\n  "encoder": block({\n    "conv1": linear(4, 3),\n    "act": relu(),\n  }),\n  "head": linear(3, 1),\n})'
    )
    trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1), trainable=lambda path: path.startswith("head."))
    assert [(row.path, row.layer, row.parameters) for row in kaun.summary(trainer, X).rows] == [
        ("encoder.conv1", "linear(4, 3)", 15), ("encoder.act", "relu()", 0), ("head", "linear(3, 1)", 4),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"linear\(4, 3\) at 'encoder\.conv1' expected float32\[\.\.\., 4\]"):
        model.apply(model.init(), X[:, :2])


@pytest.mark.parametrize("frozen", ["norm", ""])
def test_frozen_parts_run_in_evaluation_mode(frozen):
    seen = []

    def forward(m, x):
        seen.append(m.training)
        return m.dense(m.norm(m.drop(x)))

    inner = layers.module(parts(), forward)
    model = layers.module({"inner": inner, "out": layers.linear(4, 4)}, lambda m, x: m.out(m.inner(x)))
    trainable = lambda path: not path.startswith(f"inner.{frozen}")
    trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1), trainable=trainable, microbatches=2)
    state = trainer.init()
    _, after = trainer.step(state, X, loss=mse)
    assert_equal(after.vars.state, state.vars.state)
    assert seen[-1] is bool(frozen)


def test_it_trains_under_precision_and_remat_as_without():
    def forward(m, x):
        return m.dense(m.drop(m.norm(m.dense(x))))

    runs = []
    for wrap in (lambda layer: layer, layers.remat):
        with rng.scope(0):
            trainer = kaun.Trainer(
                model=wrap(layers.module(parts(), forward)), optimizer=optax.sgd(0.1), precision="mixed_bfloat16"
            )
            state = trainer.init()
        runs.append(trainer.step(state, X, loss=mse))
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-2)
    assert {a.dtype for a in jax.tree.leaves(runs[0][1].vars)} == {jnp.dtype(jnp.float32)}
    assert not np.array_equal(runs[0][1].vars.state["norm"]["running_mean"], np.zeros(4))


# What is refused


def forgets(m, x):
    return m.a(x)


def passes_on(m, x):
    return helper(m, x)


def helper(m, x):
    return m.a(m.b(x))


def asks(m, x):
    return m.b(x) if m.training else m.a(x)


def in_a_function(m, x):
    def inner(y):
        return m.b(y)

    return inner(m.a(x)) + sum(m.a(row).sum() for row in x)


def ties(m, x):
    return m.a(x) @ m.params["b"]["weight"].T


def takes_all(m, x):
    return m.a(x) + jax.tree.leaves(m.params)[0].sum()


def test_a_part_that_is_never_called_is_refused():
    both = {"a": layers.relu(), "b": layers.linear(4, 4), "c": layers.linear(4, 4)}
    text = (
        rf"net has parts that `forgets` \(test_module\.py:{forgets.__code__.co_firstlineno}\) never calls: 'b', 'c'\."
    )
    with pytest.raises(ValueError, match=text + r" They would have .* Call m\.b\(x\) in it, or leave the part out\."):
        layers.module(both, forgets, "net")
    del both["c"]
    for forward in (passes_on, asks, in_a_function, ties, takes_all, lambda *given: forgets(*given)):
        layers.module(both, forward)
    assert attributes_read(in_a_function.__code__, "m") == {"a", "b"}
    assert attributes_read(ties.__code__, "m") == {"a", "b", "params"}
    assert [attributes_read(f.__code__, "m") for f in (passes_on, takes_all)] == [None, None]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: layers.module([layers.relu()], forgets), TypeError, r"module expected a dict of layers by name, received \[relu\(\)\]"),
        (lambda: layers.module({"a": jnp.tanh}, forgets), TypeError, r"module expected layers, received tanh\. Write layers\.tanh\(\)\.$"),
        (lambda: layers.module({"a": [layers.relu]}, forgets), TypeError, r"module expected layers, received relu\. Call it: layers\.relu\(\)\.$"),
        (lambda: layers.module({"a": "relu"}, forgets), TypeError, r"module expected layers, received 'relu'"),
        (lambda: layers.module({1: layers.relu()}, forgets), TypeError, r"module expected names of layers as strings, received 1\. Write 'layer_1'"),
        (lambda: layers.sequential({"a.b": layers.relu()}), ValueError, r"sequential expected names of layers without dots, .* received 'a\.b'\. Write 'a_b'\."),
        (lambda: layers.sequential({"": layers.relu()}), ValueError, r"received ''\. Write 'layer'\."),
        (lambda: layers.sequential({}), ValueError, "sequential expected at least one layer, received an empty dict"),
        (lambda: layers.module({"params": layers.relu()}, forgets), ValueError, r"module cannot have a part 'params': m\.params is the module's own\. Rename it, \{'params_layer': \.\.\.\}"),
        (lambda: layers.module({"_a": layers.relu()}, forgets), ValueError, r"a part '_a': it cannot be read as m\.name\. Rename it, \{'a': "),
        (lambda: layers.module({"a-1": layers.relu()}, forgets), ValueError, r"a part 'a-1': .*\{'a_1': "),
        (lambda: layers.module({"a": layers.relu()}, None), TypeError, r"module expected a function \(m, x\) -> y, received None\. Write module\("),
        (lambda: layers.module({"a": layers.relu()}, lambda x: x), TypeError, r"received `<lambda>` \(test_module\.py:\d+\) with the arguments \(x\): too many"),
    ],
)  # fmt: skip
def test_what_it_cannot_be_made_of(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_misspelled_part_an_assignment_and_none():
    def applied(forward, name=None):
        model = layers.module({"conv1": layers.relu()}, forward, name)
        return model.apply(model.init(), X)

    misspelled = r"^net has no part 'con1'; m has conv1, ctx, params, training\. Did you mean m\.conv1\?"
    with pytest.raises(AttributeError, match=misspelled):
        applied(lambda m, x: m.conv1(m.con1(x)), "net")
    with pytest.raises(
        AttributeError, match=r"m\.count = \.\.\. in forward of module: m is immutable\. Use a variable"
    ):
        applied(lambda m, x: setattr(m, "count", m.conv1(x)))
    with pytest.raises(
        TypeError, match=r"forward of module returned None, from `<lambda>` \(test_module\.py:\d+\)\. Write: return y\."
    ):
        applied(lambda m, x: m.conv1(x) and None if x is None else None)
    shown = []
    applied(lambda m, x: shown.extend([repr(m), repr(m.conv1)]) or x)
    assert shown == ["<module in a forward pass: conv1, ctx, params, training>", "<m.conv1: relu()>"]


def test_a_call_after_the_forward_pass_is_refused():
    kept = []
    model = layers.module({"a": layers.linear(4, 4)}, lambda m, x: kept.append(m) or m.a(x))
    model.apply(model.init(), X)
    with pytest.raises(RuntimeError, match=r"^<m\.a: linear\(4, 4\)> was called after forward of module had returned"):
        kept[0].a(X)


@pytest.mark.parametrize(
    "inside",
    [
        lambda f, x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
        lambda f, x: jax.vmap(lambda r: f(r[None].repeat(2, 0)))(x),
        lambda f, x: jax.grad(lambda r: f(r).sum())(x),
        lambda f, x: jax.checkpoint(f)(x),
    ],
    ids=["scan", "vmap", "grad", "checkpoint"],
)
def test_a_state_that_a_transformation_would_lose_is_refused(inside):
    model = layers.module(
        {"norm": layers.batch_norm(4), "dense": layers.linear(4, 4)}, lambda m, x: inside(m.norm, m.dense(x))
    )
    variables = model.init()
    model.apply(variables, X)  # in evaluation nothing moves
    text = (
        r"batch_norm\(4\) at 'norm' changes its state, 'running_mean', 'running_var', inside of a transformation of JAX"
    )
    text += (
        r".* layers\.repeat\(layer, n\) for a scan and layers\.remat\(layer\) for a checkpoint\. In a derivative use a"
    )
    with pytest.raises(ValueError, match=text + r" layer without state, such as layers\.layer_norm\."):
        model.apply(variables, X, training=True)


def test_a_parameter_is_a_layer():
    parts = {"token": layers.parameter((1, 4), init=jax.nn.initializers.ones), "scale": layers.parameter(())}
    model = layers.module(parts, lambda m, x: jnp.concatenate([m.token(x), x]) + m.scale())
    variables = model.init(dtype=jnp.float16)
    assert tree.flatten(variables.params)[0].keys() == {"scale.weight", "token.weight"}
    y, _ = model.apply(variables, X.astype(jnp.float16))
    np.testing.assert_array_equal(y[0], np.ones(4))
    assert repr(layers.parameter(3)) == "parameter((3,))"
    with pytest.raises(TypeError, match=r"parameter\(shape=\.\.\.\) expected an int of at least 1, received 'a'"):
        layers.parameter("a")
    with pytest.raises(ValueError, match=r"parameter\(shape=\.\.\.\) expected an int of at least 1, received 0"):
        layers.parameter((2, 0))
    for shape in (None, 2.5, np.array([2, 3]), {"a": 1}):
        with pytest.raises(TypeError, match=r"parameter\(shape=\.\.\.\) expected an int of at least 1, received"):
            layers.parameter(shape)
    with pytest.raises(TypeError, match=r"parameter\(\(2,\)\)\(init=\.\.\.\) returned a function, not a float array"):
        layers.parameter(2, init=jax.nn.initializers.glorot_uniform).init()
