"""Numbers that were wrong in silence, one test for each situation in which a user met them."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, reports, rng

pytestmark = pytest.mark.filterwarnings("ignore:The fit ended inside a window")


class Blocks(reports.Report):
    """What the blocks of a fit contained."""

    def __init__(self):
        self.values = {}

    def block(self, first_step, values):
        for name, array in values.items():
            self.values.setdefault(name, []).append(array)

    def __getitem__(self, name):
        return np.concatenate(self.values[name])


def linear(optimizer, dtype=jnp.float32, **options):
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(1, 1, bias=False), optimizer=optimizer, **options)
        return trainer, trainer.init(dtype=dtype)


@pytest.mark.parametrize("looped", [True, False])
def test_float64_losses_norms_and_scalars_keep_their_digits(looped):
    """A physicist trains with x64 on: the loss improves by 1e-9 a step, and beside it stand an energy and a count.

    Loss, gradient norm, learning rate and scalars went through float32 on their way to the host.
    """
    with jax.enable_x64(True):
        trainer, state = linear(optax.inject_hyperparams(optax.sgd)(learning_rate=1e9 / 3), jnp.float64)

        def loss(output):
            value = 1.0 - 1e-9 * output.mean()
            return value, {"energy": value * 4, "count": jnp.asarray(2**24 + 1), "half": jnp.float16(0.1)}

        x = np.ones((2, 1))
        items = [(x if looped else x + i, loss) for i in range(5)]
        state, expected = state.replace(), []
        now = state
        for x, f in items:
            value, now = trainer.step(now, x, loss=f)
            expected.append(float(value))
        blocks, history, seen = Blocks(), reports.history(), []
        stopper = reports.early_stopping("loss", mode="min", patience=1)
        parts = (blocks, history, lambda step, loss, state: seen.append(loss))
        end = trainer.fit(state, items, report=reports.all_of(*parts))
        assert end.vars.params["weight"] == now.vars.params["weight"]
        again = trainer.fit(state, items, report=reports.all_of(stopper, history))
        assert int(again.step) == 5, "each step was better"
    assert len(set(expected)) == 5 and seen == expected
    assert blocks["loss"].dtype == np.float64 and blocks["loss"].tolist() == expected
    assert history.losses.dtype == np.float64 and history.losses.tolist() == expected * 2
    assert blocks["energy"].tolist() == [value * 4 for value in expected]
    assert blocks["count"].tolist() == [2**24 + 1] * 5
    assert blocks["half"].dtype == np.float32 and blocks["half"][0] == np.float16(0.1)
    assert blocks["learning_rate"].tolist() == [1e9 / 3] * 5
    assert blocks["grad_norm"].dtype == np.float64
    np.testing.assert_allclose(blocks["grad_norm"], [1e-9 * item[0].mean() for item in items], rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["raise", "skip", "ignore"])
def test_a_float64_loss_beyond_float32_is_finite(dtype, mode):
    """A likelihood in float64 begins at 7e39, with a gradient of 1e20: `step` did not train, and reports saw nothing.

    The guard squared the gradient in float32, and the host compared loss and norm in float32.
    """
    with jax.enable_x64(True):
        trainer, state = linear(optax.sgd(1e-21), jnp.dtype(dtype), on_nonfinite=mode)
        item = (np.ones((2, 1), dtype), lambda output: 7e39 + 1e20 * output.astype(jnp.float64).mean())
        value, after = trainer.step(state, *item[:1], loss=item[1])
        blocks, history = Blocks(), reports.history()
        end = trainer.fit(state, [item] * 3, report=reports.all_of(blocks, history))
        moved = float(after.vars.params["weight"][0, 0] - state.vars.params["weight"][0, 0])
    assert float(value) == pytest.approx(7e39)
    assert moved == pytest.approx(-0.1, rel=1e-5)
    assert int(end.step) == 3 and history.losses.tolist() == blocks["loss"].tolist() == pytest.approx([7e39] * 3)
    np.testing.assert_allclose(blocks["grad_norm"], 1e20, rtol=1e-6)
    assert not blocks.values.get("skipped") or not blocks["skipped"].any()


def test_a_run_in_float64_is_resumed_and_logged_with_all_digits(tmp_path):
    """Its history after a resume, its log file and its curve have the losses, not their float32 forms."""
    with jax.enable_x64(True):
        trainer, state = linear(optax.sgd(1e11), jnp.float64)
        data = Data.repeat(6, (np.ones((2, 1)), lambda output: 1 - 1e-12 * output.mean()))
        whole, cut = reports.history(), reports.history()
        trainer.fit(state, data, report=reports.all_of(whole, reports.jsonl(tmp_path / "run.jsonl")))
        directory = kaun.checkpoint.Directory(tmp_path / "run", every=2)
        trainer.fit(state, data.take(4), report=cut, checkpoints=directory)
        resumed = reports.history()
        trainer.fit(state, data, report=resumed, checkpoints=directory)
        written = [json.loads(line)["loss"] for line in (tmp_path / "run.jsonl").read_text().splitlines()]
        direct = reports.history()
        trainer.fit(state, data, report=lambda step, loss, state: direct(step, loss, state))
        measured = trainer.evaluate(state, [(np.ones((2, 1)), np.ones(2))], {"a": lambda p, t: 1 - 1e-12 * p.mean()})
        assert measured["a"] == whole.losses[0]
    assert len(set(whole.losses.tolist())) == 6
    assert resumed.losses.tolist() == direct.losses.tolist() == written == whole.losses.tolist()


def test_integers_beside_a_float32_loss_are_exact(tmp_path):
    """A language model counts its tokens beside the loss: 16777217 was logged as 16777216.0."""
    trainer, state = linear(optax.sgd(1e-3))
    tokens = jnp.asarray(2**24 + 1)
    data = Data.repeat(
        3, (np.ones((2, 1), np.float32), lambda o: (o.mean(), {"tokens": tokens, "z": 0.1, "hit": True}))
    )
    blocks = Blocks()
    trainer.fit(state, data, report=reports.all_of(blocks, reports.jsonl(tmp_path / "run.jsonl")))
    assert blocks["tokens"].dtype == np.int32 and blocks["tokens"].tolist() == [2**24 + 1] * 3
    row = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[0])
    assert (row["tokens"], row["z"], row["hit"]) == (2**24 + 1, 0.1, True)
    names = list(blocks.values)
    assert names.index("hit") < names.index("tokens") < names.index("z"), "the order of the columns is the same"


def test_a_learning_rate_in_float64_keeps_its_digits():
    """`reports.learning_rate` of a schedule under x64."""
    with jax.enable_x64(True):
        trainer, state = linear(optax.sgd(optax.constant_schedule(1 / 3)), jnp.float64)
        data = Data.repeat(3, (np.ones((2, 1)), lambda output: output.mean()))
        report = reports.all_of(blocks := Blocks(), reports.learning_rate(optax.constant_schedule(1 / 3)))
        trainer.fit(state, data, report=report)
    assert blocks["learning_rate"].tolist() == [1 / 3] * 3


def test_a_loss_called_by_hand_keeps_its_digits():
    """A report of the user's own that calls the history passes Python floats on."""
    history = reports.history()
    history(1, 0.5, None)
    assert history.losses.dtype == np.float32
    for loss in (math.nan, 7e39, 1 / 3):
        history(2, loss, None)
    assert history.losses.tolist()[2:] == [7e39, 1 / 3] and math.isnan(history.losses[1])


