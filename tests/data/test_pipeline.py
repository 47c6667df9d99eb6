"""Data: pipelines that are values. Random pipelines are compared with plain lists, pass by pass."""

import contextvars
import copy
import gc
import itertools
import pickle
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import EarlyStop, rng
from kaun._loss import capture
from kaun.context import Context
from kaun.data import chunks
from kaun.data.pipeline import Data

few = settings(max_examples=40, deadline=None)


def prefetch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "kaun prefetch"]


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test():
    yield
    assert until(lambda: not prefetch_threads())


# ---- Random pipelines beside their model -------------------------------------------------------------------------


class Built(NamedTuple):
    """A pipeline and what it must give: ``model(e)`` is the list of pass e."""

    data: Data[Any]
    model: Callable[[int], list[int]]
    knows_length: bool
    has_items: bool


def order(seed: int, draw: int, epoch: int, n: int) -> list[int]:
    """The documented order, written down again: the draw-th key of the scope and the pass."""
    words = np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(seed), draw))).tolist()
    bits = np.random.PCG64(np.random.SeedSequence([*words, epoch]))
    return np.random.RandomState(bits).permutation(n).tolist()


def grouped(items: list[int], n: int, drop_last: bool) -> list[int]:
    groups = [items[i : i + n] for i in range(0, len(items), n)]
    return [sum(g) for g in groups if len(g) == n or not drop_last]


def total(batch: Any) -> int:
    return int(np.sum(batch))


def source(kind: str, values: list[int], seed: int) -> tuple[Built, int]:
    """A source and the number of keys that it drew."""
    array = np.array(values, np.int64)
    if kind == "batches":

        def model(e: int) -> list[int]:
            return grouped([values[i] for i in order(seed, 0, e, len(values))], 2, False)

        return Built(Data.batches(array, 2, shuffle=True).map(total), model, True, True), 1
    made = {
        "items": lambda: Data.from_items(values),
        "arrays": lambda: Data.from_arrays(array),
        "fn": lambda: Data.from_fn(len(values), lambda i: values[i]),
        "repeat": lambda: Data.repeat(len(values), 7),
        "loader": lambda: Data.from_iterable(values),
        "factory": lambda: Data.from_iterable(lambda: iter(values)),
    }[kind]()
    shown = [7] * len(values) if kind == "repeat" else values
    return Built(made, lambda e: list(shown), kind != "factory", kind not in ("loader", "factory")), 0


def stage(built: Built, op: tuple[Any, ...], seed: int, draws: int) -> tuple[Built, int]:
    data, model, _, has_items = built
    name, n, *more = op
    match name:
        case "map":
            return built._replace(
                data=data.map(lambda x: int(x) * 3 + n), model=lambda e: [x * 3 + n for x in model(e)]
            ), draws
        case "batch":
            (drop,) = more
            return built._replace(
                data=data.batch(n, drop_last=drop).map(total), model=lambda e: grouped(model(e), n, drop)
            ), draws
        case "map_batch":
            (drop,) = more
            return built._replace(
                data=data.map_batch(n, total, drop_last=drop), model=lambda e: grouped(model(e), n, drop)
            ), draws
        case "epochs":
            return built._replace(
                data=data.epochs(n), model=lambda e: [x for k in range(n) for x in model(e * n + k)]
            ), draws
        case "epoch":
            return built._replace(data=data.epoch(n), model=lambda e: model(n)), draws
        case "skip":
            return built._replace(data=data.skip(n), model=lambda e: model(e)[n:]), draws
        case "take":
            return built._replace(data=data.take(n), model=lambda e: model(e)[:n]), draws
        case "prefetch":
            return built._replace(data=data.prefetch(n), has_items=False), draws
        case "shuffle" if has_items:

            def shuffled(e: int) -> list[int]:
                items = model(e)
                return [items[i] for i in order(seed, draws, e, len(items))]

            return built._replace(data=data.shuffle(), model=shuffled), draws + 1
    return built, draws


small, positive, flag = st.integers(0, 7), st.integers(1, 3), st.booleans()
ops = st.one_of(
    st.tuples(st.just("map"), small),
    st.tuples(st.just("batch"), positive, flag),
    st.tuples(st.just("map_batch"), positive, flag),
    st.tuples(st.sampled_from(["epochs", "epoch"]), st.integers(0, 3)),
    st.tuples(st.sampled_from(["skip", "take"]), small),
    st.tuples(st.just("shuffle"), small),
    st.tuples(st.just("prefetch"), positive),
)


@st.composite
def pipelines(draw: st.DrawFn) -> Built:
    seed = draw(st.integers(0, 3))
    kinds = ["items", "arrays", "fn", "repeat", "loader", "factory", "batches"]
    with rng.scope(seed):
        built, draws = source(draw(st.sampled_from(kinds)), draw(st.lists(st.integers(0, 99), max_size=9)), seed)
        for op in draw(st.lists(ops, max_size=5)):
            built, draws = stage(built, op, seed, draws)
    return built


