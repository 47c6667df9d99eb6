"""Facts of pipelines: equal for two builds of one pipeline, in another process too, and different for any change."""

import argparse
import functools
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kaun import Context, Data, losses, rng
from kaun._run import identity, position
from kaun._run.differences import differences

few = settings(max_examples=60, deadline=None)


# ---- Pipelines by recipe -----------------------------------------------------------------------------------------


def total(batch):
    return int(np.sum(batch)) % 1000


def code_of(k):
    return eval(f"lambda x: x + {k}")  # a constant in the code, not a captured value


def times(rate):
    return lambda x: x * rate


def looked_up(table):
    return lambda x: table[x % len(table)].item() + x


def source(kind, values, k, flag):
    array = np.array(values, np.int64)
    match kind:
        case "items":
            return Data.from_items(list(values))
        case "arrays":
            return Data.from_arrays(array)
        case "fn":
            return Data.from_fn(len(values), lambda i: values[i])
        case "repeat":
            return Data.repeat(k + 2, array).map(total)
        case "loader":
            return Data.from_iterable(list(values))
        case "factory":
            return Data.from_iterable(lambda: iter(values))
        case _:
            return Data.batches(array, k + 1, shuffle=flag, drop_last=not flag).map(total)


def stage(data, kind, k, flag):
    match kind:
        case "code":
            return data.map(code_of(k))
        case "static":
            return data.map(times(k))
        case "array":
            return data.map(looked_up(np.arange(k, k + 3)))
        case "partial":
            return data.map(functools.partial(max, k))
        case "batch":
            return data.batch(k + 1, drop_last=flag).map(total)
        case "map_batch":
            return data.map_batch(k + 1, total, drop_last=flag)
        case "shuffle":
            try:
                return data.shuffle()
            except TypeError:  # a stream
                return data
        case "prefetch":
            return data.prefetch(k + 1)
        case _:
            return getattr(data, kind)(k)


SOURCES = ["items", "arrays", "fn", "repeat", "loader", "factory", "batches"]
ANY_COUNT = ["epochs", "epoch", "skip", "take"]
STAGES = ["code", "static", "array", "partial", "batch", "map_batch", "shuffle", "prefetch", *ANY_COUNT]


def build(recipe):
    seed, first, values, k, flag, ops = recipe
    with rng.scope(seed):
        data = source(first, values, k, flag)
        for op in ops:
            data = stage(data, *op)
    return data


small = st.integers(0, 3)
op = st.tuples(st.sampled_from(STAGES), small, st.booleans())
recipes = st.tuples(
    st.integers(0, 2),
    st.sampled_from(SOURCES),
    st.lists(st.integers(0, 99), min_size=1, max_size=9),
    small,
    st.booleans(),
    st.lists(op, max_size=5),
)


# ---- resume_from ---------------------------------------------------------------------------------------------------


@few
@given(recipes, st.integers(0, 12))
def test_resume_from_is_the_rest_of_the_list(recipe, n):
    data = build(recipe)
    assert list(position.resume_from(data, n)) == list(data)[n:]


@few
@given(st.lists(st.integers(), max_size=6), st.integers(0, 8), st.sampled_from([list, tuple, dict.fromkeys, np.array]))
def test_resume_from_takes_any_iterable(values, n, kind):
    data = kind(values)
    if isinstance(data, dict):
        data = data.keys()
    rest = list(position.resume_from(data, n))
    assert rest == list(data)[n:]


class ByIndex:
    def __getitem__(self, i):
        return [10, 20, 30][i]


def test_resume_from_takes_what_is_iterated_by_index_alone():
    assert list(position.resume_from(ByIndex(), 1)) == [20, 30]


@pytest.mark.parametrize(
    ("stages", "calls_per_item"),
    [
        (lambda d: d.shuffle().epochs(30), 1),
        (lambda d: d.map(lambda x: (x, x)).with_loss(losses.mse).epochs(3).prefetch(1), 1),
        (lambda d: d.map_batch(4, sum).shuffle().epochs(3).take(7000), 4),
        (lambda d: d.batch(2).prefetch(1).epochs(2), 2),
    ],
)
def test_resume_from_computes_nothing_of_what_was_taken(stages, calls_per_item):
    calls = []
    data = stages(Data.from_fn(10_000, lambda i: calls.append(i) or np.float32(i)))
    assert len(list(position.resume_from(data, len(data) - 3))) == 3
    assert len(calls) == 3 * calls_per_item


