"""Updates that go wrong although loss and gradient are finite: the state before is kept, and the error says which leaf."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, Layer, Vars, checkpoint, layers, rng
from kaun.errors import NonFiniteLoss

SMALL, LARGE = 3, 400  # of the two, only the state of the second is updated in place (more than 1 MiB with adam)
X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def square(output):
    return (output**2).mean()


def breaks(at):
    """A schedule that divides by zero at one count, and is nan from there on."""
    return lambda count: 0.01 * jnp.where(count < at, 1.0, jnp.nan)


def setting(optimizer, width=SMALL, model=None, **options):
    with rng.scope(0):
        model = layers.linear(3, width) >> layers.linear(width, width) if model is None else model
        trainer = kaun.Trainer(model=model, optimizer=optimizer, **options)
        return trainer, trainer.init()


def leaves(state):
    return jax.tree.leaves((state.vars, state.opt_state))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def fold(trainer, state, loss, steps, x=X):
    for _ in range(steps):
        _, state = trainer.step(state, x, loss=loss)
    return state


@pytest.mark.parametrize(
    ("reported", "width"),
    [
        (False, SMALL),
        (True, LARGE),
        pytest.param(False, LARGE, marks=pytest.mark.slow),
        pytest.param(True, SMALL, marks=pytest.mark.slow),
    ],
)
def test_a_schedule_that_becomes_nan_ends_the_run_before_that_step(width, reported):
    """A cosine schedule divides by zero after its last step: the weights were nan, saved, and returned."""
    trainer, state = setting(optax.adam(breaks(at=4)), width)
    report = (lambda step, loss, state: None) if reported else None
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.fit(state, Data.repeat(9, (X, square)), report=report)
    error = caught.value
    assert str(error).startswith(
        "The update of step 5 makes 'params.left.bias', 'params.left.weight', 'params.right.bias', "
        f"'params.right.weight'{', or the optimizer state for it,' if width == LARGE else ''} not finite. Loss ("
    )
    assert "Look for a learning rate that is nan or infinite at this step" in str(error)
    assert "smaller learning rate" not in str(error)
    assert (error.step, error.parameters, len(error.leaves)) == (5, (), 4)
    before = fold(trainer, state, square, 4)
    assert same(error.kaun_state, before) and int(error.kaun_state.step) == 4
    _, after = trainer.step(before, X, loss=square)
    assert same(after, before) and int(after.step) == 5


@pytest.mark.parametrize("width", [pytest.param(SMALL, marks=pytest.mark.slow), LARGE])
def test_a_skipped_update_leaves_the_state_and_an_ignored_one_does_not(width):
    """The same schedule with the two other values of on_nonfinite."""
    trainer, state = setting(optax.sgd(breaks(at=2)), width, on_nonfinite="skip")
    end = trainer.fit(state, Data.repeat(5, (X, square)))
    assert same(end, fold(trainer, state, square, 2)) and int(end.step) == 5
    trainer, state = setting(optax.sgd(breaks(at=2)), width, on_nonfinite="ignore")
    end = trainer.fit(state, Data.repeat(5, (X, square)))
    assert np.isnan(end.vars.params["left"]["weight"]).all()


def straight():
    """A step that XLA:CPU would run slowly inside a loop: a convolution that is not kaun's."""
    conv = lambda x: jax.lax.conv_general_dilated(
        x[..., None], jnp.ones((3, 1, 4)), (1,), "SAME", None, None, ("NWC", "WIO", "NWC")
    )
    return layers.linear(3, 3) >> layers.fn(lambda x: conv(x).sum(-1))