@few
@given(pipelines())
def test_a_pipeline_gives_what_its_stages_say_each_time(built: Built):
    expected = built.model(0)
    assert list(built.data) == expected
    assert list(built.data) == expected
    if built.knows_length:
        assert len(built.data) == len(expected)
    else:
        with pytest.raises(TypeError, match="not known"):
            len(built.data)


@few
@given(pipelines(), st.integers(0, 3))
def test_epochs_are_the_passes_one_after_the_other(built: Built, n: int):
    passes = [list(built.data.epoch(e)) for e in range(n)]
    assert passes == [built.model(e) for e in range(n)]
    assert list(built.data.epochs(n)) == [x for one in passes for x in one]


@few
@given(pipelines(), st.integers(0, 12), st.integers(0, 12))
def test_skip_and_take_are_slices(built: Built, n: int, k: int):
    whole = built.model(0)
    assert list(built.data.skip(n).take(k)) == whole[n:][:k]
    assert list(built.data.take(k).skip(n)) == whole[:k][n:]
    assert list(built.data.epochs(2).skip(n)) == (built.model(0) + built.model(1))[n:]


@few
@given(pipelines(), st.integers(1, 4))
def test_prefetch_changes_nothing(built: Built, n: int):
    ahead = built.data.prefetch(n)
    assert list(ahead) == built.model(0)
    assert list(ahead.epochs(2)) == built.model(0) + built.model(1)


@few
@given(pipelines())
def test_two_maps_are_one(built: Built):
    assert list(built.data.map(lambda x: x + 1).map(lambda x: x * 2)) == [(x + 1) * 2 for x in built.data]


@few
@given(pipelines(), st.integers(1, 5))
def test_batches_flattened_are_the_items(built: Built, n: int):
    expected = built.model(0)
    assert [int(x) for batch in built.data.batch(n) for x in batch] == expected
    assert [x for group in built.data.map_batch(n, list) for x in group] == expected


each_stage = [
    ("map", 1),
    ("batch", 2, True),
    ("batch", 2, False),
    ("map_batch", 2, False),
    ("epochs", 2),
    ("epoch", 1),
    ("skip", 2),
    ("take", 4),
]


@pytest.mark.parametrize("kind", ["items", "arrays", "fn", "batches"])
@pytest.mark.parametrize("op", each_stage, ids=str)
def test_every_stage_can_be_shuffled_and_hands_the_pass_to_shuffles_below(kind: str, op: tuple[Any, ...]):
    with rng.scope(7):
        built, draws = source(kind, list(range(13)), 7)
        for one in (("shuffle", 0), op, ("shuffle", 0)):
            built, draws = stage(built, one, 7, draws)
    for e in range(3):
        assert list(built.data.epoch(e)) == built.model(e)
    assert list(built.data.epochs(3).skip(9)) == (built.model(0) + built.model(1) + built.model(2))[9:]


# ---- Order -------------------------------------------------------------------------------------------------------


@few
@given(st.lists(st.integers()), st.integers(0, 5))
def test_a_shuffle_is_a_permutation(values: list[int], e: int):
    assert sorted(Data.from_items(values).shuffle().epoch(e)) == sorted(values)


def shuffled(seed: int) -> Data[int]:
    with rng.scope(seed):
        return Data.from_items(range(100)).shuffle()


def test_the_same_seed_is_the_same_order_and_another_is_another():
    assert list(shuffled(1)) == list(shuffled(1))
    assert list(shuffled(1)) != list(shuffled(2))
    assert list(shuffled(1)) != list(range(100))


def test_each_epoch_has_its_own_order():
    data = shuffled(1)
    orders = {tuple(data.epoch(e)) for e in range(10)}
    assert len(orders) == 10
    assert list(data) == list(data.epoch(0))
    assert list(data.epochs(2).epochs(3)) == list(data.epochs(6))


def test_the_order_never_changes_between_versions_or_machines():
    with rng.scope(0):
        data = Data.from_items(range(8)).shuffle()
    assert list(data.epochs(2)) == [0, 4, 6, 2, 3, 1, 7, 5, 0, 2, 4, 3, 6, 1, 7, 5]


def test_two_shuffles_draw_two_keys():
    with rng.scope(0):
        once = Data.from_items(range(50)).shuffle()
    with rng.scope(0):
        twice = Data.from_items(range(50)).shuffle().shuffle()
    first = list(once)
    assert list(twice) != [first[i] for i in first]


def test_keys_are_drawn_when_the_pipeline_is_built_and_only_then():
    with rng.scope(0):
        plain = Data.batches(np.arange(4), 2)
        data = Data.batches(np.arange(4), 2, shuffle=True).map(lambda b: b).epochs(2)
        after = rng.next_key()
    with rng.scope(0):
        rng.next_key()
        second = rng.next_key()
    assert after == second
    with rng.scope(1):
        list(data), list(plain)
        third = rng.next_key()
    with rng.scope(1):
        assert third == rng.next_key()


