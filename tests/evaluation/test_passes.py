"""evaluate and predict over data: against scikit-learn and NumPy on the whole set, however it is cut into batches."""

import dataclasses
import functools
import itertools
import math
import weakref
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

import kaun
from kaun import Context, Data, Layer, Vars, layers, losses, metrics, rng
from kaun._engine import EvaluationLoop, StepInputs
from kaun._loss import FrozenLoss, snapshot_loss
from kaun.errors import CaptureError
from kaun.evaluation.totals import PackedMetrics

CLASSES = 4
AVERAGES = ("macro", "micro", "weighted")


def identity(apply=lambda x: x):
    """A trainer whose model gives its input back (a parameter it must have, and does not use)."""
    init = lambda *, dtype: Vars(params={"unused": jnp.zeros(1, dtype)}, state={}, dtype=dtype)
    model = Layer(init=init, apply=lambda vars, x, *, training, ctx: (apply(x), vars), name="identity")
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
        return trainer, trainer.init()


def scores_for(ids, seed=0):
    noise = np.random.default_rng(seed).random((len(ids), CLASSES), np.float32)
    return noise + 2 * (ids[:, None] == np.arange(CLASSES)).astype(np.float32)


def cut(arrays, sizes):
    bounds = np.cumsum([0, *sizes])
    return [tuple(a[i:j] for a in arrays) for i, j in itertools.pairwise(bounds)]


ROWS = st.integers(0, CLASSES - 1)


@st.composite
def cuts(draw):
    """Sizes of batches, of few numbers of rows in all: what runs on all rows at once compiles for each of those."""
    left, sizes = draw(st.sampled_from([1, 26])), []
    while left:
        sizes.append(draw(st.sampled_from([size for size in (1, 4, 7) if size <= left])))
        left -= sizes[-1]
    return sizes


SIZES = cuts()
CLASSIFICATION = {
    "accuracy": metrics.accuracy,
    "positive": functools.partial(metrics.binary_accuracy, threshold=0.25),
    **{
        f"{name} {average}": functools.partial(getattr(metrics, name), average=average)
        for name in ("precision", "recall", "f1")
        for average in AVERAGES
    },
}
REFERENCE = {"precision": precision_score, "recall": recall_score, "f1": f1_score}


@pytest.fixture(scope="module")
def two_heads():
    return identity()


@given(SIZES, st.data())
@settings(max_examples=60, deadline=None)
def test_classification_is_scikit_learns_on_the_whole_set(two_heads, sizes, data):
    """For every cut into batches, the ragged ones included, to the last digit."""
    trainer, state = two_heads
    n = sum(sizes)
    draw = lambda: np.array(data.draw(st.lists(ROWS, min_size=n, max_size=n)), np.int32)
    predicted, targets = draw(), draw()
    scores = scores_for(predicted, n)
    on = {k: m for k, m in CLASSIFICATION.items() if k != "positive"}
    found = trainer.evaluate(state, cut((scores, targets), sizes), on)
    assert list(found) == sorted(on) and all(type(v) is float for v in found.values())
    assert found["accuracy"] == accuracy_score(targets, predicted)
    for name, reference in REFERENCE.items():
        for average in AVERAGES:
            key = f"{name} {average}"
            expected = reference(targets, predicted, labels=range(CLASSES), average=average, zero_division=0)
            assert found[key] == pytest.approx(expected, rel=1e-14)
            assert found[key] == getattr(metrics, name)(scores, targets, average), "as on all rows at once"