def one_weight(losses_of, optimizer=None, **options):
    """A trainer of one weight w, its state with w = 1, and data in which step i has the loss ``losses_of(i)(w)``."""
    trainer, state = linear(optimizer or optax.sgd(1.0), **options)
    state = state.replace(vars=state.vars.replace(params={"weight": jnp.ones((1, 1))}))
    items = [(np.ones((1, 1), np.float32), lambda out, f=f: f(out[0, 0])) for f in losses_of]
    return trainer, state, items


def same_state(a, b):
    jax.tree.map(np.testing.assert_array_equal, (a.vars, a.opt_state, a.step), (b.vars, b.opt_state, b.step))


def states_of(trainer, state, items):
    """The state before each step and after the last one."""
    states = [state]
    for x, loss in items:
        states.append(trainer.step(states[-1], x, loss=loss)[1])
    return states


def descent(bad=(), steps=40):
    """Losses that fall from step to step, and are nan at the steps ``bad``, which are counted from 1."""
    return [
        (lambda w: jnp.abs(w - 100) * jnp.nan) if step in bad else (lambda w: jnp.abs(w - 100))
        for step in range(1, steps + 1)
    ]


BAD = [(1,), (2,), (4, 5), tuple(range(1, 13))]
SKIPPED = [(1, 0), (4, 1), (7, 2), (4, 3)]  # of the short form: each n and each of BAD