def test_a_shuffle_of_epochs_computes_each_order_once(monkeypatch: pytest.MonkeyPatch):
    with rng.scope(0):
        data = Data.from_items(range(20)).shuffle().epochs(4).shuffle()
    computed: list[Any] = []
    seeded = np.random.SeedSequence
    monkeypatch.setattr(np.random, "SeedSequence", lambda entropy: computed.append(entropy) or seeded(entropy))
    assert sorted(data) == sorted(list(range(20)) * 4)
    assert len(computed) == 5


def test_shuffle_in_compiled_code_is_refused():
    @jax.jit
    def compiled(key: jax.Array):
        with rng.scope(key):
            return Data.from_items([1, 2]).shuffle()

    with pytest.raises(RuntimeError, match=r"shuffle\(\) was called inside compiled code.*Build the pipeline outside"):
        compiled(jax.random.key(0))


# ---- Cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "calls_per_item"),
    [
        (lambda d: d, 1),
        (lambda d: d.map(lambda x: x), 1),
        (lambda d: d.shuffle(), 1),
        (lambda d: d.batch(4), 4),
        (lambda d: d.map_batch(4, list).map(sum).shuffle(), 4),
        (lambda d: d.epochs(3), 1),
        (lambda d: d.shuffle().skip(5).epochs(2), 1),
        (lambda d: d.take(9_000).epochs(2).epochs(2).skip(5), 1),
        (lambda d: d.epochs(2).batch(4).epoch(1), 4),
        (lambda d: d.prefetch(2).epochs(2), 1),
    ],
)
def test_skip_and_take_compute_only_what_they_give(stages: Callable[[Data[int]], Data[Any]], calls_per_item: int):
    calls: list[int] = []
    data = stages(Data.from_fn(10_000, lambda i: calls.append(i) or i))
    n = len(data)
    rest = data.skip(n - 3)
    assert len(list(rest)) == len(rest) == 3
    assert len(calls) == 3 * calls_per_item
    calls.clear()
    assert len(list(data.take(3))) == 3
    assert len(calls) <= (3 + 2 * (".prefetch" in repr(data))) * calls_per_item


def library_calls(run: Callable[[], Any]) -> int:
    """How many Python functions of kaun are called, a generator that is resumed counted too."""
    folder = str(Path(kaun.__file__).parent)
    calls: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            calls.append(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(calls)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    ("stages", "calls"),
    [
        (lambda d: d, 1),
        (lambda d: d.map(lambda b: (b[0], lambda out: out + b[1])), 1),
        (lambda d: d.map(lambda b: (b[0], lambda out: out + b[1])).epochs(2), 2),
    ],
)
def test_an_item_costs_few_calls_of_the_library(
    shuffle: bool, kind: Callable[[Any], Any], stages: Callable[[Data[Any]], Data[Any]], calls: int
):
    data = stages(Data.batches((kind(np.zeros((400, 2))), kind(np.zeros(400))), 2, shuffle=shuffle))
    n = len(data)
    assert n >= 200 and library_calls(lambda: list(data)) <= calls * n + 20


def test_no_order_is_computed_before_the_first_item(monkeypatch: pytest.MonkeyPatch):
    data = Data.batches(np.arange(6), 2, shuffle=True)
    mapped = data.map(lambda b: b)
    computed: list[Any] = []
    seeded = np.random.SeedSequence
    monkeypatch.setattr(np.random, "SeedSequence", lambda entropy: computed.append(entropy) or seeded(entropy))
    opened = [iter(data), iter(mapped)]
    assert not computed
    assert [next(it).shape for it in opened] == [(2,), (2,)] and len(computed) == 2


def test_items_are_computed_one_at_a_time():
    seen: list[int] = []
    it = iter(Data.from_iterable([1, 2, 3]).map(lambda x: seen.append(x) or x).epochs(2))
    assert seen == []
    next(it)
    assert seen == [1]
    next(it)
    assert seen == [1, 2]


def test_take_pulls_nothing_more_and_leaves_the_users_generator_open():
    numbers = (i for i in range(10))
    assert list(Data.from_iterable(numbers).take(3)) == [0, 1, 2]
    assert next(numbers) == 3
    numbers = (i for i in range(10))
    it = iter(Data.from_iterable(numbers).map(lambda x: x))
    next(it)
    it.close()  # pyright: ignore
    assert next(numbers) == 1


# ---- Sources -----------------------------------------------------------------------------------------------------


def test_from_items_keeps_the_items_of_now():
    items = [1, 2, 3]
    data = Data.from_items(items)
    items[0] = 9
    items.append(4)
    assert list(data) == [1, 2, 3]


def test_from_items_reads_a_sequence_by_index():
    class Squares:
        def __len__(self):
            return 5

        def __getitem__(self, i: int):
            return i * i

    data = Data.from_items(Squares())
    assert list(data.skip(3)) == [9, 16]
    assert sorted(data.shuffle()) == [0, 1, 4, 9, 16]


def test_repeat_gives_the_very_same_object():
    item = ([1], object())
    assert [x is item for x in Data.repeat(3, item).skip(1).epochs(2)] == [True] * 4