@given(SIZES, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_binary_accuracy_keeps_its_threshold(two_heads, sizes, seed):
    trainer, state = two_heads
    g = np.random.default_rng(seed)
    p, t = g.random(sum(sizes), np.float32), g.integers(0, 2, sum(sizes), dtype=np.int32)
    found = trainer.evaluate(state, cut((p, t), sizes), {"positive": CLASSIFICATION["positive"]})
    assert found == {"positive": accuracy_score(t, p > np.float32(0.25))}


@given(SIZES, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_scalars_are_weighted_by_examples_and_pairs_by_their_count(two_heads, sizes, seed):
    """Exactly: against fractions of what each batch alone gives."""
    trainer, state = two_heads
    g = np.random.default_rng(seed)
    p = g.normal(size=(sum(sizes), 3)).astype(np.float32) * 10.0 ** g.integers(-6, 7, (sum(sizes), 1)).astype(
        np.float32
    )
    t = g.normal(size=p.shape).astype(np.float32)
    kept = lambda p, t: (jnp.where(p > 0, t, 0).sum(), (p > 0).sum())
    scalar = lambda p, t: losses.mse(p, t)
    batches = [*cut((p, t), sizes), (np.ones((1, 3), np.float32), t[:1])]
    measured = {"mse": scalar, "kept": kept, "parts": losses.mse}
    found = trainer.evaluate(state, batches, measured)
    alone = [parts_of(trainer, state, batch, measured | {"parts": losses.mse.parts}) for batch in batches]
    for batch, parts in zip(batches, alone, strict=True):
        np.testing.assert_allclose(parts["mse"].value, np.square(np.subtract(*batch)).mean(), rtol=1e-5)
    expected = sum(Fraction(float(parts["mse"].value[0])) * len(b[1]) for parts, b in zip(alone, batches, strict=True))
    assert found["mse"] == pytest.approx(float(expected / (sum(sizes) + 1)), rel=1e-15)
    expected = sum(Fraction(float(parts["parts"].total[0])) for parts in alone) / (3 * (sum(sizes) + 1))
    assert found["parts"] == pytest.approx(float(expected), rel=1e-15)
    expected = sum(Fraction(float(parts["kept"].total[0])) for parts in alone)
    assert found["kept"] == pytest.approx(
        float(expected / sum(int(each["kept"].count[0]) for each in alone)), rel=1e-15
    )


def parts_of(trainer, state, batch, measured):
    """What the metrics give for a batch that is the only one, by name, with one row."""
    taken = []
    loop = EvaluationLoop(trainer._programs, (state.vars, state.step), state.key, "evaluate", taken.append)
    captured = FrozenLoss.by_name({name: snapshot_loss(metric) for name, metric in measured.items()})
    loop.push(StepInputs({"x": batch[0], "y": batch[1]}, captured, None, "item"))
    loop.finish()
    return PackedMetrics.stacked(taken[0].form, taken)


def test_nothing_is_lost_to_rounding(two_heads):
    trainer, state = two_heads
    values = np.array([1e8, 1.0, -1e8, 3.0] * 20, np.float32)
    found = trainer.evaluate(state, [(v[None], v[None]) for v in values], {"mean": lambda p, t: p.mean()})
    assert found == {"mean": 1.0}


@pytest.mark.parametrize("bad", [-1, CLASSES, np.nan])
def test_what_cannot_be_counted_makes_the_result_nan(two_heads, bad):
    trainer, state = two_heads
    targets = np.zeros(7, np.int32)
    scores = scores_for(targets)
    if math.isnan(bad):
        scores[5, 1] = np.nan
    else:
        targets[5] = bad
    on = {**{k: m for k, m in CLASSIFICATION.items() if k != "positive"}, "rows": lambda p, t: (t.size, 1)}
    found = trainer.evaluate(state, cut((scores, targets), [3, 3, 1]), on)
    assert {k for k, v in found.items() if math.isnan(v)} == set(on) - {"rows"}
    assert found["rows"] == 7 / 3


def test_evaluation_mode_and_nothing_is_changed():
    """Dropout off, running statistics used and kept, the same bytes each time and as predict gives."""
    with rng.scope(0):
        model = layers.linear(3, 16) >> layers.batch_norm(16) >> layers.dropout(0.5) >> layers.linear(16, CLASSES)
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(1e-2))
        state = trainer.init()
    g = np.random.default_rng(0)
    x, y = g.normal(size=(20, 3)).astype(np.float32), g.integers(0, CLASSES, 20, dtype=np.int32)
    data = Data.batches((x, y), batch_size=5)
    state = trainer.fit(state, data.take(4).with_loss(losses.cross_entropy_sparse).epochs(3))
    before = jax.tree.map(np.array, (state.vars, state.opt_state, state.step))
    on = {"accuracy": metrics.accuracy, "loss": losses.cross_entropy_sparse}
    found = [trainer.evaluate(state, data, on) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    assert found[0]["accuracy"] == metrics.accuracy(trainer.predict(state, x), y)
    jax.tree.map(np.testing.assert_array_equal, (state.vars, state.opt_state, state.step), before)


def test_contexts_of_evaluate_and_of_the_item():
    init = lambda *, dtype: Vars(params={"w": jnp.ones(1, dtype)}, state={}, dtype=dtype)
    model = Layer(init=init, apply=lambda vars, x, *, training, ctx: (x + ctx["a"] + 10 * ctx["b"], vars))
    trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
    state = trainer.init()
    zero, one = jnp.zeros(1), jnp.ones(1)
    items = [(zero, zero), (zero, zero, Context(a=3 * one)), (zero, zero, None)]
    mean = {"mean": lambda p, t: p.mean()}
    assert trainer.evaluate(state, items, mean, ctx=Context(a=one, b=one)) == {"mean": (11 + 13 + 11) / 3}
    assert trainer.evaluate(state, [(zero, zero, Context(a=one, b=zero))], mean) == {"mean": 1.0}
    assert trainer.predict(state, Data.repeat(2, zero), ctx=Context(a=one, b=one)).tolist() == [11.0, 11.0]


# Laws 3 and 4: one compile, never stale.


def test_fresh_closures_compile_once_and_are_never_stale():
    trainer, state = identity()
    data = Data.batches((np.ones((6, 2), np.float32), np.ones((6, 2), np.float32)), batch_size=3)
    for scale in (1.0, 2.0, 3.0):
        weights = np.full((1, 2), scale, np.float32)
        found = trainer.evaluate(state, data, {"weighted": lambda p, t: (p * weights).mean()})
        assert found == {"weighted": scale}
    assert [(c.where, c.why) for c in trainer.compilations] == [("evaluate", "first")]
    assert "test_passes.py:" in trainer.compilations[0].code


@dataclasses.dataclass
class Weighted:
    weights: object

    def __call__(self, p, t):
        return (p * self.weights).mean()


class Plain:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, p, t):
        return p.mean() * self.weight


scale_global = np.ones((), np.float32)


def reads_a_global(p, t):
    return p.mean() * scale_global


def test_metrics_of_every_form_see_the_values_of_now():
    global scale_global
    trainer, state = identity()
    data = [(np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32))]
    plain = Plain(1.0)
    for scale in (1.0, 2.0):
        array = np.full((1, 2), scale, np.float32)
        plain.weight = scale_global = np.float32(scale)
        on = {
            "dataclass": Weighted(array),
            "default": lambda p, t, w=array: (p * w).mean(),
            "global": reads_a_global,
            "method": Weighted(array).__call__,
            "partial": functools.partial(lambda w, p, t: (p * w).mean(), array),
            "plain": lambda p, t: p.mean() * plain.weight,
        }
        assert trainer.evaluate(state, data, on) == dict.fromkeys(on, scale)


