"""Losses that return a ``losses.Mean``, in every way in which a step runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

import kaun
from kaun import Data, layers, losses, metrics, reports, rng
from kaun.errors import NonFiniteLoss

ROWS, WIDTH = 33, 5  # batches of 3 rows: no power of two, so that a division rounds
g = np.random.default_rng(0)
X = g.normal(size=(ROWS, WIDTH)).astype(np.float32)
TARGETS = {
    "mse": g.normal(size=(ROWS, 3)).astype(np.float32),
    "huber": g.normal(size=(ROWS, 3)).astype(np.float32),
    "cross_entropy_sparse": g.integers(0, 3, ROWS).astype(np.int32),
    "binary_cross_entropy": g.integers(0, 2, (ROWS, 3)) > 0,
}


def trainer_of(optimizer=None, **options):
    with rng.scope(0):
        model = layers.sequential([layers.linear(WIDTH, 8), layers.tanh(), layers.linear(8, 3)])
        trainer = kaun.Trainer(model=model, optimizer=optimizer or optax.sgd(0.1, momentum=0.9), **options)
        return trainer, trainer.init()


class Block(reports.Report):
    def __init__(self):
        self.values = []

    def block(self, first_step, values):
        self.values.append({name: np.array(v) for name, v in values.items() if name not in ("step_time",)})

    def all(self, name):
        return np.concatenate([v[name] for v in self.values])


def same(left, right):
    leaves = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(jax.random.key_data(a) if a.dtype.name.startswith("key") else a,
                              jax.random.key_data(b) if b.dtype.name.startswith("key") else b) for a, b in leaves)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["cross_entropy_sparse", *(pytest.param(n, marks=pytest.mark.slow) for n in TARGETS if n[:7] != "cross_e")]
)
def test_with_loss_trains_to_the_bytes_of_the_scalar_loss_and_compiles_as_often(name):
    """The weight comes with the loss, and nothing else changes."""
    loss, runs = getattr(losses, name), []
    pairs = Data.batches((X, TARGETS[name]), 3)
    for data in (
        pairs.with_loss(loss),
        pairs.map(lambda b: (b[0], lambda out: loss(out, b[1]))),
        pairs.with_loss(functools.partial(loss)),
    ):
        trainer, state = trainer_of()
        end = trainer.fit(state, data.epochs(2), report=(block := Block()))
        stepped = state
        for x, f in data.epochs(2):
            value, stepped = trainer.step(stepped, x, loss=f)
        assert same(end, stepped) and float(value) == block.all("loss")[-1]
        runs.append((end, block, [c.where for c in trainer.compilations]))
    for end, block, compilations in runs[1:]:
        assert same(end, runs[0][0])
        assert np.array_equal(block.all("loss"), runs[0][1].all("loss"))
        assert np.array_equal(block.all("grad_norm"), runs[0][1].all("grad_norm"))
        assert compilations == runs[0][2]


def test_a_float16_model_trains_to_the_bytes_of_the_scalar_loss():
    pairs = Data.batches((X.astype(np.float16), TARGETS["mse"].astype(np.float16)), 3)
    ends = []
    for data in (pairs.with_loss(losses.mse), pairs.map(lambda b: (b[0], lambda out: losses.mse(out, b[1])))):
        with rng.scope(0):
            trainer = kaun.Trainer(model=layers.linear(WIDTH, 3), optimizer=optax.sgd(0.1))
            ends.append(trainer.fit(trainer.init(dtype=jnp.float16), data))
    assert same(*ends)


def masked(out, y, keep):
    """What a user writes: rows that are not kept do not count."""
    rows = optax.losses.softmax_cross_entropy_with_integer_labels(out, y)
    right = (out.argmax(-1) == y) & keep
    mean = losses.Mean(jnp.where(keep, rows, 0).sum(), keep.sum())
    return mean, {"accuracy": losses.Mean(right.sum(), keep.sum()), "kept": keep.sum()}


KEEP = g.random(ROWS) > 0.4
KEEP[3:6] = False
OPTIONS = {
    "plain": {},
    "float16 with a loss scale": {"precision": "mixed_float16"},
    "microbatches": {"microbatches": 3},
    "skip": {"on_nonfinite": "skip"},
}


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow) if form in ("plain", "skip") else form for form in OPTIONS]
)
def test_the_value_is_what_is_reported_and_an_item_without_weight_changes_nothing(form):
    """A masked loss and its accuracy. One batch is masked as a whole: loss 0, gradient 0, never NaN."""
    trainer, state = trainer_of(optax.sgd(0.1), **OPTIONS[form])
    y = TARGETS["cross_entropy_sparse"]
    items = Data.batches((X, y, KEEP), 3).map(lambda b: (b[0], lambda out: masked(out, b[1], b[2])))
    end = trainer.fit(state, items, report=(block := Block()))
    stepped, values = state, []
    for i, (x, loss) in enumerate(items):
        before = stepped
        value, stepped = trainer.step(stepped, x, loss=loss)
        values.append(float(value))
        rows = KEEP[3 * i : 3 * i + 3]
        logits = np.asarray(trainer.predict(before, x), np.float32)[rows]
        log_p = special.log_softmax(logits, axis=-1)
        expected = -log_p[range(len(log_p)), y[3 * i : 3 * i + 3][rows]].mean() if rows.any() else 0
        np.testing.assert_allclose(value, expected, rtol=2e-2 if "float16" in form else 1e-5)
        accuracy = (logits.argmax(-1) == y[3 * i : 3 * i + 3][rows]).mean() if rows.any() else 0
        np.testing.assert_allclose(block.all("accuracy")[i], accuracy, rtol=1e-6)
        if not rows.any():
            assert value == 0 and same(before.vars.params, stepped.vars.params)
            assert block.all("grad_norm")[i] == 0
    assert same(end, stepped) and np.array_equal(block.all("loss"), np.float32(values))
    assert block.all("accuracy").dtype == np.float32 and np.array_equal(block.all("kept"), KEEP.reshape(-1, 3).sum(1))


def test_a_mean_that_is_not_finite_is_discarded():
    trainer, state = trainer_of()
    loss = lambda out: losses.Mean(out.sum() / 0, out.size)
    with pytest.raises(NonFiniteLoss, match=r"The loss is -?(inf|nan) at step 1") as caught:
        trainer.fit(state, Data.repeat(5, (X[:3], loss)))
    assert same(caught.value.kaun_state.vars, state.vars)
    assert same(trainer.step(state, X[:3], loss=loss)[1].vars, state.vars)


def test_a_penalty_and_a_second_loss_are_added_to_the_loss_of_an_item():
    trainer, state = trainer_of()
    ((x, loss),) = Data.batches((X, TARGETS["mse"]), ROWS).with_loss(losses.mse)
    both = lambda out: loss(out) + 0.1 * losses.mae(out, TARGETS["mse"]) + 1.0
    value, _ = trainer.step(state, x, loss=both)
    out = trainer.predict(state, x)
    expected = losses.mse(out, TARGETS["mse"]) + 0.1 * losses.mae(out, TARGETS["mse"]) + 1
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert both(out).weight == X.shape[0] * 3


def test_a_captured_mask_of_with_loss_and_a_bound_option_compile_once():
    """Padded labels of varying number: one program, and the mean over what is not padded."""
    y = np.where(KEEP, TARGETS["cross_entropy_sparse"], -100)
    loss = functools.partial(losses.cross_entropy_sparse, ignore_index=-100, label_smoothing=0.1)
    trainer, state = trainer_of()
    end = trainer.fit(state, Data.batches((X, y), 3).with_loss(loss).epochs(2), report=(block := Block()))
    assert [c.where for c in trainer.compilations] == ["fit"] and np.isfinite(block.all("loss")).all()
    assert block.all("loss")[1] == 0 and int(end.step) == 22


def test_evaluate_counts_a_loss_by_its_weight():
    """The loss of a validation set with padded labels is that of all rows at once, however they are cut."""
    y = np.where(KEEP, TARGETS["cross_entropy_sparse"], -100)
    loss = functools.partial(losses.cross_entropy_sparse, ignore_index=-100)
    trainer, state = trainer_of()
    own = lambda out, y: losses.Mean(jnp.where(y == -100, 0, 1.0).sum(), y.size)
    found = trainer.evaluate(state, Data.batches((X, y), 5), {"loss": loss, "own": own})
    np.testing.assert_allclose(found["loss"], jax.jit(loss)(trainer.predict(state, X), y), rtol=1e-6)
    assert found["own"] == pytest.approx(KEEP.mean(), rel=1e-15)
    parts = jax.jit(functools.partial(loss.func.parts, **loss.keywords))
    by_item = lambda b: parts(trainer.predict(state, b[0]), b[1])
    by_hand = metrics.evaluate(by_item, Data.batches((X, y), 5).skip(2))
    np.testing.assert_allclose(by_hand, jax.jit(loss)(trainer.predict(state, X[10:]), y[10:]), rtol=1e-6)


# What is refused.


@pytest.mark.parametrize(
    ("mean", "received"),
    [
        (lambda out: losses.Mean(out, 1), r"Mean\(float32\[3, 3\], int\)"),
        (lambda out: losses.Mean(out.sum(), out[:, 0]), r"Mean\(float32\[\], float32\[3\]\)"),
        (lambda out: losses.Mean(3.0, 1), r"Mean\(float, int\)"),
        (lambda out: losses.Mean(np.float32(3), 1), r"Mean\(float32\[\], int\)"),
        (lambda out: losses.Mean((out > 0).sum(), 1), r"Mean\(int32\[\], int\)"),
        (lambda out: losses.Mean(out.sum(), None), r"Mean\(float32\[\], NoneType\)"),
    ],
)
def test_a_mean_is_of_two_scalars(mean, received):
    trainer, state = trainer_of()
    for loss in (mean, lambda out: (mean(out), {})):
        with pytest.raises(
            TypeError,
            match=rf"loss `.*` \(test_training\.py:\d+\) must return losses\.Mean\(total, weight\) of two real scalars, "
            rf"the total a floating one .*; received {received}\. Write losses\.Mean\(\(weights",
        ):
            trainer.step(state, X[:3], loss=loss)


def test_a_mean_beside_a_loss_is_of_two_scalars():
    trainer, state = trainer_of()
    loss = lambda out: (out.mean(), {"rows": losses.Mean(out[:, 0], 1)})
    with pytest.raises(
        TypeError,
        match=r"'rows': received Mean\(float32\[3\], int\)\. A scalar is a real number, an array of shape \(\), .*Mean",
    ):
        trainer.step(state, X[:3], loss=loss)