def test_from_arrays_gives_tuples_or_plain_rows():
    x, y = np.arange(6).reshape(3, 2), np.array([0.5, 1.5, 2.5])
    rows = list(Data.from_arrays(x, y))
    assert [type(r) for r in rows] == [tuple] * 3
    assert [(a.tolist(), float(b)) for a, b in rows] == [([0, 1], 0.5), ([2, 3], 1.5), ([4, 5], 2.5)]
    assert [r.tolist() for r in Data.from_arrays(x)] == [[0, 1], [2, 3], [4, 5]]
    assert [sorted(r) for r in Data.from_arrays({"x": x, "y": y})] == [["x", "y"]] * 3


def test_from_iterable_iterates_a_loader_again():
    class Loader:
        def __len__(self):
            return 3

        def __iter__(self):
            return iter([1, 2, 3])

    data = Data.from_iterable(Loader())
    assert len(data) == 3
    assert list(data.epochs(2)) == [1, 2, 3, 1, 2, 3]
    assert Data.from_iterable(data) is data


def test_a_loader_that_refuses_len_has_none():
    class Loader(list[int]):
        def __len__(self):
            raise TypeError("streaming")

    with pytest.raises(TypeError, match=r"the length of this pipeline is not known.*Data.from_iterable\(Loader\)"):
        len(Data.from_iterable(Loader()))


@pytest.mark.parametrize("again", [lambda d: list(d), lambda d: list(d.map(str)), lambda d: list(d.prefetch(2))])
def test_a_used_up_iterator_is_an_error(again: Callable[[Data[int]], Any]):
    data = Data.from_iterable(x for x in range(3))
    assert list(data) == [0, 1, 2]
    with pytest.raises(
        RuntimeError, match=r"from_iterable\(generator\) is exhausted.*Data.from_items\(list\(iterator\)\)"
    ):
        again(data)
    with pytest.raises(RuntimeError, match="is exhausted"):
        list(Data.from_iterable(iter([1, 2])).epochs(2))


def test_a_function_that_hands_out_one_iterator_twice_is_an_error():
    numbers = iter([1, 2, 3])
    data = Data.from_iterable(lambda: numbers)
    assert list(data) == [1, 2, 3]
    with pytest.raises(RuntimeError, match=r"has no items, although it had items in an earlier pass"):
        list(data)
    assert list(Data.from_iterable(lambda: iter(())).epochs(3)) == []


def test_what_a_function_returns_must_be_iterable():
    with pytest.raises(TypeError, match=r"expected a function that returns an iterable, received int"):
        list(Data.from_iterable(lambda: 3))  # pyright: ignore


# ---- Batches -----------------------------------------------------------------------------------------------------

trees = st.sampled_from(["tuple", "list", "dict", "single"])


