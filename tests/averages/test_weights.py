"""Averaged weights: equal to a recursion in float64, in every form of fit, resumed, skipped, frozen, in each dtype."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kaun
from kaun import Data, Vars, averages, checkpoint, layers, losses, rng
from kaun.averages.weights import add_average, averaged_vars, find_average, put_average

G = np.random.default_rng(0)
X = G.normal(size=(24, 3)).astype(np.float32)
Y = G.normal(size=(24, 2)).astype(np.float32)
PAIRS = Data.batches((X, Y), 6)
TRAIN = PAIRS.with_loss(losses.mse)
ADAM = optax.adam(0.05)
RULE, ONES = averages.ema(0.9999), {"w": jnp.ones(3)}


def small():
    return layers.linear(3, 4) >> layers.tanh() >> layers.linear(4, 2)


def large():
    """Above 1 MiB with its optimizer's state: the loop overwrites it in place."""
    return layers.linear(3, 30_000) >> layers.linear(30_000, 2)


@functools.cache
def made(average, model=small, optimizer=ADAM, dtype=jnp.float32, **options):
    with rng.scope(0):
        trainer = kaun.Trainer(model=model(), optimizer=optimizer, average=average, **options)
        return trainer, trainer.init(dtype=dtype)


def params_of(state):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.vars.params)]


def host(tree):
    data = lambda leaf: np.asarray(jax.random.key_data(leaf) if kaun.tree.is_key(leaf) else leaf).tobytes()
    return [data(leaf) for leaf in jax.tree.leaves(tree)]


def value_of(node, params):
    """The average that a part of an optimizer state has of these parameters."""
    return averaged_vars(node, Vars(params=params, state={}, dtype=jnp.float32)).params


def ema_by_hand(params, decay):
    """The debiased average after each update, in float64."""
    total, found = [0.0] * len(params[0]), []
    for t, leaves in enumerate(params, start=1):
        total = [decay * a + (1 - decay) * p for a, p in zip(total, leaves, strict=True)]
        found.append([a / (1 - decay**t) for a in total])
    return found


def swa_by_hand(params, start, every):
    """As ``torch.optim.swa_utils.AveragedModel``: the running mean of the models that it was updated with."""
    mean, n, found = None, 0, []
    for t, leaves in enumerate(params, start=1):
        if t >= start and (t - start) % every == 0:
            mean = leaves if n == 0 else [m + (p - m) / (n + 1) for m, p in zip(mean, leaves, strict=True)]
            n += 1
        found.append(leaves if mean is None else mean)
    return found


def close(found, expected, tolerance=1e-6):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def walk():
    """The data of 1000 updates."""
    with rng.scope(1):
        return Data.batches((X, Y), 12, shuffle=True).with_loss(losses.mse).epochs(500)


@pytest.mark.parametrize("decay", [pytest.param(0.999, marks=pytest.mark.slow), 0.9999])
def test_ema_is_the_recursion_in_float64_after_a_thousand_updates(walk, decay):
    trainer, start = made(averages.ema(decay))
    seen = []
    end = trainer.fit(start, walk, report=lambda step, loss, state: seen.append(params_of(state)))
    close(params_of(end.averaged), ema_by_hand(seen, decay)[-1])
    assert len(seen) == 1000


def test_an_average_in_float32_alone_stands_still_and_this_one_does_not():
    """The parameters stop at 1; with a decay of 0.9999 rounding would hold the average at 0.9997."""
    node = add_average(RULE, (), {"w": jnp.zeros(3)}, {})
    node = put_average(RULE, node, node._replace(updates=jnp.int32(1)), {"w": jnp.full(3, 0.9998)})
    move = jax.jit(lambda node: put_average(RULE, node, node._replace(updates=node.updates + 1), ONES))
    exact, alone = np.float64(np.float32(0.9998)), np.float32(0.9998)
    for t in range(50_000, 50_400):
        node = move(node._replace(updates=jnp.int32(t)))
        share = (1 - RULE.decay) / (1 - RULE.decay ** (t + 1))
        exact, alone = exact + share * (1 - exact), alone + np.float32(share) * (np.float32(1) - alone)
    assert alone == np.float32(0.9998)
    np.testing.assert_allclose(value_of(node, ONES)["w"], exact, rtol=6e-8)


