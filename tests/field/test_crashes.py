"""Situations from reports about training libraries that ended in an error where the run was sound, or a wrong reason."""

import dataclasses

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


@pytest.mark.parametrize("place", ["x", "captured", pytest.param("ctx", marks=pytest.mark.slow)])
def test_a_typed_key_may_be_part_of_an_item(place):
    """A diffusion model takes its noise key with the batch: ``'PRNGKeyArray' object has no attribute 'weak_type'``."""
    model, item = PLACES[place]
    trainer, state = trained(model)
    items = [item(key) for key in KEYS]
    end = trainer.fit(state, items)
    assert_same(end, folded(trainer, state, items))
    assert len(trainer.compilations) == 2  # one of fit, one of step
    other = trainer.fit(state, [item(key) for key in KEYS[::-1]])
    assert (np.asarray(end.vars.params["weight"]) != other.vars.params["weight"]).any()


@pytest.mark.parametrize("place", ["x", pytest.param("ctx", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("width", [pytest.param(1, marks=pytest.mark.slow), 3000])
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
    trainer, state = trained(layers.batch_norm(2))
    data = Data.batches((X, X[:, ::-1].copy()), 2).with_loss(losses.mse).epochs(3)
    expected = trainer.fit(state, data)
    seen = []
    with jax.disable_jit():
        end = dataclasses.replace(trainer).fit(state, data, report=lambda step, value, state: seen.append(value))
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


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("inject_hyperparams", jnp.bfloat16),
        pytest.param("a float32 rate", jnp.bfloat16, marks=pytest.mark.slow),
        ("float32 moments", jnp.bfloat16),
        pytest.param("inject_hyperparams", jnp.float16, marks=pytest.mark.slow),
        pytest.param("a float32 rate", jnp.float16, marks=pytest.mark.slow),
        pytest.param("float32 moments", jnp.float16, marks=pytest.mark.slow),
    ],
)
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

    @jax.jit
    def by_hand(params, opt_state):
        gradient = jax.grad(lambda p: f(trainer.model.apply(kaun.Vars(p, {}, dtype), x)[0]))(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

    for _ in range(2):
        params, opt_state = by_hand(params, opt_state)
    for left, right in zip(jax.tree.leaves(end.vars.params), jax.tree.leaves(params), strict=True):
        assert left.dtype == dtype
        np.testing.assert_allclose(np.asarray(left, np.float32), np.asarray(right, np.float32), rtol=0.03)


@pytest.mark.parametrize(
    ("x64", "dtype"),
    [
        pytest.param(True, jnp.float32, marks=pytest.mark.slow),
        (True, jnp.bfloat16),
        pytest.param(False, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_lbfgs_trains_models_narrower_than_its_line_search(x64, dtype):
    """Its line search tries float64 or float32 parameters, which the second layer refused as input of another dtype."""
    model = layers.sequential([layers.linear(2, 4), layers.linear(4, 1)])
    trainer = kaun.Trainer(model=model, optimizer=optax.lbfgs(memory_size=1))
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", x64)
    try:
        with rng.scope(0):
            state = trainer.init(dtype=dtype)
        f = jax.jit(lambda output: losses.mse(output.astype(jnp.float32), Y))
        end = trainer.fit(state, Data.repeat(5, (jnp.asarray(X, dtype), f)))
        first, last = (float(f(trainer.predict(s, jnp.asarray(X, dtype)))) for s in (state, end))
    finally:
        jax.config.update("jax_enable_x64", before)
    assert last < 0.1 * first and end.vars.params[0]["weight"].dtype == dtype


def sam(opaque):
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(optax.sgd(0.5), ascent, opaque_mode=opaque)


@pytest.mark.parametrize("trainable", [pytest.param(None, marks=pytest.mark.slow), lambda path: path == "weight"])
def test_opaque_sam_is_that_of_optax_by_hand(trainable):
    """It needs ``grad_fn``, which a loop by hand passes: ``grad_fn must be provided when opaque_mode=True``."""
    trainer, state = trained(layers.linear(2, 1), sam(True), trainable=trainable)
    end = trainer.fit(state, Data.repeat(4, (X, loss)))
    bias = state.vars.params["bias"]
    params = {"weight": state.vars.params["weight"]} | ({} if trainable else {"bias": bias})
    optimizer = sam(True)
    opt_state = optimizer.init(params)
    gradient = jax.jit(
        jax.grad(lambda p: loss(trainer.model.apply(kaun.Vars({"bias": bias, **p}, {}, jnp.dtype("float32")), X)[0]))
    )
    for _ in range(4):
        updates, opt_state = optimizer.update(gradient(params), opt_state, params, grad_fn=lambda p, _: gradient(p))
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(end.vars.params["weight"], params["weight"], rtol=1e-5)


@pytest.mark.parametrize(
    "wrap", [pytest.param(lambda o: o, marks=pytest.mark.slow), lambda o: optax.chain(optax.clip(1.0), o)]
)
def test_sophia_trains(wrap):
    """It needs ``obj_fn``, the loss as a function of the parameters, also inside a chain."""
    trainer, state = trained(layers.linear(2, 1), wrap(optax.contrib.sophia(0.05)))
    end = trainer.fit(state, Data.repeat(20, (X, loss)))
    assert loss(trainer.predict(end, X)) < 0.5 * loss(trainer.predict(state, X))


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


# 27. Models of other kinds.


def quantized(dtype):
    """``x @ (base + delta)``, with the base in a dtype that does not train."""

    def init(*, dtype):
        return kaun.Vars({"base": jnp.ones((2, 1), base), "delta": jnp.zeros((2, 1), dtype)}, {}, dtype)

    def apply(vars, x, *, training, ctx):
        return x @ (vars.params["base"].real.astype(x.dtype) + vars.params["delta"]), vars

    base = dtype
    return kaun.Layer(init=init, apply=apply, name="quantized")


def test_frozen_integer_parameters_are_part_of_a_model():
    """QLoRA: int8 weights that do not train, and a float32 delta that does. The int8 ones were refused."""
    trainer, state = trained(quantized(jnp.int8), optax.adam(0.1), trainable=lambda path: path == "delta")
    items = [(X, loss)] * 3
    end = trainer.fit(state, items)
    assert_same(end, folded(trainer, state, items))
    assert end.vars.params["base"].dtype == jnp.int8 and (end.vars.params["delta"] != 0).all()


def test_integer_and_complex_parameters_that_would_train_are_refused():
    """The way out of complex parameters is two arrays, and of integers to freeze them; the text spoke of state alone."""
    with pytest.raises(
        TypeError, match=r"Parameter 'base' is int8\[2, 1\].*freeze it: Trainer\(trainable=lambda path: "
    ):
        trained(quantized(jnp.int8))
    with pytest.raises(TypeError, match=r"only real floating arrays train.*as two parameters.*jax\.lax\.complex"):
        trained(quantized(jnp.complex64))


@pytest.mark.parametrize("stateful", [False, True])
def test_one_function_of_hk_multi_transform_is_a_layer(stateful):
    """An autoencoder with ``encode`` and ``decode``: ``'function' object has no attribute '_original_fn'``."""
    hk = pytest.importorskip("haiku")

    def build():
        linear = hk.Linear(3)
        return linear, {"encode": linear}

    multi = (hk.multi_transform_with_state if stateful else hk.multi_transform)(build)
    with pytest.raises(TypeError, match=r"which has several\. Choose one: interop\.haiku\(hk\.Transformed"):
        kaun.interop.haiku(multi, X)
    kind = hk.TransformedWithState if stateful else hk.Transformed
    model = kaun.interop.haiku(kind(multi.init, multi.apply["encode"]), X)
    trainer, state = trained(model)
    assert trainer.predict(trainer.fit(state, [(X, lambda output: (output**2).mean())]), X).shape == (4, 3)


@pytest.mark.parametrize("name", ["key", "rng_key", "rng"])
def test_a_haiku_functions_key_may_have_any_name(name):
    """``apply(params, key, x)`` around Haiku's: the key's place was taken for x, and x for a name of the Context."""
    hk = pytest.importorskip("haiku")
    pure = hk.transform(lambda x: hk.Linear(3)(x))
    scope = {"inner": pure.apply}
    exec(f"def apply(params, {name}, x): return inner(params, {name}, x)", scope)
    model = kaun.interop.haiku(hk.Transformed(pure.init, scope["apply"]), X)
    with rng.scope(0):
        assert model.apply(model.init(dtype=jnp.float32), X, training=True)[0].shape == (4, 3)


# 29. Microbatches.


def test_batch_norm_under_microbatches_is_refused_at_the_first_item():
    """A run must not end in its middle for a layer that it had from the start."""
    model = layers.sequential([layers.linear(2, 4), layers.batch_norm(4), layers.linear(4, 1)])
    trainer, state = trained(model, microbatches=2)
    taken, seen = [], []

    def items():
        for number in range(5):
            taken.append(number)
            yield X, loss

    with pytest.raises(ValueError, match=r"'1\.running_mean', '1\.running_var' changes in training"):
        trainer.fit(state, items(), report=lambda step, value, state: seen.append(step))
    assert taken == [0] and not seen


# 31. Small ones.


def test_a_dict_for_a_linen_call_of_several_inputs_names_method():
    """``__call__(self, a, b)`` with ``{"a": ..., "b": ...}`` as x: the dict became a, and b was missing."""
    nn = pytest.importorskip("flax.linen")

    class Pair(nn.Module):
        @nn.compact
        def __call__(self, a, b):
            return nn.Dense(1)(a) + b

    x = {"a": X, "b": Y}
    with pytest.raises(TypeError, match=r"method=lambda module, x: module\(a=x\['a'\], b=x\['b'\]\)"):
        kaun.interop.linen(Pair(), x)
    model = kaun.interop.linen(Pair(), x, method=lambda module, x: module(a=x["a"], b=x["b"]))
    assert trained(model)[0].predict(trained(model)[1], x).shape == (4, 1)


def test_step_takes_no_word_for_training():
    """``training="no"`` trained, because a text is true."""
    trainer, state = trained(layers.linear(2, 1))
    with pytest.raises(TypeError, match="step expected training=True or training=False, received 'no'"):
        trainer.step(state, X, loss=loss, training="no")
    trainer.step(state, X, loss=loss, training=np.False_)


def test_a_scalar_of_the_loss_may_have_any_name_of_the_guard():
    """A loss that returned ``squares`` broke the look at the gradient's squares."""
    trainer, state = trained(layers.linear(2, 1))
    f = lambda output: (losses.mse(output, jnp.asarray(Y)), {"squares": output.sum(), "status": output.max()})
    trainer.fit(state, [(X, f)] * 3)
    with pytest.raises(kaun.errors.NonFiniteLoss, match=r"not finite for 'bias', 'weight' \(2 of 2"):
        trainer.fit(state, [(X, f), (X * np.nan, f)])


def test_a_long_chain_of_compositions_says_sequential():
    """400 times ``>>`` ended in Python's RecursionError with a path of a thousand characters."""
    model = layers.tanh()
    for _ in range(400):
        model = model >> layers.tanh()
    with pytest.raises(RecursionError) as caught:
        model.init(dtype=jnp.float32)
        model.apply(model.init(dtype=jnp.float32), X)
    assert "A long chain is sequential([a, b, ...])" in "".join(caught.value.__notes__)
    assert sum(map(len, caught.value.__notes__)) < 1000


def test_export_names_the_context_array_that_it_takes_for_rows():
    """A table that is as long as the example batch by chance: JAX's raw error about symbolic shapes."""
    inner = layers.linear(2, 1)

    def apply(vars, x, *, training, ctx):
        return inner.apply(vars, x @ (ctx["table"].T @ jnp.ones((4, 2))), training=training, ctx=ctx)

    model = kaun.Layer(init=lambda *, dtype: inner.init(dtype=dtype), apply=apply, name="table")
    trainer, state = trained(model)
    ctx = Context(table=jnp.ones((4, 2)))
    with pytest.raises(TypeError) as caught:
        trainer.export(state, X, ctx=ctx)
    assert any("ctx['table'] of length 4, as x has" in note for note in caught.value.__notes__)
    program = trainer.export(state, X[:3], ctx=ctx)
    np.testing.assert_allclose(program.call(X, dict(ctx)), trainer.predict(state, X, ctx=ctx), rtol=1e-6)


@pytest.mark.parametrize("code", ["F4", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_a_file_with_a_dtype_that_is_not_read_is_not_called_damaged(tmp_path, code):
    """Quantized weights of the hub; ``damaged`` sent people to download them again."""
    header = b'{"w":{"dtype":"%b","shape":[8],"data_offsets":[0,8]}}' % code.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    for read in (kaun.interop.safetensors.load, lambda path: checkpoint.load(path, like={"w": np.zeros(8)})):
        with pytest.raises(ValueError, match=f"cannot be read: 'w' is of dtype '{code}'; kaun reads") as caught:
            read(tmp_path / "model.safetensors")
        assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model", "adapter_model", "model.fp16"])
def test_a_folder_with_one_file_of_weights_is_read(tmp_path, name):
    """Diffusion models and adapters of the hub have other names than ``model.safetensors``."""
    checkpoint.save(tmp_path / f"{name}.safetensors", {"w": X})
    assert (kaun.interop.safetensors.load(tmp_path)["w"] == X).all()
    checkpoint.save(tmp_path / "other.safetensors", {"w": X})
    with pytest.raises(FileNotFoundError, match=r"Pass the file itself"):
        kaun.interop.safetensors.load(tmp_path)


def test_a_shard_alone_is_not_a_model(tmp_path):
    """An interrupted download: one of two shards, and no index."""
    checkpoint.save(tmp_path / "model-00001-of-00002.safetensors", {"w": X})
    with pytest.raises(FileNotFoundError, match="Pass the file itself"):
        kaun.interop.safetensors.load(tmp_path)


def test_a_missing_shard_names_the_index(tmp_path):
    """A plain ``No such file`` did not say who asked for it."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "model-00002-of-00002.safetensors"}}')
    with pytest.raises(
        FileNotFoundError, match=r"index\.json' names 'model-00002-of-00002\.safetensors', which is not"
    ):
        kaun.interop.safetensors.load(tmp_path)


def test_the_error_of_a_scikit_learn_metric_in_evaluate_says_where_it_can_run():
    """Its NumPy code met a traced array, and JAX's error did not say that a metric is compiled."""
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    trainer, state = trained(layers.linear(2, 1))
    with pytest.raises(jax.errors.TracerArrayConversionError) as caught:
        trainer.evaluate(state, [(X, Y)], {"r2": lambda p, y: sklearn_metrics.r2_score(p, y)})
    assert any("What only NumPy can compute takes the predictions" in note for note in caught.value.__notes__)