def check_batches(kind: str, n: int, size: int, shuffle: bool, drop: bool, move: Callable[[Any], Any], made: type):
    x, y = np.arange(n * 3, dtype=np.float32).reshape(n, 3), np.arange(n, dtype=np.int32)
    arrays = {"tuple": (x, y), "list": [x, y], "dict": {"x": x, "y": (y, None)}, "single": x}[kind]
    with rng.scope(5):
        data = Data.batches(jax.tree.map(move, arrays), size, shuffle=shuffle, drop_last=drop)
    assert len(list(data)) == len(data) == (n // size if drop else -(-n // size))
    for e in range(2):
        rows = order(5, 0, e, n) if shuffle else list(range(n))
        for k, batch in enumerate(data.epoch(e)):
            expected = jax.tree.map(lambda a: a[rows[k * size : (k + 1) * size]], arrays)
            assert jax.tree.structure(batch) == jax.tree.structure(expected)
            assert all(isinstance(a, made) for a in jax.tree.leaves(batch))
            for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_equal(np.asarray(a), b, strict=True)


@few
@given(trees, st.integers(0, 12), st.integers(1, 5), flag, flag)
def test_batches_are_the_rows_of_every_array(kind: str, n: int, size: int, shuffle: bool, drop: bool):
    check_batches(kind, n, size, shuffle, drop, np.copy, np.ndarray)


@pytest.mark.parametrize("kind", ["tuple", "dict", "single"])
@pytest.mark.parametrize(("shuffle", "drop"), [(False, False), (True, False), (True, True)])
def test_batches_of_jax_arrays_stay_on_the_device(kind: str, shuffle: bool, drop: bool):
    check_batches(kind, 5, 2, shuffle, drop, jnp.asarray, jax.Array)
    check_batches(kind, 0, 2, shuffle, drop, jnp.asarray, jax.Array)


def test_batches_in_order_are_read_only_windows_and_shuffled_ones_are_fresh():
    x = np.zeros((4, 2))
    (batch,) = Data.batches(x, 4)
    assert np.shares_memory(batch, x)
    with pytest.raises(ValueError, match="read-only"):
        batch[0] = 1
    row = next(iter(Data.from_arrays(x)))
    with pytest.raises(ValueError, match="read-only"):
        row[0] = 1
    (batch,) = Data.batches(x, 4, shuffle=True)
    batch[0] = 1
    assert x.flags.writeable and not x.any()


def test_batches_of_jax_arrays_compile_once_for_each_size():
    x = jnp.arange(131.0)
    before = chunks.gather_rows._cache_size()
    assert len(list(Data.batches(x, 2))) == 66
    assert chunks.gather_rows._cache_size() - before == 2


def test_batches_take_prng_keys():
    keys = jax.random.split(jax.random.key(0), 3)
    first, second = Data.batches(keys, 2)
    assert (first == keys[:2]).all() and (second == keys[2:]).all()


def test_batches_of_unequal_lengths_name_paths_and_lengths():
    with pytest.raises(
        ValueError,
        match=r"(?s)the same length along axis 0.*4 at 'x': float64\[4, 2\].*3 at 'y.0': int64\[3\].*x\[:n\]",
    ):
        Data.batches({"x": np.zeros((4, 2)), "y": (np.zeros(3, np.int64),)}, 2)


@pytest.mark.parametrize(
    ("arrays", "error", "text"),
    [
        ((np.zeros(3), [1, 2, 3]), TypeError, r"expected NumPy or JAX arrays, received int at '1.0'.*np.asarray\(x\)"),
        ("abc", TypeError, r"expected NumPy or JAX arrays, received str\. Convert"),
        (
            (np.zeros(3), np.float32(1)),
            ValueError,
            r"expected arrays with a leading axis of items, received float32\[\] at '1'",
        ),
        (
            (np.zeros(3), np.array(1.0)),
            ValueError,
            r"expected arrays with a leading axis of items, received float64\[\] at '1'.*np.full",
        ),
        ({"x": None}, ValueError, r"expected arrays, received none in \{'x': NoneType\}"),
        ((), ValueError, r"expected arrays, received none in \(\)"),
    ],
)
def test_what_batches_cannot_slice_is_refused(arrays: Any, error: type[Exception], text: str):
    with pytest.raises(error, match="Data.batches " + text):
        Data.batches(arrays, 2)
    with pytest.raises(error, match="Data.from_arrays " + text):
        Data.from_arrays(*arrays if type(arrays) is tuple else (arrays,))


# ---- Stack -------------------------------------------------------------------------------------------------------


@few
@given(st.lists(st.tuples(st.integers(-9, 9), st.floats(-1, 1), st.booleans()), min_size=1, max_size=5))
def test_stack_is_the_tree_of_columns(rows: list[tuple[int, float, bool]]):
    items = [{"a": a, "b": (np.full((2, 1), b, np.float32), None), "c": c} for a, b, c in rows]
    stacked = Data.stack(iter(items))
    np.testing.assert_array_equal(stacked["a"], np.array([a for a, _, _ in rows]), strict=True)
    np.testing.assert_array_equal(stacked["b"][0], np.array([[[b], [b]] for _, b, _ in rows], np.float32), strict=True)
    np.testing.assert_array_equal(stacked["c"], np.array([c for _, _, c in rows]), strict=True)
    assert stacked["b"][1] is None


def test_stack_fetches_jax_arrays_and_keeps_bfloat16():
    stacked = Data.stack([jnp.ones(2, jnp.bfloat16), jnp.zeros(2, jnp.bfloat16)])
    assert type(stacked) is np.ndarray and stacked.dtype == jnp.bfloat16 and stacked.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("items", "error", "text"),
    [
        ([], ValueError, "at least one item, received none"),
        (
            [{"x": np.zeros(3)}, {"x": np.zeros(4)}],
            ValueError,
            r"at 'x', received float64\[3\] in item 0 and float64\[4\] in item 1.*Pad",
        ),
        ([(1, 1), (1, 2), (1, 2.5)], ValueError, r"at '1', received int64\[\] in item 0 and float64\[\] in item 2"),
        (
            [(1, 2), [1, 2]],
            ValueError,
            r"the same structure, received \(int, int\) at item 0 and \[int, int\] at item 1",
        ),
        ([{"x": 1}, {"y": 1}], ValueError, r"received \{'x': int\} at item 0 and \{'y': int\} at item 1.*map_batch"),
        ([{"t": "a"}, {"t": "b"}], TypeError, r"numbers and arrays of numbers, received str at 't' of item 0"),
        ([jax.random.key(0)], TypeError, r"received key<fry>\[\] of item 0"),
        ([np.zeros(2, [("a", int)])], TypeError, "arrays of numbers, received"),
        (
            [{"x": np.array([[1], [1, 2]], object)}],
            TypeError,
            r"received object\[2\] at 'x' of item 0. Pad its parts to one shape",
        ),
        ([(1, lambda x: x)], TypeError, r"received function at '1' of item 0.*map_batch"),
    ],
)
def test_what_stack_cannot_collate_is_refused(items: list[Any], error: type[Exception], text: str):
    with pytest.raises(error, match="(?s)Data.stack expected .*" + text):
        Data.stack(items)