def test_a_global_that_the_data_changes_is_read_for_each_batch():
    global scale_global

    def items():
        global scale_global
        for k in (1, 2, 6):
            scale_global = np.float32(k)
            yield np.ones(2, np.float32), np.ones(2, np.float32)

    trainer, state = identity()
    assert trainer.evaluate(state, items(), {"mean": reads_a_global}) == {"mean": 3.0}
    assert len(trainer.compilations) == 1


def test_buffers_of_a_loader_may_be_used_again():
    def items():
        x, y = np.zeros(2, np.float32), np.zeros(2, np.float32)
        for k in range(40):
            x[:], y[:] = k, 2 * k
            yield x, y

    trainer, state = identity()
    found = trainer.evaluate(state, items(), {"p": lambda p, t: p.mean(), "t": lambda p, t: t.mean()})
    assert found == {"p": 19.5, "t": 39.0}


def test_what_compiles_again_says_why():
    trainer, state = identity()
    f = lambda n, dtype=np.int32: [(np.zeros((n, CLASSES), np.float32), np.zeros(n, dtype))]
    on = {"accuracy": metrics.accuracy}
    trainer.evaluate(state, f(2), on)
    trainer.evaluate(state, f(3), on)
    trainer.evaluate(state, f(3, np.int8), on)
    trainer.evaluate(state, f(3, np.int8), {"accuracy": metrics.accuracy, "f1": metrics.f1})
    trainer.predict(state, f(3)[0][0])
    assert [c.where for c in trainer.compilations] == ["evaluate"] * 4 + ["predict"]
    why = [c.why for c in trainer.compilations[:4]]
    assert why[0] == why[3] == "first"
    assert why[1] == "item.x changed from float32[2, 4] to float32[3, 4]; item.y changed from int32[2] to int32[3]"
    assert why[2] == "item.y changed from int32[3] to int8[3]"


