"""averages.update_statistics: the statistics of batch_norm that averaged weights give, against a pass by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, Data, Layer, averages, checkpoint, layers, losses, rng

G = np.random.default_rng(0)
X = (3 * G.normal(size=(22, 3)) + 1).astype(np.float32)
Y = G.normal(size=(22, 2)).astype(np.float32)
PAIRS = Data.batches((X, Y), 8)
TRAIN = PAIRS.with_loss(losses.mse)


def model():
    return layers.sequential([layers.linear(3, 4), layers.batch_norm(4), layers.tanh(), layers.linear(4, 2)])


def made(average, model=model, optimizer=None, **options):
    with rng.scope(0):
        trainer = kaun.Trainer(model=model(), optimizer=optimizer or optax.adam(0.05), average=average, **options)
        return trainer, trainer.init()


@pytest.fixture(scope="module")
def trained():
    trainer, state = made(averages.ema(0.9))
    return trainer, trainer.fit(state, TRAIN.epochs(3))


def by_hand(vars, batches=PAIRS):
    """The mean of the batches' statistics with the weight of their rows, in float64, of the first batch_norm."""
    weight, bias = (np.asarray(vars.params[0][name], np.float64) for name in ("weight", "bias"))
    hidden = [np.asarray(x, np.float64) @ weight + bias for x, _ in batches]
    rows = [len(h) for h in hidden]
    mean = np.average([h.mean(0) for h in hidden], axis=0, weights=rows)
    return {"running_mean": mean, "running_var": np.average([h.var(0) for h in hidden], axis=0, weights=rows)}


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), found, expected)


def same(a, b):
    data = lambda leaf: np.asarray(jax.random.key_data(leaf) if kaun.tree.is_key(leaf) else leaf)
    jax.tree.map(lambda p, q: np.testing.assert_array_equal(data(p), data(q)), a, b)


def test_they_are_the_means_of_the_batches_and_all_else_stays(trained):
    trainer, state = trained
    found = averages.update_statistics(trainer, state, TRAIN)
    close(found.averaged.vars.state[1], by_hand(state.averaged.vars))
    same(found.averaged.vars.params, state.averaged.vars.params)
    same((found.vars, found.step, found.key), (state.vars, state.step, state.key))
    same(state.averaged.vars.state, state.vars.state)
    again = averages.update_statistics(trainer, found, PAIRS)  # items of evaluate, and nothing of the earlier ones
    same(again.opt_state, found.opt_state)
    assert len(vars(trainer)["_without_updates"].compilations) <= 2  # one for each shape, not for each call


def test_of_an_averaged_state_they_are_its_own(trained):
    trainer, state = trained
    expected = averages.update_statistics(trainer, state, TRAIN).averaged
    found = averages.update_statistics(trainer, state.averaged, TRAIN)
    assert found.is_averaged and found.averaged is found
    same(found, expected)
    same(trainer.predict(found, X), trainer.predict(expected, X))
    again = averages.update_statistics(trainer, found, TRAIN)
    same(again, found)


def test_an_update_discards_them_and_a_discarded_step_does_not(trained, tmp_path):
    trainer, state = trained
    found = averages.update_statistics(trainer, state, TRAIN)
    x, loss = next(iter(TRAIN))
    _, after = trainer.step(found, x, loss=loss)
    same(after.averaged.vars.state, after.vars.state)
    _, discarded = trainer.step(found, np.full_like(x, np.nan), loss=loss)
    same(discarded.averaged.vars, found.averaged.vars)
    checkpoint.save(tmp_path / "state", found)
    same(checkpoint.load(tmp_path / "state", like=state).averaged.vars, found.averaged.vars)
    same(trainer.fit(found, TRAIN), trainer.fit(found.replace(opt_state=found.opt_state), TRAIN))


def test_it_is_a_function_of_its_arguments_and_draws_no_key():
    dropping = lambda: layers.sequential([layers.dropout(0.5), *[layers.linear(3, 4), layers.batch_norm(4)]])
    trainer, state = made(averages.ema(0.9), dropping)
    data = Data.from_items([(X[:8], X[:8]), (X[8:12], X)])
    with rng.scope(3):
        first = averages.update_statistics(trainer, state, data)
        drawn = rng.next_key()
    with rng.scope(3):
        assert rng.next_key() == drawn
    same(averages.update_statistics(trainer, state, data).opt_state, first.opt_state)
    other = averages.update_statistics(trainer, state.replace(key=jax.random.key(5)), data)
    assert (other.averaged.vars.state[2]["running_var"] != first.averaged.vars.state[2]["running_var"]).any()


def test_a_frozen_batch_norm_keeps_its_statistics():
    trainer, state = made(averages.ema(0.9), trainable=lambda path: not path.startswith("1."))
    state = trainer.fit(state, TRAIN)
    found = averages.update_statistics(trainer, state, TRAIN)
    same(found.averaged.vars.state, state.vars.state)