@pytest.mark.parametrize("rule", [RULE, averages.swa(start=1, every=2)])
def test_the_average_of_a_mask_is_the_mask(rule):
    move = jax.jit(lambda node, params: put_average(rule, node, node._replace(updates=node.updates + 1), params))
    node = add_average(rule, (), [jnp.zeros(3)], {})
    for number in range(1, 20):
        params = [jnp.array([-np.inf, np.inf, number], jnp.float32)]
        node = move(node, params)
        if number in (1, 2, 19):
            found = np.asarray(value_of(node, params)[0])
            assert found[:2].tolist() == [-np.inf, np.inf] and 1 <= found[2] <= number


@settings(max_examples=40)
@example(decay=0.0, values=[1e-6], dtype=jnp.float16)  # below the smallest normal number
@example(decay=0.0, values=[-6.1e-5], dtype=jnp.float16)
@given(
    decay=st.floats(0.0, 0.9999),
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12),
    dtype=st.sampled_from([jnp.float32, jnp.float16, jnp.bfloat16]),
)
def test_each_update_of_ema_is_within_an_ulp_of_float64(decay, values, dtype):
    rule, given = averages.ema(decay), [jnp.asarray(v, dtype) for v in values]
    node = add_average(rule, (), [jnp.zeros((), dtype)], {})
    with jax.disable_jit():
        for value in given:
            node = put_average(rule, node, node._replace(updates=node.updates + 1), [value])
    found = float(value_of(node, [jnp.float32(0)])[0])
    expected = ema_by_hand([[np.float64(v)] for v in given], decay)[-1][0]
    largest = max(abs(float(v)) for v in given)
    assert abs(found - expected) <= len(values) * np.spacing(np.float32(largest))


@pytest.mark.parametrize(
    "rule", [averages.ema(0.0), averages.ema(0.5), averages.ema(0.98), averages.swa(start=3, every=2)]
)
def test_an_average_agrees_with_float64_before_and_after_each_join(rule):
    values = G.normal(size=(100, 50)).astype(np.float32)

    def move(node, value):
        node = put_average(rule, node, node._replace(updates=node.updates + 1), value)
        return node, value_of(node, value)

    found = jax.jit(lambda node: jax.lax.scan(move, node, values)[1])(add_average(rule, (), values[0], {}))
    seen = [[row] for row in values.astype(np.float64)]
    by_hand = swa_by_hand(seen, 3, 2) if rule == averages.swa(start=3, every=2) else ema_by_hand(seen, rule.decay)
    np.testing.assert_allclose(found, np.concatenate(by_hand), rtol=0, atol=1e-6)
    if rule == averages.ema(0.0):
        np.testing.assert_array_equal(found, values)


def test_the_first_average_is_the_first_parameters_as_optax_debiases_it():
    trainer, start = made(averages.ema(0.9))
    assert host(start.averaged.vars) == host(start.vars)
    reference = optax.ema(0.9, debias=True)
    kept, state = reference.init(start.vars.params), start
    for number, (x, loss) in enumerate(TRAIN):
        _, state = trainer.step(state, x, loss=loss)
        with jax.numpy_dtype_promotion("standard"):
            mean, kept = reference.update(state.vars.params, kept)
        close(params_of(state.averaged), [np.asarray(leaf) for leaf in jax.tree.leaves(mean)])
        if number == 0:
            assert host(state.averaged.vars) == host(state.vars)


