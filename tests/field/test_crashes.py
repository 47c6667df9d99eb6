"""Situations from reports about training libraries that ended in an error where the run was sound, or a wrong reason."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, Data, checkpoint, layers, losses, rng

X, Y = np.arange(8, dtype=np.float32).reshape(4, 2) / 8, np.ones((4, 1), np.float32)
KEYS = jax.random.split(jax.random.key(7), 6)


def trained(model, optimizer=None, **options):
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optimizer or optax.sgd(0.1), **options)
        return trainer, trainer.init()


def loss(output):
    return losses.mse(output, jnp.asarray(Y))


def folded(trainer, state, items):
    for x, f, *ctx in items:
        _, state = trainer.step(state, x, loss=f, ctx=ctx[0] if ctx else None)
    return state


def assert_same(a, b):
    for left, right in zip(jax.tree_util.tree_leaves(a.vars), jax.tree_util.tree_leaves(b.vars), strict=True):
        np.testing.assert_array_equal(left, right)


# 22. Typed keys.


def noisy(read):
    """A layer that adds noise drawn with a key that ``read(x, ctx)`` finds, and returns x's other part."""
    inner = layers.linear(2, 1)

    def apply(vars, x, *, training, ctx):
        key, x = read(x, ctx)
        return inner.apply(vars, x + jax.random.normal(key, ()), training=training, ctx=ctx)

    return kaun.Layer(init=lambda *, dtype: inner.init(dtype=dtype), apply=apply, name="noisy")


def with_noise(key):
    return lambda output: losses.mse(output + jax.random.normal(key, output.shape), jnp.asarray(Y))