def test_other_layers_update_their_state_as_in_training():
    def counting():
        count = lambda vars, x, training, ctx: (x, vars.replace(state={"n": vars.state["n"] + int(training)}))
        init = lambda dtype: kaun.Vars(params={}, state={"n": jnp.int32(0)}, dtype=dtype)
        return Layer(init=init, apply=count) >> layers.linear(3, 2)

    trainer, state = made(averages.ema(0.9), counting)
    state = trainer.fit(state, TRAIN)
    found = averages.update_statistics(trainer, state, TRAIN)
    assert int(state.vars.state["left"]["n"]) == 3 and int(found.averaged.vars.state["left"]["n"]) == 6


@pytest.mark.parametrize(
    ("average", "optimizer"),
    [
        (averages.from_optimizer(optax.contrib.schedule_free_eval_params), optax.contrib.schedule_free_sgd(0.1)),
        pytest.param(averages.swa(start=2, every=1), None, marks=pytest.mark.slow),
    ],
)
def test_for_each_average_and_after_averages_of_any_kind(average, optimizer):
    trainer, state = made(average, optimizer=optimizer)
    state = trainer.fit(state, TRAIN)
    found = averages.update_statistics(trainer, state, TRAIN)
    close(found.averaged.vars.state[1], by_hand(state.averaged.vars))


@pytest.mark.parametrize("precision", [pytest.param("mixed_bfloat16", marks=pytest.mark.slow), "mixed_float16"])
def test_in_mixed_precision_rows_are_still_counted_exactly(precision):
    trainer, state = made(averages.ema(0.9), precision=precision)
    state = trainer.fit(state, TRAIN)
    many = Data.batches((np.tile(X, (30, 1)), np.tile(Y, (30, 1))), 600)  # 600 and 60 rows
    found = averages.update_statistics(trainer, state, many).averaged.vars.state[1]
    expected = by_hand(state.averaged.vars, many)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2), found, expected)
    assert found["running_mean"].dtype == jnp.float32


def test_a_context_goes_to_the_layers():
    def scaled():
        return layers.fn(lambda x: x) >> reading() >> layers.batch_norm(3) >> layers.linear(3, 2)

    def reading():
        init = lambda dtype: kaun.Vars(params={}, state={}, dtype=dtype)
        return Layer(init=init, apply=lambda vars, x, training, ctx: (x * ctx["scale"] + ctx["shift"], vars))

    trainer, state = made(averages.ema(0.9), scaled)
    items = [(X[:8], Y, Context(scale=jnp.float32(2))), (X[8:], Y, Context(scale=jnp.float32(3)))]
    found = averages.update_statistics(trainer, state, items, ctx=Context(shift=jnp.float32(1), scale=jnp.float32(0)))
    batches = [2 * X[:8] + 1, 3 * X[8:] + 1]
    mean = np.average([b.mean(0) for b in batches], axis=0, weights=[8, 14])
    np.testing.assert_allclose(found.averaged.vars.state["left"]["right"]["running_mean"], mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (lambda t, s: (s, t, TRAIN), TypeError, r"update_statistics expected a Trainer first, received TrainState. Wr"),
        (lambda t, s: (t, made(None)[1], TRAIN), ValueError, r"state.averaged: this state has no average of its weig"),
        (
            lambda t, s: (t, s, [X]),
            TypeError,
            r"expected items \(x, loss\), \(x, y\), .*; item 1 is float32\[22, 3\]. Pa",
        ),
        (
            lambda t, s: (t, s, []),
            ValueError,
            r"^update_statistics received no items: the data is empty\. An iterator .* pass a",
        ),
        (
            lambda t, s: (t, s, [(X * np.inf, Y)]),
            kaun.NonFiniteLoss,
            r"item 1 of the data makes 'state.1.running_mean'.* not f",
        ),
    ],
)
def test_errors(trained, arguments, error, text):
    with pytest.raises(error, match=text):
        averages.update_statistics(*arguments(*trained))


def test_an_error_of_the_pass_has_the_given_state_and_advice_that_runs(trained):
    trainer, state = trained
    x = X * np.inf
    with pytest.raises(kaun.NonFiniteLoss, match="Look for values in the x of that item") as caught:
        averages.update_statistics(trainer, state, [(x, Y)])
    assert caught.value.kaun_state is state and caught.value.leaves[0] == "state.1.running_mean"
    exec(str(caught.value).splitlines()[-1].strip(), {"trainer": trainer, "state": state, "x": x})
    assert "explain" not in str(caught.value) and "on_nonfinite" not in str(caught.value)

    def interrupted():
        yield X, Y
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        averages.update_statistics(trainer, state, interrupted())
    assert stopped.value.kaun_state is state