@pytest.mark.parametrize(
    ("start", "every"), [(3, 2), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((1, 1), (8, 5))), (100, 1)]
)
def test_swa_is_the_mean_of_the_updates_that_count(start, every):
    trainer, state = made(averages.swa(start=start, every=every))
    seen, found = [], []
    for x, loss in TRAIN.epochs(3):
        _, state = trainer.step(state, x, loss=loss)
        seen.append(params_of(state))
        found.append(state.averaged)
    for expected, each in zip(swa_by_hand(seen, start, every), found, strict=True):
        close(params_of(each), expected)
    before = [host(state.vars) for state in found[: start - 1]]
    assert before == [[leaf.astype(np.float32).tobytes() for leaf in leaves] for leaves in seen[: start - 1]]


@pytest.mark.parametrize(
    ("average", "model"),
    [
        (averages.ema(0.9), large),
        (averages.swa(start=3, every=2), small),
        pytest.param(averages.ema(0.9), small, marks=pytest.mark.slow),
        pytest.param(averages.swa(start=3, every=2), large, marks=pytest.mark.slow),
    ],
)
def test_every_form_of_fit_has_the_bytes_of_step(model, average):
    trainer, start = made(average, model)
    data = TRAIN.epochs(2)
    state, states = start, []
    for x, loss in data:
        _, state = trainer.step(state, x, loss=loss)
        states.append(host((state, state.averaged)))
    seen = []
    report = lambda step, loss, state: seen.append(host((state, state.averaged)))
    ends = [trainer.fit(start, data), trainer.fit(start, data, report=report), trainer.fit(start, list(data))]
    assert [host((end, end.averaged)) for end in ends] == [states[-1]] * 3 and seen == states
    cut = trainer.fit(trainer.fit(start, data.take(3)), data.skip(3))
    assert host((cut, cut.averaged)) == states[-1]


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_has_the_same_average(tmp_path, stop):
    trainer, start = made(averages.ema(0.9))
    end = trainer.fit(start, TRAIN.epochs(2))

    def interrupt(step, loss, state):
        if step == stop:
            raise KeyboardInterrupt

    runs = checkpoint.Directory(tmp_path, every=3)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(start, TRAIN.epochs(2), report=interrupt, checkpoints=runs)
    again, fresh = made(averages.ema(0.9))
    resumed = again.fit(fresh, TRAIN.epochs(2), checkpoints=runs)
    assert host((resumed, resumed.averaged)) == host((end, end.averaged))
    other, fresh = made(averages.ema(0.8))
    with pytest.raises(kaun.errors.ResumeMismatch):
        other.fit(fresh, TRAIN.epochs(3), checkpoints=runs)


def test_a_state_and_its_average_are_saved_pickled_and_mapped(tmp_path):
    trainer, start = made(averages.ema(0.9))
    state = trainer.fit(start, TRAIN)
    checkpoint.save(tmp_path / "state", state)
    for back in (
        checkpoint.load(tmp_path / "state", like=trainer.init()),
        pickle.loads(pickle.dumps(state)),
        jax.tree.map(jnp.asarray, state),
    ):
        assert host(back.averaged) == host(state.averaged)
    assert state.averaged.averaged is not state and host(state.averaged.averaged) == host(state.averaged)
    assert pickle.loads(pickle.dumps(state.averaged)).is_averaged and state.averaged.replace(step=0).is_averaged
    assert not state.averaged.replace(vars=state.vars).is_averaged
    assert "averaged" in dir(state) and "averaged" not in dir(made(None)[1])


@pytest.mark.parametrize("model", [pytest.param(small, marks=pytest.mark.slow), large])
def test_a_discarded_step_is_no_update(model):
    skipping, start = made(averages.ema(0.9), model, on_nonfinite="skip")
    bad = (np.full_like(X[:6], np.nan), next(iter(TRAIN))[1])
    items = list(TRAIN)
    end = skipping.fit(start, [items[0], bad, items[1], bad, items[2]])
    clean = skipping.fit(start, items[:3])
    assert host(end.averaged.vars) == host(clean.averaged.vars) and int(end.step) == 5
    raising, start = made(averages.ema(0.9), model)
    with pytest.raises(kaun.NonFiniteLoss, match="the gradient is not finite for") as caught:
        raising.fit(start, [items[0], bad])
    assert host(caught.value.kaun_state.averaged.vars) == host(raising.fit(start, items[:1]).averaged.vars)
    _, after = raising.step(start, bad[0], loss=bad[1])
    assert host(after.opt_state) == host(start.opt_state)


