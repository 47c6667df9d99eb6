"""Data.concat, zip, mix, filter, sample: random pipelines of them against plain Python, and what they refuse."""

import itertools
import json

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Data, layers, losses, rng
from kaun._run.position import makes_items, position, resume_from

few = settings(max_examples=120, deadline=None)


def seeded(seed, make):
    with rng.scope(seed):
        return make()


def numbers(make, seed, e):
    """What a random stage does to the numbers of the items."""
    return list(seeded(seed, make).epoch(e))


class Positioned:
    """An iterator that knows its position."""

    def __init__(self, items):
        self.items, self.at = items, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        if self.at > len(self.items):
            raise StopIteration
        return self.items[self.at - 1]

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


class Loader:
    def __init__(self, items, positioned):
        self.items, self.positioned = items, positioned

    def __iter__(self):
        return Positioned(self.items) if self.positioned else iter(self.items)


# A pipeline and its reference: a function from the number of a pass to the list of its items.


def leaf(kind, n, base):
    items = [base + i for i in range(n)]
    made = {
        "items": lambda: Data.from_items(items),
        "fn": lambda: Data.from_fn(n, lambda i: base + i),
        "stream": lambda: Data.from_iterable(Loader(items, False)),
        "positioned": lambda: Data.from_iterable(Loader(items, True)),
        "function": lambda: Data.from_iterable(lambda: iter(items)),
    }[kind]()
    return made, lambda e: items


def even(item):
    return hash(item) % 2 == 0


def apply(op, n, seed, made, of):
    if op in ("shuffle", "sample") and made._node.by_index is None:
        op = "map"
    size = len(of(0))
    weights = np.arange(1, size + 1)
    match op:
        case "map":
            return made.map(lambda x: (x, 1)), lambda e: [(x, 1) for x in of(e)]
        case "filter":
            return made.filter(even), lambda e: [x for x in of(e) if even(x)]
        case "skip":
            return made.skip(n), lambda e: of(e)[n:]
        case "take":
            return made.take(n), lambda e: of(e)[:n]
        case "prefetch":
            return made.prefetch(n), of
        case "group":
            groups = lambda items: [tuple(items[i : i + n]) for i in range(0, len(items), n)]
            return made.map_batch(n, tuple), lambda e: groups(of(e))
        case "epochs":
            return made.epochs(n), lambda e: [x for j in range(n) for x in of(e * n + j)]
        case "shuffle":
            order = lambda e: numbers(lambda: Data.from_items(range(len(of(e)))).shuffle(), seed, e)
            return seeded(seed, made.shuffle), lambda e: [of(e)[i] for i in order(e)]
        case "random":
            key = lambda e: numbers(lambda: Data.repeat(len(of(e)), 0).random_map(lambda k, _: str(k)), seed, e)
            keyed = seeded(seed, lambda: made.random_map(lambda k, x: (x, str(k))))
            return keyed, lambda e: list(zip(of(e), key(e), strict=True))
        case "sample":
            if size == 0:
                return made, of
            if "shuffle" in repr(made) or "sample" in repr(made):
                return made, of
            drawn = lambda e: numbers(lambda: Data.from_items(range(size)).sample(weights, 2 * n), seed, e)
            return seeded(seed, lambda: made.sample(weights, 2 * n)), lambda e: [of(e)[i] for i in drawn(e)]


def combine(op, seed, parts):
    made, of = [p[0] for p in parts], [p[1] for p in parts]
    if op == "concat":
        return Data.concat(*made), lambda e: [x for f in of for x in f(e)]
    if op == "zip":
        n = min(len(f(e)) for f in of for e in range(4))
        return Data.zip(*(d.take(n) for d in made)), lambda e: list(zip(*(f(e)[:n] for f in of), strict=True))
    weights = list(range(1, len(made) + 1))
    sources = numbers(lambda: Data.mix([Data.repeat(999, k) for k in range(len(made))], weights), seed, 0)

    def mixed(e):
        iterators, found = [iter(f(e)) for f in of], []
        for k in sources:
            item = next(iterators[k], None)
            if item is None:
                break
            found.append(item)
        return found

    return seeded(seed, lambda: Data.mix(made, weights)), mixed