PLACES = {
    "x": (noisy(lambda x, ctx: (x["key"], x["a"])), lambda key: ({"a": X, "key": key}, loss)),
    "ctx": (noisy(lambda x, ctx: (ctx["key"], x)), lambda key: (X, loss, Context(key=key))),
    "captured": (layers.linear(2, 1), lambda key: (X, with_noise(key))),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_typed_key_may_be_part_of_an_item(place):
    """A diffusion model takes its noise key with the batch: ``'PRNGKeyArray' object has no attribute 'weak_type'``."""
    model, item = PLACES[place]
    trainer, state = trained(model)
    items = [item(key) for key in KEYS]
    end = trainer.fit(state, items)
    assert_same(end, folded(trainer, state, items))
    assert len(trainer.compilations) == 2  # one of fit, one of step
    other = trainer.fit(state, [item(key) for key in KEYS[::-1]])
    assert (end.vars.params["weight"] != other.vars.params["weight"]).any()


@pytest.mark.parametrize("place", ["x", "ctx"])
def test_predict_and_export_take_a_typed_key(place):
    """The same model in ``predict``, and exported with a key as an input of the program."""
    model, item = PLACES[place]
    trainer, state = trained(model)
    x, _, *ctx = item(KEYS[0])
    expected = trainer.predict(state, x, ctx=ctx[0] if ctx else None)
    program = trainer.export(state, x, ctx=ctx[0] if ctx else None)
    given = (x, dict(ctx[0])) if ctx else (x,)
    np.testing.assert_allclose(program.call(*given), expected, rtol=1e-6)


def test_a_typed_key_goes_into_a_checkpointed_run(tmp_path):
    """The digest of a run's items reads keys too, and a run that is extended is the run in one piece."""
    model, item = PLACES["x"]
    trainer, state = trained(model)
    runs = checkpoint.Directory(tmp_path, every=2)
    trainer.fit(state, Data.repeat(4, item(KEYS[0])), checkpoints=runs)
    longer = trainer.fit(state, Data.repeat(6, item(KEYS[0])), checkpoints=runs)
    assert_same(longer, trainer.fit(state, Data.repeat(6, item(KEYS[0]))))


@pytest.mark.parametrize("width", [1, 3000])
def test_a_loss_and_a_metric_may_capture_a_whole_state(width):
    """Distillation: the teacher is a TrainState, whose run key is a typed key. Small states, and those above 1 MiB."""
    trainer, state = trained(layers.linear(2, width), optax.adam(0.1))
    _, teacher = trained(layers.linear(2, width), optax.adam(0.2))
    teacher = teacher.replace(key=jax.random.key(5))

    def distilled(teacher):
        return lambda output: losses.mse(output, X @ teacher.vars.params["weight"])

    items = [(X, distilled(each)) for each in (teacher, state) * 3]
    end = trainer.fit(state, items)
    assert_same(end, folded(trainer, state, items))
    error = trainer.evaluate(
        end, [(X, Y)], {"error": lambda p, _: jnp.square(p - X @ teacher.vars.params["weight"]).mean()}
    )
    expected = np.square(trainer.predict(end, X) - X @ teacher.vars.params["weight"]).mean()
    assert error["error"] == pytest.approx(float(expected), rel=1e-5)


# 24. disable_jit, and fit inside jit.


def test_fit_runs_with_jit_disabled():
    """Debugging with ``jax.disable_jit()``: the state of a small model came back as NumPy arrays, and the step died."""
    model = layers.sequential([layers.linear(2, 8), layers.batch_norm(8), layers.linear(8, 1)])
    trainer, state = trained(model)
    data = Data.batches((X, Y), 2).with_loss(losses.mse).epochs(3)
    expected = trainer.fit(state, data)
    seen = []
    with jax.disable_jit():
        end = trained(model)[0].fit(state, data, report=lambda step, value, state: seen.append(value))
    assert len(seen) == 6
    for left, right in zip(jax.tree.leaves(end.vars), jax.tree.leaves(expected.vars), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def test_the_users_code_has_jax_arrays_with_jit_disabled():
    """A layer, a loss and a metric that use ``.at[...]`` work on x, weights and labels as they do in a compiled step."""

    def apply(vars, x, *, training, ctx):
        state = {"calls": vars.state["calls"].at[...].add(1)}
        return x.at[0].set(0) @ vars.params["weight"].at[0].multiply(2), vars.replace(state=state)

    def init(*, dtype):
        return kaun.Vars({"weight": jnp.ones((2, 1), dtype)}, {"calls": jnp.zeros((), jnp.int32)}, dtype)

    labels = Y.copy()
    trainer, state = trained(kaun.Layer(init=init, apply=apply, name="edits"))
    with jax.disable_jit():
        end = trainer.fit(state, Data.repeat(3, (X, lambda output: losses.mse(output, labels.at[0].set(2)))))
        trainer.predict(end, X)
        assert trainer.evaluate(end, [(X, Y)], {"m": lambda p, t: t.at[0].set(5).sum()}) == {"m": 8.0}
    assert end.vars.state["calls"] == 3


TRANSFORMED = {
    "jit of the state": lambda fit, state: jax.jit(lambda s: fit(s, [(X, loss)]))(state),
    "jit of nothing that fit uses": lambda fit, state: jax.jit(lambda z: fit(state, [(X, loss)]).step + z)(1),
    "jit of x": lambda fit, state: jax.jit(lambda x: fit(state, [(x, loss)]))(X),
    "scan": lambda fit, state: jax.lax.scan(lambda s, _: (fit(s, [(X, loss)]), None), state, None, length=2),
    "grad": lambda fit, state: jax.grad(lambda x: fit(state, [(x, loss)]).vars.params["weight"].sum())(X),
    "vmap": lambda fit, state: jax.vmap(lambda x: fit(state, [(X, loss), (x, loss)]).vars)(np.stack([X, X])),
    "vmap, the second JAX array": lambda fit, state: jax.vmap(
        lambda x: fit(state, [(jnp.asarray(X), loss), (x, loss)]).vars
    )(np.stack([X, X])),
    "a context": lambda fit, state: jax.vmap(lambda c: fit(state, [(X, loss, Context(c=c))]).vars)(np.ones(2)),
    "a captured array": lambda fit, state: jax.vmap(
        lambda y: fit(state, [(X, lambda output: losses.mse(output, y))]).vars
    )(np.stack([Y, Y])),
}


@pytest.mark.parametrize("form", TRANSFORMED)
def test_fit_inside_a_transformed_function_says_what_to_write(form):
    """A hyperparameter search writes ``jit`` or ``vmap`` around ``fit``, which died on 'sharding' of a traced array."""
    trainer, state = trained(layers.linear(2, 1))
    with pytest.raises(TypeError, match="fit was called inside a function that JAX traces") as caught:
        TRANSFORMED[form](trainer.fit, state)
    assert "jax.lax.scan(lambda state, x: trainer.step(state, x, loss=loss)[::-1], state, xs)" in str(caught.value)


def test_the_advice_for_fit_inside_jit_is_a_program_that_runs():
    """``lax.scan`` over ``step`` gives the losses and the state of ``fit``."""
    trainer, state = trained(layers.linear(2, 1))
    xs = jnp.stack([X, X + 1, X + 2])
    scanned, values = jax.jit(
        lambda state, xs: jax.lax.scan(lambda state, x: trainer.step(state, x, loss=loss)[::-1], state, xs)
    )(state, xs)
    end = trainer.fit(state, [(x, loss) for x in xs])
    assert values.shape == (3,)
    for left, right in zip(jax.tree.leaves(scanned.vars), jax.tree.leaves(end.vars), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)


# 25. Optimizers.

SCHEDULE = optax.linear_schedule(0.5, 0.1, 10)
WIDE = {
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=SCHEDULE),
    "a float32 rate": lambda: optax.adam(jnp.float32(0.01)),
    "float32 moments": lambda: optax.adam(0.01, mu_dtype=jnp.float32),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", WIDE)
def test_updates_of_half_precision_parameters_may_be_float32(name, dtype):
    """optax.apply_updates casts them; kaun refused them with a text about optax.lookahead."""
    trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=WIDE[name]())
    with rng.scope(0):
        state = trainer.init(dtype=dtype)
    x, y = jnp.asarray(X, dtype), jnp.asarray(Y, dtype)
    f = lambda output: losses.mse(output, y)
    end = trainer.fit(state, Data.repeat(2, (x, f)))
    optimizer, params = WIDE[name](), state.vars.params
    opt_state = optimizer.init(params)
    for _ in range(2):
        gradient = jax.grad(lambda p: f(trainer.model.apply(kaun.Vars(p, {}, dtype), x)[0]))(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
    for left, right in zip(jax.tree.leaves(end.vars.params), jax.tree.leaves(params), strict=True):
        assert left.dtype == dtype
        np.testing.assert_allclose(left.astype(np.float32), right.astype(np.float32), rtol=0.03)


@pytest.mark.parametrize(("x64", "dtype"), [(True, jnp.float32), (True, jnp.bfloat16), (False, jnp.bfloat16)])
def test_lbfgs_trains_models_narrower_than_its_line_search(x64, dtype):
    """Its line search tries float64 or float32 parameters, which the second layer refused as input of another dtype."""
    model = layers.sequential([layers.linear(2, 4), layers.tanh(), layers.linear(4, 1)])
    trainer = kaun.Trainer(model=model, optimizer=optax.lbfgs())
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", x64)
    try:
        with rng.scope(0):
            state = trainer.init(dtype=dtype)
        f = lambda output: losses.mse(output.astype(jnp.float32), jnp.asarray(Y))
        end = trainer.fit(state, Data.repeat(5, (jnp.asarray(X, dtype), f)))
        first, last = (float(trainer.step(s, jnp.asarray(X, dtype), loss=f)[0]) for s in (state, end))
    finally:
        jax.config.update("jax_enable_x64", before)
    assert last < 0.1 * first and end.vars.params[0]["weight"].dtype == dtype


def sam(opaque):
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(optax.sgd(0.5), ascent, opaque_mode=opaque)


@pytest.mark.parametrize("trainable", [None, lambda path: path == "weight"])
def test_opaque_sam_is_that_of_optax_by_hand(trainable):
    """It needs ``grad_fn``, which a loop by hand passes: ``grad_fn must be provided when opaque_mode=True``."""
    trainer, state = trained(layers.linear(2, 1), sam(True), trainable=trainable)
    end = trainer.fit(state, Data.repeat(4, (X, loss)))
    bias = state.vars.params["bias"]
    params = {"weight": state.vars.params["weight"]} | ({} if trainable else {"bias": bias})
    optimizer = sam(True)
    opt_state = optimizer.init(params)
    gradient = jax.grad(
        lambda p: loss(trainer.model.apply(kaun.Vars({"bias": bias, **p}, {}, jnp.dtype("float32")), X)[0])
    )
    for _ in range(4):
        updates, opt_state = optimizer.update(gradient(params), opt_state, params, grad_fn=lambda p, _: gradient(p))
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(end.vars.params["weight"], params["weight"], rtol=1e-5)


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: optax.chain(optax.clip(1.0), o)])
def test_sophia_trains(wrap):
    """It needs ``obj_fn``, the loss as a function of the parameters, also inside a chain."""
    trainer, state = trained(layers.linear(2, 1), wrap(optax.contrib.sophia(0.05)))
    end = trainer.fit(state, Data.repeat(20, (X, loss)))
    assert trainer.step(end, X, loss=loss)[0] < 0.5 * trainer.step(state, X, loss=loss)[0]


