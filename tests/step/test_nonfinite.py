"""Steps that are not finite: they change nothing, in ``step`` and in every form of ``fit``."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Data, Layer, Vars, layers, losses, reports, rng
from kaun._step.nonfinite import both_finite, match_state
from kaun.errors import NonFiniteLoss

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
Y = np.ones((4, 1), np.float32)
BAD = np.full((4, 3), np.nan, np.float32)


def loss(out):
    return losses.mse(out, Y)


@functools.cache
def trainer_of(mode, model=None, optimizer=None):
    """Trainers and states are values, so the tests share them, and what they have compiled."""
    with rng.scope(0):
        model = layers.linear(3, 1) >> layers.batch_norm(1) if model is None else model
        trainer = kaun.Trainer(model=model, optimizer=optimizer or optax.adam(0.1), on_nonfinite=mode)
        return trainer, trainer.init()


@functools.cache
def in_place():
    """A state of more than a megabyte, whose memory is taken over."""
    return layers.linear(3, 1) >> Layer(
        init=lambda *, dtype: Vars(params={"w": jnp.full((600, 600), 0.01, dtype)}, state={}, dtype=dtype),
        apply=lambda vars, x, **_: (x + vars.params["w"].sum(), vars),
    )


@functools.cache
def straight():
    """A step that XLA:CPU would run slowly inside a loop: a convolution that is not kaun's."""
    conv = lambda x: jax.lax.conv_general_dilated(
        x[..., None], jnp.ones((3, 1, 4)), (1,), "SAME", None, None, ("NWC", "WIO", "NWC")
    )
    return layers.linear(3, 3) >> layers.fn(lambda x: conv(x).sum(-1).mean(axis=1, keepdims=True))


MODELS = {"packed": None, "in place": in_place, "straight": straight}


def same(a, b):
    pairs = zip(
        jax.tree.leaves((a.vars, a.opt_state, a.step)), jax.tree.leaves((b.vars, b.opt_state, b.step)), strict=True
    )
    return all(np.array_equal(x, y) for x, y in pairs)


WATCHES = {"none": None, "third": reports.every(3, lambda *_: None), "all": lambda *_: None}
IN_SHORT = {("packed", "none"), ("packed", "third"), ("in place", "third"), ("straight", "all")}


@pytest.mark.parametrize(
    ("kind", "watch"),
    [
        pytest.param(*case, marks=() if case in IN_SHORT else pytest.mark.slow)
        for case in itertools.product(MODELS, WATCHES)
    ],
)
def test_the_state_on_the_exception_is_the_one_before_that_step(kind, watch):
    report = WATCHES[watch]
    trainer, state = trainer_of("raise", MODELS[kind] and MODELS[kind]())
    xs = [X * k for k in range(1, 8)] + [BAD] + [X] * 5 + [BAD]
    with pytest.raises(
        NonFiniteLoss, match=r"The loss is nan at step 8; the gradient is not finite for 'left"
    ) as caught:
        trainer.fit(state, [(x, loss) for x in xs], report=report)
    expected = state
    for x in xs[:7]:
        _, expected = trainer.step(expected, x, loss=loss)
    assert same(caught.value.kaun_state, expected)
    assert caught.value.step == 8 and np.isnan(caught.value.loss)
    assert {"left.weight", "left.bias"} <= set(caught.value.parameters)


def test_what_is_not_finite_from_the_start_stays_so_and_all_else_is_looked_at():
    """A fit looks at less of a small state that is finite when it begins: both kinds have the bits of ``step``."""
    rate = lambda count: jnp.where(count < 4, 0.1, jnp.nan)
    trainer, clean = trainer_of("raise", optimizer=optax.adam(rate))
    adam, *rest = clean.opt_state
    nu = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), adam.nu)
    assert len(jax.tree.leaves(nu)) == 4
    for start in (clean, clean.replace(opt_state=(adam._replace(nu=nu), *rest))):
        expected = start
        for _ in range(4):
            _, expected = trainer.step(expected, X, loss=loss)
        with pytest.raises(NonFiniteLoss, match=r"The update of step 5 makes 'params.left.bias'") as caught:
            trainer.fit(start, Data.repeat(7, (X, loss)))
        assert same(caught.value.kaun_state, expected) and caught.value.parameters == ()