KINDS = st.sampled_from(["items", "items", "fn", "stream", "positioned", "function"])
OPS = ["map", "filter", "skip", "take", "prefetch", "group", "epochs", "shuffle", "random", "sample"]
SEEDS = st.integers(0, 5)
LEAVES = st.builds(leaf, KINDS, st.integers(0, 6), st.sampled_from([0, 100]))


def extend(inner):
    one = st.builds(lambda op, n, s, p: apply(op, n, s, *p), st.sampled_from(OPS), st.integers(1, 3), SEEDS, inner)
    several = st.lists(inner, min_size=1, max_size=3)
    return one | st.builds(combine, st.sampled_from(["concat", "zip", "mix"]), SEEDS, several)


PIPELINES = st.recursive(LEAVES, extend, max_leaves=4)


@few
@given(PIPELINES, st.integers(0, 12), st.integers(1, 3))
def test_passes_skip_and_take_are_those_of_plain_python(pipeline, k, n):
    data, of = pipeline
    assert list(data) == list(data) == of(0)
    whole = [x for e in range(n) for x in of(e)]
    for e in range(n):
        assert list(data.epoch(e)) == of(e)
    assert list(data.epochs(n)) == whole
    assert list(data.epochs(n).skip(k)) == whole[k:] == list(data.epochs(n).prefetch(2).skip(k))
    assert list(data.epochs(n).skip(k).take(3)) == whole[k : k + 3]
    if data._node.seekable:
        assert len(data) == len(of(0))
    if data._node.by_index is not None:
        get = data._node.by_index(n)
        assert [get(i) for i in reversed(range(len(of(n))))] == of(n)[::-1]


@few
@given(PIPELINES, st.data())
def test_a_run_resumes_anywhere_with_the_same_items(pipeline, data):
    made, of = pipeline
    whole = [x for e in range(2) for x in of(e)]
    taken, where = [], None
    for _ in range(2):
        rest = resume_from(made.epochs(2), len(taken), where)
        items = iter(rest)
        taken += itertools.islice(items, data.draw(st.integers(1, 4)))
        where = json.loads(json.dumps(position(rest)))
        items.close() if hasattr(items, "close") else None
    seen = []
    rest = resume_from(made.epochs(2), len(taken), where, lambda n, item, final: seen.append((n, item)) or True)
    assert taken + list(rest) == whole
    if taken and where is None and makes_items(made):
        assert seen == [(len(taken), whole[len(taken) - 1])]


@pytest.mark.parametrize("verb", ["concat", "zip", "mix"])
def test_loaders_that_draw_from_one_generator_are_pulled_in_the_same_order_when_items_are_skipped(verb):
    def make():
        shared = np.random.default_rng(0)
        draws = lambda: (int(shared.integers(1000)) for _ in range(6))
        sources = [Data.from_iterable(draws), Data.from_items(range(6)), Data.from_iterable(draws)]
        with rng.scope(0):
            return Data.mix(sources, [1, 1, 1]) if verb == "mix" else getattr(Data, verb)(*sources)

    whole = list(make())
    assert len(whole) > 5
    for k in range(len(whole) + 2):
        assert list(make().skip(k)) == whole[k:]


def test_skipping_makes_no_item_of_sources_with_an_index():
    made = []
    source = lambda name: Data.from_fn(5000, lambda i: made.append((name, i)) or i)
    with rng.scope(0):
        mixed = Data.mix([source("a"), source("b")], [1, 1])
    for data in (Data.concat(source("a"), source("b")), Data.zip(source("a"), source("b")), mixed):
        made.clear()
        assert len(list(data.epochs(3).skip(3 * len(data) - 1))) == 1 and len(made) <= 2


