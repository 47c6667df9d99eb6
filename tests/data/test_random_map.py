"""Data.random_map: items are a function of the pipeline's key, the pass and the index, however they are reached."""

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
from kaun._run import identity
from kaun._run.differences import differences
from kaun._run.position import position, resume_from

few = settings(max_examples=40, deadline=None)


def key_words(key, item):
    return (item, *np.asarray(jax.random.key_data(key)).tolist())


def random(data, seed=0):
    with rng.scope(seed):
        return data.random_map(key_words)


class Stream:
    """A loader of ten items, whose iterators know their position where it is asked for."""

    def __init__(self, positioned):
        self.positioned = positioned

    def __iter__(self):
        return Positioned() if self.positioned else iter(range(10))


class Positioned:
    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == 10:
            raise StopIteration
        self.at += 1
        return self.at - 1

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


SOURCES = {
    "index": lambda: Data.from_items(range(10)),
    "stream": lambda: Data.from_iterable(Stream(False)),
    "positioned": lambda: Data.from_iterable(Stream(True)),
}
FORMS = {
    "rows": lambda d: random(d).epochs(3),
    "rows in batches": lambda d: random(d).map_batch(4, tuple).epochs(3),
    "batches": lambda d: random(d.map_batch(3, tuple)).epochs(3),
    "after epochs": lambda d: random(d.epochs(3)),
    "batches after epochs": lambda d: random(d.epochs(3).map_batch(4, tuple)),
    "twice": lambda d: random(random(d, 1).map_batch(2, tuple)).epochs(3),
    "taken": lambda d: random(d.take(7)).map_batch(2, tuple),
    "one pass": lambda d: random(d),
}


def test_the_key_is_a_function_of_pipeline_key_pass_and_index():
    with rng.scope(5):
        base = rng.next_key()
    data = random(Data.from_items("abc"), 5)
    for e in range(2):
        expected = [key_words(jax.random.fold_in(jax.random.fold_in(base, e), i), c) for i, c in enumerate("abc")]
        assert list(data.epoch(e)) == expected
    assert list(data) == list(data.epoch(0))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", FORMS)
def test_a_value_whose_passes_are_epochs_and_whose_keys_all_differ(source, form):
    make = lambda: FORMS[form](SOURCES[source]())
    whole = list(make())
    assert whole == list(make()) == list(make().prefetch(2))
    assert len(set(map(repr, whole))) == len(whole)
    if form == "rows":
        one = random(SOURCES[source]())
        assert whole == [item for e in range(3) for item in one.epoch(e)]


@few
@given(st.sampled_from(sorted(SOURCES)), st.sampled_from(sorted(FORMS)), st.data())
def test_skip_and_resume_are_exact_at_any_item(source, form, data):
    make = lambda: FORMS[form](SOURCES[source]())
    whole, where, n, taken = list(make()), None, 0, []
    k = data.draw(st.integers(0, len(whole)))
    assert list(make().skip(k)) == whole[k:]
    assert list(make().take(k)) == whole[:k]
    for _ in range(2):
        rest = resume_from(make(), n, where)
        items = iter(rest)
        more = data.draw(st.integers(1, max(1, len(whole) - n)))
        taken += itertools.islice(items, more)
        n = len(taken)
        where = json.loads(json.dumps(position(rest)))
        assert (where is not None) == (source == "positioned") or n == len(whole)
        items.close()
    seen = []
    rest = resume_from(make(), n, where, lambda count, item, final: seen.append((count, item)) or True)
    assert taken + list(rest) == whole
    assert where is not None or seen == [(n, whole[n - 1])]


@few
@given(st.integers(0, 9), st.integers(0, 3))
def test_a_shuffle_moves_the_items_with_their_numbers(skip, e):
    with rng.scope(0):
        data = Data.from_items(range(10)).random_map(key_words).shuffle()
    assert sorted(data.epoch(e)) == list(random(Data.from_items(range(10))).epoch(e))
    assert list(data.epochs(4).skip(10 * e + skip)) == list(data.epochs(4))[10 * e + skip :]


def test_skipping_makes_no_item():
    made = []
    with rng.scope(0):
        data = Data.from_fn(10_000, lambda i: i).random_map(lambda key, i: made.append(i) or i).epochs(3)
    assert list(data.skip(29_998)) == [9998, 9999] and made == [9998, 9999]


def test_batches_of_arrays_and_fit():
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    flip = lambda key, b: (np.where(jax.random.bernoulli(key, shape=(len(b[0]), 1)), b[0][:, ::-1], b[0]), b[1])
    with rng.scope(0):
        batches = Data.batches((x, x[:, :1]), 2, shuffle=True).random_map(flip).with_loss(losses.mse)
    first, second = ([b.tolist() for b, _ in batches.epoch(e)] for e in (0, 1))
    assert first != second and len(batches) == 3
    with rng.scope(1):
        trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
        state = trainer.init()
    fitted = trainer.fit(state, batches.epochs(2))
    for b, loss in batches.epochs(2):
        _, state = trainer.step(state, b, loss=loss)
    assert np.array_equal(fitted.vars.params["weight"], state.vars.params["weight"])


def test_it_is_part_of_what_a_run_is():
    words = lambda old, new: differences(identity.describe_data(old), identity.describe_data(new), 0)
    base = Data.from_items(range(4))
    assert words(random(base), random(base)) == []
    (line,) = words(random(base), random(base, 1))
    assert line.startswith("Data.random_map: the key was 0x") and "another seed" in line
    with rng.scope(0):
        other = base.random_map(lambda key, item: item)
    (line,) = words(random(base), other)
    assert line.startswith("Data.random_map: the function was key_words, is test_it_is_part")
    assert len(words(random(base), base)) == 1
    assert words(random(base).epochs(2), random(base).epochs(3)) == []
    assert identity.unscoped(base.random_map(key_words)) and not identity.unscoped(random(base))


def test_what_it_refuses():
    with pytest.raises(TypeError, match=r"random_map expected a function, received 3.*random_map\(f\), not f\(x\)"):
        Data.from_items([1]).random_map(3)

    @jax.jit
    def compiled(key):
        with rng.scope(key):
            Data.from_items([1]).random_map(key_words)

    with pytest.raises(
        RuntimeError, match=r"random_map\(f\) was called inside compiled code.*Build the pipeline outside"
    ):
        compiled(jax.random.key(0))
    with pytest.raises(ZeroDivisionError) as caught:
        list(Data.from_items([1, 0]).random_map(lambda key, x: 1 // x))
    assert "random_map(<lambda>" in caught.value.__notes__[0] and "item 1 (counted from 0)" in caught.value.__notes__[0]
    assert "random_map(key_words (test_random_map.py:" in repr(random(Data.from_items([1])))
