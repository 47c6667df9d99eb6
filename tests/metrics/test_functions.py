"""The metrics: against scikit-learn, their laws, means over items, and the tracker."""

import functools
import math
import weakref
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from kaun import losses, metrics
from kaun.metrics import counts

quick = settings(max_examples=40, deadline=None)
ROWS, CLASSES = 12, 5
# Few classes among many, so that some are never predicted and some never present.
ids = st.lists(st.integers(0, CLASSES - 1), min_size=ROWS, max_size=ROWS).map(lambda v: np.array(v, np.int32))
rare_ids = st.sampled_from([(0, 1), (3,), (1, 4), (2, 3, 4)]).flatmap(
    lambda some: st.lists(st.sampled_from(some), min_size=ROWS, max_size=ROWS).map(lambda v: np.array(v, np.int32))
)
REFERENCE = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
AVERAGES = ("macro", "micro", "weighted")


@jax.jit
def compiled(scores, targets):
    """All in one program, which takes far less time to compile than one for each."""
    return {name: {a: getattr(metrics, name)(scores, targets, a) for a in AVERAGES} for name in REFERENCE}


def scores_for(predicted, seed=0):
    """Scores whose largest column is the predicted one."""
    noise = np.random.default_rng(seed).random((*np.shape(predicted), CLASSES), np.float32)
    return noise + 2 * (np.asarray(predicted)[..., None] == np.arange(CLASSES)).astype(np.float32)


# Against scikit-learn.


@given(ids | rare_ids, ids | rare_ids, st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_they_are_scikit_learns(predicted, targets, seed):
    scores = scores_for(predicted, seed)
    assert metrics.accuracy(scores, targets) == accuracy_score(targets, predicted)
    assert metrics.accuracy(predicted, targets) == accuracy_score(targets, predicted)
    in_one_program = compiled(scores, targets)
    for name, reference in REFERENCE.items():
        for average in AVERAGES:
            expected = reference(targets, predicted, labels=range(CLASSES), average=average, zero_division=0)
            score = getattr(metrics, name)(scores, targets, average)
            assert type(score) is float
            assert score == pytest.approx(expected, rel=1e-14)
            assert getattr(metrics, name)(predicted, targets, average, num_classes=CLASSES) == score
            assert float(in_one_program[name][average]) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=ROWS, max_size=ROWS))
@quick
def test_binary_accuracy_is_scikit_learns(rows):
    scores, targets = np.array([s for s, _ in rows], np.float32), np.array([t for _, t in rows])
    for threshold in (0.5, 0.25):
        expected = accuracy_score(targets, scores > np.float32(threshold))
        assert metrics.binary_accuracy(scores, targets, threshold) == expected


def test_a_score_at_the_threshold_is_a_zero():
    assert metrics.binary_accuracy(np.array([0.5, 0.75], np.float32), np.array([0, 1])) == 1.0
    assert metrics.binary_accuracy(np.array([0.0, -1.0], np.float32), np.array([0, 0]), threshold=0.0) == 1.0


# Laws.


@given(ids, ids)
@quick
def test_micro_averages_are_the_accuracy_and_so_is_weighted_recall(predicted, targets):
    scores = scores_for(predicted)
    accuracy = metrics.accuracy(scores, targets)
    for name in REFERENCE:
        assert getattr(metrics, name)(scores, targets, "micro") == accuracy
    assert metrics.recall(scores, targets, "weighted") == pytest.approx(accuracy, rel=1e-14)


@given(ids, ids, st.permutations(range(ROWS)), st.permutations(range(CLASSES)))
@quick
def test_neither_the_order_of_rows_nor_the_names_of_classes_matter(predicted, targets, rows, names):
    rows, names = np.array(rows), np.array(names, np.int32)
    for name in REFERENCE:
        score = getattr(metrics, name)(predicted, targets, num_classes=CLASSES)
        renamed = getattr(metrics, name)(names[predicted[rows]], names[targets[rows]], num_classes=CLASSES)
        assert renamed == pytest.approx(score, rel=1e-14)


@given(ids, ids)
@quick
def test_recall_is_precision_with_the_sides_exchanged(predicted, targets):
    one = metrics.precision(predicted, targets, num_classes=CLASSES)
    assert metrics.recall(targets, predicted, num_classes=CLASSES) == pytest.approx(one, rel=1e-14)