# ---- Losses ------------------------------------------------------------------------------------------------------


def square(output: Any, y: Any) -> Any:
    return (output - y) ** 2


def test_with_loss_makes_closures_of_one_code_over_f_and_y():
    data = Data.from_items([(1.0, np.float32(2)), (2.0, np.float32(5))]).with_loss(square)
    losses = [loss for _, loss in data]
    assert [loss(x) for (x, loss) in data] == [1.0, 9.0]
    assert losses[0].__code__ is losses[1].__code__
    assert losses[0].__code__.co_freevars == ("f", "y")
    apart = [capture.capture_loss(loss) for loss in losses]
    assert apart[0][0] == apart[1][0]
    assert [arrays[0].item() for _, arrays in apart] == [2.0, 5.0]


def test_with_loss_keeps_a_context_and_takes_lists():
    ctx = Context(mask=np.ones(2))
    ((x, loss, kept),) = Data.from_items([[3.0, 1.0, ctx]]).with_loss(square)
    assert kept is ctx and loss(x) == 4.0


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"x": np.zeros(2), "y": 1}, r"items \(x, y\).*received \{'x': float64\[2\], 'y': int\}.*item\[\"x\"\]"),
        ((1,), r"received \(int\)"),
        ((1, 2, 3, 4), r"received \(int, int, int, int\)"),
        ((1, square), r"received the function square \(test_pipeline.py:\d+\).*Remove with_loss"),
        ((1, 2, np.ones(3)), r"a Context as third.*received float64\[3\].*Context\(weights=b\[2\]\)"),
    ],
)
def test_items_without_a_label_are_refused(item: Any, text: str):
    with pytest.raises(TypeError, match="(?s)with_loss expected .*" + text) as caught:
        list(Data.repeat(3, item).with_loss(square).skip(1))
    assert caught.value.__notes__ == [
        f"In the data pipeline's .with_loss(square (test_pipeline.py:{square.__code__.co_firstlineno})), item 1 (counted from 0)."
    ]


def sharing_one_cell():
    buffer = np.zeros(2)
    for y in (1.0, 2.0, 3.0, 4.0):
        buffer[:] = y
        yield buffer, lambda output: output - y, Context(scale=buffer)


def test_stages_that_pull_ahead_take_the_loss_apart_and_copy_buffers():
    def flat(item: Any) -> list[float]:
        x, loss, ctx = item
        return [x[0].item(), loss(10.0), ctx["scale"][1].item()]

    expected = [[y, 10.0 - y, y] for y in (1.0, 2.0, 3.0, 4.0)]
    assert [flat(item) for item in Data.from_iterable(sharing_one_cell)] == expected
    held = list(Data.from_iterable(sharing_one_cell).prefetch(3))
    assert [flat(item) for item in held] == expected
    pairs = list(Data.from_iterable(sharing_one_cell).map_batch(2, lambda group: group))
    assert [flat(item) for pair in pairs for item in pair] == expected


def test_a_buffer_that_is_filled_again_is_batched_right():
    def loader():
        buffer = {"x": np.zeros(1), "y": [0]}
        for i in range(3):
            buffer["x"][:] = i
            buffer["y"][0] = i
            yield buffer

    (batch,) = Data.from_iterable(loader).batch(3)
    assert batch["x"].tolist() == [[0], [1], [2]] and batch["y"][0].tolist() == [0, 1, 2]
    assert [b["x"].item() for b in list(Data.from_iterable(loader).prefetch(2))] == [0, 1, 2]


# ---- Prefetch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_prefetch_stays_n_items_ahead(n: int):
    pulled = itertools.count()
    made: list[int] = []
    it = iter(Data.from_fn(50, lambda i: made.append(next(pulled)) or i).prefetch(n))
    for taken in range(1, 11):
        next(it)
        assert until(lambda: len(made) == taken + n)
    # It continues only when a slot is free, and all are taken.
    time.sleep(0.02)
    assert len(made) == 10 + n
    it.close()  # pyright: ignore


def test_prefetch_brings_an_exception_in_its_place_with_its_traceback():
    def breaks(i: int) -> int:
        if i == 3:
            raise KeyError("broken item")
        return i

    it = iter(Data.from_fn(9, breaks).prefetch(5))
    assert [next(it) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="broken item") as caught:
        next(it)
    assert "breaks" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "item 3" in caught.value.__notes__[0]


def test_prefetch_passes_on_what_is_no_exception_class_of_python():
    def exits(i: int) -> int:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        list(Data.from_fn(2, exits).prefetch(1))


def endless() -> Data[int]:
    return Data.from_iterable(lambda: itertools.count()).prefetch(2).map(lambda x: x)


def test_prefetch_ends_its_thread_when_the_iterator_is_closed():
    it = iter(endless())
    next(it)
    assert len(prefetch_threads()) == 1
    it.close()  # pyright: ignore
    assert not prefetch_threads()


def test_prefetch_ends_its_thread_when_the_iterator_is_dropped():
    it = iter(endless().take(100).epochs(2))
    next(it)
    del it
    assert until(lambda: not prefetch_threads())