@pytest.mark.parametrize(
    ("n", "bad"),
    [
        pytest.param(n, bad, marks=[] if (n, i) in SKIPPED else pytest.mark.slow)
        for n in (1, 4, 7)
        for i, bad in enumerate(BAD)
    ],
)
def test_a_skipped_step_does_not_end_an_improving_run(n, bad):
    """One item of a corpus gives nan and is skipped: the run ended there, and `stopper.best` was empty.

    The mean loss of its window was nan.
    """
    trainer, state, items = one_weight(descent(bad), on_nonfinite="skip")
    stopper = reports.early_stopping("loss", mode="min", patience=1)
    end = trainer.fit(state, items, report=reports.every(n, stopper))
    assert int(end.step) == 40, "every window is better than the one before"
    assert stopper.best_step == (40 // n - 1) * n
    window = range(stopper.best_step, stopper.best_step + n)
    assert stopper.best_value == pytest.approx(np.mean([99.0 - (i - len(bad)) for i in window]), rel=1e-7)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_the_best_state_by_the_training_loss_is_the_one_that_had_it(n, resume, tmp_path):
    """A learning rate that is too large: the step with the best loss, 0.4507, led to a state whose loss is 5.446.

    The state after that step was kept, and its loss is another one.
    """
    trainer, state, _ = one_weight([], optax.sgd(0.8))
    targets = np.repeat(np.float32([0, 7]), [3, 6])
    items = [(np.ones((1, 1), np.float32), lambda out, t=t: (out[0, 0] - t) ** 2) for t in map(np.asarray, targets)]
    states = states_of(trainer, state, items)
    values = [float(trainer.step(states[i], x, loss=loss)[0]) for i, (x, loss) in enumerate(items)]
    stopper = reports.early_stopping("loss", mode="min", patience=100)
    if resume:  # from a checkpoint in the middle of a window
        directory = kaun.checkpoint.Directory(tmp_path / "run")
        data = Data.from_items(items)
        for steps in range(1, 10):
            stopper = reports.early_stopping("loss", mode="min", patience=100)
            trainer.fit(state, data.take(steps), report=reports.every(n, stopper), checkpoints=directory)
    else:
        trainer.fit(state, items, report=reports.every(n, stopper))
    means = [np.mean(values[i : i + n]) for i in range(0, 9, n)]
    best = int(np.argmin(means))
    assert stopper.best_value == pytest.approx(means[best], rel=1e-6)
    same_state(stopper.best, states[best * n])
    if n == 1:
        x, loss = items[best]
        assert float(trainer.step(stopper.best, x, loss=loss)[0]) == stopper.best_value


def test_one_stopper_for_two_runs_keeps_no_state_of_the_first():
    """Five folds with one report: `best` was the state of another fold, trained on this one's held-out rows."""
    easy, hard = [lambda w: w**2] * 4, [lambda w: w**2 + 50] * 4
    trainer, state, items = one_weight(easy, optax.sgd(0.1))
    harder = one_weight(hard)[2]
    stopper = reports.early_stopping("loss", mode="min", patience=100)
    first = trainer.fit(state, items, report=stopper)
    assert stopper.best_value < 1
    trainer.fit(state, harder, report=stopper)  # from the start again, with the same key
    assert stopper.best_value > 50
    assert stopper.best.key is not None and int(stopper.best.step) == 3
    value = stopper.best_value
    with rng.scope(1):
        another = trainer.make_state(first.vars).replace(step=first.step)
    trainer.fit(another, [(x, lambda out: out.mean() * 0 + 60) for x, _ in harder], report=stopper)
    assert stopper.best_value == 60 > value, "another key is another run"


def test_one_stopper_for_two_fits_of_a_run_continues():
    """A run in two fits, the second from the state that the first returned, is one run for the stopper."""
    trainer, state, items = one_weight([lambda w: w**2] * 4, optax.sgd(0.1))
    stopper, whole = (reports.early_stopping("loss", mode="min", patience=3) for _ in range(2))
    between = trainer.fit(state, items, report=stopper)
    same = [(x, lambda out: out.mean() * 0 + 0.9) for x, _ in items]
    end = trainer.fit(between, same, report=stopper)
    assert int(end.step) == 7 and stopper.best_step == 3, "three values without a better one"
    end = trainer.fit(state, items + same, report=whole)
    assert int(end.step) == 7 and (whole.best_value, whole.best_step) == (stopper.best_value, 3)


def test_the_training_loss_of_a_window_is_weighted_by_examples():
    """A ragged last batch of one hard row counted as much as a batch of 64 in `early_stopping("loss")`."""
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.0))
        state = trainer.init()
    x = np.ones((9, 1), np.float32)
    y = np.float32([[0]] * 8 + [[100]])
    data = Data.batches((x, y), batch_size=8).with_loss(losses.mse)
    stopper = reports.early_stopping("loss", mode="min", patience=1)
    trainer.fit(state, data, report=reports.every(2, stopper))
    whole = float(losses.mse(trainer.predict(state, x), y))
    assert stopper.best_value == pytest.approx(whole, rel=1e-6)


