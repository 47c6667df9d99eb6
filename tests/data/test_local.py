"""Parts of batches: each process reads rows of its own, in the order of one process; and what cannot be cut is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Data, layers, losses, metrics, rng, sharding
from kaun._run.identity import describe_data
from kaun.data.pieces import RowBlocks

few = settings(max_examples=50, deadline=None)
S = sharding.data_parallel()
N = 23
X, Y = np.arange(2.0 * N, dtype=np.float32).reshape(N, 2), np.arange(N)
LENGTHS = np.arange(N) % 5 + 1
LEFT, RIGHT = RowBlocks(2, (0,)), RowBlocks(2, (1,))


def row(i):
    return X[i], Y[i]


def noisy(key, pair):
    return pair[0] + np.asarray(jax.random.normal(key, (2,))), pair[1]


def tokens(i):
    return np.arange(LENGTHS[i]), Y[i]


rows = lambda: Data.from_fn(N, row)
SOURCES = {
    "batches": lambda: Data.batches((X, Y), 4),
    "shuffled": lambda: Data.batches((X, Y), 4, shuffle=True),
    "dropped": lambda: Data.batches((X, Y), 4, shuffle=True, drop_last=True),
    "on a device": lambda: Data.batches((jnp.asarray(X), jnp.asarray(Y)), 4, shuffle=True),
    "padded": lambda: Data.batches((X, Y), 4, shuffle=True, pad=True),
    "weighted": lambda: Data.batches((X, Y), 4, pad=True, sample_weights=np.arange(N)),
    "folds": lambda: Data.folds((X, Y), 3, 4, shuffle=True)[1][0],
    "batch": lambda: rows().shuffle().random_map(noisy).batch(4),
    "batch, dropped": lambda: rows().map(lambda pair: pair).batch(4, drop_last=True),
    "sample": lambda: Data.from_arrays(X, Y).sample(np.arange(N), 11).batch(4),
    "bucket": lambda: Data.from_fn(N, tokens).bucket(LENGTHS, [2, 5], 4),
    "skip": lambda: Data.batches((X, Y), 4, shuffle=True).epochs(3).skip(7).take(6),
    "epoch": lambda: Data.batches((X, Y), 4, shuffle=True).epoch(2),
    "shuffled batches": lambda: Data.batches((X, Y), 4).shuffle().epochs(2),
    "concat": lambda: Data.concat(Data.batches((X, Y), 4), rows().batch(6)),
    "mix": lambda: Data.mix([Data.batches((X, Y), 4, shuffle=True), rows().batch(6)], [0.5, 0.5]),
    "zip": lambda: Data.zip(Data.batches(X, 4, shuffle=True), Data.batches({"y": Y}, 4)),
    "prefetch": lambda: Data.batches((X, Y), 4).prefetch(1),
}


def make(name):
    with rng.scope(0):
        return SOURCES[name]()


def items_of(node):
    return [(each.item, each.rows) for each in node.open(None, 0)]


def whole_items(data):
    return [getattr(item, "item", item) for item in data._node.open(None, 0)]


def equal(left, right):
    return jax.tree.structure(left) == jax.tree.structure(right) and all(
        np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


@pytest.mark.parametrize("name", SOURCES)
def test_the_parts_of_a_batch_are_the_batch(name):
    data = make(name)
    left, right = (items_of(data._node.narrow(blocks)) for blocks in (LEFT, RIGHT))
    for whole, (a, of_a), (b, of_b) in zip(whole_items(data), left, right, strict=True):
        n = len(jax.tree.leaves(whole)[0])
        assert of_a.piece.total == of_b.piece.total == n
        if n % 2:
            assert equal(a, whole) and equal(b, whole)
        else:
            assert {len(leaf) for leaf in jax.tree.leaves((a, b))} == {n // 2}
            assert equal(jax.tree.map(lambda *parts: np.concatenate(parts), a, b), whole)


def test_any_item_of_a_part_is_found_at_once():
    node = make("skip")._node.narrow(RIGHT)
    assert equal([item for item, _ in items_of(node)][4:], [each.item for each in node.open(None, 4)])


def test_half_of_the_rows_are_read():
    read = []

    def load(i):
        read.append(i)
        return row(i)

    with rng.scope(0):
        data = Data.from_fn(16, load).shuffle().batch(4).epochs(2)
    list(data)
    (order, read[:]) = (list(read), [])
    list(data._node.narrow(RIGHT).open(None, 0))
    assert read == [i for first in range(0, 32, 4) for i in order[first + 2 : first + 4]]


def test_bucket_reads_its_rows_and_pads_the_same_leaves_in_all_processes():
    read = []

    def load(i):  # a vector as long as the row of some, in all rows
        read.append(i)
        return np.arange(lengths[i]), np.zeros(3)

    lengths = np.array([3, 3, 4, 4])
    data = Data.from_fn(4, load).bucket(lengths, [5], 4)
    (whole,), narrow = whole_items(data), data._node.narrow
    read.clear()
    ((left, about),), ((right, _),) = items_of(narrow(LEFT)), items_of(narrow(RIGHT))
    assert read == [0, 1, 2, 2, 3, 0]  # the third of each is a row of another length
    assert left[1].shape == (2, 3) and equal(jax.tree.map(lambda *a: np.concatenate(a), left, right), whole)
    assert about.mask.shape == (4,) and about.ctx["attention_mask"].shape == (4, 5)


@few
@given(st.integers(1, 9), st.integers(0, 40), st.data())
def test_blocks_cut_a_batch_into_parts_of_which_each_row_is_in_one(count, n, data):
    owner = np.array(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    parts = [RowBlocks(count, tuple(np.flatnonzero(owner == p).tolist())) for p in sorted({*owner.tolist()})]
    pieces = [part.piece(n) for part in parts]
    found = [np.arange(n)[piece.here] for piece in pieces]
    if n % count:
        assert all(np.array_equal(each, np.arange(n)) for each in found)
    else:
        assert np.array_equal(np.sort(np.concatenate(found)), np.arange(n))
        assert [part.total(piece.rows) for part, piece in zip(parts, pieces, strict=True)] == [n] * len(parts)
    values, offset = np.arange(100), data.draw(st.integers(0, 50))
    for part, piece, each in zip(parts, pieces, found, strict=True):
        assert np.array_equal(values[piece.of(slice(offset, offset + n))], each + offset)
        assert np.array_equal(piece.of(values[offset : offset + n]), each + offset)
        assert piece.rows == len(each)
        for block in part.here if n and not n % count else ():
            at = slice(block * (n // count), (block + 1) * (n // count))
            assert np.array_equal(each[piece.positions(at)], np.arange(n)[at])


# In one process


@functools.cache
def trained():
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.001))
        return trainer, trainer.init()


@pytest.mark.parametrize("name", SOURCES)
def test_in_one_process_items_stay_what_they_are_and_come_as_jax_arrays(name):
    data = make(name)
    found = list(data.local(S).assemble(S))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    canonical = lambda tree: jax.tree.map(lambda a: np.asarray(jnp.asarray(a)), tree)
    assert equal(jax.tree.map(np.asarray, found), canonical(list(data)))
    assert len(data.local(S).assemble(S)) == len(data)


@pytest.mark.parametrize("name", [pytest.param("shuffled", marks=pytest.mark.slow), "weighted"])
def test_fit_evaluate_and_predict_see_the_same_batches(name):
    trainer, state = trained()
    with rng.scope(0):
        data = make(name).map(lambda b: (b[0], b[1][:, None].astype(np.float32)))
        placed = make(name).local(S).map(lambda b: (b[0], b[1][:, None].astype(np.float32))).assemble(S).prefetch(2)
    fit = lambda data: trainer.fit(state, data.with_loss(losses.mse).epochs(2))
    assert equal(fit(placed).vars, fit(data).vars)
    found = trainer.evaluate(state, placed, {"mse": losses.mse})
    assert found == trainer.evaluate(state, data, {"mse": losses.mse})
    inputs = lambda data: data.map(lambda b: b[0])
    assert equal(trainer.predict(state, inputs(placed)), trainer.predict(state, inputs(data)))


def test_a_padded_batch_keeps_its_real_rows_through_map_and_prefetch():
    data = make("padded").local(S).map(lambda b: b).prefetch(1)
    assert sum(len(y) for _, y in data) == N == sum(item.rows.mask.sum() for item in data._node.open(None, 0))
    last = list(data.assemble(S).with_loss(losses.mse))[-1][2]
    assert last["row_mask"].tolist() == [True] * 3 + [False]


def test_what_is_no_row_is_left_as_it_is():
    item = {"n": 3, "name": "a", "none": None, "x": np.float64([1.0, 2.0]), "key": jax.random.key(0), "s": np.int8(3)}
    (found,) = Data.from_items([item]).assemble(S)
    assert (found["n"], found["name"], found["none"]) == (3, "a", None)
    assert found["x"].dtype == jnp.float32 and found["s"].dtype == jnp.int8 and found["s"].sharding == S.replicated
    assert jax.random.key_data(found["key"]).tolist() == jax.random.key_data(item["key"]).tolist()


def test_a_loader_may_fill_its_buffer_again():
    def batches():
        buffer = np.zeros(4, np.float32)
        for i in range(3):
            buffer[:] = i
            yield buffer

    found = list(Data.from_iterable(batches).assemble(S).prefetch(1))
    assert [batch.tolist() for batch in found] == [[i] * 4 for i in range(3)]


def test_sources_that_all_have_local_are_put_together():
    with rng.scope(0):
        a, b = make("shuffled").local(S), make("batch").local(S)
        for join in (Data.concat, lambda *d: Data.mix(d, [0.5, 0.5])):
            assert len(list(join(a, b).assemble(S).take(4))) == 4


def test_the_facts_of_a_run_leave_out_where_rows_lie():
    assert describe_data(make("shuffled").local(S).assemble(S)) == describe_data(make("shuffled"))


# What is refused


PAIRS = Data.batches((X, Y), 4)
REFUSED = {
    "no batches": (rows(), "Make batches first: data.batch(64).local(s)."),
    "map": (PAIRS.map(lambda b: b), "Write .local(s) before .map."),
    "random_map": (PAIRS.random_map(lambda k, b: b), "Write .local(s) before .random_map."),
    "with_loss": (PAIRS.epochs(2).with_loss(losses.mse), "Write .local(s) before .with_loss."),
    "assemble": (PAIRS.assemble(S), "Write .local(s) before .assemble."),
    "filter": (PAIRS.filter(bool), "Write .local(s) before .filter."),
    "twice": (PAIRS.local(S), "It has .local(s) already"),
    "loader": (Data.from_iterable([X]).batch(2), "write .assemble(s) alone; else leave both out"),
    "map_batch": (rows().map_batch(4, Data.stack), "Write .batch(n).local(s).map(f)."),
    "bucket": (Data.from_fn(N, tokens).shuffle().bucket(lambda r: len(r[0]), [5], 4), "bucket(lengths, edges, batch_"),
    "filtered rows": (rows().filter(bool).batch(4), "A filter or prefetch before batch(n) takes the index away"),
    "concat": (Data.concat(rows(), PAIRS), "Make each source of batches."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_local_names_the_stage_that_keeps_it_from_leaving_rows_out(name):
    data, fix = REFUSED[name]
    with pytest.raises(TypeError, match=re.escape(fix)) as caught:
        data.local(S)
    assert "expected batches whose rows have an index, received Data" in str(caught.value)


LOCAL = PAIRS.local(S)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LOCAL.with_loss(losses.mse), r"with_loss\(f\) expected whole batches, and after local\(s\) each"),
        (lambda: LOCAL.batch(2), r"batch\(n\) expected whole.*Make batches of the wanted size before local\(s\)"),
        (lambda: LOCAL.filter(bool), r"filter\(f\) expected whole batches or single rows.*keep different batches"),
        (lambda: LOCAL.random_map(noisy), r"random_map\(f\) expected whole.*would be others with more processes"),
        (lambda: Data.zip(LOCAL, LOCAL), r"Data.zip\(\*sources\) expected whole batches"),
        (lambda: Data.concat(PAIRS, LOCAL), r"in all of its sources or in none, and source 0 .*Data.concat\(...\).loc"),
        (lambda: trained()[0].fit(trained()[1], LOCAL), r"fit .* expected whole batches.*Write .assemble\(s\) before"),
        (lambda: trained()[0].evaluate(trained()[1], LOCAL, {"mse": losses.mse}), "evaluate or predict expected whole"),
        (lambda: metrics.evaluate(len, LOCAL), "metrics.evaluate.* expected whole batches"),
        (
            lambda: list(Data.zip(PAIRS, rows().batch(2).take(6)).local(S)),
            "batches of as many rows for local.*received 4, 2",
        ),
        (lambda: PAIRS.local(None), r"local\(s\) expected a kaun.sharding.Sharding.*received NoneType"),
        (lambda: PAIRS.assemble("data"), r"assemble\(s\) expected a kaun.sharding.Sharding.*data_parallel\(\)"),
        (lambda: list(PAIRS.with_loss(losses.mse).assemble(S)), r"without a loss.*Write .assemble\(s\).with_loss\(f\)"),
        (lambda: list(Data.from_items([1]).assemble(S)), "expected items with an array of rows, received int"),
        (lambda: list(LOCAL.map(lambda b: b[0][:1]).assemble(S)), "one row for each of the 4 of 4 rows"),
    ],
)
def test_what_needs_whole_batches_says_what_to_write(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