OTHERS = {
    "adam(eps=0), and an input that is always 0": (
        lambda: setting(optax.adam(0.1, eps=0.0)), X * np.float32([0, 1, 1]), "'params.left.weight' not finite",
        "by zero in the optimizer (an eps of 0", 1,
    ),
    "a running variance that overflows": (
        lambda: setting(optax.sgd(0.1), model=layers.batch_norm(3)), X * np.float32(1e20),
        "'state.running_var' not finite", "Look for a running statistic that is too", 1,
    ),
    "a moment that overflows in float16": (
        lambda: setting(optax.adam(1e-3), model=layers.linear(3, 3), precision="params=float16,compute=float32,output=float32"),
        X * np.float32(100), "'opt_state.0.nu.weight' not finite", "Look for a value in the optimizer's state", 1,
    ),
    "a step outside of a loop": (
        lambda: setting(optax.sgd(breaks(at=3)), model=straight()), X, "'params.left.bias', 'params.left.weight' not", "schedule", 4,
    ),
    "an optimizer of matrix products, in place": (
        lambda: setting(optax.contrib.muon(breaks(at=1)), LARGE), X, "'params.left.weight'", "schedule", 2,
    ),
    "a window of MultiSteps, in place": (
        lambda: setting(optax.MultiSteps(optax.adam(breaks(at=1)), 2), LARGE), X, "'params.left.weight'", "schedule", 3,
    ),
    "under a loss scale, which does not shrink for it": (
        lambda: setting(optax.sgd(breaks(at=2)), precision="mixed_float16"), X, "'params.left.bias'", "schedule", 3,
    ),
    "frozen layers": (
        lambda: setting(optax.sgd(breaks(at=2)), LARGE, trainable=lambda path: path.startswith("left")), X,
        "'params.left.bias', 'params.left.weight' not finite", "schedule", 3,
    ),
}  # fmt: skip


# The two that compile for longest; a state in place is also that of the window of MultiSteps.
LONG = {"an optimizer of matrix products, in place", "frozen layers"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in LONG)) for case in OTHERS])
def test_what_else_an_update_makes(case):
    """Each was kept, saved as the newest checkpoint, and returned without a word."""
    make, x, leaf, advice, step = OTHERS[case]
    trainer, state = make()
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.fit(state, Data.repeat(9, (x, square)))
    assert f"The update of step {step} makes " in str(caught.value)
    assert leaf in str(caught.value) and advice in str(caught.value)
    assert all(np.isfinite(leaf).all() for leaf in leaves(caught.value.kaun_state))
    assert same(caught.value.kaun_state, fold(trainer, state, square, step - 1, x))


def masked(*, inf):
    """A layer whose weight has a mask of -inf in it, as a bias of attention has."""
    weight = jnp.array([0.5, -jnp.inf if inf else 0.0, 0.25])
    return Layer(
        init=lambda *, dtype: Vars(params={"w": weight.astype(dtype)}, state={}, dtype=dtype),
        apply=lambda vars, x, **_: (jnp.where(jnp.isfinite(vars.params["w"]), vars.params["w"], 0) * x, vars),
    )


def test_a_mask_of_inf_among_the_weights_is_allowed_and_the_other_elements_are_watched():
    """A causal mask is kept as a parameter: it was never finite."""
    trainer, state = setting(optax.sgd(0.1), model=masked(inf=True))
    end = trainer.fit(state, Data.repeat(5, (X[0], square)))
    assert end.vars.params["w"][1] == -jnp.inf and end.vars.params["w"][0] != 0.5
    trainer, state = setting(optax.sgd(breaks(at=3)), model=masked(inf=True))
    with pytest.raises(NonFiniteLoss, match=r"update of step 4 makes 'params.w' not finite"):
        trainer.fit(state, Data.repeat(5, (X[0], square)))


@pytest.mark.parametrize("optimizer", [
    lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    pytest.param(lambda: optax.lbfgs(), marks=pytest.mark.slow),
])  # fmt: skip
def test_optimizers_that_begin_with_inf_run(optimizer):
    """reduce_on_plateau has an infinite best value at the start, and lbfgs an infinite loss."""
    trainer, state = setting(optimizer())
    assert not all(np.isfinite(leaf).all() for leaf in leaves(state))
    assert int(trainer.fit(state, Data.repeat(4, (X, square))).step) == 4


@pytest.mark.parametrize("optimizer", [
    lambda: optax.adamw(optax.cosine_decay_schedule(1e-3, 99)),
    pytest.param(lambda: optax.MultiSteps(optax.adam(1e-3), 4), marks=pytest.mark.slow),
])  # fmt: skip
def test_the_look_at_an_update_takes_no_memory(optimizer):
    """Adam with millions of parameters: a second copy of the state would not fit."""
    found = {}
    for mode in ("ignore", "raise"):
        trainer, _ = setting(optimizer(), 700, on_nonfinite=mode)
        found[mode] = kaun.summary(trainer, X, square).cost.temporaries
    assert found["raise"] < found["ignore"] + 2.2 * 4 * 700 * 700, "at most two arrays as large as the largest"