def test_a_stopper_says_what_it_holds():
    """A user kept training the state that `fit` returned, as after Keras' `restore_best_weights=True`."""
    trainer, state, items = one_weight([lambda w: w**2] * 4, optax.sgd(0.1))
    stopper = reports.early_stopping("loss", mode="min", patience=3)
    assert repr(stopper) == "<early_stopping('loss', mode='min', patience=3): no value yet, .best is empty>"
    trainer.fit(state, items, report=stopper)
    assert repr(stopper) == (
        "<early_stopping('loss', mode='min', patience=3) of the training loss: best value 0.262144; .best is the state "
        "before the steps whose mean loss this is, of step 3; since then 0 of 3 values without a better one>"
    )
    measured = reports.early_stopping("a", mode="max", patience=2)
    measured.observe(4, {"a": 0.5}, state)
    assert repr(measured) == (
        "<early_stopping('a', mode='max', patience=2): best value 0.5; .best is the state after the step at which it "
        "was measured, of step 0; since then 0 of 2 values without a better one>"
    )


@pytest.mark.parametrize("pipeline", [lambda d: d.epochs(3), lambda d: d.epochs(3).with_loss(losses.mse).prefetch(2)])
def test_an_epoch_of_validate_is_one_epoch_also_of_train_epochs(pipeline):
    """`validate(..., each=train)` where `train` was already `epochs(3)`: it ran once, after the third epoch."""
    data = Data.from_items([1, 2, 3, 4])
    trainer, _ = linear(optax.sgd(1e-3))
    several = pipeline(data)
    validation = reports.validate(trainer, [], {"a": losses.mse}, each=several)
    each = reports.each_epoch(several, lambda epoch, state: None)
    for report in (validation, each):
        assert [step for step in range(1, 13) if report.wants(step)] == [4, 8, 12]
    twice = reports.each_epoch(several.epochs(2), lambda epoch, state: None)
    assert [step for step in range(1, 13) if twice.wants(step)] == [4, 8, 12]


@pytest.mark.parametrize(
    "pipeline", [lambda d: d.epochs(3).take(7), lambda d: d.epochs(3).skip(4), lambda d: d.epochs(3).batch(2)]
)
def test_a_part_of_several_epochs_is_no_epoch(pipeline):
    """`each=train.epochs(3).take(7)` says nothing about where an epoch ends."""
    several = pipeline(Data.from_items([1, 2, 3, 4]))
    trainer, _ = linear(optax.sgd(1e-3))
    text = r"expected the pipeline of one epoch, received (?s:.*)epochs\(3\).*, whose items are not whole epochs\. Pass"
    with pytest.raises(ValueError, match=f"validate {text}"):
        reports.validate(trainer, [], {"a": losses.mse}, each=several)
    with pytest.raises(ValueError, match=f"each_epoch {text} .*each=train, with trainer.fit"):
        reports.each_epoch(several, lambda epoch, state: None)