def test_the_rest_of_batches_is_still_taken_many_at_a_time():
    from kaun.data import chunks_of

    data = position.resume_from(Data.batches(np.arange(64.0), 4).epochs(3), 20)
    assert [chunk.n for chunk in chunks_of(data, iter(data), lambda left: left)] == [12, 16]


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize(
    "once", [iter([1, 2]), (i for i in [1, 2]), map(str, [1]), Data.from_iterable(iter([1])).map(str).take(1)]
)
def test_a_one_shot_iterator_cannot_be_resumed(once, n):
    with pytest.raises(TypeError, match=r"(?s)A run with checkpoints expected data that can be iterated again, received "
                       r"(list_iterator|generator|map), .*list\(iterator\).*Data.from_iterable\(lambda: make"):  # fmt: skip
        position.resume_from(once, n)


def test_resume_from_checks_its_count():
    with pytest.raises(ValueError, match=r"resume_from\(data, n\) expected n to be at least 0, received -1"):
        position.resume_from([1], -1)


# ---- describe_data -------------------------------------------------------------------------------------------------


@few
@given(recipes)
def test_two_builds_have_the_same_facts_and_they_are_json(recipe):
    facts = identity.describe_data(build(recipe))
    assert facts == identity.describe_data(build(recipe))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert differences(facts, json.loads(json.dumps(facts)), 0) == []


@few
@given(recipes, st.integers(0, 10), st.integers(0, 9))
def test_one_changed_parameter_changes_the_facts(recipe, which, where):
    """Where a parameter does not reach a stage, nothing may change: the recipe without it says so."""
    seed, first, values, k, flag, ops = recipe
    match which % 5:
        case 0:
            other = (seed + 7, first, values, k, flag, ops)
            counts = any(
                stage_.text.startswith(".shuffle") or "shuffle=True" in stage_.text for stage_ in build(recipe)._stages
            )
        case 1:
            changed = [*values]
            changed[where % len(values)] += 1
            other, counts = (seed, first, changed, k, flag, ops), True
        case 2:
            other = (seed, first, values, k + 1, flag, ops)
            counts = first in ("repeat", "batches")
        case 3:
            assume(ops)
            kind, n, drop = ops[where % len(ops)]
            changed = [*ops]
            changed[where % len(ops)] = (kind, n + 1, drop)
            other = (seed, first, values, k, flag, changed)
            counts = kind != "shuffle"
        case _:
            assume(ops)
            kind, n, drop = ops[where % len(ops)]
            changed = [*ops]
            changed[where % len(ops)] = (kind, n, not drop)
            other = (seed, first, values, k, flag, changed)
            counts = kind in ("batch", "map_batch")
    assert (identity.describe_data(build(recipe)) != identity.describe_data(build(other))) is counts


@pytest.mark.parametrize("salt", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_another_process_finds_the_same_facts(salt):
    recipe = [3, "batches", [5, 1, 4, 2], 1, True, [["code", 2, False], ["static", 3, False], ["array", 1, True],
              ["partial", 4, True], ["map_batch", 1, False], ["shuffle", 0, False], ["epochs", 2, False]]]  # fmt: skip
    program = (
        "import importlib.util, json, sys\n"
        "spec = importlib.util.spec_from_file_location('elsewhere', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['elsewhere'] = module\n"
        "spec.loader.exec_module(module)\n"
        "print(json.dumps([module.identity.describe_data(d) for d in (module.build(json.loads(sys.argv[2])), *module.each_kind())]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__)), json.dumps(recipe)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONHASHSEED": salt},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [identity.describe_data(d) for d in (build(recipe), *each_kind())]


class Scale:
    def __init__(self, rate, note=""):
        self.rate, self.note = rate, note
        self.words = {"a", "b", "c", note}

    def __call__(self, x):
        return x * self.rate + ("a" in self.words)


def each_kind():
    """Data whose facts could depend on addresses, on the order of a set or on the time."""
    yield [(np.ones(2), lambda out: out.sum()), (np.zeros(2), lambda out: out.mean())]
    yield Data.from_items(["a", {"b", "c", "d"}, None, object(), 1 + 2j]).map(Scale(2.0))
    with rng.scope(4):
        (train, valid), *_ = Data.folds(np.arange(6), 3, 2, shuffle=True)
        mixed = Data.mix([Data.from_items([1, 2]).filter(Scale(2.0)), Data.from_iterable([3])], [1, 2])
        yield Data.concat(train, valid, Data.zip(mixed, mixed), Data.from_items([1, 2]).sample([1, 2], 3))
    yield Data.from_items([1]).map(Scale(2.0).__call__).map(lambda x: x in {"p", "q", "r"})
    yield Data.repeat(3, (jnp.ones(2), lambda out: losses.mse(out, jnp.zeros(2)), Context(w=np.ones(1))))
    yield Data.from_iterable(range(4)).map(np.random.default_rng(0).permutation)
    yield Data.from_iterable(ByIterator())


class ByIterator:
    def __iter__(self):
        return iter([1, 2])

    def __len__(self):
        return 2


def test_facts_are_computed_when_they_are_asked_for():
    x = np.zeros((4, 2))
    data = Data.batches(x, 2)
    before = identity.describe_data(data)
    x[0] = 1
    assert identity.describe_data(data) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.astype(np.float64),
        lambda x: x.reshape(2, 8),
        lambda x: np.where(np.arange(16).reshape(4, 4) == 13, np.nextafter(x, np.float32(2)), x),
        lambda x: -x,
        lambda x: x[::-1],
        lambda x: (x,),
        lambda x: {"x": x},
    ],
)
def test_arrays_count_by_dtype_shape_bytes_and_place(change):
    x = np.zeros((4, 4), np.float32)
    x[0, 0] = 1
    assert identity.describe_data(Data.batches(x, 2)) != identity.describe_data(Data.batches(change(x), 2))
    assert identity.describe_data(Data.batches(x, 2)) == identity.describe_data(
        Data.batches(np.asfortranarray(x.copy()), 2)
    )
    assert identity.describe_data(Data.batches(jnp.asarray(x), 2)) == identity.describe_data(Data.batches(x, 2))