@given(ids, ids, st.integers(1, ROWS - 1))
@quick
def test_counts_of_batches_add_up(predicted, targets, cut):
    # Cut with a mask and not a slice, for each length would compile.
    first = np.arange(ROWS) < cut
    whole = counts.class_counts("f1", predicted, targets, CLASSES)
    parts = [
        counts.class_counts("f1", np.where(m, predicted, CLASSES), np.where(m, targets, CLASSES), CLASSES + 1)
        for m in (first, ~first)
    ]
    for total, one, two in zip(whole[:3], parts[0][:3], parts[1][:3], strict=True):
        np.testing.assert_array_equal(np.asarray(one + two)[:CLASSES], total)


def test_perfect_and_absent_classes():
    targets = np.array([0, 1, 1])
    for name in REFERENCE:
        f = getattr(metrics, name)
        assert f(targets, targets, num_classes=2) == 1.0
        assert f(targets, targets, num_classes=4) == 0.5
        assert f(targets, targets, "micro", num_classes=4) == 1.0
        assert f(targets, targets, "weighted", num_classes=4) == 1.0
        assert f(targets, np.array([2, 3, 3]), num_classes=4) == 0.0


@pytest.mark.parametrize("shape", [pytest.param((), marks=pytest.mark.slow), (2, 3)])
def test_rows_may_have_any_shape(shape):
    targets = np.random.default_rng(0).integers(0, CLASSES, shape).astype(np.int32)
    predicted = np.where(targets == 1, 0, targets).astype(np.int32)
    scores = scores_for(predicted)
    assert metrics.accuracy(scores, targets) == accuracy_score(targets.ravel(), predicted.ravel())
    expected = f1_score(targets.ravel(), predicted.ravel(), labels=range(CLASSES), average="macro", zero_division=0)
    assert metrics.f1(scores, targets) == pytest.approx(expected)


def test_the_first_of_equal_scores_is_the_prediction():
    assert metrics.accuracy(np.zeros((2, 3), np.float32), np.array([0, 1])) == 0.5


# Concrete and compiled.

CALLS = {
    "accuracy": (metrics.accuracy, scores_for([0, 1, 2]), np.array([0, 1, 1])),
    "binary_accuracy": (metrics.binary_accuracy, np.array([0.1, 0.9], np.float32), np.array([0, 0])),
    "precision": (metrics.precision, scores_for([0, 1, 2]), np.array([0, 1, 1])),
    "recall": (metrics.recall, scores_for([0, 1, 2]), np.array([0, 1, 1])),
    "f1": (metrics.f1, scores_for([0, 1, 2]), np.array([0, 1, 1])),
}
every_metric = pytest.mark.parametrize("name", CALLS)


@every_metric
def test_a_float_for_concrete_inputs_and_an_array_when_compiled(name):
    f, scores, targets = CALLS[name]
    value = f(scores, targets)
    assert type(value) is float and 0 < value < 1
    assert f(jnp.asarray(scores), jnp.asarray(targets)) == value
    traced = jax.jit(f)(scores, targets)
    assert isinstance(traced, jax.Array) and traced.shape == () and traced.dtype == jnp.float32
    assert float(traced) == pytest.approx(value, rel=1e-6)
    # The inputs are concrete, yet inside a compiled function the result is an array like any other.
    captured = jax.jit(lambda: f(jnp.asarray(scores), jnp.asarray(targets)) * 1.0)()
    assert float(captured) == pytest.approx(value, rel=1e-6)


@every_metric
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_scores_may_be_halves_and_targets_narrow(name, dtype):
    f, scores, targets = CALLS[name]
    halves = jnp.asarray(scores, dtype)
    assert f(halves, targets.astype(np.uint8)) == f(np.asarray(halves, np.float32), targets)