class Series:
    """As pandas': ``[i]`` is the value with the label i."""

    def __init__(self, values, labels):
        self._values, self._labels = list(values), list(labels)
        self.loc = self.iloc = self

    def __len__(self):
        return len(self._values)

    def __iter__(self):
        return iter(self._values)

    def __getitem__(self, label):
        return self._values[self._labels.index(label)]


class DataFrame(Series):
    columns = ("a", "b")


def frames():
    yield Series([10, 20, 30], [2, 0, 1]), r"Data\.from_items\(series\.to_numpy\(\)\)\."
    records = r'Data\.from_items\(frame\.to_dict\("records"\)\)'
    yield DataFrame([10, 20, 30], ["a", "b", "c"]), rf"Data\.batches\(\(frame.*, or for rows as dicts {records}"


def refused_frames(frames):
    for frame, fix in frames:
        kind = type(frame).__name__
        for where, make in (("from_items", Data.from_items), ("from_iterable", Data.from_iterable)):
            text = rf"Data\.{where} expected items by their number, received a {kind}, which finds .*Write {fix}"
            with pytest.raises(TypeError, match=text):
                make(frame)


def test_a_series_is_not_read_by_its_labels():
    """A shuffled Series of pandas gave its rows in another order than its values, a DataFrame its columns."""
    refused_frames(frames())


def test_a_series_of_pandas_is_not_read_by_its_labels():
    """The same with pandas itself."""
    pandas = pytest.importorskip("pandas")
    fixes = [fix for _, fix in frames()]
    series, frame = pandas.Series([10, 20, 30], index=[2, 0, 1]), pandas.DataFrame({"a": [1, 2], "b": [3, 4]})
    refused_frames(zip((series, frame), fixes, strict=True))


def test_masked_arrays_keep_their_mask_or_are_refused():
    """Sensor data with gaps as masked arrays: the numbers under the mask went into batches and losses."""
    rows = [np.ma.masked_array([1.0, 999.0], mask=[False, True]), np.ma.masked_array([2.0, 3.0], mask=[False, False])]
    data = Data.from_items(rows)
    text = (
        r"Data\.stack expected arrays without a mask, received a masked float64\[2\] of item 0\. Pass values and mask"
    )
    with pytest.raises(TypeError, match=text):
        list(data.batch(2))
    for batches in (data.map_batch(2, np.ma.stack), data.prefetch(2).map_batch(2, np.ma.stack)):
        (batch,) = batches
        assert isinstance(batch, np.ma.MaskedArray) and batch.sum() == 6.0
    for pairs in (data.prefetch(2), data.map(lambda a: {"x": a}).prefetch(1).map(lambda d: d["x"])):
        first = next(iter(pairs))
        assert isinstance(first, np.ma.MaskedArray) and first.sum() == 1.0
    text = r"mse expected targets without a mask, received a masked float32\[2\]: masked elements would count\. Leave"
    with pytest.raises(TypeError, match=text):
        losses.mse(jnp.zeros(2), rows[0].astype(np.float32))
    trainer, state = linear(optax.sgd(1e-3))
    masked = np.ma.masked_array(np.ones((4, 1), np.float32), mask=[[True], [False]] * 2)
    good = np.ones((4, 1), np.float32)
    for pair in ((masked, good), (good, masked)):
        for batches in (Data.batches(pair, batch_size=2), Data.batches(pair, batch_size=2).prefetch(1)):
            with pytest.raises(Exception, match="a masked array"):
                trainer.fit(state, batches.with_loss(losses.mse))
            with pytest.raises(TypeError, match="a masked array"):
                trainer.evaluate(state, batches, {"mse": losses.mse})