def test_a_filter_makes_the_items_before_again_and_says_so():
    made = []
    data = Data.from_fn(10, lambda i: made.append(i) or i).filter(lambda i: i % 2)
    assert list(data.skip(4)) == [9] and made == list(range(10))
    assert "make the items before again" in " ".join(Data.filter.__doc__.split())
    with pytest.raises(TypeError, match=r"its source has no len\(\), or a filter leaves items out: Data\.from_fn"):
        len(data)
    with pytest.raises(TypeError, match=r"shuffle\(\) needs items by index.*Shuffle before prefetch or filter"):
        data.shuffle()
    with pytest.raises(ZeroDivisionError) as caught:
        list(Data.from_items([1, 0]).filter(lambda x: 1 // x))
    assert "filter(<lambda>" in caught.value.__notes__[0] and "item 1 (counted from 0)" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match=r"filter expected a function, received 3"):
        Data.from_items([1]).filter(3)


def test_proportions_and_frequencies_approach_the_weights():
    weights = np.array([6.0, 0.0, 3.0, 1.0])
    with rng.scope(0):
        mixed = list(Data.mix([Data.repeat(60_000, k) for k in range(4)], weights))
        drawn = list(Data.from_items(range(4)).sample(weights, 50_000))
    assert len(mixed) > 90_000
    for found in (mixed, drawn):
        share = np.bincount(found, minlength=4) / len(found)
        assert share[1] == 0 and np.abs(share - weights / 10).max() < 4 * 0.5 / np.sqrt(len(found))
    with rng.scope(1):
        assert list(Data.from_items(range(4)).sample(weights, 50_000)) != drawn


def test_the_sources_of_a_mix_are_the_same_in_each_pass_and_for_each_length():
    make = lambda n: Data.mix([Data.repeat(n, k) for k in range(3)], [0.2, 0.3, 0.5])
    short, long = (seeded(3, lambda n=n: make(n)) for n in (50, 9000))
    assert list(short.epoch(0)) == list(short.epoch(1)) == list(long)[: len(short)]
    assert max(map(list(short).count, range(3))) == 50  # it ends where a source has ended
    other = seeded(4, lambda: make(50))
    assert list(other) != list(short)


def test_the_draws_of_a_key_stay_as_they_are():
    """Another process, machine or version that drew other ones would resume a run with other items."""
    with rng.scope(0):
        mixed = Data.mix([Data.repeat(99, k) for k in range(3)], [1, 2, 3])
        sampled = Data.from_items(range(4)).sample([1, 2, 3, 4], 8)
        folds = Data.folds(np.arange(7), 3, 9, shuffle=True)
    assert list(mixed.take(16)) == [1, 2, 2, 2, 2, 2, 2, 2, 1, 2, 2, 0, 0, 1, 2, 2]
    assert list(sampled.epoch(0)) == [1, 3, 2, 1, 3, 3, 3, 1] and list(sampled.epoch(1)) == [3, 1, 1, 2, 1, 2, 3, 0]
    assert [v.tolist() for _, valid in folds for v in valid] == [[2, 3, 6], [0, 5], [1, 4]]
    assert [t.tolist() for train, _ in folds for t in train] == [[0, 1, 5, 4], [4, 1, 2, 6, 3], [6, 0, 2, 5, 3]]


def test_a_stream_that_reuses_its_buffer_can_be_zipped_with_itself():
    shared = np.zeros(2)

    class Reusing:
        def __iter__(self):
            for i in range(4):
                shared[:] = i
                yield shared

    stream = Data.from_iterable(Reusing())
    pairs = [(a[0], b[0]) for a, b in Data.zip(stream.take(3), stream.skip(1))]
    assert pairs == [(0, 1), (1, 2), (2, 3)]


def fitted(data, steps=None):
    with rng.scope(1):
        trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.adam(0.1))
        state = trainer.init()
    single = state
    for b, loss in data:
        _, single = trainer.step(single, b, loss=loss)
    return trainer.fit(state, data), single