@every_metric
def test_works_in_float64_and_in_default_mode(name):
    f, scores, targets = CALLS[name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert f(scores, targets) == f(scores.astype(np.float64), targets)
    with jax.enable_x64(True):
        wide = f(scores.astype(np.float64), targets.astype(np.int64))
    assert wide == f(scores, targets)


@every_metric
def test_maps_over_batches(name):
    f, scores, targets = CALLS[name]
    mapped = jax.jit(jax.vmap(f))(np.stack([scores, scores]), np.stack([targets, 1 - targets]))
    np.testing.assert_allclose(mapped, [f(scores, targets), f(scores, 1 - targets)], rtol=1e-6)


@every_metric
def test_a_score_that_is_nan_is_not_counted_as_wrong(name):
    f, scores, targets = CALLS[name]
    broken = scores.copy()
    broken.flat[0] = np.nan
    assert math.isnan(f(broken, targets))
    assert np.isnan(jax.jit(f)(broken, targets))
    assert math.isnan(f(np.full_like(scores, np.nan), targets))


@every_metric
def test_a_target_out_of_range_is_an_error_or_nan(name):
    f, scores, targets = CALLS[name]
    for bad in (-1, CLASSES):
        wrong = targets.copy()
        wrong[1] = bad
        with pytest.raises(
            ValueError,
            match=rf"{name} expected targets in .*, received targets\[1\] = {bad} \(1 of {len(targets)} are outside\)",
        ):
            f(scores, wrong)
        assert np.isnan(jax.jit(f)(scores, wrong))


@pytest.mark.parametrize("average", AVERAGES)
def test_an_id_out_of_range_is_an_error_or_nan(average):
    targets, wrong = np.array([0, 1, 1]), np.array([0, 3, 1])
    f = lambda p, t: metrics.precision(p, t, average, num_classes=3)
    for predicted, wanted, where in ((wrong, targets, "predictions"), (targets, wrong, "targets")):
        with pytest.raises(ValueError, match=rf"precision expected {where} in 0 to 2, received {where}\[1\] = 3"):
            f(predicted, wanted)
        assert np.isnan(jax.jit(f)(predicted, wanted))


# What they refuse.


@pytest.mark.parametrize("name", REFERENCE)
def test_the_average_is_one_of_three(name):
    for average in ("binary", None, "MACRO"):
        with pytest.raises(
            ValueError, match=rf'{name} expected average="macro", "micro" or "weighted", received {average!r}\.'
        ):
            getattr(metrics, name)(*CALLS[name][1:], average)


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("num_classes", [None, 0, -2, 2.0, "2"])
def test_class_ids_need_the_number_of_classes(name, num_classes):
    f, predicted, targets = getattr(metrics, name), np.array([0, 1]), np.array([0, 1])
    message = rf"{name} of class indices expected the number of classes, received num_classes={num_classes!r}\. Write {name}\(predictions, targets, num_classes=10\), or pass scores"
    with pytest.raises(ValueError, match=message):
        f(predicted, targets, num_classes=num_classes)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda p, t: f(p, t, num_classes=num_classes))(predicted, targets)
    assert f(predicted, targets, num_classes=np.int64(2)) == 1.0


def test_the_number_of_classes_is_that_of_the_columns():
    f, scores, targets = CALLS["precision"]
    with pytest.raises(
        ValueError,
        match=r"precision expected as many classes as the scores have columns, received num_classes=3 and predictions float32\[3, 5\]\. Leave num_classes out",
    ):
        f(scores, targets, num_classes=3)
    with pytest.raises(ValueError, match=r"received num_classes=2147483647"):
        f(scores, targets, num_classes=2**31 - 1)
    assert f(scores, targets, num_classes=CLASSES) == f(scores, targets)


@pytest.mark.parametrize("name", ["accuracy", "precision", "recall", "f1"])
@pytest.mark.parametrize(
    ("shape", "fix"),
    [
        ((3, CLASSES), r"If targets are one-hot, write targets\.argmax\(axis=-1\)\. .* metrics\.binary_accuracy"),
        ((3, 1), r"Write targets\.reshape\(predictions\.shape\[:-1\]\)"),
        ((4,), r"Make targets\.shape equal predictions\.shape\[:-1\]"),
    ],
)
def test_targets_have_the_shape_of_the_rows(name, shape, fix):
    f, scores, _ = CALLS[name]
    with pytest.raises(
        ValueError, match=rf"{name} expected predictions \[\.\.\., classes\] and targets \[\.\.\.\].*{fix}"
    ):
        f(scores, np.zeros(shape, np.int32))


