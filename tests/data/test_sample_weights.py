"""Data.batches(..., sample_weights=w): the weight of each row, in the loss and in metrics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, metrics, rng
from kaun._run.differences import differences
from kaun._run.identity import describe_data
from kaun.data import with_rows

G = np.random.default_rng(0)
N, SIZE = 10, 4
X = G.normal(size=(N, 3)).astype(np.float32)
Y = G.integers(0, 2, N)
W = G.uniform(0, 2, N)
W[3] = 0


def batches(arrays=(X, Y), shuffle=False, **options):
    with rng.scope(0):
        return Data.batches(arrays, SIZE, shuffle, **options)


@functools.cache
def trained():
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(3, 2), optimizer=optax.sgd(0.1, momentum=0.9))
        return trainer, trainer.init()


def close(left, right):
    pairs = zip(jax.tree.leaves(left.vars), jax.tree.leaves(right.vars), strict=True)
    return all(np.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in pairs)


def weighted_by_hand(batch):
    x, y, w = batch
    return x, lambda output: losses.cross_entropy_sparse.parts(output, y, weights=w)


@pytest.mark.parametrize("pad", [False, True])
def test_training_weighs_each_row_in_any_order_and_compiles_no_more_for_it(pad):
    trainer, state = trained()
    by_hand = batches((X, Y, W.astype(np.float32)), shuffle=True).map(weighted_by_hand).epochs(3)
    expected = trainer.fit(state, by_hand)
    data = batches(shuffle=True, pad=pad, sample_weights=W)
    before = len(trainer.compilations)
    fitted = trainer.fit(state, data.with_loss(losses.cross_entropy_sparse).epochs(3))
    assert close(fitted, expected) and len(trainer.compilations) - before == 2 - pad
    other = batches(shuffle=True, pad=pad, sample_weights=W + 1).with_loss(losses.cross_entropy_sparse)
    assert not close(trainer.fit(state, other.epochs(3)), expected)
    assert len(trainer.compilations) - before == 2 - pad
    x, loss, *ctx = next(iter(data.with_loss(losses.cross_entropy_sparse)))
    assert len(ctx) == pad and isinstance(loss(trainer.predict(state, x)), losses.Mean)


def test_rows_of_weight_0_are_left_out():
    trainer, state = trained()
    keep = W > 0
    arrays = (X, np.where(keep, Y, -5))
    data = Data.batches(arrays, N, sample_weights=keep)
    fitted = trainer.fit(state, data.with_loss(losses.cross_entropy_sparse))
    expected = trainer.fit(state, Data.batches((X[keep], Y[keep]), N).with_loss(losses.cross_entropy_sparse))
    assert close(fitted, expected)


@pytest.mark.parametrize("pad", [False, True])
def test_metrics_are_weighted(pad):
    trainer, state = trained()
    scores = np.asarray(trainer.predict(state, X), np.float64)
    right, rows = scores.argmax(-1) == Y, np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)

    def share(p, t, *, weights):
        assert weights.dtype == jnp.float32
        return jnp.where(p.argmax(-1) == t, weights, 0).sum(), weights.sum()

    of = {"accuracy": metrics.accuracy, "loss": losses.cross_entropy_sparse, "own": share}
    found = trainer.evaluate(state, batches(shuffle=True, pad=pad, sample_weights=W), of)
    assert found["accuracy"] == pytest.approx((W * right).sum() / W.sum(), rel=1e-6) == found["own"]
    assert found["loss"] == pytest.approx(-(W * np.log(rows[np.arange(N), Y])).sum() / W.sum(), rel=1e-5)


def test_the_folds_have_the_weights_of_their_rows():
    for pad in (False, True):
        with rng.scope(0):
            pairs = Data.folds(np.arange(N), 3, SIZE, shuffle=True, pad=pad, sample_weights=W)
        for data in (part for pair in pairs for part in pair):
            for item in with_rows(data.epochs(2)):
                assert np.array_equal(item.rows.weights, W[item.item].astype(np.float32))


def test_weights_of_any_numbers_are_float32_and_part_of_what_a_run_is():
    for weights in ([1, 2] * 5, np.array([1, 2] * 5, np.int8), jnp.array([1.0, 2.0] * 5), np.arange(N) % 2 == 0):
        data = batches(sample_weights=weights)
        found = np.concatenate([item.rows.weights for item in with_rows(data)])
        assert found.dtype == np.float32 and np.array_equal(found, np.asarray(weights, np.float32))
    assert repr(data).endswith("batch_size=4, sample_weights=float32[10])")
    facts = [describe_data(d) for d in (batches(sample_weights=W), batches(sample_weights=W + 1), batches())]
    assert differences(facts[0], facts[0], 0) == []
    assert any("sample_weights" in line for line in differences(facts[0], facts[1], 0))
    assert any("sample_weights" in line for line in differences(facts[0], facts[2], 0))
    assert not any("pad" in fact or "sample_weights" in fact for fact in facts[2])  # older checkpoints stay valid


WRONG = [
    (W[:9], ValueError, r"Data\.batches expected one weight for each row, shape \[10\], received shape \[9\]"),
    (W[:, None], ValueError, r"received shape \[10, 1\]\. Write sample_weights=sample_weights\[:, 0\]\.$"),
    (-W, ValueError, r"expected sample_weights that are finite and at least 0, .*np\.maximum\(sample_weights, 0\), or 0 "
     r"for a row that does not count"),
    (W * np.nan, ValueError, r"expected sample_weights that are finite and at least 0, received nan at 0"),
    (W * 1e300, ValueError, r"expected sample_weights that are finite and at least 0, received inf at 0"),
    (W * 0, ValueError, r"expected a weight above 0, received 10 of 0\. Write sample_weights=np\.ones\(10\)"),
    (["a"] * 10, TypeError, r"expected sample_weights to be numbers, one for each row"),
]  # fmt: skip


@pytest.mark.parametrize(("weights", "kind", "message"), WRONG)
def test_it_refuses_weights_that_are_wrong(weights, kind, message):
    with pytest.raises(kind, match=message):
        batches(sample_weights=weights)


def test_it_refuses_what_takes_no_weights():
    trainer, state = trained()
    data = batches(sample_weights=W)
    with pytest.raises(
        TypeError, match=r"does not know the weights of its rows.* or take weights=, def loss\(output, y"
    ):
        data.with_loss(lambda output, y: losses.mse(output, y))
    both = batches(pad=True, sample_weights=W)
    message = r"which rows of a batch are filled and the weights of its rows.*or take where= and weights="
    with pytest.raises(TypeError, match=message):
        both.with_loss(lambda output, y, *, where: losses.mse.parts(output, y, where=where))
    with pytest.raises(TypeError, match=r"fit of a pipeline whose items have no with_loss does not know the weights"):
        trainer.fit(state, data.map(lambda b: (b[0], jnp.mean)))
    with pytest.raises(
        TypeError, match=r"expected metrics that take them; metric 'mean' .*Write def mean\(predictions"
    ):
        trainer.evaluate(state, data, {"mean": lambda p, t: p.mean()})
    with pytest.raises(TypeError, match=r"metrics\.evaluate\(f, data\) does not know the weights .*trainer\.evaluate"):
        metrics.evaluate(len, data)