def test_draws_of_a_metric_are_a_function_of_the_run_key(two_heads):
    trainer, state = two_heads
    data = [(np.ones(3, np.float32), np.ones(3, np.float32))] * 2
    on = {"noise": lambda p, t: jax.random.normal(rng.next_key())}
    assert trainer.evaluate(state, data, on) == trainer.evaluate(state, data, on)
    assert trainer.evaluate(state.replace(key=jax.random.key(9)), data, on) != trainer.evaluate(state, data, on)


# Any trees, and counts of the user's own.


def test_outputs_and_targets_of_any_form():
    trainer, state = identity(lambda x: {"head": x, "twice": (2 * x,)})
    g = np.random.default_rng(0)
    targets = g.integers(0, CLASSES, 11, dtype=np.int32)
    scores = scores_for(g.integers(0, CLASSES, 11), 1)
    f1 = metrics.Counted.of(metrics.f1)
    on = {
        "f1": metrics.Counted(lambda out, y: f1.counts(out["head"], y["label"]), f1.result),
        "twice": lambda out, y: out["twice"][0].mean(),
        "offset": lambda out, y: y["more"][0].mean(),
    }
    more = np.arange(11, dtype=np.float32)
    found = trainer.evaluate(state, Data.batches((scores, {"label": targets, "more": [more]}), 4), on)
    assert found["f1"] == metrics.f1(scores, targets)
    assert found["twice"] == pytest.approx(2 * scores.mean(), rel=1e-6) and found["offset"] == 5.0


def test_counts_of_the_users_own_add_up_in_wide_types(two_heads):
    trainer, state = two_heads
    seen = []

    def result(sums):
        seen.append({k: v.dtype for k, v in sums.items()})
        return math.sqrt(sums["squares"] / sums["n"])

    rmse = metrics.Counted(lambda p, t: {"squares": ((p - t) ** 2).sum(), "n": t.size, "big": jnp.int32(2**30)}, result)
    g = np.random.default_rng(0)
    p, t = g.normal(size=(2, 50)).astype(np.float32)
    found = trainer.evaluate(state, cut((p, t), [7] * 7 + [1]), {"rmse": rmse})
    assert found["rmse"] == pytest.approx(math.sqrt(((p - t) ** 2).mean()), rel=1e-6)
    assert seen == [{"squares": np.float64, "n": np.int64, "big": np.int64}]


def test_without_targets_the_predictions_tell_how_many(two_heads):
    trainer, state = two_heads
    items = [(np.ones(1, np.float32), None), (np.full(3, 5, np.float32), None)]
    assert trainer.evaluate(state, items, {"mean": lambda p, t: p.mean()}) == {"mean": 4.0}


def test_python_numbers_are_targets(two_heads):
    trainer, state = two_heads
    items = [(jnp.float32(k), 2 * k) for k in range(3)]
    pair = lambda p, t: (p * t, 1)
    with jax.numpy_dtype_promotion("standard"):
        assert trainer.evaluate(state, items, {"product": pair}) == {"product": pytest.approx((0 + 2 + 8) / 3)}


# No sync for each batch, and bounded.


class Pending:
    """A result on the device; ``read`` is told when it is fetched."""

    dtype = np.dtype(np.float32)

    def __init__(self, value, read):
        self._value, self._read = value, read

    def __array__(self, *args, **kwargs):
        self._read()
        return np.array([self._value], np.float32)


