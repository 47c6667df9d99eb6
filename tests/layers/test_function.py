"""A plain function and its parameters, as a layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, Data, layers, losses, rng


def mlp(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return x @ params[-1]["w"] + params[-1]["b"][None]


def initial():
    g = np.random.default_rng(0)
    make = lambda a, b: {"w": g.standard_normal((a, b)).astype(np.float32), "b": np.zeros(b, np.float32)}
    return [make(2, 4), make(4, 1)]


def test_it_trains_as_a_loop_by_hand_does():
    x = np.random.default_rng(1).standard_normal((20, 8, 2)).astype(np.float32)
    y = x[..., :1] * x[..., 1:]
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, opt_state, x, y):
        value, grads = jax.value_and_grad(lambda p: losses.mse(mlp(p, x), y))(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    params = jax.tree.map(jnp.asarray, initial())
    opt_state, theirs, ours = optimizer.init(params), [], []
    for a, b in zip(x, y, strict=True):
        value, params, opt_state = step(params, opt_state, a, b)
        theirs.append(float(value))
    trainer = kaun.Trainer(model=layers.from_function(mlp, initial()), optimizer=optimizer)
    state = trainer.fit(
        trainer.init(), Data.from_arrays(x, y).with_loss(losses.mse), report=lambda _, loss, state: ours.append(loss)
    )
    assert ours == theirs
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state.vars.params, params))


def test_its_params_are_copied_and_cast():
    params = initial()
    layer = layers.from_function(mlp, {"w": params[0]["w"], "n": np.int32(3), "f": 2.0})
    kept = params[0]["w"].copy()
    params[0]["w"][:] = 0
    for dtype in (jnp.float32, jnp.bfloat16):
        made = layer.init(dtype=dtype).params
        np.testing.assert_array_equal(made["w"], jnp.asarray(kept, dtype))
        assert (made["w"].dtype, made["n"].dtype, made["f"].dtype) == (dtype, jnp.int32, dtype)
        assert not made["f"].weak_type
    assert layer.init().state == {}


def test_it_gets_what_it_has_parameters_for():
    def all_of_it(params, x, *, training, ctx):
        return params * x, training, sorted(ctx)

    layer = layers.from_function(all_of_it, 1.0)
    (_, training, names), _ = layer.apply(layer.init(), jnp.ones(()), training=True, ctx=Context(mask=1))
    assert (training, names) == (True, ["mask"])
    one = layers.from_function(lambda params, x, training=None: training, 1.0)
    assert one.apply(one.init(), jnp.ones(()))[0] is False


def test_randomness_comes_from_the_scope():
    layer = layers.from_function(lambda params, x: params + jax.random.normal(rng.next_key(), x.shape), 0.0)
    with rng.scope(0):
        y, _ = layer.apply(layer.init(), jnp.ones(3))
    with rng.scope(0):
        np.testing.assert_array_equal(y, jax.random.normal(rng.next_key(), (3,)))


def test_its_name():
    assert repr(layers.from_function(mlp, [])) == "from_function(mlp)"
    assert repr(layers.from_function(functools.partial(mlp), [])) == "from_function(partial)"
    assert repr(layers.from_function(mlp, [], name="tiny")) == "tiny"
    assert layers.from_function(max, 1.0).name == "from_function(max)"  # has no signature


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: layers.from_function(3, {}),
            r"expected a function \(params, x\) -> output, received 3\. Write layers\.fr",
        ),
        (
            lambda: layers.from_function(lambda params: params, {}),
            r"\(params, x\), which may also take training= and ctx=, received `<lambda>` \(test_function\.py:\d+\) with the "
            r"arguments \(params\): too many positional arguments\. Write lambda params, x: f\(\.\.\.\)",
        ),
        (lambda: layers.from_function(lambda params, x, y: x, {}), r"missing a required argument: 'y'\. Write lambda"),
        (
            lambda: layers.from_function(mlp, {"a": {"b": "c"}}),
            r"expected a tree of arrays, received str at 'a\.b'\. Take it out",
        ),
    ],
)
def test_what_it_cannot_use_is_refused(make, text):
    with pytest.raises(TypeError, match=text):
        make()