def test_an_update_that_is_not_finite_is_named_as_without_an_average():
    for average in (None, averages.ema(0.9)):
        trainer, start = made(average, lambda: layers.linear(3, 2) >> layers.batch_norm(2), optax.sgd(jnp.inf))
        with pytest.raises(kaun.NonFiniteLoss, match=r"The update of step 1 makes 'params.left.bias'"):
            trainer.fit(start, TRAIN)


def test_an_item_inside_a_window_of_multi_steps_is_no_update():
    rule = averages.ema(0.5)
    trainer, state = made(rule, optimizer=optax.MultiSteps(optax.sgd(0.1), 2))
    seen = []
    for number, (x, loss) in enumerate(TRAIN, start=1):
        _, state = trainer.step(state, x, loss=loss)
        if number % 2 == 0:
            seen.append(params_of(state))
    close(params_of(state.averaged), ema_by_hand(seen, 0.5)[-1])
    assert int(find_average(state.opt_state).updates) == 2


def test_frozen_parameters_have_no_average():
    trainer, start = made(averages.ema(0.9), trainable=lambda path: path.startswith("right."))
    state = trainer.fit(start, TRAIN)
    average = find_average(state.opt_state).average
    sizes = [leaf.shape for leaf in jax.tree.leaves(average)]
    assert sizes == [leaf.shape for leaf in jax.tree.leaves(state.vars.params["right"])]
    assert host(state.averaged.vars.params["left"]) == host(start.vars.params["left"])
    assert host(state.averaged.vars.params["right"]) != host(state.vars.params["right"])


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype):
    trainer, start = made(averages.ema(0.9), optimizer=optax.sgd(0.02), dtype=dtype)
    seen = []
    data = Data.batches((X.astype(dtype), Y.astype(dtype)), 6).with_loss(losses.mse).epochs(5)
    end = trainer.fit(start, data, report=lambda step, loss, state: seen.append(params_of(state)))
    kept = jax.tree.leaves(find_average(end.opt_state).average)
    assert {leaf.dtype for leaf in kept} == {jnp.dtype(jnp.float32)}
    close([np.asarray(leaf) for leaf in kept], ema_by_hand(seen, 0.9)[-1])
    expected = [leaf.astype(dtype).tobytes() for leaf in map(np.asarray, kept)]
    assert host(end.averaged.vars.params) == expected and end.averaged.vars.dtype == dtype


def test_with_a_loss_scale_an_overflow_is_no_update():
    trainer, start = made(averages.ema(0.9), optimizer=optax.sgd(0.02), precision="mixed_float16")
    scaled = start.replace(opt_state=start.opt_state._replace(scale=jnp.float32(2.0**24)))
    x, loss = next(iter(TRAIN))
    large = lambda output: 1e4 * loss(output).value
    _, after = trainer.step(scaled, x, loss=large)
    assert float(after.opt_state.scale) == 2.0**23 and host(after.opt_state.inner) == host(scaled.opt_state.inner)
    seen, state = [], start
    for x, loss in TRAIN:
        _, state = trainer.step(state, x, loss=loss)
        seen.append(params_of(state))
    close(params_of(state.averaged), ema_by_hand(seen, 0.9)[-1])