def test_metrics_are_read_some_dispatches_later():
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.1))
        state = trainer.init()
    pushed, dispatches = 0, []

    def take(parts):
        dispatches.append((pushed, len(parts.vectors[0])))

    loop = EvaluationLoop(trainer._programs, (state.vars, state.step), state.key, "evaluate", take)
    captured = FrozenLoss.by_name({"mse": snapshot_loss(losses.mse.parts)})
    x = np.ones((2, 1), np.float32)
    for _ in range(500):
        loop.push(StepInputs({"x": x * pushed, "y": x}, captured, None, "item"))
        pushed += 1
    during = len(dispatches)
    loop.finish()
    sizes = [n for _, n in dispatches]
    assert sum(sizes) == 500 and sizes[:3] == [2, 2, 2] and max(sizes) <= 128 and during > 3
    behind = [at - sum(sizes[: i + 1]) for i, (at, _) in enumerate(dispatches)]
    assert min(behind[:during]) >= 2 and max(behind) <= 3 * 128


# predict over data.


@given(SIZES, st.booleans(), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_predict_of_data_is_predict_of_each_item_bit_for_bit(sizes, known, seed):
    trainer, state, _ = nested
    x = np.random.default_rng(seed).normal(size=(sum(sizes), 3)).astype(np.float32)
    batches = [b for (b,) in cut((x,), sizes)]
    data = Data.from_items(batches) if known else Data.from_iterable(lambda: iter(batches))
    found = trainer.predict(state, data)
    each = [trainer.predict(state, b) for b in batches]
    expected = jax.tree.map(lambda *leaves: np.concatenate(leaves), *each)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(a) is np.ndarray and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    np.testing.assert_allclose(found["out"][0], trainer_whole(state, x)["out"][0], rtol=1e-5, atol=1e-6)


def make_nested():
    with rng.scope(0):
        model = layers.linear(3, 4) >> layers.fn(
            lambda y: {"out": (y, y.argmax(axis=-1)), "half": y.astype(jnp.bfloat16)[:, None], "sure": y > 0}
        )
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
        return trainer, trainer.init(), model


nested = make_nested()
trainer_whole = lambda state, x: nested[2].apply(state.vars, jnp.asarray(x))[0]


def test_outputs_share_a_dispatch_and_are_read_some_later():
    trainer, state, _ = nested
    x = np.random.default_rng(0).normal(size=(300, 2, 3)).astype(np.float32)

    def run(items):
        lags, read, pushed = [], [], 0

        def take(results):
            read.append(results["out"][0])
            lags.append((len(read[-1]), pushed - sum(map(len, read))))

        made = EvaluationLoop(trainer._programs, (state.vars, state.step), state.key, "predict", take)
        for item in items:
            made.push(StepInputs(item, None, None))
            pushed += 1
        during = len(lags)
        made.finish()
        return np.concatenate(read), lags, during

    together, lags, during = run(x)
    assert sum(n for n, _ in lags) == 300 and [n for n, _ in lags[:3]] == [2, 2, 2] and 3 < len(lags) < 100
    assert all(2 <= lag <= 3 * 128 for _, lag in lags[:during])
    alone, lags, during = run(map(jnp.asarray, x[:40]))
    assert lags[:during] == [(1, 15)] * (40 - 16), "arrays on a device are not stacked"
    assert together[:40].tobytes() == alone.tobytes()


@pytest.mark.parametrize("pad", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "part",
    [
        layers.gelu(),
        pytest.param(layers.multi_head_attention(8, 2, is_causal=True), marks=pytest.mark.slow),
        pytest.param(layers.lstm(8, 8), marks=pytest.mark.slow),
        pytest.param(layers.conv1d(8, 8, 3), marks=pytest.mark.slow),
    ],
    ids=lambda part: getattr(part, "name", ""),
)
def test_outputs_of_layers_are_those_of_each_batch_bit_for_bit(part, pad):
    with rng.scope(0):
        model = layers.embedding(11, 8) >> layers.sequential(
            [layers.layer_norm(8), part, layers.batch_norm(8), layers.linear(8, 5), layers.fn(jax.nn.softmax)]
        )
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
        state = trainer.init()
    x = np.random.default_rng(1).integers(0, 11, (44 + pad, 6)).astype(np.int32)
    found = trainer.predict(state, Data.batches(x, batch_size=4, pad=pad))
    each = [trainer.predict(state, np.concatenate([x[i : i + 4]] * 4)[:4]) for i in range(0, len(x), 4)]
    assert found.tobytes() == np.concatenate(each)[: len(x)].tobytes()


def test_outputs_that_are_not_small_have_the_program_of_an_array():
    with rng.scope(0):
        model = layers.linear(2, 2) >> layers.fn(lambda x: jnp.tile(x, (1, 9000)))
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
        state = trainer.init()
    x = np.ones((2, 2), np.float32)
    assert trainer.predict(state, Data.from_items([x] * 5)).shape == (10, 18000)
    trainer.predict(state, x)
    assert [c.where for c in trainer.compilations] == ["predict"]


def test_predict_in_blocks_keeps_the_bits_of_a_sum_of_what_is_sliced():
    """Where XLA fused the slice of an item with the sum, the last bits were others than those of one item."""
    g = np.random.default_rng(0)
    params = {"w": g.normal(size=(8, 2)).astype(np.float32), "b": g.normal(size=2).astype(np.float32)}

    def apply(vars, x, *, training, ctx):
        out = x["a"] @ vars.params["w"] + vars.params["b"][None, None]
        return (2.7 / 72 * (out - x["c"])).sum((0, 1)), vars

    init = lambda *, dtype: Vars(params=jax.tree.map(jnp.asarray, params), state={}, dtype=dtype)
    trainer = kaun.Trainer(model=Layer(init=init, apply=apply), optimizer=optax.sgd(0.1))
    state = trainer.init()
    shapes = {"a": (8, 9, 8), "c": (8, 9, 2)}
    items = [{name: g.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(9)]
    each = np.concatenate([trainer.predict(state, x) for x in items])
    assert trainer.predict(state, Data.from_items(items)).tobytes() == each.tobytes()


def test_predict_of_a_ragged_last_batch():
    trainer, state, _ = nested
    x = np.random.default_rng(0).normal(size=(103, 3)).astype(np.float32)
    found = trainer.predict(state, Data.batches(x, batch_size=25))
    assert found["out"][0].shape == (103, 4) and found["half"].shape == (103, 1, 4)
    np.testing.assert_array_equal(found["out"][1], trainer.predict(state, x)["out"][1])


def test_predict_of_a_pair_is_told_to_take_the_input():
    trainer, state, _ = nested
    x = np.ones((2, 3), np.float32)
    with pytest.raises((TypeError, ValueError)) as caught:
        trainer.predict(state, Data.repeat(2, (x, x)))
    assert any("data.map(lambda b: b[0])" in note for note in caught.value.__notes__)


def test_predict_of_outputs_that_cannot_be_stacked():
    trainer, state = identity()
    x = np.ones((2, 3), np.float32)
    with pytest.raises(
        ValueError, match=r"these of item 2 differ .*: output: float32\[2, 4\]\. Pad the inputs to one shape"
    ):
        trainer.predict(state, Data.from_items([x, np.ones((2, 4), np.float32)]))
    with pytest.raises(ValueError, match=r"these of item 2 differ .*: output: int32\[2, 3\]"):
        trainer.predict(state, Data.from_items([x, np.ones((2, 3), np.int32)]))
    with pytest.raises(ValueError, match=r"these of item 2 differ .*: a: float32\[2, 3\]"):
        trainer.predict(state, Data.from_items([x, {"a": x}]))
    with pytest.raises(
        ValueError, match=r"the output at 'b' of item 1 is a scalar\. Call predict for each item: \[trainer"
    ):
        trainer.predict(state, Data.from_items([{"a": x, "b": np.float32(1)}]))
    with pytest.raises(ValueError, match=r"predict received no items: the data is empty"):
        trainer.predict(state, Data.from_items([]))


# What a user gets wrong, and what the message says.


def refused(error, match, data=None, on=None, **more):
    trainer, state = identity()
    data = [(np.ones((2, 3), np.float32), np.ones(2, np.int32))] if data is None else data
    with pytest.raises(error, match=match):
        trainer.evaluate(state, data, {"accuracy": metrics.accuracy} if on is None else on, **more)


X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (
            [],
            ValueError,
            "evaluate received no items: the data is empty. An iterator or generator is empty when it is iterated a",
        ),
        (iter(()), ValueError, "evaluate received no items"),
        (
            3,
            TypeError,
            r"evaluate expected data, a kaun.Data or an iterable of \(x, y\), received int\. To make them from arrays, write",
        ),
        (
            (X, X),
            TypeError,
            r"item 1 is float32\[2, 3\]\. To make them from arrays, write Data\.batches\(\(x, y\), batch_size=256\)",
        ),
        (
            [(X,)],
            TypeError,
            r"evaluate expected items \(x, y\) or \(x, y, Context\), with targets y; item 1 is a tuple of \(float32",
        ),
        ([(X, X, X)], TypeError, r"item 1 is a tuple of \(float32\[2, 3\], float32\[2, 3\], float32\[2, 3\]\)"),
        (
            [(X, losses.mse)],
            TypeError,
            r"item 1 is a tuple of \(float32\[2, 3\], function\)\. This item is for fit: pass the pipeline",
        ),
        (
            [(X, {"label": ["a"]})],
            TypeError,
            r"item at 'y\.label\.0' expected a NumPy or JAX array of numbers, received str",
        ),
    ],
)
def test_items(data, error, match):
    refused(error, match, data)


