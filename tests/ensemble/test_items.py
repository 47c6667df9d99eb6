"""Items of each member: arrays with an axis of members, folds of cross-validation; evaluate and predict."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, metrics, rng

G = np.random.default_rng(0)
X = G.normal(size=(20, 3)).astype(np.float32)
Y = (X @ G.normal(size=(3, 2)) + 0.3).astype(np.float32)
LABELS = np.argmax(Y, axis=1).astype(np.int32)

TRAINER = kaun.Trainer(model=layers.linear(3, 2), optimizer=optax.sgd(0.1))
MANY = kaun.Ensemble(TRAINER, 3)
with rng.scope(0):
    START = MANY.init()
    FOLDS = Data.folds((X, Y), 3, batch_size=5, pad=True, shuffle=True)  # of 6, 7 and 7 rows
SCORES = {"mse": losses.mse, "rmse": metrics.rmse}


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-6)


def masked(out, y, mask):
    return losses.mse(out, y, where=mask)


def test_folds_train_together_as_each_alone():
    train = [fold.with_loss(losses.mse).epochs(2) for fold, _ in FOLDS]
    history = kaun.reports.history()
    end = MANY.fit(START, train, per_member=True, report=history)
    for i, data in enumerate(train):
        alone = TRAINER.fit(START.member(i), data)
        close(end.member(i).vars.params["weight"], alone.vars.params["weight"])
    assert history.member_losses.shape == (6, 3)
    state = START
    for items in zip(*train, strict=True):
        x, ctx = (
            np.stack([x for x, _, _ in items]),
            kaun.Context(row_mask=np.stack([c["row_mask"] for _, _, c in items])),
        )
        y = np.stack([Y[[int(np.argmin(abs(X - row).sum(1))) for row in rows]] for rows in x])  # filled rows are copies
        loss = functools.partial(masked, y=y, mask=ctx["row_mask"])
        _, state = MANY.step(state, x, loss=loss, ctx=ctx, per_member=True)
    close(state.vars.params["weight"], end.vars.params["weight"])


def test_evaluate_gives_each_member_what_its_trainer_gives():
    shared = Data.batches((X, Y), 8)
    found = MANY.evaluate(START, shared, SCORES)
    valid = [fold for _, fold in FOLDS]
    own = MANY.evaluate(START, valid, SCORES, per_member=True)
    for i in range(3):
        for name in SCORES:
            assert found[name].dtype == np.float64 and found[name].shape == (3,)
            close(found[name][i], TRAINER.evaluate(START.member(i), shared, SCORES)[name])
            close(own[name][i], TRAINER.evaluate(START.member(i), valid[i], SCORES)[name])
    assert not np.array_equal(found["mse"], own["mse"])
    labels = Data.batches((X, LABELS), 8)
    counts = MANY.evaluate(START, labels, {"matrix": metrics.confusion_matrix, "accuracy": metrics.accuracy})
    alone = TRAINER.evaluate(
        START.member(2), labels, {"matrix": metrics.confusion_matrix, "accuracy": metrics.accuracy}
    )
    assert counts["matrix"].shape == (3, 2, 2) and np.array_equal(counts["matrix"][2], alone["matrix"])
    assert counts["accuracy"][2] == alone["accuracy"]


def test_predict_has_the_members_first():
    outputs = MANY.predict(START, Data.batches(X, 8))
    assert isinstance(outputs, np.ndarray) and outputs.shape == (3, 20, 2)
    close(outputs, MANY.predict(START, X))
    close(outputs[1], TRAINER.predict(START.member(1), X))
    own = MANY.predict(START, np.stack([X, X + 1, X + 2]), per_member=True)
    close(own[2], TRAINER.predict(START.member(2), X + 2))
    valid = [fold.map(lambda pair: pair[0]) for _, fold in FOLDS]
    each = MANY.predict(START, valid, per_member=True)
    assert [len(rows) for rows in each] == [7, 7, 6]
    for i in range(3):
        close(each[i], TRAINER.predict(START.member(i), valid[i]))
    scalar = kaun.Ensemble(kaun.Trainer(model=layers.linear(3, 2) >> layers.fn(jnp.sum), optimizer=optax.sgd(0.1)), 2)
    with pytest.raises(ValueError, match=r"the output of item 1 is a scalar"):
        scalar.predict(scalar.init(), Data.batches(X, 8))


def test_items_of_members_must_agree():
    ragged = [Data.batches((X[: 9 + i], Y[: 9 + i]), 5).with_loss(losses.mse) for i in range(3)]
    with pytest.raises(
        ValueError, match=r"x of member 0 \(expected\) and of member 1 \(found\) differ:[\s\S]*pad=True"
    ):
        MANY.fit(
            START,
            [data.skip(1) for data in ragged[:2]] + ragged[2:3] * 0 + [ragged[2].skip(1).take(1)],
            per_member=True,
        )
    with pytest.raises(ValueError, match=r"a pipeline for each of 3 members, received 2\. .*Ensemble\(trainer, 2\)"):
        MANY.fit(START, ragged[:2], per_member=True)
    with pytest.raises(ValueError, match=r"pipelines of as many items each, received 2, 2, 1\. .*each\.take\(1\)"):
        MANY.evaluate(START, [*ragged[:2], ragged[0].take(1)], SCORES, per_member=True)
    with pytest.raises(TypeError, match=r"expected a list of a Data for each member, received one with list"):
        MANY.predict(START, [*ragged[:2], [X]], per_member=True)
    with pytest.raises(
        ValueError, match=r"fit received a list of pipelines, one for each member: write per_member=True"
    ):
        MANY.fit(START, ragged)
    with pytest.raises(ValueError, match=r"x expected 3 along it, received float32\[20, 3\]"):
        MANY.step(START, X, loss=lambda out: losses.mse(out, Y), per_member=True)
    target = jnp.zeros((4, 2))
    with pytest.raises(ValueError, match=r"an array of a metric expected 3 along it, received float32\[4, 2\]"):
        data = Data.from_items([(np.stack([X] * 3), np.stack([Y] * 3))])
        MANY.evaluate(START, data, {"far": lambda out, y: (target.sum(), 1)}, per_member=True)
    with pytest.raises(TypeError, match=r"fit of a pipeline whose items have no with_loss does not know which rows"):
        MANY.fit(START, [Data.batches((X, Y), 8, pad=True)] * 3, per_member=True)
    context = Data.from_items([(X, Y, kaun.Context(scale=np.float32(2)))])
    for pipelines in ([Data.from_items([(X, Y)]), context, context], [context, context, Data.from_items([(X, Y)])]):
        with pytest.raises(ValueError, match=r"ctx of member 0 .* differ:\n  scale: expected"):
            MANY.evaluate(START, pipelines, SCORES, per_member=True)
    powers = [Data.repeat(1, (X, lambda out, p=p: (out**p).mean())) for p in (2, 3, 2)]
    with pytest.raises(
        ValueError, match=r"must be one function, of which only captured arrays differ; of member 0 and of"
    ):
        MANY.fit(START, powers, per_member=True)