def test_an_optimizer_that_fails_is_refused_with_its_own_error():
    """Differentially private SGD needs gradients of single examples; the message spoke of optax.lookahead alone."""
    with pytest.raises(TypeError, match=r"It raises ValueError: .* expects `grads` to have a batch dimension"):
        trained(layers.linear(2, 1), optax.contrib.differentially_private_aggregate(1.0, 0.1, key=jax.random.key(0)))


def test_monitor_is_refused_before_the_first_step_with_what_to_write():
    """optax.monitor's state has no measurements before its first update. optax.snapshot's has."""
    with pytest.raises(TypeError, match=r"(?s)another form after an update.*measurements\.norm.*optax\.snapshot"):
        trained(layers.linear(2, 1), optax.chain(optax.sgd(0.1), optax.monitor({"norm": optax.tree.norm})))
    snapshot = optax.snapshot("norm", optax.tree.norm)
    trainer, state = trained(layers.linear(2, 1), optax.chain(optax.sgd(0.1), snapshot))
    assert optax.tree.get(trainer.fit(state, [(X, loss)]).opt_state, "norm") > 0


def test_galore_with_frozen_parameters_is_refused_for_the_true_reason():
    """It reads None leaves as parameters; what the message says to write runs."""
    with pytest.raises(TypeError, match=r"(?s)the frozen parameters are None.*optax\.partition"):
        trained(layers.linear(2, 1), optax.contrib.galore(0.1, rank=1), trainable=lambda path: path == "weight")
    parts = {"train": optax.contrib.galore(0.1, rank=1), "frozen": optax.set_to_zero()}
    trainer, state = trained(layers.linear(2, 1), optax.partition(parts, {"weight": "train", "bias": "frozen"}))
    end = trainer.fit(state, [(X, loss)])
    assert (end.vars.params["bias"] == state.vars.params["bias"]).all()
    assert (end.vars.params["weight"] != state.vars.params["weight"]).any()