# ---- differences -------------------------------------------------------------------------------------------------


@few
@given(recipes, st.sampled_from(["epochs", "take"]), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_the_last_count_may_change_and_such_a_stage_may_come_or_go(recipe, kind, a, b, wrapped):
    data = build(recipe)
    whole = list(data.epochs(6))
    assume(kind == "take" or recipe[1] != "factory")

    def made(n):
        counted = getattr(data, kind)(n)
        return counted.map(code_of(1)).prefetch(2) if wrapped else counted

    old, new = made(a), made(b)
    done = min(len(list(old)), len(list(new)))
    assert differences(identity.describe_data(old), identity.describe_data(new), done) == []
    bare = data.map(code_of(1)) if wrapped else data
    assert differences(identity.describe_data(bare), identity.describe_data(new), min(len(whole), 0)) == []
    assert differences(identity.describe_data(new), identity.describe_data(bare), 0) == []


@few
@given(st.integers(0, 4), st.integers(0, 4), st.sampled_from(ANY_COUNT))
def test_an_inner_count_may_not(a, b, kind):
    assume(a != b)
    old, new = (getattr(Data.from_items(range(40)), kind)(n).batch(2) for n in (a, b))
    name = "e" if kind == "epoch" else "n"
    found = differences(identity.describe_data(old), identity.describe_data(new.epochs(3)), 0)
    assert found[0] == f"Data.{kind}: {name} was {a}, is {b}"


def test_fewer_items_than_were_taken_is_a_difference():
    with rng.scope(0):
        data = Data.batches(np.arange(10), 2, shuffle=True).with_loss(losses.mse)
    old, new = identity.describe_data(data.epochs(4)), identity.describe_data(data.epochs(2).prefetch(1))
    assert differences(old, new, 10) == []
    assert differences(old, new, 11) == ["Data.epochs: there are 10 items now, and the run has taken 11 already"]
    assert differences(identity.describe_data([1, 2]), identity.describe_data([1, 2]), 3) == [
        "list: there are 2 items now, and the run has taken 3 already"
    ]


def test_how_far_prefetch_pulls_is_no_difference():
    data = Data.from_items([1, 2])
    assert identity.describe_data(data.prefetch(1)) != identity.describe_data(data.prefetch(2))
    assert differences(identity.describe_data(data.prefetch(1)), identity.describe_data(data), 0) == []


RATE = 0.5
TABLE = np.arange(3)


def uses_globals(x):
    return x * RATE + TABLE[0] + helper(x)


def helper(x):
    return x + 1


def pipeline(seed=1, size=4, rate=0.1, table=(1, 2), f=None, x=None, shuffle=True):
    captured = np.array(table)
    with rng.scope(seed):
        data = Data.batches({"x": np.zeros((10, 3), np.float32) if x is None else x}, size, shuffle=shuffle)
        return data.map(f or (lambda b: b["x"] * rate + captured[0])).epochs(2)


def words(new, old=None):
    return differences(identity.describe_data(old or pipeline()), identity.describe_data(new), 0)


def test_a_difference_says_stage_parameter_and_values():
    assert words(pipeline()) == []
    assert words(pipeline(size=5)) == ["Data.batches: batch_size was 4, is 5"]
    (line,) = words(pipeline(seed=2))
    assert line.startswith("Data.batches: the shuffle key was 0x") and "another seed" in line
    (line,) = words(pipeline(shuffle=False))
    assert line.endswith("is nothing (shuffled or not)")
    assert words(pipeline(x=np.zeros((9, 3), np.float32))) == [
        "Data.batches: arrays at 'x' was float32[10, 3], is float32[9, 3]"
    ]
    assert words(pipeline(x=np.ones((10, 3), np.float32))) == [
        "Data.batches: the content of arrays at 'x' has changed (float32[10, 3])"
    ]
    name = "pipeline.<locals>.<lambda>"
    assert words(pipeline(rate=0.2)) == [f"Data.map: `rate`, which {name} reads, was 0.1, is 0.2"]
    assert words(pipeline(table=(1, 3))) == [
        f"Data.map: the content of `captured`, which {name} reads, has changed (int64[2])"
    ]
    assert words(pipeline(f=helper)) == [f"Data.map: the function was {name}, is helper"]
    assert words(pipeline().shuffle()) == [
        "the stages were Data.batches, Data.map, Data.epochs; they are Data.batches, Data.map, Data.epochs, Data.shuffle"
    ]


def test_code_and_globals_of_the_users_own_functions_count(monkeypatch):
    old = identity.describe_data(pipeline(f=uses_globals))
    now = lambda: differences(old, identity.describe_data(pipeline(f=uses_globals)), 0)
    assert now() == []
    monkeypatch.setitem(globals(), "RATE", 0.25)
    assert now() == ["Data.map: `RATE`, which uses_globals reads, was 0.5, is 0.25"]
    monkeypatch.setitem(globals(), "RATE", 0.5)
    monkeypatch.setitem(globals(), "TABLE", np.arange(1, 4))
    assert now() == ["Data.map: the content of `TABLE`, which uses_globals reads, has changed (int64[3])"]
    monkeypatch.setitem(globals(), "TABLE", np.arange(3))
    monkeypatch.setattr(helper, "__code__", (lambda x: x + 2).__code__)
    assert now() == ["Data.map: the code of `helper`, which uses_globals reads, has changed (helper)"]


def test_one_constant_of_a_function_is_its_code():
    assert words(pipeline(f=code_of(2)), pipeline(f=code_of(1))) == ["Data.map: the code of <lambda> has changed"]
    assert words(pipeline(f=code_of(2)), pipeline(f=code_of(2))) == []


def test_attributes_that_the_code_of_an_object_names_count():
    old = pipeline(f=Scale(0.1))
    assert words(pipeline(f=Scale(0.1)), old) == []
    assert words(pipeline(f=Scale(0.2)), old) == ["Data.map: `rate`, which Scale reads, was 0.1, is 0.2"]
    assert words(pipeline(f=Scale(0.1, "d")), old) == [
        "Data.map: the content of `words`, which Scale reads, has changed (set)"
    ]
    assert len(words(pipeline(f=Scale(0.2).__call__), pipeline(f=Scale(0.1).__call__))) == 1


def test_settings_in_a_namespace_count():
    made = lambda kind, rate: pipeline(f=(lambda args: lambda b: b["x"] * args.rate)(kind(rate=rate, other=object())))
    for kind in (argparse.Namespace, types.SimpleNamespace):
        assert words(made(kind, 0.1), made(kind, 0.1)) == []
        (line,) = words(made(kind, 0.2), made(kind, 0.1))
        assert "the content of `args`, which " in line


def test_what_code_reads_of_the_users_own_modules_counts(monkeypatch, tmp_path):
    (tmp_path / "my_settings.py").write_text("RATE = 0.5\nOTHER = object()\ndef scaled(x):\n    return x * RATE\n")
    monkeypatch.syspath_prepend(tmp_path)
    import my_settings

    f = lambda b: my_settings.scaled(b["x"]) + my_settings.RATE
    old = identity.describe_data(pipeline(f=f))
    monkeypatch.setattr(my_settings, "OTHER", object())
    assert differences(old, identity.describe_data(pipeline(f=f)), 0) == []
    monkeypatch.setattr(my_settings, "RATE", 0.25)
    (line,) = differences(old, identity.describe_data(pipeline(f=f)), 0)
    assert "the content of `my_settings`, which " in line


def test_code_is_compared_within_one_python_only():
    old = identity.describe_data(pipeline(f=code_of(1), rate=0.1))
    other = json.loads(json.dumps(old).replace("python3.", "python2."))
    assert differences(other, old, 0) == []
    now = identity.describe_data(pipeline(f=code_of(2)))
    assert differences(other, now, 0) == []
    assert differences(old, now, 0) != []
    old = json.loads(json.dumps(identity.describe_data(pipeline(rate=0.1))).replace("python3.", "python2."))
    assert len(differences(old, identity.describe_data(pipeline(rate=0.2)), 0)) == 1


def test_losses_in_lists_and_repeats_count():
    y, other = np.zeros(2), np.ones(2)
    listed = lambda y: [(np.ones(2), lambda out: losses.mse(out, y))]
    assert words(listed(y), listed(np.zeros(2))) == []
    assert words(listed(other), listed(y)) == ["list: the content of items has changed (list)"]
    repeated = lambda n, y: Data.repeat(n, (np.ones(2), lambda out: losses.mse(out, y)))
    assert words(repeated(9, y), repeated(3, y)) == []
    name = "test_losses_in_lists_and_repeats_count.<locals>.<lambda>.<locals>.<lambda>"
    assert words(repeated(3, other), repeated(3, y)) == [
        f"Data.repeat: the content of `y`, which {name} reads, has changed (float64[2])"
    ]


def test_loaders_count_by_type_and_length():
    class Loader:
        def __init__(self, n):
            self.n = n

        def __iter__(self):
            return iter(range(self.n))

        def __len__(self):
            return self.n

    assert words(Loader(3), Loader(3)) == []
    assert words(Data.from_iterable(Loader(4)), Data.from_iterable(Loader(3))) == [
        "Data.from_iterable: len was 3, is 4"
    ]
    line = words(Data.from_iterable(ByIterator()), Data.from_iterable(Loader(2)))[0]
    assert line.endswith(".Loader, is ByIterator") and line.startswith("Data.from_iterable: type was ")


def test_stages_of_one_name_are_numbered():
    old = Data.from_items([1]).map(code_of(1)).map(code_of(1))
    new = Data.from_items([1]).map(code_of(1)).map(code_of(2))
    assert words(new, old) == ["Data.map (stage 3): the code of <lambda> has changed"]


# ---- unscoped keys and functions ----------------------------------------------------------------------------------


def test_stages_with_keys_from_outside_any_scope_are_named():
    with rng.scope(0):
        good = Data.batches(np.arange(4), 2, shuffle=True).shuffle().epochs(2)
    assert identity.unscoped(good) == identity.unscoped([1]) == []
    assert identity.unscoped(good.shuffle()) == [".shuffle()"]
    assert identity.unscoped(Data.batches(np.arange(4), 2, shuffle=True)) == [
        "Data.batches(int64[4], batch_size=2, shuffle=True)"
    ]


def test_the_facts_of_a_function_are_what_it_does():
    make = lambda rate, table: lambda x: x * rate + table
    facts = lambda f: identity.describe_data(Data.from_fn(1, f))
    same = facts(make(0.1, np.ones(2)))
    assert facts(make(0.1, np.ones(2))) == same
    for other in (
        make(0.2, np.ones(2)),
        make(0.1, np.zeros(2)),
        make(0.1, np.ones(2, np.float32)),
        jax.jit(make(0.1, 0)),
    ):
        assert facts(other) != same


def test_large_trees_are_one_digest():
    arrays = [np.full(2, i) for i in range(1500)]
    facts = identity.describe_data(Data.batches(arrays, 1))
    assert isinstance(facts[0]["arrays"], str)
    assert words(Data.batches([*arrays[:-1], np.full(2, -1)], 1), Data.batches(arrays, 1)) == [
        "Data.batches: the content of arrays has changed (list)"
    ]


def test_a_fact_that_an_older_kaun_did_not_write_is_no_change_of_the_machine():
    now = {"jax": "0.10", "devices": 8, "the place of the state": "on one device"}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        identity.warn_of_machine({"jax": "0.10", "devices": 8}, now)
        assert not seen
        identity.warn_of_machine({"jax": "0.10", "devices": 2}, now)
    assert ":\n  the number of devices was 2, is 8\nIt continues" in str(seen[0].message)
