"""Mixed precision: what is read and refused, which dtypes go where, and parity with casts written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, Data, Layer, Vars, layers, losses, rng
from kaun._step import precision

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)


def mse(out):
    return losses.mse(out, Y)


def made(policy, *parts, optimizer=None):
    with rng.scope(0):
        model = layers.sequential(list(parts) or [layers.linear(3, 4), layers.tanh(), layers.linear(4, 2)])
        trainer = kaun.Trainer(model=model, optimizer=optimizer or optax.sgd(0.1), precision=policy)
        return trainer, trainer.init()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mixed_bfloat16", "params=float32,compute=bfloat16,output=float32"),
        ("mixed_float16", "params=float32,compute=float16,output=float32"),
        ("output=float32, compute=bfloat16, params=bfloat16", "params=bfloat16,compute=bfloat16,output=float32"),
    ],
)
def test_what_is_read(text, expected):
    policy = precision.parse_precision(text)
    assert str(policy) == expected
    assert precision.parse_precision(str(policy)) == policy
    assert policy.scaled == ("compute=float16" in expected)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "mixed",
            r"expected params, compute and output, each once, or one of 'mixed_bfloat16', 'mixed_float16', received 'mixed'",
        ),
        ("params=float32,compute=bfloat16", "each once.*Write precision="),
        ("params=float32,params=float32,compute=float32", "each once"),
        ("params=float32,compute=int8,output=float32", "expected a floating dtype as compute, received 'int8'"),
        ("params=float32,compute=half!,output=float32", "as compute, received 'half!'"),
        ("params=float32,compute=,output=float32", "as compute, received ''"),
        ("params=float64,compute=float32,output=float32", r"as params, received 'float64' \(it needs JAX's x64 mode"),
    ],
)
def test_what_is_refused(text, match):
    with pytest.raises(ValueError, match=match):
        made(text)


def test_it_must_be_a_string():
    with pytest.raises(TypeError, match=r"Trainer\(precision=\.\.\.\) expected a string, received .*bfloat16"):
        made(jnp.bfloat16)


def test_a_dtype_that_contradicts_it_is_refused():
    trainer, state = made("mixed_bfloat16")
    assert trainer.init(dtype=jnp.float32).vars.dtype == jnp.float32
    match = (
        r"expected parameters in float32, received bfloat16\. Write trainer\.init\(\) without.*or write params=bfloat16"
    )
    with pytest.raises(ValueError, match=match):
        trainer.init(dtype=jnp.bfloat16)
    half = trainer.model.init(dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match=match):
        trainer.make_state(half)
    with pytest.raises(ValueError, match=match):
        trainer.predict(state.replace(vars=half), X)
    _, state = made("params=bfloat16,compute=bfloat16,output=float32")
    assert state.vars.dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="received None"):
        trainer.init(dtype=None)


def test_dtypes_of_everything():
    seen = []

    def apply(vars, x, *, training, ctx):
        seen.append(
            (vars.dtype, vars.params["w"].dtype, vars.state["s"].dtype, x["f"].dtype, x["i"].dtype, ctx["c"].dtype)
        )
        return {"y": x["f"] * vars.params["w"], "n": x["i"]}, vars

    init = lambda *, dtype: Vars(params={"w": jnp.ones((), dtype)}, state={"s": jnp.ones((), dtype)}, dtype=dtype)
    trainer = kaun.Trainer(model=Layer(init=init, apply=apply), optimizer=optax.adam(0.1), precision="mixed_bfloat16")
    state, x = trainer.init(), {"f": np.ones(3), "i": np.arange(3)}

    def loss(out):
        assert (out["y"].dtype, out["n"].dtype) == (jnp.float32, jnp.int32)
        return out["y"].sum()

    value, after = trainer.step(state, x, loss=loss, ctx=Context(c=jnp.ones(3)))
    bf16, f32, i32 = jnp.dtype("bfloat16"), jnp.dtype("float32"), jnp.dtype("int32")
    assert set(seen) == {(bf16, bf16, f32, bf16, i32, bf16)}
    assert value.dtype == f32
    assert [a.dtype for a in jax.tree.leaves(after)] == [a.dtype for a in jax.tree.leaves(state)]
    out = trainer.predict(state, x, ctx=Context(c=jnp.ones(3)))
    assert (out["y"].dtype, out["n"].dtype) == (f32, i32)


def test_parity_with_casts_by_hand():
    trainer, state = made("mixed_bfloat16", optimizer=optax.adam(0.01))
    params, opt = state.vars.params, optax.adam(0.01)
    opt_state = opt.init(params)

    @jax.jit
    def step(params, opt_state):
        def objective(params):
            a, _, b = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
            hidden = jnp.tanh(X.astype(jnp.bfloat16) @ a["weight"] + a["bias"][None])
            out = (hidden @ b["weight"] + b["bias"][None]).astype(jnp.float32)
            return ((out - Y) ** 2).mean()

        value, gradient = jax.value_and_grad(objective)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = opt.update(gradient, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    for _ in range(20):
        expected, params, opt_state = step(params, opt_state)
        found, state = trainer.step(state, X, loss=mse)
        np.testing.assert_allclose(found, expected, rtol=1e-2)  # one rounding of bfloat16 is 2**-8


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "group_norm", "batch_norm"])
def test_norms_compute_their_statistics_in_float32(policy, norm):
    size = {"layer_norm": (64,), "rms_norm": (64,), "group_norm": (1, 64), "batch_norm": (64,)}[norm]
    trainer, state = made(policy, getattr(layers, norm)(*size))
    compute = precision.parse_precision(policy).compute
    # far from zero, and its squares are too large for float16
    x = jnp.asarray(np.random.default_rng(0).normal(300, 4, size=(32, 64)), compute).astype(jnp.float32)
    exact, _ = trainer.model.apply(state.vars, x, training=True)
    found, _ = precision.apply_model(precision.parse_precision(policy), trainer.model, state.vars, x, Context(), True)
    np.testing.assert_allclose(found, exact, rtol=2**-7, atol=2**-7)


def test_running_statistics_stay_float32_and_move_by_less_than_bfloat16_can_say():
    trainer, state = made("mixed_bfloat16", layers.linear(3, 2), layers.batch_norm(2))
    state = trainer.fit(state, Data.repeat(3, (X, mse)))
    running = state.vars.state[1]["running_var"]
    assert running.dtype == jnp.float32
    assert not np.array_equal(running, running.astype(jnp.bfloat16).astype(jnp.float32))


def test_evaluate_and_predict_use_the_same_casts():
    trainer, state = made("mixed_bfloat16")
    out = trainer.predict(state, X)
    assert out.dtype == jnp.float32
    expected, _ = precision.apply_model(
        precision.parse_precision("mixed_bfloat16"), trainer.model, state.vars, X, Context(), False
    )
    np.testing.assert_allclose(out, expected, rtol=2**-6, atol=2**-8)
    exact = made(None)[0].predict(state, X)
    assert 2**-14 < np.abs(out - exact).max() < 2**-4
    found = trainer.evaluate(state, [(X, Y)], {"mse": lambda p, t: ((p - t) ** 2).mean()})
    np.testing.assert_allclose(found["mse"], mse(out), rtol=1e-6)


def test_it_learns_as_float32_does():
    found = []
    for policy in (None, "mixed_bfloat16", "mixed_float16"):
        trainer, state = made(policy, optimizer=optax.adam(0.02))
        before = float(mse(trainer.predict(state, X)))
        state = trainer.fit(state, Data.repeat(200, (X, mse)))
        found.append(float(mse(trainer.predict(state, X))))
    assert max(found) < before / 2
    assert max(found) - min(found) < before / 10