def test_no_run_is_resumed_from_a_state_that_is_not_finite(tmp_path):
    """An earlier version, or on_nonfinite="ignore", saved weights of nan as the newest checkpoint."""
    bad, runs = optax.sgd(breaks(at=4)), checkpoint.Directory(tmp_path, every=1, keep=3, accept={"program"})
    with rng.scope(1):
        data = Data.repeat(6, (X, square))
    trainer, state = setting(bad, on_nonfinite="ignore")
    end = trainer.fit(state, data, checkpoints=runs)
    again = trainer.fit(state, data, checkpoints=runs)
    assert np.isnan(end.vars.params["left"]["weight"]).all() and np.isnan(again.vars.params["left"]["weight"]).all()
    trainer, state = setting(bad, on_nonfinite="raise")
    with (
        pytest.warns(UserWarning, match="holds another run, at step 4"),
        pytest.warns(UserWarning, match="the run resumes from step 4, because newer") as caught,
        pytest.raises(NonFiniteLoss, match="step 5"),
    ):
        trainer.fit(state, data, checkpoints=runs)
    text = str(caught[0].message)
    assert "step-00000005: 'vars.params.left.bias' is not finite, and was finite when the run began" in text
    assert 'write Trainer(..., on_nonfinite="ignore")' in text
    assert runs.steps() == [4]


# Steps that learn nothing


def test_skip_says_once_that_it_skips_all_the_time():
    """A schedule that is nan by its count: the count stays where it is, so every later step is skipped too."""
    trainer, state = setting(optax.sgd(breaks(at=5)), on_nonfinite="skip")
    with pytest.warns(UserWarning, match='on_nonfinite="skip" discarded') as caught:
        trainer.fit(state, Data.repeat(400, (X, square)))
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert " 100 steps in a row, 6 to 105, so" in text and "What is not finite: the update in 100 of them" in text
    assert "A schedule that is not finite stays so" in text and 'Write Trainer(..., on_nonfinite="raise")' in text


def test_skip_says_that_no_step_of_a_fit_was_an_update():
    """float16 weights that overflow: the loss is inf at each step, and the fit returned what it was given."""
    trainer, state = setting(optax.sgd(0.1), on_nonfinite="skip", precision="mixed_float16")
    loss = lambda output: (output.astype(jnp.float16) * jnp.float16(6e4)).sum() * jnp.float16(6e4)
    with pytest.warns(
        UserWarning, match=r"discarded 3 steps in a row, 1 to 3, .*What is not finite: the loss in 3 of them"
    ):
        trainer.fit(state, Data.repeat(3, (X, loss)), report=lambda *_: None)


def test_skip_says_nothing_where_updates_come_between():
    """A few bad items in a run are what "skip" is for."""
    trainer, state = setting(optax.sgd(0.1), on_nonfinite="skip")
    items = [(X * np.nan if i % 40 else X, square) for i in range(200)]
    trainer.fit(state, items)
    trainer.fit(state, items, report=lambda *_: None)


def test_an_open_window_of_multisteps_at_the_end_is_named():
    """250 items in windows of 100: the gradients of the last 50 were dropped without a word."""
    trainer, state = setting(optax.MultiSteps(optax.adam(0.1), 4))
    with pytest.warns(
        UserWarning, match=r"inside a window of optax\.MultiSteps: the gradients of the last 2 items"
    ) as caught:
        end = trainer.fit(state, Data.repeat(6, (X, square)))
    assert caught[0].filename == __file__
    assert "accumulate=k) in place of optax.MultiSteps(every_k_schedule=k)" in str(caught[0].message)
    # A fit that begins with that state continues the window, and has the bytes of one fit.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(trainer.fit(end, Data.repeat(2, (X, square))), trainer.fit(state, Data.repeat(8, (X, square))))