def test_class_ids_have_the_shape_of_the_targets():
    with pytest.raises(
        ValueError,
        match=r"accuracy expected equal shapes, received predictions int32\[3, 1\] and targets int32\[3\]: they are not broadcast\. Write targets\.reshape",
    ):
        metrics.accuracy(np.zeros((3, 1), np.int32), np.zeros(3, np.int32))
    with pytest.raises(
        ValueError,
        match=r"binary_accuracy expected equal shapes, received predictions float32\[3, 1\] and targets int32\[3\]",
    ):
        metrics.binary_accuracy(np.zeros((3, 1), np.float32), np.zeros(3, np.int32))


@pytest.mark.parametrize("name", ["accuracy", "precision"])
def test_class_ids_are_integers(name):
    f, scores, targets = CALLS[name]
    classes = {} if name == "accuracy" else {"num_classes": 2}
    with pytest.raises(
        TypeError,
        match=rf"{name} expected integer class indices for targets, received float32\[3\]\. Write targets\.astype\(jnp\.int32\)\.",
    ):
        f(scores, targets.astype(np.float32))
    with pytest.raises(
        TypeError,
        match=rf"{name} expected integer class indices for predictions, received bool\[3\]\. Write predictions\.astype",
    ):
        f(targets.astype(bool), targets, **classes)


def test_binary_accuracy_wants_scores_and_hard_labels():
    scores = np.array([0.2, 0.7], np.float32)
    with pytest.raises(TypeError, match=r"binary_accuracy expected floating predictions, received bool\[2\]"):
        metrics.binary_accuracy(scores > 0.5, np.array([0, 1]))
    with pytest.raises(
        ValueError,
        match=r"targets in 0 and 1, received targets\[1\] = 0\.5 \(1 of 2 are outside\)\. Write targets > 0\.5 for hard labels",
    ):
        metrics.binary_accuracy(scores, np.array([0, 0.5], np.float32))
    for dtype in (bool, np.int8, np.float32, np.float64):
        assert metrics.binary_accuracy(scores, np.array([0, 1], dtype)) == 1.0


@every_metric
def test_no_rows_are_an_error(name):
    f, scores, targets = CALLS[name]
    with pytest.raises(
        ValueError,
        match=rf"{name} expected at least one element, received predictions float32\[0.*Skip empty batches",
    ):
        f(scores[:0], targets[:0])


@every_metric
@pytest.mark.parametrize("place", [0, 1])
def test_arguments_are_arrays(name, place):
    f, *arguments = CALLS[name]
    arguments[place] = arguments[place].tolist()
    with pytest.raises(
        TypeError,
        match=rf"{name} expected an array for (predictions|targets), received list\. Write jnp\.asarray\(\1\)\.",
    ):
        f(*arguments)


# Means over items.

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=50))
@quick
def test_evaluate_is_the_exact_mean(values):
    expected = float(sum(map(Fraction, values)) / len(values))
    assert metrics.evaluate(lambda v: v, values) == pytest.approx(expected, rel=1e-15, abs=1e-300)
    assert metrics.evaluate_many(lambda v: {"a": v}, values) == {"a": metrics.evaluate(lambda v: v, values)}


@given(st.lists(st.tuples(finite, st.integers(1, 9)), min_size=1, max_size=50))
@quick
def test_evaluate_of_pairs_is_sum_over_count(pairs):
    expected = float(sum(Fraction(s) for s, _ in pairs) / sum(n for _, n in pairs))
    assert metrics.evaluate(lambda pair: pair, pairs) == pytest.approx(expected, rel=1e-15, abs=1e-300)


@given(st.permutations([1e100, 1.0, -1e100, 1e-3] * 10))
@quick
def test_evaluate_loses_nothing_to_rounding(values):
    assert metrics.evaluate(lambda v: v, values) == pytest.approx((10 * 1.0 + 10 * 1e-3) / 40, rel=1e-15)