def test_prefetch_ends_its_thread_when_a_cycle_is_collected():
    cycle: list[Any] = [iter(endless())]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert until(lambda: not prefetch_threads())


def test_prefetch_ends_its_thread_when_the_loop_raises():
    def stops():
        for item in endless():
            if item == 5:
                raise EarlyStop

    with pytest.raises(EarlyStop):
        stops()
    assert until(lambda: not prefetch_threads())


def test_prefetch_starts_no_thread_before_the_first_item():
    it = iter(endless())
    assert not prefetch_threads()
    del it


def test_an_iterator_dropped_by_its_own_thread_does_not_wait_for_itself():
    holder: list[Any] = []
    consumer_waits, dropped_by = threading.Event(), []

    def item(i: int) -> int:
        if i == 1:
            assert consumer_waits.wait(20)
            holder.clear()
            dropped_by.append(threading.current_thread().name)
        return i

    holder.append(iter(Data.from_fn(9, item).prefetch(1)))
    assert next(holder[0]) == 0
    consumer_waits.set()
    assert until(lambda: not prefetch_threads())
    assert dropped_by == ["kaun prefetch"]


def test_an_iterator_left_open_at_exit_has_its_thread_ended():
    # A thread that is inside JAX when Python goes away aborts the process.
    program = (
        "import atexit, itertools, threading, jax.numpy as jnp\n"
        "from kaun.data import Data\n"
        "atexit.register(lambda: print([t.name for t in threading.enumerate()]))\n"
        "it = iter(Data.from_iterable(lambda: itertools.count()).map(lambda i: jnp.ones(3) * i).prefetch(2))\n"
        "print(next(it).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0.0, 0.0, 0.0]\n['MainThread']\n", "")


def test_prefetch_sees_the_context_of_its_consumer():
    setting = contextvars.ContextVar("setting", default="unset")
    setting.set("seen")
    assert list(Data.from_fn(2, lambda i: setting.get()).prefetch(1)) == ["seen", "seen"]


# ---- Exceptions of the user's functions --------------------------------------------------------------------------


def fails_at_twenty(x: Any) -> Any:
    if x == 20:
        raise ZeroDivisionError("mine")
    return x


@pytest.mark.parametrize(
    "shape", [lambda d: d, lambda d: d.shuffle(), lambda d: d.prefetch(2), lambda d: d.epochs(2).skip(1)]
)
def test_an_exception_of_a_function_passes_with_its_place(shape: Callable[[Data[int]], Data[int]]):
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        list(shape(Data.from_items([0, 10, 20]).map(fails_at_twenty)).map(lambda x: x))
    line = fails_at_twenty.__code__.co_firstlineno
    assert caught.value.args == ("mine",)
    assert caught.value.__notes__ == [
        f"In the data pipeline's .map(fails_at_twenty (test_pipeline.py:{line})), item 2 (counted from 0)."
    ]


def test_an_exception_of_a_loader_passes_with_its_place():
    def loader():
        yield 1
        yield 2
        raise OSError("disk")

    with pytest.raises(OSError, match="disk") as caught:
        list(Data.from_iterable(loader).skip(1))
    assert caught.value.__notes__[0].startswith("In the data pipeline's Data.from_iterable(loader (test_pipeline.py:")
    assert caught.value.__notes__[0].endswith(", item 2 (counted from 0).")


@pytest.mark.parametrize("shape", [lambda d: d, lambda d: d.shuffle(), lambda d: d.batch(2)])
def test_stop_iteration_in_a_function_does_not_end_the_pipeline_silently(shape: Callable[[Data[int]], Data[int]]):
    few_labels = iter([1])
    with pytest.raises(RuntimeError, match=r"StopIteration in \.map\(<lambda>.*, item \d.*next\(iterator, default\)"):
        list(shape(Data.from_items([1, 2, 3]).map(lambda x: next(few_labels))))


# ---- Wrong arguments ---------------------------------------------------------------------------------------------

counts: list[tuple[str, str, int, Callable[[Any], Any]]] = [
    ("Data.batches", "batch_size", 1, lambda n: Data.batches(np.zeros(4), n)),
    (r"Data.from_fn\(n, f\)", "n", 0, lambda n: Data.from_fn(n, str)),
    (r"Data.repeat\(n, item\)", "n", 0, lambda n: Data.repeat(n, 1)),
    (r"batch\(n\)", "n", 1, lambda n: Data.from_items([1]).batch(n)),
    (r"map_batch\(n, f\)", "n", 1, lambda n: Data.from_items([1]).map_batch(n, list)),
    (r"epochs\(n\)", "n", 0, lambda n: Data.from_items([1]).epochs(n)),
    (r"epoch\(e\)", "e", 0, lambda n: Data.from_items([1]).epoch(n)),
    (r"skip\(n\)", "n", 0, lambda n: Data.from_items([1]).skip(n)),
    (r"take\(n\)", "n", 0, lambda n: Data.from_items([1]).take(n)),
    (r"prefetch\(n\)", "n", 1, lambda n: Data.from_items([1]).prefetch(n)),
]