@pytest.mark.parametrize(
    ("on", "error", "match"),
    [
        (
            [metrics.f1],
            TypeError,
            r"evaluate expected metrics as a dict from names to functions \(predictions, targets\), received list",
        ),
        (
            {},
            ValueError,
            r'evaluate expected at least one metric, received none\. Write {"accuracy": metrics.accuracy}',
        ),
        ({3: metrics.f1}, TypeError, r'expected names of metrics as strings, received 3\. Write "3"'),
        ({"f1": 0.5}, TypeError, r"expected the metric 'f1' to be a function \(predictions, targets\), received float"),
        (
            {"own": lambda p, t: p.sum(axis=1)},
            TypeError,
            r"metric 'own' `<lambda>` \(test_passes\.py:\d+\) must return a real scalar or a pair \(sum, count\) of them, received float32\[2\]\. Return its mean, value\.mean\(\), or \(value\.sum\(\), value\.size\)\.",
        ),
        ({"own": lambda p, t: None}, TypeError, r"received None\. Return one JAX scalar"),
        ({"own": lambda p, t: (p.sum(), p)}, TypeError, r"received a tuple of \(float32\[\], float32\[2, 3\]\)"),
        ({"own": lambda p, t: (1, 2, 3)}, TypeError, r"received a tuple of \(int, int, int\)"),
        ({"own": lambda p, t: jnp.complex64(1)}, TypeError, r"received complex64\[\]"),
        (
            {"own": metrics.Counted(lambda p, t: {"a": jnp.complex64(1)}, float)},
            TypeError,
            r"metric 'own' .* must count in real numbers, received complex64\[\] at 'a'\. Return arrays that add up",
        ),
        (
            {"own": metrics.Counted(lambda p, t: t.size, lambda s: None)},
            TypeError,
            r"metric 'own': the result `<lambda>` \(.*\) of its counts must be a real number, received None",
        ),
        (
            {"own": lambda p, t: (p.sum(), 0)},
            ValueError,
            r"The counts of 'own' add up to 0: there is nothing to average",
        ),
    ],
)
def test_metrics(on, error, match):
    refused(error, match, on=on)