def test_evaluate_takes_scalars_of_all_kinds():
    values = [
        1,
        2.0,
        True,
        np.float32(0.5),
        np.int64(3),
        np.array(1.5),
        jnp.float32(2.5),
        jnp.int32(4),
        jnp.bfloat16(1),
    ]
    expected = (1 + 2 + 1 + 0.5 + 3 + 1.5 + 2.5 + 4 + 1) / 9
    assert metrics.evaluate(lambda v: v, values) == pytest.approx(expected, rel=1e-15)
    assert metrics.evaluate(lambda v: (v, jnp.int32(1)), values) == pytest.approx(expected, rel=1e-15)


def test_a_scalar_counts_as_one():
    assert metrics.evaluate(lambda v: v, [1.0, (6.0, 3)]) == 7.0 / 4


def test_a_pair_weighs_a_short_last_batch_right():
    x = jnp.arange(10.0)
    batches = [x[:4], x[4:8], x[8:]]
    assert metrics.evaluate(lambda b: (b.sum(), b.size), batches) == 4.5
    assert metrics.evaluate(lambda b: b.mean(), batches) != 4.5


def test_what_is_not_finite_stays_visible():
    inf, nan = float("inf"), float("nan")
    mean = lambda values: metrics.evaluate(lambda v: v, values)
    assert mean([1.0, inf, 2.0] * 20) == inf
    assert mean([-inf, 1.0]) == -inf
    assert math.isnan(mean([inf, -inf]))
    assert math.isnan(mean([1.0, nan] + [1.0] * 40))
    assert mean([1.7e308, 1.7e308]) == inf


def test_evaluate_many_sorts_by_name_and_weighs_each_by_itself():
    items = [(1.0, 1), (5.0, 3)]
    result = metrics.evaluate_many(lambda item: {"plain": item[0], "mean": item, "n": item[1]}, items)
    assert list(result.items()) == [("mean", 1.5), ("n", 2.0), ("plain", 3.0)]
    assert all(type(value) is float for value in result.values())


def test_evaluate_takes_any_iterable():
    class Indexed:
        def __getitem__(self, i):
            return [1.0, 3.0][i]

    for data in ([1.0, 3.0], iter([1.0, 3.0]), (v for v in (1.0, 3.0)), Indexed(), np.array([1.0, 3.0])):
        assert metrics.evaluate(lambda v: v, data) == 2.0


def test_evaluate_runs_ahead_of_the_host_and_not_too_far(monkeypatch):
    fetches, results, alive = [], [], []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetches.append(len(x)) or real(x))

    def f(x):
        value = jnp.sum(x)
        results.append(weakref.ref(value))
        alive.append(sum(r() is not None for r in results))
        return value

    items = 100
    assert metrics.evaluate(f, [jnp.ones(3)] * items) == 3.0
    assert sum(fetches) == items and len(fetches) <= items / 8 + 1
    assert 8 <= max(alive) <= 20


def test_errors_of_the_data_and_of_the_function_pass_through():
    def items():
        yield 1.0
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        metrics.evaluate(lambda v: v, items())
    with pytest.raises(ZeroDivisionError):
        metrics.evaluate(lambda v: 1 / v, [0])


both = pytest.mark.parametrize("evaluate", [metrics.evaluate, metrics.evaluate_many])


@both
def test_no_items_is_an_error(evaluate):
    with pytest.raises(ValueError, match=rf"{evaluate.__name__} expected at least one item, received none"):
        evaluate(lambda v: v, [])


@both
def test_arguments_in_the_wrong_order_are_an_error(evaluate):
    with pytest.raises(
        TypeError,
        match=rf"{evaluate.__name__} expected a function of an item and an iterable of items, received list and function\. Write {evaluate.__name__}\(f, data\)",
    ):
        evaluate([1.0], lambda v: v)
    with pytest.raises(TypeError, match=r"received function and float"):
        evaluate(lambda v: v, 1.0)