@pytest.mark.parametrize("wrong", [-0.5, 1.5, 255.0, math.nan])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_probabilities_outside_of_0_to_1_are_refused(wrong, kind):
    """An autoencoder with images from 0 to 255 as labels had a binary cross entropy of minus thousands."""
    labels = kind(np.float32([0.0, 1.0, wrong, 0.25]))
    text = rf"binary_cross_entropy expected labels in 0 to 1, received labels\[2\] = {wrong} \(1 of 4 are outside\)\."
    with pytest.raises(ValueError, match=text):
        losses.binary_cross_entropy(jnp.zeros(4), labels)
    losses.binary_cross_entropy(jnp.zeros(4), kind(np.float32([0.0, 1.0, 0.5, 0.25])))


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([[1, 0], [1, 1]], r"one_hot\.sum\(axis=-1\) in 1, received one_hot\.sum\(axis=-1\)\[1\] = 2\.0"),
        ([[0, 0], [1, 0]], r"one_hot\.sum\(axis=-1\) in 1.* = 0\.0 \(1 of 2 are outside\)\. For several classes"),
        ([[-0.5, 1.5], [1.0, 0.0]], r"one_hot in 0 to 1, received one_hot\[0, 0\] = -0\.5"),
    ],
)
def test_rows_that_are_no_distributions_are_refused(rows, text):
    """Labels of several classes at once, or a row of zeros for padding, in `cross_entropy`."""
    labels = np.array(rows)
    for given in (labels.astype(np.float32), jnp.asarray(labels, jnp.float32), labels):
        if given.dtype != np.float64:
            with pytest.raises(ValueError, match=f"cross_entropy expected {text}"):
                losses.cross_entropy(jnp.zeros((2, 2)), given)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_distributions_may_be_rounded(dtype):
    """A teacher's probabilities in half precision sum to 1 up to their rounding."""
    probabilities = jax.nn.softmax(jnp.asarray(np.random.default_rng(0).normal(size=(8, 1000)), jnp.float32))
    assert losses.cross_entropy(jnp.zeros((8, 1000), dtype), probabilities.astype(dtype)) > 0


def rates_of(trainer, state, items, *parts):
    """The learning rates that the blocks of a fit have, the lengths by which each step moved the weight, the state."""
    states = [state]
    report = reports.all_of(blocks := Blocks(), *parts, lambda step, loss, now: states.append(now))
    end = trainer.fit(state, items, report=report)
    moved = np.diff([float(s.vars.params["weight"][0, 0]) for s in states])
    return blocks["learning_rate"].tolist() if "learning_rate" in blocks.values else None, -moved, end


SLOPE = (np.ones((1, 1), np.float32), lambda output: output.sum())  # of gradient 1
BAD = (np.full((1, 1), np.nan, np.float32), SLOPE[1])
HALVING = lambda count: 0.5**count


def test_the_rate_under_multi_steps_is_that_of_its_updates():
    """Gradients accumulated over 3 steps with `optax.MultiSteps`: the logged rate fell three times too fast.

    With an injected rate, the steps of a window had the rate of the window before.
    """
    trainer, state = linear(optax.MultiSteps(optax.sgd(HALVING), 3).gradient_transformation())
    rates, moved, end = rates_of(trainer, state, [SLOPE] * 7, reports.learning_rate(HALVING))
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    np.testing.assert_allclose(moved, [0, 0, 1, 0, 0, 0.5, 0], atol=1e-6)
    rates, moved, _ = rates_of(trainer, end, [SLOPE] * 3, reports.learning_rate(HALVING))
    assert rates == [0.25, 0.25, 0.125], "a further fit begins inside a window"
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=HALVING)
    trainer, state = linear(optax.MultiSteps(injected, 3).gradient_transformation())
    rates, moved, _ = rates_of(trainer, state, [SLOPE] * 7)
    np.testing.assert_array_equal(rates, [math.nan, math.nan, 1, math.nan, math.nan, 0.5, math.nan])
    np.testing.assert_allclose(moved[2::3], [1, 0.5], atol=1e-6)


