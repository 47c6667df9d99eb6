"""Data.folds: each row is in one validation pipeline, and in the training pipelines of the other pairs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Data, layers, losses, rng
from kaun._run.differences import differences
from kaun._run.identity import describe_data

few = settings(max_examples=60, deadline=None)


def rows_of(data):
    return [int(i) for batch in data for i in batch["i"]]


def folds(n, k, size, shuffle, seed=0, kind=np.asarray):
    with rng.scope(seed):
        return Data.folds({"i": kind(np.arange(n)), "x": kind(np.arange(n) * 0.5)}, k, size, shuffle=shuffle)


@few
@given(st.integers(2, 17), st.data(), st.integers(1, 6), st.booleans())
def test_each_row_is_validated_once_and_trained_on_elsewhere(n, data, size, shuffle):
    k = data.draw(st.integers(2, n))
    pairs = folds(n, k, size, shuffle)
    assert len(pairs) == k
    valid = [rows_of(v) for _, v in pairs]
    assert sorted(itertools.chain.from_iterable(valid)) == list(range(n))
    assert max(map(len, valid)) - min(map(len, valid)) <= 1
    for (train, v), out in zip(pairs, valid, strict=True):
        for e in range(2):
            assert sorted(rows_of(train.epoch(e)) + out) == list(range(n)) and rows_of(v.epoch(e)) == out
        whole = rows_of(train.epochs(2))
        assert whole == rows_of(train.epoch(0)) + rows_of(train.epoch(1)) and whole == rows_of(train.epochs(2))
        assert len(train) == -(-(n - len(out)) // size) and len(v) == -(-len(out) // size)
        s = data.draw(st.integers(0, 2 * len(train)))
        assert rows_of(train.epochs(2).skip(s)) == [i for b in list(train.epochs(2))[s:] for i in b["i"].tolist()]
        assert all(np.array_equal(b["x"], b["i"] * 0.5) for b in train)
    if not shuffle:
        assert valid == [list(part) for part in np.array_split(np.arange(n), k)]


def test_jax_arrays_have_the_same_folds_and_stay_on_their_device():
    for pairs in zip(folds(6, 2, 3, True), folds(6, 2, 3, True, kind=jnp.asarray), strict=True):
        for on_host, on_device in zip(*pairs, strict=True):
            assert rows_of(on_host.epochs(2)) == rows_of(on_device.epochs(2))
            assert isinstance(next(iter(on_device))["x"], jax.Array)


def test_a_shuffle_deals_rows_at_random_and_reorders_each_epoch():
    pairs, again, other = (folds(40, 4, 8, True, seed) for seed in (0, 0, 1))
    assert [rows_of(v) for _, v in pairs] == [rows_of(v) for _, v in again] != [rows_of(v) for _, v in other]
    orders = [rows_of(train.epoch(e)) for train, _ in pairs for e in range(2)]
    assert len(set(map(tuple, orders))) == 8 and orders == [rows_of(t.epoch(e)) for t, _ in again for e in range(2)]
    assert rows_of(pairs[0][1]) != list(range(10))


def test_k_trainers_with_fit_equal_to_steps():
    x = np.arange(20, dtype=np.float32).reshape(10, 2) / 20
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
        state = trainer.init()
        pairs = Data.folds((x, x[:, :1]), 3, 2, shuffle=True)
    for train, valid in pairs:
        train = train.with_loss(losses.mse).epochs(2)
        assert train._node.chunks is not None
        single = state
        for b, loss in train:
            _, single = trainer.step(single, b, loss=loss)
        fitted = trainer.fit(state, train)
        assert all(map(np.array_equal, jax.tree.leaves(fitted.vars), jax.tree.leaves(single.vars)))
        assert trainer.evaluate(fitted, valid, {"mse": losses.mse})["mse"] >= 0


def test_a_fold_is_part_of_what_a_run_is():
    facts = lambda pair, i=0: describe_data(pair[i])
    pairs, again, other = (folds(9, 3, 2, True, seed) for seed in (0, 0, 1))
    assert differences(facts(pairs[0]), facts(again[0]), 0) == []
    lines = differences(facts(pairs[0]), facts(pairs[1]), 0)
    assert lines[0] == "Data.folds: fold was 0, is 1"
    lines = differences(facts(pairs[0]), facts(other[0]), 0)
    assert any("the shuffle key was 0x" in line for line in lines) and "rows has changed" in " ".join(lines)
    assert "Data.folds: part was training, is validation" in differences(facts(pairs[0]), facts(pairs[0], 1), 0)


def test_what_it_refuses():
    with pytest.raises(
        ValueError, match=r"Data\.folds expected k to be at least 2, received 1\. Write Data\.folds\(arrays, k=5"
    ):
        Data.folds(np.arange(4), 1, 2)
    with pytest.raises(
        ValueError, match=r"expected at least one row for each fold, received 4 rows for k=5\. Write k=4 to leave one"
    ):
        Data.folds(np.arange(4), 5, 2)
    with pytest.raises(ValueError, match=r"received 1 rows for k=2\. Pass more rows\."):
        Data.folds(np.arange(1), 2, 2)
    with pytest.raises(ValueError, match=r"Data\.folds expected arrays of the same length"):
        Data.folds((np.arange(4), np.arange(3)), 2, 2)
    with pytest.raises(TypeError, match=r"Data\.folds expected batch_size to be an int"):
        Data.folds(np.arange(4), 2, np.arange(4))
    assert repr(Data.folds(np.arange(4), 2, 2)[1][0]) == "Data.folds(int64[4], k=2, batch_size=2)[1][0]"

    @jax.jit
    def compiled(key):
        with rng.scope(key):
            Data.folds(np.arange(4), 2, 2, shuffle=True)

    with pytest.raises(RuntimeError, match=r"Data\.folds\(\.\.\., shuffle=True\) was called inside compiled code"):
        compiled(jax.random.key(0))