@pytest.mark.parametrize(
    ("value", "received"),
    [
        (np.ones(3, np.float32), r"float32\[3\]\. Take its mean, value\.mean\(\)\."),
        (jnp.ones(1), r"float32\[1\]\. Take its mean"),
        (None, "NoneType"),
        ("1.0", "str"),
        (1j, "complex"),
        (jnp.complex64(1), r"complex64\[\]"),
        ([1.0, 2], "list"),
        ((1.0, jnp.ones(2)), r"float32\[2\]"),
        ((jnp.ones(2), 1), r"float32\[2\]"),
        ((1.0,), "a tuple of 1"),
        ((1.0, 2, 3), "a tuple of 3"),
    ],
)
def test_results_are_scalars_or_pairs(value, received):
    def measure(item):
        return item

    wanted = r"a real scalar or a pair \(sum, count\) of them"
    with pytest.raises(
        TypeError, match=rf"evaluate: `measure` \(test_functions\.py:\d+\) must return {wanted}, received {received}"
    ):
        metrics.evaluate(measure, [value])
    with pytest.raises(
        TypeError, match=rf"evaluate_many: `.*<lambda>` \(.*\) must return for 'loss' {wanted}, received {received}"
    ):
        metrics.evaluate_many(lambda item: {"loss": item}, [value])


def test_evaluate_many_wants_a_dict():
    with pytest.raises(
        TypeError,
        match=r"evaluate_many: .* must return a dict from names to real scalars or pairs \(sum, count\), received float\. Write: return {\"accuracy\": \.\.\.}",
    ):
        metrics.evaluate_many(lambda v: v, [1.0])