def test_examples_that_nobody_can_count():
    mean = {"mean": lambda p, t: p.mean()}
    refused(
        ValueError,
        r"(?s)metric 'mean' `<lambda>` .* the targets do not all have one length .* \(0: float32\[2, 3\], 1: float32\[\]\)\. Return a pair \(sum, count\)",
        [(X, (X, np.float32(1)))],
        mean,
    )
    refused(ValueError, r"the predictions do not all have one length .*\(float32\[\]\)", [(np.float32(1), None)], mean)


def test_counts_that_change_their_shape():
    counted = metrics.Counted(lambda p, t: {"a": p.sum(axis=1)}, lambda s: float(s["a"].sum()))
    refused(
        ValueError,
        r"(?s)metric 'own': counts must have the same shapes in all batches .*a: expected float64\[2\], found float64\[1\]",
        [(X, X), (X[:1], X[:1])],
        {"own": counted},
    )


def test_ctx_and_state_are_checked():
    refused(TypeError, r"ctx expected a kaun\.Context, received dict", ctx={})
    trainer, state = identity()
    with pytest.raises(
        TypeError, match=r"evaluate expected a TrainState, received Vars\. Make one with trainer\.make_state\(vars\)"
    ):
        trainer.evaluate(state.vars, [(X, X)], {"f1": metrics.f1})


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_evaluate_refuses_to_be_traced(transform):
    trainer, state = identity()
    x = jnp.ones((2, 3, 1))
    for make in (lambda a: [(a, a)], lambda a: [(x, x), (np.ones((2, 1)), a)], lambda a: Data.from_items([(a, a)])):
        with pytest.raises(TypeError, match=r"evaluate was called inside a function .* metric\(trainer\.predict"):
            transform(lambda a, make=make: trainer.evaluate(state, make(a), {"mse": losses.mse}))(x)
    with pytest.raises(TypeError, match=r"evaluate was called inside a function"):
        transform(lambda key: trainer.evaluate(state.replace(key=key), [(x, x)], {"mse": losses.mse}))(
            jax.random.split(state.key, 2)
        )