def test_the_rate_after_skipped_steps_of_an_earlier_fit_is_right():
    """A second fit with a new report, after a first one that skipped two steps: the rate was two updates ahead."""
    trainer, state = linear(optax.sgd(HALVING), on_nonfinite="skip")
    rates, _, end = rates_of(trainer, state, [SLOPE, BAD, BAD, SLOPE], reports.learning_rate(HALVING))
    assert rates == [1, 0.5, 0.5, 0.5]
    rates, moved, _ = rates_of(trainer, end, [SLOPE, BAD, SLOPE], reports.learning_rate(HALVING))
    assert rates == [0.25, 0.125, 0.125]
    np.testing.assert_allclose(moved, [0.25, 0, 0.125], atol=1e-6)


def test_an_injected_rate_of_a_skipped_step_is_unknown():
    """The state has the rate of the update before, which was logged for the skipped step."""
    trainer, state = linear(optax.inject_hyperparams(optax.sgd)(learning_rate=HALVING), on_nonfinite="skip")
    rates, moved, _ = rates_of(trainer, state, [SLOPE, BAD, SLOPE])
    np.testing.assert_array_equal(rates, [1, math.nan, 0.5])
    np.testing.assert_allclose(moved, [1, 0, 0.5], atol=1e-6)


def test_of_two_injected_rates_none_is_the_rate_of_the_step():
    """Head and body with learning rates of their own: the first that was found was logged for both."""
    inject = optax.inject_hyperparams(optax.sgd)
    optimizer = optax.partition({"a": inject(learning_rate=1.0), "b": inject(learning_rate=0.1)}, {"weight": "b"})
    trainer, state = linear(optimizer)
    rates, moved, _ = rates_of(trainer, state, [SLOPE])
    assert rates is None
    np.testing.assert_allclose(moved, [0.1], rtol=1e-5)


def test_the_rate_with_reduce_on_plateau_is_scaled_or_unknown():
    """`reduce_on_plateau` divided the rate by two, and the log went on with the one before."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, atol=1e9)
    inject = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    trainer, state = linear(optax.chain(inject, plateau))
    rates, moved, _ = rates_of(trainer, state, [SLOPE] * 6)
    np.testing.assert_allclose(rates, moved, rtol=1e-5)
    assert rates[0] == 1 and rates[-1] < 0.5
    trainer, state = linear(optax.chain(optax.sgd(HALVING), plateau))
    with pytest.warns(UserWarning, match=r"gives NaN: reduce_on_plateau scales it\. Leave .*\n    optax\.inject_hyper"):
        rates, *_ = rates_of(trainer, state, [SLOPE] * 2, reports.learning_rate(HALVING))
    assert np.isnan(rates).all()


def test_the_rate_of_schedules_at_different_counts_is_unknown():
    """A schedule inside of `MultiSteps` and another one behind it."""
    windows = optax.MultiSteps(optax.sgd(HALVING), 2).gradient_transformation()
    trainer, state = linear(optax.chain(windows, optax.scale_by_schedule(HALVING)))
    with pytest.warns(
        UserWarning, match=r"gives NaN: the optimizer's state has schedules at different counts \(\[0\]\)"
    ):
        rates, *_ = rates_of(trainer, state, [SLOPE] * 2, reports.learning_rate(HALVING))
    assert np.isnan(rates).all()


def test_the_rate_is_right_after_a_resume_and_with_a_schedule_behind_multi_steps(tmp_path):
    """A run of skipped steps is resumed by another process, in which the report is new."""
    trainer, state = linear(optax.sgd(HALVING), on_nonfinite="skip")
    data = Data.from_items([SLOPE, BAD, SLOPE, SLOPE])
    directory = kaun.checkpoint.Directory(tmp_path / "run")
    for steps in (2, 4):
        report = reports.all_of(blocks := Blocks(), reports.learning_rate(HALVING))
        trainer.fit(state, data.take(steps), report=report, checkpoints=directory)
    assert blocks["learning_rate"].tolist() == [0.5, 0.25]
    windows = optax.MultiSteps(optax.identity(), 2).gradient_transformation()
    trainer, state = linear(optax.chain(windows, optax.scale_by_schedule(HALVING)))
    rates, *_ = rates_of(trainer, state, [SLOPE] * 4, reports.learning_rate(HALVING))
    assert rates == [1, 0.5, 0.25, 0.125]
