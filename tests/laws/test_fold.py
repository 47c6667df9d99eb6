"""Laws 1, 2 and 9: step is a function, fit is its fold, randomness is a function of (run key, step)."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Context, Data, Layer, Vars, layers, losses, rng

pytestmark = pytest.mark.filterwarnings("ignore:The fit ended inside a window")

OPTIMIZERS = ["adam", "adamw_schedule", "nesterov", "multi_steps", "inject", "ema"]
# Each model once, and each optimizer that counts, wraps others or changes its rate: what the short form compiles.
SHORT = [
    ("mlp", "inject"),
    ("norms", "adam"),
    ("wide", "adam"),
    ("cnn", "multi_steps"),
    ("attention", "adam"),
    ("module", "adamw_schedule"),
]
ALL = [
    *itertools.product(["wide", "mlp", "norms", "cnn", "attention", "transformer"], OPTIMIZERS),
    ("module", "adam"),
    ("module", "adamw_schedule"),
]


def pairs(short):
    return [pytest.param(*pair, marks=[] if pair in short else pytest.mark.slow) for pair in ALL]


# 21 rows have a ragged last batch, another shape, which doubles what is compiled.
@pytest.mark.parametrize("n", [18, pytest.param(21, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("model", "optimizer"), pairs(SHORT))
def test_fit_is_the_fold_of_step_byte_for_byte(zoo, model, optimizer, n):
    check_the_fold(zoo, *zoo.trainer(model, optimizer), zoo.data(model, n=n))


def test_fit_is_the_fold_with_a_ragged_last_batch(zoo):
    check_the_fold(zoo, *zoo.trainer("mlp", "inject"), zoo.data("mlp", n=20))


def check_the_fold(zoo, trainer, state, data):
    fitted = trainer.fit(state, data)  # first, so that the steps that are reported one by one run in its program
    states, folded = zoo.fold(trainer, state, data)
    assert zoo.bytes(fitted) == zoo.bytes(states[-1])
    seen = []
    reported = trainer.fit(state, data, report=lambda step, loss, state: seen.append((step, loss)))
    assert zoo.bytes(reported) == zoo.bytes(fitted), "a report must not change the bytes"
    assert seen == list(enumerate(folded, start=1))


@pytest.mark.parametrize(("model", "optimizer"), pairs(SHORT[:1]))
def test_steps_that_are_reported_from_the_start_are_the_fold_too(zoo, model, optimizer):
    """A trainer whose first block is one step compiles a program for blocks of which nothing varies."""
    trainer, state = zoo.trainer(model, optimizer)
    other, data, seen = dataclasses.replace(trainer), zoo.data(model), []
    fitted = other.fit(state, data, report=lambda step, loss, state: seen.append((step, loss)))
    states, folded = zoo.fold(trainer, state, data)
    assert zoo.bytes(fitted) == zoo.bytes(states[-1])
    assert seen == list(enumerate(folded, start=1))
    assert zoo.bytes(other.fit(state, data)) == zoo.bytes(fitted)


@pytest.mark.parametrize(("model", "optimizer"), pairs(SHORT[1:4]))
def test_step_is_a_function_and_leaves_its_arguments_alone(zoo, model, optimizer):
    trainer, state = zoo.trainer(model, optimizer)
    (x, loss), *_ = zoo.data(model)
    before, x_before = zoo.bytes(state), x.tobytes()
    first = trainer.step(state, x, loss=loss)
    second = trainer.step(state, x, loss=loss)
    assert zoo.bytes(first) == zoo.bytes(second)
    assert zoo.bytes(state) == before and x.tobytes() == x_before
    other, _ = zoo.fresh(model, optimizer)
    assert zoo.bytes(other.step(state, x, loss=loss)) == zoo.bytes(first), "nor may the trainer remember anything"


@pytest.mark.parametrize("model", ["norms", pytest.param("attention", marks=pytest.mark.slow)])
def test_same_seed_same_run_other_seed_other_run(zoo, model):
    def run(seed):
        trainer, state = zoo.fresh(model, seed=seed)
        return zoo.bytes(trainer.fit(state, zoo.data(model, seed=seed, epochs=1)))

    first = run(1)
    assert first == run(1)
    assert first != run(2)


def test_a_step_draws_by_run_key_and_step_number_alone(zoo):
    trainer, state = zoo.trainer("norms")
    (x, loss), *_ = zoo.data("norms")
    with rng.scope(123):
        rng.next_key()
        inside, _ = trainer.step(state, x, loss=loss)
    outside, _ = trainer.step(state, x, loss=loss)
    assert float(inside) == float(outside)
    later, _ = trainer.step(state.replace(step=state.step + 1), x, loss=loss)
    rekeyed, _ = trainer.step(state.replace(key=jax.random.key(99)), x, loss=loss)
    assert len({float(outside), float(later), float(rekeyed)}) == 3


def test_one_run_key_is_drawn_besides_the_weights(zoo):
    model = layers.linear(2, 2)
    trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
    with rng.scope(5):
        made = trainer.init(dtype=jnp.float32)
        after = rng.next_key()
    with rng.scope(5):
        vars = model.init(dtype=jnp.float32)
        assert zoo.bytes(trainer.make_state(vars)) == zoo.bytes(made)
        assert zoo.bytes(rng.next_key()) == zoo.bytes(after)


def sequences(sizes):
    return given(st.lists(sizes, min_size=1, max_size=8), st.integers(0, 2**31 - 1))


@sequences(st.sampled_from([2, 6]))
@settings(max_examples=8, deadline=None)
def test_fit_is_the_fold_for_any_sequence_of_batch_sizes(zoo, sizes, seed):
    check_a_sequence(zoo, sizes, seed)


@pytest.mark.slow
@sequences(st.integers(2, 6))
@settings(max_examples=15, deadline=None)
def test_fit_is_the_fold_for_more_batch_sizes(zoo, sizes, seed):
    check_a_sequence(zoo, sizes, seed)


def check_a_sequence(zoo, sizes, seed):
    trainer, state = zoo.trainer("norms")
    g = np.random.default_rng(seed)

    def item(n):
        b = g.normal(size=(n, 5)).astype(np.float32), g.integers(0, 3, n, dtype=np.int32)
        return b[0], lambda out: losses.cross_entropy_sparse(out, b[1])  # captures what the loss of zoo.data does

    items = [item(n) for n in sizes]
    states, _ = zoo.fold(trainer, state, items)
    assert zoo.bytes(trainer.fit(state, items)) == zoo.bytes(states[-1])


def test_items_may_bring_a_context_of_their_own(zoo):
    """A Context of an item overrides the names of fit's, for that step only."""

    def apply(vars, x, *, training, ctx):
        return x @ vars.params["w"] * ctx["scale"] + ctx["shift"], vars

    init = lambda *, dtype: Vars(params={"w": jnp.ones((2, 1), dtype)}, state={}, dtype=dtype)
    trainer = kaun.Trainer(model=Layer(init=init, apply=apply), optimizer=optax.sgd(0.1))
    state = trainer.init()
    x, y = jnp.ones((3, 2)), jnp.zeros((3, 1))
    loss = lambda out: losses.mse(out, y)
    ctx = Context(scale=jnp.float32(1), shift=jnp.float32(0))
    own = Context(scale=jnp.float32(3))
    items = [(x, loss), (x, loss, own), (x, loss)]
    fitted = trainer.fit(state, items, ctx=ctx)
    expected = state
    for c in (ctx, ctx.merge(own), ctx):
        _, expected = trainer.step(expected, x, loss=loss, ctx=c)
    assert zoo.bytes(fitted) == zoo.bytes(expected)