def test_exceptions_of_data_and_metrics_pass_unchanged():
    closed = []

    def items():
        try:
            yield X, X
            raise OSError("disk")
        finally:
            closed.append(True)

    refused(OSError, "disk", items(), {"mse": losses.mse})

    def failing(p, t):
        raise ZeroDivisionError("mine")

    trainer, state = identity()
    data = Data.from_iterable(items)
    with pytest.raises(ZeroDivisionError, match=r"mine") as caught:
        trainer.evaluate(state, data, {"mse": losses.mse, "own": failing})
    assert [n for n in caught.value.__notes__ if n.startswith("In metric 'own' `failing` (test_passes.py:")]
    assert closed == [True, True], "an iterator made by evaluate is closed by it"
    assert not trainer.compilations


def test_what_a_compiled_metric_cannot_do_is_refused_by_name():
    held, kept = [], Plain(jnp.ones(2))
    hidden = weakref.ref(kept)
    count = 0

    def writes(p, t):
        held.append(p)
        return p.mean()

    def counts(p, t):
        nonlocal count
        count += 1
        return p.mean()

    draws = np.random.default_rng(0)
    refused(
        CaptureError,
        r"metric 'own' `writes` \(test_passes\.py:\d+\) writes to a list, .* A compiled metric runs",
        on={"own": writes},
    )
    refused(
        CaptureError,
        r"metric 'own' .* reads an array float32\[2\] through an object that .*the compiled metric would keep using this one",
        on={"own": lambda p, t: (p.mean() * hidden().weight).sum()},
    )
    refused(
        CaptureError,
        r"(?s)captures `draws`, a Generator.*In metric 'own'",
        on={"own": lambda p, t: p.mean() * draws.normal()},
    )
    refused(
        CaptureError,
        r"(?s)`counts` .* assigns to the nonlocal variable `count`.*In metric 'own', which evaluate compiles",
        on={"own": counts},
    )
    assert held == []
    numpy = lambda p, t: accuracy_score(t, p.argmax(-1))
    refused(
        jax.errors.TracerArrayConversionError,
        r"(?s)In metric 'own' `<lambda>` .*takes the predictions: trainer\.predict\(state, data\)",
        on={"own": numpy},
    )
    refused(
        jax.errors.ConcretizationTypeError,
        r"(?s)In metric 'own' .*write jnp\.where",
        on={"own": lambda p, t: 1.0 if p.mean() > 0 else 0.0},
    )