def test_fit_is_step_for_step_the_same():
    x = np.arange(24, dtype=np.float32).reshape(12, 2) / 24
    with rng.scope(0):
        left, right = (Data.batches((a, a[:, :1]), 4, shuffle=True).with_loss(losses.mse) for a in (x, -x))
        data = [Data.concat(left, right), Data.mix([left.epochs(3), right.epochs(3)], [1, 2])]
        data.append(Data.from_arrays(x, x[:, :1]).sample(np.arange(12), 9).batch(3).with_loss(losses.mse))
    assert data[0]._node.chunks is not None
    for each in data:
        fit, step = fitted(each.epochs(2))
        for a, b in zip(jax.tree.leaves(fit.vars), jax.tree.leaves(step.vars), strict=True):
            assert np.array_equal(a, b)


def test_what_they_refuse():
    a, b = Data.from_items([1, 2, 3]), Data.from_items([1, 2])
    stream = Data.from_iterable(Loader([1, 2], False))
    for make, name in ((Data.concat, "concat"), (Data.zip, "zip"), (lambda *d: Data.mix(d, [1] * len(d)), "mix")):
        with pytest.raises(TypeError, match=rf"Data\.{name}\(.*expected pipelines, received .*as source 1 \(counted"):
            make(a, [1])
        with pytest.raises(ValueError, match=rf"Data\.{name}\(.*expected at least one pipeline, received none"):
            make()
    with pytest.raises(ValueError, match=r"same length, received lengths 3, 2\. Take as many.*source\.take\(2\)"):
        Data.zip(a, b)
    with pytest.raises(
        ValueError, match=r"source 1 \(counted from 0\) ended after 2 items.*a\.take\(2\), b\.take\(2\)"
    ):
        list(Data.zip(a, stream))
    with pytest.raises(ValueError, match=r"sources 0, 1 \(counted from 0\) ended after 2 items"):
        list(Data.zip(b, stream, a.map(int).filter(bool)).skip(1))


@pytest.mark.parametrize(
    ("of", "call"),
    [
        ("source", lambda w: Data.mix([Data.repeat(2, 0)] * 2, w)),
        ("item", lambda w: Data.from_items("ab").sample(w, 3)),
    ],
)
def test_weights_that_are_refused(of, call):
    with pytest.raises(TypeError, match=rf"expected weights to be numbers, one for each {of}.*weights=\[0\.8, 0\.2\]"):
        call("ab")
    with pytest.raises(
        ValueError, match=rf"one weight for each {of}, shape \[2\], received shape \[3\].*np\.ones\(2\)"
    ):
        call([1, 2, 3])
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"finite and at least 0, received {bad} at 1.*{of} that is never drawn"):
            call([1, bad])
    with pytest.raises(ValueError, match=r"expected a weight above 0, received 2 of 0"):
        call([0, 0])

    @jax.jit
    def compiled(key):
        with rng.scope(key):
            call([1, 2])

    with pytest.raises(RuntimeError, match=r"weights.*was called inside compiled code.*Build the pipeline outside"):
        compiled(jax.random.key(0))


def test_a_sample_of_what_has_no_fixed_items_is_refused():
    with rng.scope(0):
        rows = Data.from_items("ab")
        for moved in (rows.shuffle(), rows.sample([1, 1], 2), Data.batches(np.arange(2), 1, shuffle=True).map(str)):
            with pytest.raises(
                ValueError, match=r"order that does not depend on the pass, received them after .*Sample"
            ):
                moved.sample([1, 1], 3)
        assert len(rows.random_map(lambda key, x: x).sample([1, 1], 3)) == 3
    with pytest.raises(TypeError, match=r"sample\(weights, n\) needs items by index.*Sample before prefetch or filter"):
        rows.filter(bool).sample([1, 1], 3)