def test_evaluate_many_wants_the_same_names():
    items = [{"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 2.0}]
    with pytest.raises(
        ValueError,
        match=r"must return the same names for every item, at least one; received \['a', 'c'\] for item 2, and \['a', 'b'\] for the first",
    ):
        metrics.evaluate_many(lambda item: item, items)
    with pytest.raises(ValueError, match=r"at least one; received \[\] for item 1"):
        metrics.evaluate_many(lambda item: {}, items)


def test_counts_of_nothing_are_an_error():
    with pytest.raises(ValueError, match=r"The counts add up to 0: there is nothing to average"):
        metrics.evaluate(lambda v: (v, 0), [1.0, 2.0])
    with pytest.raises(ValueError, match=r"The counts of 'a' add up to 0"):
        metrics.evaluate_many(lambda v: {"a": (v, 0)}, [1.0])
    assert metrics.evaluate(lambda pair: pair, [(0.0, 0), (4.0, 2)]) == 2.0


# Metrics in two parts.


@given(ids | rare_ids, ids | rare_ids)
@quick
def test_the_parts_of_a_metric_are_the_metric(predicted, targets):
    scores = scores_for(predicted)
    for metric in (
        metrics.accuracy,
        *(functools.partial(getattr(metrics, n), average=a) for n in REFERENCE for a in AVERAGES),
    ):
        parts = metrics.Counted.of(metric)
        assert parts(scores, targets) == metric(scores, targets)
        again = metrics.Counted.of(functools.partial(parts))
        assert again(scores, targets) == metric(scores, targets)
    by_ids = functools.partial(metrics.f1, num_classes=CLASSES)
    assert metrics.Counted.of(by_ids)(predicted, targets) == by_ids(predicted, targets)


def test_parts_check_what_the_metric_checks():
    with pytest.raises(ValueError, match=r'f1 expected average="macro"'):
        metrics.Counted.of(functools.partial(metrics.f1, average="none"))(
            np.ones((2, 2), np.float32), np.zeros(2, np.int32)
        )
    threshold = metrics.Counted.of(functools.partial(metrics.binary_accuracy, threshold=0.7))
    assert threshold(np.array([0.6, 0.8], np.float32), np.array([0, 1])) == 1.0


@pytest.mark.parametrize(
    "metric", [losses.mse, max, 3, functools.partial(metrics.f1, [1]), lambda p, t: metrics.f1(p, t)]
)
def test_what_has_no_parts(metric):
    with pytest.raises(
        TypeError,
        match=r'Counted\.of expected a metric that adds up from counts, received .*Counted\.of\(functools\.partial\(metrics\.f1, average="weighted"\)\)',
    ):
        metrics.Counted.of(metric)
    assert metrics.Counted.find(metric) is None


# The tracker.


@given(st.lists(st.tuples(st.sampled_from("abc"), finite), max_size=60))
@quick
def test_a_tracker_is_a_mean_by_name(observations):
    tracker = metrics.Tracker()
    for name, value in observations:
        tracker.observe(name, value)
    by_name = {n: [v for m, v in observations if m == n] for n in sorted({n for n, _ in observations})}
    expected = {n: float(sum(map(Fraction, values)) / len(values)) for n, values in by_name.items()}
    assert [n for n, _ in tracker.items()] == list(expected)
    for name, mean in tracker.items():
        assert type(mean) is float and mean == tracker.mean(name)
        assert mean == pytest.approx(expected[name], rel=1e-15, abs=1e-300)
        assert tracker.count(name) == len(by_name[name])
    assert tracker.summary() == "  ".join(f"{n}: {v:.4f}" for n, v in tracker.items())


def test_a_summary_looks_like_this():
    tracker = metrics.Tracker()
    assert tracker.summary() == "" and tracker.items() == []
    tracker.observe("loss", jnp.float32(0.4231))
    tracker.observe("accuracy", 0.91)
    tracker.observe("accuracy", np.float64(0.92))
    assert tracker.summary() == "accuracy: 0.9150  loss: 0.4231"


def test_reading_between_observations_changes_nothing():
    one, other = metrics.Tracker(), metrics.Tracker()
    for value in [1e100, 1.0, -1e100, 0.1] * 5:
        one.observe("x", value)
        other.observe("x", value)
        other.mean("x")
    assert one.mean("x") == other.mean("x") == pytest.approx(5.5 / 20, rel=1e-15)


def test_reset_forgets():
    tracker = metrics.Tracker()
    tracker.observe("loss", 1.0)
    tracker.reset()
    assert tracker.items() == []
    tracker.observe("loss", 3.0)
    assert tracker.mean("loss") == 3.0 and tracker.count("loss") == 1


def test_observing_fetches_nothing_until_a_mean_is_read(monkeypatch):
    fetches = []
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetches.append(len(x)) or real(x))
    tracker, value = metrics.Tracker(), jnp.float32(2.0)
    for _ in range(1000):
        tracker.observe("loss", value)
    assert tracker.count("loss") == 1000 and fetches == []
    assert tracker.mean("loss") == 2.0 and fetches == [1000]
    for _ in range(5000):  # never more than some thousands wait
        tracker.observe("loss", value)
    assert len(fetches) > 1 and tracker.count("loss") == 6000
    assert tracker.mean("loss") == 2.0 and sum(fetches) == 6000


def test_a_numpy_scalar_may_change_after_it_was_observed():
    tracker, value = metrics.Tracker(), np.array(1.0)
    tracker.observe("loss", value)
    value[()] = 5.0
    assert tracker.mean("loss") == 1.0


def test_an_unknown_name_lists_those_present():
    tracker = metrics.Tracker()
    with pytest.raises(
        LookupError, match=r"Tracker has no 'loss'; it has nothing\. Call observe\('loss', value\) first\."
    ):
        tracker.mean("loss")
    tracker.observe("loss", 1.0)
    tracker.observe("accuracy", 1.0)
    with pytest.raises(LookupError, match=r"Tracker has no 'f1'; it has 'accuracy', 'loss'\."):
        tracker.count("f1")


def test_what_is_observed_is_a_scalar():
    tracker = metrics.Tracker()
    with pytest.raises(
        TypeError,
        match=r"Tracker\.observe\('loss', value\) expected a real scalar, received float32\[2\]\. Take its mean, value\.mean\(\)\.",
    ):
        tracker.observe("loss", jnp.ones(2))
    with pytest.raises(TypeError, match=r"Tracker\.observe\(1\.0, value\) expected a real scalar, received str"):
        tracker.observe(1.0, "loss")
    assert tracker.items() == []


def test_what_is_being_traced_has_no_value_yet():
    tracker = metrics.Tracker()

    @jax.jit
    def step(x):
        tracker.observe("loss", x)
        return x

    message = r"received a value that JAX is tracing, float32\[\]: there is no number yet\. Return it from the compiled function"
    with pytest.raises(TypeError, match=r"Tracker\.observe\('loss', value\) " + message):
        step(1.0)
    with pytest.raises(TypeError, match=r"evaluate: .* " + message):
        jax.jit(lambda x: metrics.evaluate(lambda item: item * x, [1.0]))(2.0)