def fit_and_fold(zoo, trainer, *arrays):
    with rng.scope(1):
        state = trainer.init()
        data = Data.batches(arrays, batch_size=8, shuffle=True).epochs(2).with_loss(losses.mse)
    states, _ = zoo.fold(trainer, state, data)
    return zoo.bytes(trainer.fit(state, data)), zoo.bytes(states[-1])


def test_fit_is_the_fold_for_targets_with_three_axes(zoo):
    """Where XLA fused the slice of the targets with the sum of their errors, the bias had other last bits."""
    trainer = kaun.Trainer(model=layers.linear(8, 2), optimizer=optax.sgd(0.01))
    g = np.random.default_rng(0)
    x, y = (g.normal(size=(40, 9, n)).astype(np.float32) for n in (8, 2))
    fitted, folded = fit_and_fold(zoo, trainer, x, y)
    assert fitted == folded


def test_a_step_of_ignore_keeps_the_norm_that_it_does_not_need(zoo):
    """Without it XLA fused the bias's gradient with its momentum: the last bits of this model were others than fit's."""
    model = layers.sequential([layers.linear(4, 8000), layers.tanh(), layers.linear(8000, 1)])
    trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.01, momentum=0.9), on_nonfinite="ignore")
    g = np.random.default_rng(0)
    x, y = (g.normal(size=(64, n)).astype(np.float32) for n in (4, 1))
    fitted, folded = fit_and_fold(zoo, trainer, x, y)
    assert fitted == folded


