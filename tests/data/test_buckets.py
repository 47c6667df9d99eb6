"""Data.bucket: rows of similar lengths in one batch, padded to the edge of their bucket."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Context, Data, checkpoint, layers, losses, metrics, rng
from kaun._run.differences import differences
from kaun._run.identity import describe_data
from kaun.data import with_rows

few = settings(max_examples=60, deadline=None)
G = np.random.default_rng(0)
LENGTHS = [3, 1, 6, 2, 5, 5, 4, 2, 1]
ROWS = [(G.integers(1, 9, n), G.integers(0, 4, n)) for n in LENGTHS]
EDGES = [3, 6]


def length(row):
    return len(row[0])


def shuffled(rows=ROWS, seed=0):
    with rng.scope(seed):
        return Data.from_items(rows).shuffle()


def expected_groups(lengths, edges, size):
    """The rows of each batch, one row after another."""
    groups, waiting = [], {edge: [] for edge in edges}
    for i, n in enumerate(lengths):
        edge = next(e for e in edges if n <= e)
        waiting[edge].append(i)
        if len(waiting[edge]) == size:
            groups.append(waiting[edge])
            waiting[edge] = []
    return [*groups, *filter(None, waiting.values())]


def equal(left, right):
    same = lambda a, b: (
        all(np.array_equal(u, v) for u, v in zip(a[:2], b[:2], strict=True))
        and all(np.array_equal(a[2][name], b[2][name]) for name in ("attention_mask", "row_mask"))
    )
    return all(same(a, b) for a, b in zip(left, right, strict=True))


@few
@given(st.lists(st.integers(1, 9), max_size=14), st.sets(st.integers(1, 8), max_size=3), st.integers(1, 4), st.data())
def test_items_of_known_lengths_of_a_function_and_of_a_stream(lengths, edges, size, data):
    edges = [*sorted(edges), 9]
    rows = [(np.full(n, i), i) for i, n in enumerate(lengths)]
    plain = Data.from_items(rows)
    found = [
        plain.bucket(lengths, edges, size),
        plain.bucket(length, edges, size),
        Data.from_iterable(rows).bucket(length, edges, size),
    ]
    items = list(found[0])
    assert all(equal(items, other) for other in found[1:])
    groups = expected_groups(lengths, edges, size)
    assert len(items) == len(groups) == len(found[0]) == len(found[1])
    for (x, y, ctx), group in zip(items, groups, strict=True):
        edge = next(e for e in edges if lengths[group[0]] <= e)
        assert x.shape == (size, edge) and y[: len(group)].tolist() == group
        assert {*y[len(group) :]} <= {*group} and ctx["row_mask"].tolist() == [i < len(group) for i in range(size)]
        assert all(
            np.array_equal(m, np.arange(edge) < lengths[i]) for m, i in zip(ctx["attention_mask"], y, strict=True)
        )
        assert np.array_equal(x, np.where(ctx["attention_mask"], y[:, None], 0))
    s = data.draw(st.integers(0, len(items)))
    assert all(equal(items[s:], each.skip(s)) for each in found)
    places = sum(size * x.shape[1] for x, *_ in items)
    expected = (len(rows), size * len(items) - len(rows), sum(lengths), places - sum(lengths))
    assert found[0].padding == found[1].padding == expected and found[2].padding is None


def test_a_shuffle_before_puts_other_rows_together_in_each_epoch():
    data = shuffled().bucket(length, EDGES, 2)
    passes = [list(data.epoch(e)) for e in range(2)]
    assert not equal(*passes) and equal(passes[0], data) and len(data) == len(passes[0]) == 5
    assert equal([*passes[0], *passes[1]], data.epochs(2))
    for s in range(11):
        assert equal([*passes[0], *passes[1]][s:], data.epochs(2).skip(s))
    assert data.padding == Data.from_items(ROWS).bucket(LENGTHS, EDGES, 2).padding
    by_batch = Data.from_items(ROWS).bucket(LENGTHS, EDGES, 2).shuffle()  # known lengths: batches by index
    assert len(list(by_batch.epochs(2))) == 10


@functools.cache
def trained():
    with rng.scope(0):
        model = layers.embedding(9, 4) >> layers.multi_head_attention(4, 2) >> layers.linear(4, 4)
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1, momentum=0.9))
        return trainer, trainer.init()


def counted(data):
    """How many rows or tokens of a pass count in a loss."""
    return sum(int(item.rows.counted(item.item[1]).sum()) for item in with_rows(data))


def test_a_loss_of_tokens_counts_the_tokens_of_the_rows_with_one_compilation_for_each_edge(tmp_path):
    trainer, state = trained()
    data = shuffled().bucket(length, EDGES, 2)
    train = data.with_loss(losses.cross_entropy_sparse).epochs(2)
    assert counted(data) == sum(LENGTHS)
    x, loss, _ = next(iter(train))
    assert float(loss(jnp.zeros((*x.shape, 4))).weight) == counted(data.take(1))
    before = len(trainer.compilations)
    fitted = trainer.fit(state, train)
    assert len(trainer.compilations) - before == len(EDGES)
    # A run that is resumed at any item.
    runs = checkpoint.Directory(tmp_path, every=1)

    def killed(step, loss, state):
        if step == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        trainer.fit(state, train, report=killed, checkpoints=runs)
    resumed = trainer.fit(state, train, report=lambda step, loss, state: None, checkpoints=runs)
    assert all(map(np.array_equal, jax.tree.leaves(resumed.vars), jax.tree.leaves(fitted.vars)))
    # Metrics of the tokens, and outputs, as of each row by itself.
    total, right = 0.0, 0
    padded = {}
    for tokens, labels in ROWS:
        n = len(tokens)
        x, keep = np.zeros((1, 6), np.int64), np.arange(6)[None] < n
        x[0, :n] = tokens
        output = np.asarray(trainer.predict(fitted, x, ctx=Context(attention_mask=keep)))[0, :n]
        padded[tokens.tobytes()] = output
        total += (np.log(np.exp(output).sum(-1)) - output[np.arange(n), labels]).sum()
        right += int((output.argmax(-1) == labels).sum())
    of = {"loss": losses.cross_entropy_sparse, "accuracy": metrics.accuracy}
    found = trainer.evaluate(fitted, data, of)
    assert found == pytest.approx({"loss": total / sum(LENGTHS), "accuracy": right / sum(LENGTHS)}, rel=1e-5)
    rows = Data.from_items([row for row in ROWS if len(row[0]) > 3]).bucket(length, EDGES, 3)
    outputs = trainer.predict(fitted, rows.map(lambda b: b[0]))  # with the masks, which map has not kept
    for output, (tokens, _) in zip(outputs, [row for row in ROWS if len(row[0]) > 3], strict=True):
        assert np.allclose(output[: len(tokens)], padded[tokens.tobytes()], atol=1e-6)


def test_labels_of_rows_and_items_of_other_kinds():
    of_rows = Data.from_items([(x, i % 4) for i, (x, _) in enumerate(ROWS)]).bucket(length, EDGES, 2)
    assert counted(of_rows) == len(ROWS)
    single = Data.from_items([x for x, _ in ROWS]).bucket(len, EDGES, 4)
    x = next(iter(single))
    item = next(iter(with_rows(single)))
    assert x.shape == (4, 6) == item.rows.ctx["attention_mask"].shape
    assert counted(single.map(lambda x: (x, x))) == sum(LENGTHS)  # labels of each token
    assert counted(single.map(lambda x: (x, x[:, 0]))) == len(ROWS)
    own = Data.from_items([(x, y, Context(scale=np.float32(2), keep=y > 0)) for x, y in ROWS]).bucket(length, EDGES, 2)
    ctx = next(iter(own.with_loss(losses.cross_entropy_sparse)))[2]
    assert sorted(ctx) == ["attention_mask", "keep", "row_mask", "scale"]
    assert ctx["keep"].shape == (2, 3) and ctx["scale"].tolist() == [2, 2]
    noisy = Data.from_items(ROWS).random_map(lambda key, row: row).bucket(LENGTHS, EDGES, 2)
    assert len(noisy) == 5 and noisy.padding is not None
    with pytest.raises(TypeError, match="the length of this pipeline is not known"):
        len(Data.from_items(ROWS).random_map(lambda key, row: row).bucket(length, EDGES, 2))


def test_a_bucket_is_part_of_what_a_run_is():
    plain = Data.from_items(ROWS)
    facts = [describe_data(d) for d in (plain.bucket(LENGTHS, EDGES, 2), plain.bucket(LENGTHS, [4, 6], 2))]
    assert facts[0][1]["lengths"] and facts[0][1]["edges"] == EDGES and differences(facts[0], facts[0], 0) == []
    assert any("edges" in line for line in differences(*facts, 0))
    assert repr(plain.bucket(LENGTHS, EDGES, 2)).endswith(".bucket(int64[9], edges=[3, 6], batch_size=2)")
    assert ".bucket(length (test_buckets.py:" in repr(plain.bucket(length, EDGES, 2))


def bucket(*arguments, rows=ROWS):
    return list(Data.from_items(rows).bucket(*arguments))


WRONG = [
    (lambda: bucket(length, [3, 5], 2), ValueError, r"expected rows of at most 5, the last edge, received 6 for row 2 "
     r"\(counted from 0\)\. Write edges=\[3, 5, 6\], where no row is longer, cut longer rows in map\(f\), or leave them out with filter\(f\)"),
    (lambda: bucket(LENGTHS, [3, 5], 2), ValueError, r"at most 5, the last edge, received 6 for row 2"),
    (lambda: list(Data.from_iterable(ROWS).bucket(length, [5], 2)), ValueError, r"at most 5, .*received 6 for row 2"),
    (lambda: bucket(lambda row: 0, [5], 2), ValueError, r"lengths of at least 1, received 0 for row 0.*data\.filter"),
    (lambda: bucket(lambda row: 1.5, [5], 2), TypeError, r"expected an int for the length of a row, received 1\.5"),
    (lambda: bucket(lambda row: 7, [9], 2), ValueError, r"whose axis 0 has the length of the row, 7, received \(int64\[3"),
    (lambda: bucket(LENGTHS[1:], EDGES, 2), ValueError, r"expected one length for each row, shape \[9\], .* \[8\]"),
    (lambda: bucket([1.0] * 9, EDGES, 2), TypeError, r"expected a function from row to length, or the lengths of all"),
    (lambda: bucket(length, [], 2), ValueError, r"expected edges that rise, at least one, received \[\]"),
    (lambda: bucket(length, [6, 3], 2), ValueError, r"expected edges that rise, at least one, received \[6, 3\]"),
    (lambda: bucket(length, 6, 2), TypeError, r"expected edges as a list of ints, received .*Write edges=\[64, 128\]\."),
    (lambda: bucket(length, [0, 6], 2), ValueError, r"expected an edge to be at least 1, received 0"),
    (lambda: bucket(length, EDGES, 0), ValueError, r"expected batch_size to be at least 1, received 0"),
    (lambda: shuffled().bucket(LENGTHS, EDGES, 2), ValueError, r"received them after \.shuffle\(\): length i would belong "
     r"to another row in each pass\. Pass a function from row to length"),
    (lambda: Data.from_iterable(ROWS).bucket(LENGTHS, EDGES, 2), TypeError, r"needs items by index"),
    (lambda: list(Data.from_items(ROWS).bucket(length, EDGES, 2).map(lambda b: (b[0][:, 1:], b[1][:, 1:]))
                  .with_loss(losses.cross_entropy_sparse)), ValueError,
     r"bucket expected labels of shape \[2, 3\] or of one value for each row, .* received shapes \[2, 2\] after map"),
    (lambda: trained()[0].evaluate(trained()[1], Data.from_items(ROWS).bucket(length, EDGES, 2), {"a": lambda p, t: 1.0}),
     TypeError, r"with padding inside of them, expected metrics that take them; metric 'a'"),
]  # fmt: skip


@pytest.mark.parametrize(("run", "kind", "message"), WRONG)
def test_what_it_refuses(run, kind, message):
    with pytest.raises(kind, match=message):
        run()