@pytest.mark.parametrize("trainable", [None, lambda path: path.startswith("right.")])
def test_from_optimizer_is_what_optax_evaluates_and_keeps_no_weights(trainable):
    free = optax.contrib.schedule_free_sgd(0.1)
    rule = averages.from_optimizer(optax.contrib.schedule_free_eval_params)
    trainer, start = made(rule, optimizer=free, trainable=trainable)
    state = trainer.fit(start, TRAIN)
    own = find_average(state.opt_state).inner
    plain, begin = made(None, optimizer=free, trainable=trainable)
    reference = plain.fit(begin, TRAIN)
    assert host(own) == host(reference.opt_state) and host(state.vars) == host(reference.vars)
    right = optax.contrib.schedule_free_eval_params(own._replace(z=own.z["right"]), state.vars.params["right"])
    assert host(state.averaged.vars.params["right"]) == host(right)
    assert host(state.averaged.averaged.vars) == host(state.averaged.vars)
    if trainable is not None:
        assert host(state.averaged.vars.params["left"]) == host(start.vars.params["left"])
    extra = len(jax.tree.leaves(state.opt_state)) - len(jax.tree.leaves(reference.opt_state))
    assert extra == 2  # two numbers


def test_the_average_of_float64_parameters_is_float64():
    with jax.enable_x64(True):
        trainer, start = made(averages.ema(0.9), optimizer=optax.sgd(0.02), dtype=jnp.float64)
        seen = []
        data = Data.batches((X.astype(np.float64), Y.astype(np.float64)), 6).with_loss(losses.mse).epochs(5)
        end = trainer.fit(start, data, report=lambda step, loss, state: seen.append(params_of(state)))
        close(params_of(end.averaged), ema_by_hand(seen, 0.9)[-1], 1e-14)


def test_a_step_from_averaged_weights_continues_from_them():
    trainer, start = made(averages.ema(0.9))
    state = trainer.fit(start, TRAIN)
    x, loss = next(iter(TRAIN))
    _, found = trainer.step(state.averaged, x, loss=loss)
    _, expected = trainer.step(state.replace(vars=state.averaged.vars), x, loss=loss)
    assert host(found) == host(expected) and not found.is_averaged
    clean = trainer.make_state(state.averaged.vars)
    assert int(clean.step) == 0 and host(clean.averaged.vars) == host(state.averaged.vars)


def test_all_that_takes_a_state_takes_its_average():
    trainer, start = made(averages.ema(0.9))
    state = trainer.fit(start, TRAIN)
    plain, begin = made(None)
    by_hand = begin.replace(vars=state.averaged.vars)
    assert host(trainer.predict(state.averaged, X)) == host(plain.predict(by_hand, X))
    on = {"mse": losses.mse}
    assert trainer.evaluate(state.averaged, PAIRS, on) == plain.evaluate(by_hand, PAIRS, on)
    assert trainer.evaluate(state.averaged, PAIRS, on) != trainer.evaluate(state, PAIRS, on)
    close([trainer.export(state.averaged, X).call(X)], [plain.predict(by_hand, X)])
    found = jax.jit(lambda state: trainer.predict(state.averaged, X))(state)
    close([found], [trainer.predict(state.averaged, X)])


def test_without_an_average_the_program_and_the_state_are_those_of_before():
    plain, start = made(None)
    assert host(start.opt_state) == host(ADAM.init(start.vars.params))
    averaging, other = made(averages.ema(0.9))
    ends = plain.fit(start, TRAIN), averaging.fit(other, TRAIN)
    assert host(ends[0].vars) == host(ends[1].vars)
    assert host(ends[0].opt_state) == host(find_average(ends[1].opt_state).inner)


def test_a_learning_rate_is_found_beside_an_average():
    class Rates(kaun.reports.Report):
        def block(self, first_step, values):
            self.rates = values["learning_rate"]

    trainer, start = made(averages.ema(0.9), optimizer=optax.inject_hyperparams(optax.sgd)(0.5))
    trainer.fit(start, TRAIN, report=(report := Rates()))
    assert set(report.rates.tolist()) == {0.5}