def test_inputs_and_outputs_may_be_any_pytree(zoo):
    def apply(vars, x, *, training, ctx):
        out = x["a"] @ vars.params["w"] + x["more"][0]
        return {"sum": out, "pair": (out * 2.0, out.mean())}, vars

    init = lambda *, dtype: Vars(params={"w": jnp.full((2, 1), 0.5, dtype)}, state={}, dtype=dtype)
    trainer = kaun.Trainer(model=Layer(init=init, apply=apply), optimizer=optax.adam(0.1))
    state = trainer.init()
    x = {"a": np.ones((3, 2), np.float32), "more": (np.zeros((3, 1), np.float32),)}
    items = [(x, lambda out: losses.mse(out["sum"], out["pair"][0]) + out["pair"][1])] * 4
    states, _ = zoo.fold(trainer, state, items)
    assert zoo.bytes(trainer.fit(state, items)) == zoo.bytes(states[-1])
    predicted = trainer.predict(state, x)
    assert sorted(predicted) == ["pair", "sum"] and predicted["sum"].shape == (3, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.polyak_sgd(max_learning_rate=0.1),
        lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, cooldown=0)),
        pytest.param(lambda: optax.lbfgs(), marks=pytest.mark.slow),
    ],
    ids=["polyak", "reduce_on_plateau", "lbfgs"],
)
def test_optimizers_with_extra_arguments_receive_them(zoo, make):
    """Against the loop that optax's documentation shows, and as a fold."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        optimizer = make()
        trainer = kaun.Trainer(model=layers.linear(3, 1), optimizer=optimizer)
        with rng.scope(0):
            state = trainer.init()
        g = np.random.default_rng(0)
        x = jnp.asarray(g.normal(size=(8, 3)), jnp.float32)
        y = x @ jnp.array([[1.0], [2.0], [3.0]])
        data = Data.repeat(8, (x, lambda out: losses.mse(out, y)))
        fitted = trainer.fit(state, data)
        states, _ = zoo.fold(trainer, state, data)
        assert zoo.bytes(fitted) == zoo.bytes(states[-1])

        def f(p):
            return jnp.mean((x @ p["weight"] + p["bias"] - y) ** 2)

        @jax.jit
        def by_hand(params, opt):
            value, grad = jax.value_and_grad(f)(params)
            updates, opt = optimizer.update(grad, opt, params, value=value, grad=grad, value_fn=f)
            return optax.apply_updates(params, updates), opt

        params, opt = state.vars.params, optimizer.init(state.vars.params)
        for _ in range(8):
            params, opt = by_hand(params, opt)
        assert f(fitted.vars.params) < f(state.vars.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), fitted.vars.params, params)