@pytest.mark.parametrize(("where", "name", "least", "call"), counts, ids=[c[0] for c in counts])
def test_counts_are_checked(where: str, name: str, least: int, call: Callable[[Any], Any]):
    for wrong in (True, np.True_, 2.0, "2", None):
        with pytest.raises(TypeError, match=rf"{where} expected an int for {name}, received .*{name}=int\(\.\.\.\)"):
            call(wrong)
    for low in (least - 1, -5):
        with pytest.raises(ValueError, match=rf"{where} expected {name} to be at least {least}, received {low}\."):
            call(low)
    assert isinstance(call(np.int64(least)), Data)


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("Data.from_fn", lambda f: Data.from_fn(2, f)),
        ("map", lambda f: Data.from_items([1]).map(f)),
        ("map_batch", lambda f: Data.from_items([1]).map_batch(2, f)),
        ("with_loss", lambda f: Data.from_items([1]).with_loss(f)),
    ],
)
def test_functions_are_checked(where: str, call: Callable[[Any], Any]):
    with pytest.raises(TypeError, match=rf"^{where} expected a function, received 3\. Pass the function itself"):
        call(3)


@pytest.mark.parametrize("wrong", [{"x": 1}, {1, 2}, 3, (i for i in [1]), Data.repeat(2, 1)])
def test_from_items_wants_a_sequence(wrong: Any):
    with pytest.raises(
        TypeError,
        match=r"from_items expected a sequence.*received (dict|set|int|generator|Data)\. Use Data.from_items\(list",
    ):
        Data.from_items(wrong)


@pytest.mark.parametrize("wrong", [{"x": 1}, 3, None])
def test_from_iterable_wants_an_iterable_or_a_function(wrong: Any):
    with pytest.raises(
        TypeError, match=r"from_iterable expected a loader.*received (dict|int|NoneType)\. Use Data.batches"
    ):
        Data.from_iterable(wrong)


@pytest.mark.parametrize("stream", [Data.from_iterable([1, 2]).map(str), Data.from_items([1, 2]).prefetch(1)])
def test_a_stream_is_not_shuffled(stream: Data[Any]):
    with pytest.raises(
        TypeError, match=r"shuffle\(\) needs items by index.*Data.from.*Data.from_items\(list\(data\)\).shuffle\(\)"
    ):
        stream.shuffle()


def test_data_is_made_by_its_class_methods_and_immutable():
    with pytest.raises(TypeError, match=r"Data is made by its class methods: Data.batches"):
        Data([1, 2])
    with pytest.raises(AttributeError, match=r"immutable; each method returns a new one.*not \.length ="):
        Data.from_items([1]).length = 3  # pyright: ignore


# ---- Copies ------------------------------------------------------------------------------------------------------


def test_a_copy_of_an_immutable_value_is_the_value():
    data = Data.from_iterable(iter([1, 2])).map(str)
    assert copy.copy(data) is data and copy.deepcopy({"train": data})["train"] is data


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickling_says_what_to_pickle_instead(protocol: int):
    data = Data.from_items([1, 2]).map(str)
    with pytest.raises(
        TypeError, match=r"(?s)Data cannot be pickled.*closures: Data.from_items\(2 items\).*def make_data"
    ):
        pickle.dumps({"train": data}, protocol)


# ---- repr --------------------------------------------------------------------------------------------------------


def test_repr_shows_the_chain():
    def numbered(item):
        return item

    line = numbered.__code__.co_firstlineno
    assert repr(Data.from_items([1, 2]).shuffle().take(1)) == "Data.from_items(2 items).shuffle().take(1)"
    assert repr(Data.repeat(3, (np.zeros(2), square))) == "Data.repeat(3, (float64[2], function))"
    assert repr(Data.from_arrays(np.zeros(2))) == "Data.from_arrays(float64[2])"
    assert (
        repr(Data.from_iterable(range(2)).batch(2, drop_last=True))
        == "Data.from_iterable(range).batch(2, drop_last=True)"
    )
    long = (
        Data.batches({"x": np.zeros((4, 2)), "y": np.zeros(4)}, 2, shuffle=True, drop_last=True)
        .map(numbered)
        .epochs(3)
        .prefetch(2)
    )
    assert repr(long).splitlines() == [
        "Data.batches({'x': float64[4, 2], 'y': float64[4]}, batch_size=2, shuffle=True, drop_last=True)",
        f"  .map(numbered (test_pipeline.py:{line}))",
        "  .epochs(3)",
        "  .prefetch(2)",
    ]


def test_the_arrays_of_batches_are_one_argument():
    x, y = np.zeros((4, 2), np.float32), np.zeros(4, np.int32)
    with pytest.raises(
        TypeError, match=r"batch_size to be an int, received int32\[4\].*Data.batches\(\(x, y\), batch_size=64\)"
    ):
        Data.batches(x, y, 2)