@pytest.mark.filterwarnings("ignore:on_nonfinite=")
@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(1, 7))
@settings(max_examples=15, deadline=None)
def test_skipping_is_a_fit_over_the_good_items_with_a_count_of_all(skipping, good, n):
    trainer, state = skipping
    items = [(X * (i + 1) if ok else BAD, loss) for i, ok in enumerate(good)]
    end = trainer.fit(state, items, report=reports.every(n, lambda *_: None))
    assert int(end.step) == len(items)
    expected = state
    for item, ok in zip(items, good, strict=True):
        expected = trainer.step(expected, item[0], loss=loss)[1] if ok else expected.replace(step=expected.step + 1)
    assert same(end, expected)


@pytest.fixture(scope="module")
def skipping():
    return trainer_of("skip")


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_step_never_raises_and_changes_nothing_but_the_number(mode):
    trainer, state = trainer_of(mode)
    value, after = trainer.step(state, BAD, loss=loss)
    assert np.isnan(value) and int(after.step) == 1
    assert same(after.replace(step=state.step), state)


def test_ignore_is_a_step_like_any_other():
    trainer, state = trainer_of("ignore")
    end = trainer.fit(state, [(BAD, loss), (X, loss)])
    assert np.isnan(end.vars.params["left"]["weight"]).all() and int(end.step) == 2


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_a_gradient_that_is_not_finite_where_the_loss_is(mode):
    trainer, state = trainer_of(mode, layers.linear(3, 1, bias=False), optax.sgd(0.1))
    root = lambda out: jnp.sqrt(jnp.abs(out * 0.0)).mean()
    value, after = trainer.step(state, X, loss=root)
    assert value == 0.0 and same(after.replace(step=state.step), state)
    if mode == "raise":
        with pytest.raises(
            NonFiniteLoss,
            match=r"The loss is 0 at step 1; the gradient is not finite for 'weight' \(1 of 1 parameters\)",
        ):
            trainer.fit(state, [(X, root)])


def test_a_loss_that_is_not_finite_where_the_gradient_is():
    trainer, state = trainer_of("raise")
    with pytest.raises(NonFiniteLoss, match="The loss is inf at step 1; the gradient is finite"):
        trainer.fit(state, [(X, lambda out: losses.mse(out, Y) + jnp.inf)])


def test_many_parameters_are_named_by_the_first():
    trainer, state = trainer_of("raise", layers.sequential([layers.linear(3, 3) for _ in range(4)]))
    with pytest.raises(
        NonFiniteLoss, match=r"'0.bias', '0.weight', '1.bias', '1.weight', '2.bias' and 3 more \(8 of 8 parameters\)"
    ):
        trainer.fit(state, [(BAD, lambda out: (out * out).mean())])


def test_the_first_failure_is_raised_whatever_comes_after():
    trainer, state = trainer_of("raise")
    called = []

    def items():
        yield X, loss
        yield BAD, loss
        yield X, loss
        raise OSError("the disk is gone")

    report = reports.all_of(reports.every(100, lambda *_: None), history := reports.history())
    with pytest.raises(NonFiniteLoss, match="step 2") as caught:
        trainer.fit(state, items(), report=report)
    assert isinstance(caught.value.__cause__, OSError) and int(caught.value.kaun_state.step) == 1
    assert len(history) == 1
    with pytest.raises(NonFiniteLoss):
        trainer.fit(state, [(X, loss), (BAD, loss), (X, loss)], report=lambda step, *_: called.append(step))
    assert called == [1], "a report is not called for a discarded step"


class Counter:
    """Python code that a compiled step calls."""

    calls = 0

    def __call__(self, value):
        Counter.calls += 1
        return value


def test_a_step_that_calls_the_host_is_run_once_where_it_is_not_finite():
    trainer, state = trainer_of("raise", layers.linear(3, 1), optax.sgd(0.1))
    shape, fixed = jax.ShapeDtypeStruct((), np.float32), jax.lax.stop_gradient
    called = lambda out: loss(out) + 0 * jax.pure_callback(Counter(), shape, fixed(out.sum()))
    data = [(x, called) for x in (X, BAD, X)]
    with pytest.raises(NonFiniteLoss, match="The loss is nan at step 2; "):
        trainer.fit(state, data)
    assert Counter.calls == 2


class Blocks:
    def __init__(self):
        self.values = {}

    def __call__(self, step, loss, state):
        pass

    def wants(self, step):
        return False

    def block(self, first_step, values):
        for name, array in values.items():
            self.values.setdefault(name, []).extend(array.tolist())


def test_norm_and_learning_rate_of_each_step_are_reported():
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    trainer, state = trainer_of("skip", layers.linear(3, 1), optax.inject_hyperparams(optax.sgd)(schedule))
    seen = Blocks()
    trainer.fit(state, [(X, loss), (BAD, loss), (X, loss)], report=seen)
    weight, bias = (np.asarray(state.vars.params[name], np.float64) for name in ("weight", "bias"))
    back = 2 * (X @ weight + bias - Y) / Y.size
    norm = np.sqrt(((X.T @ back) ** 2).sum() + (back.sum(axis=0) ** 2).sum())
    np.testing.assert_allclose(seen.values["grad_norm"][0], norm, rtol=1e-6)
    # The schedule counts updates, and the second step is none: it has no rate.
    np.testing.assert_allclose(seen.values["learning_rate"], [0.1, np.nan, 0.09], rtol=1e-6)
    assert seen.values["skipped"] == [False, True, False] and seen.values["step"] == [1, 2, 3]


def test_scalars_of_a_loss_are_reported_for_each_step():
    trainer, state = trainer_of("raise")
    counted = lambda i: lambda out: (losses.mse(out, Y), {"i": i, "most": out.max()})
    data = Data.from_fn(5, lambda i: (X, counted(np.float32(i))))
    seen = Blocks()
    end = trainer.fit(state, data.map(lambda item: item), report=seen)
    assert seen.values["i"] == [0, 1, 2, 3, 4] and len(seen.values["most"]) == 5
    value, _ = trainer.step(end, X, loss=lambda out: (losses.mse(out, Y), {"most": out.max()}))
    assert value.shape == (), "step gives the loss alone"


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_loss_and_norm_are_looked_at_together(dtype):
    most, norm = jnp.finfo(dtype).max, jnp.sqrt(jnp.finfo(jnp.float32).max)
    finite = [(most, norm), (-most, norm), (0, norm), (most, 0), (-1, 1)]
    others = [(v, n) for v in (jnp.inf, -jnp.inf, jnp.nan) for n in (0, norm, jnp.inf, jnp.nan)]
    others += [(v, n) for v in (0, most, -most) for n in (jnp.inf, jnp.nan)]
    both = lambda v, n: bool(both_finite(jnp.asarray(v, dtype), jnp.asarray(n, jnp.float32)))
    assert all(both(*pair) for pair in finite) and not any(both(*pair) for pair in others)


def test_a_state_of_another_form_is_refused():
    with pytest.raises(
        TypeError, match=r"(?s)must return a state.*w: expected float32\[2\], found float16\[2\].*astype"
    ):
        match_state({"w": jnp.ones(2)}, {"w": jnp.ones(2, jnp.float16)})
    with pytest.raises(TypeError, match="must return a state"):
        match_state([jnp.ones(2)], (jnp.ones(2),))


def test_modes_are_checked():
    with pytest.raises(ValueError, match=r"on_nonfinite=...\) expected 'raise', 'skip', 'ignore', received 'stop'"):
        kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.1), on_nonfinite="stop")
