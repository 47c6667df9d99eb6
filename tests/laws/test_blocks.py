"""Many steps per dispatch cannot be seen: bytes, report calls, items taken and exceptions are those of single steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import kaun
from kaun import Data, Layer, Vars, layers, losses, rng

X = np.random.default_rng(0).normal(size=(37, 5)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 37).astype(np.int32)
WEIGHTS = np.array([1.0, 2.0, 3.0], np.float32)


def weighted(logits, y):
    return (losses.cross_entropy_sparse(logits, y) + (logits * WEIGHTS[None]).mean()) * 0.5


def batches(kind, drop_last=False):
    with rng.scope(3):
        return Data.batches(kind(X, Y), batch_size=5, shuffle=True, drop_last=drop_last)


def listed(drop_last):
    items = batches(lambda x, y: (x, y), drop_last)
    return [(x, lambda out, y=y: losses.cross_entropy_sparse(out, y)) for x, y in items]


SOURCES = {
    "arrays": lambda: batches(lambda x, y: (x, y)).with_loss(losses.cross_entropy_sparse).epochs(4),
    "captured weights": lambda: batches(lambda x, y: (x, y)).with_loss(weighted).epochs(4).skip(3).take(19),
    "float64 and int64": lambda: batches(lambda x, y: (x.astype(np.float64), y.astype(np.int64))).with_loss(weighted),
    "jax arrays": lambda: batches(lambda x, y: (jnp.asarray(x), jnp.asarray(y))).with_loss(weighted).epochs(3),
    "closures": lambda: (
        batches(lambda x, y: (x, y), drop_last=True).map(lambda b: (b[0], lambda out: weighted(out, b[1]))).epochs(3)
    ),
    "list": lambda: listed(False) * 3,
    "jax list": lambda: [(jnp.asarray(x), loss) for x, loss in listed(True)] * 3,
    "one item": lambda: Data.repeat(23, listed(True)[0]),
    "prefetched": lambda: batches(lambda x, y: (x, y)).with_loss(weighted).epochs(2).prefetch(3),
    "two losses": lambda: [(x, loss) for x, loss in listed(True) for loss in (loss, lambda out: (out**2).mean())],
    "numbers": lambda: [
        (x, lambda out, a=a: (out**2).mean() * a) for (x, _), a in zip(listed(True), [1, 1, 2, 2, 2, 1, 1], strict=True)
    ],
}


@functools.cache
def trained():
    with rng.scope(7):
        parts = [layers.linear(5, 3), layers.batch_norm(3), layers.dropout(0.5)]
        trainer = kaun.Trainer(model=layers.sequential(parts), optimizer=optax.sgd(1e-2, momentum=0.9))
        return trainer, trainer.init(dtype=jnp.float32)


def raw(tree):
    data = jax.random.key_data
    plain = [data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a for a in jax.tree_util.tree_leaves(tree)]
    return [np.asarray(a).tobytes() for a in plain]


@functools.cache
def fold(name):
    """The state and the loss after each step of ``trainer.step`` over a source."""
    trainer, state = trained()
    steps = [(state, None)]
    for x, loss in SOURCES[name]():
        value, state = trainer.step(state, x, loss=loss)
        steps.append((state, float(value)))
    return steps


class Watching:
    """A report for some steps, which looks at the state or not, and records what it received."""

    def __init__(self, wanted, looks, stop):
        self.wanted, self.looks, self.stop = wanted, looks, stop
        self.asked, self.called, self.losses = [], [], []

    def wants(self, step):
        self.asked.append(step)
        return step in self.wanted or step == self.stop

    def block(self, first_step, values):
        assert first_step == len(self.losses) + 1
        self.losses += values["loss"].tolist()

    def __call__(self, step, loss, state):
        assert len(self.losses) == step
        self.called.append((step, loss, raw(state) if self.looks else None))
        if step == self.stop:
            raise kaun.EarlyStop


# Each differs from another source in one thing.
LIKE_ANOTHER = {"captured weights", "float64 and int64", "jax arrays", "jax list", "numbers", "prefetched"}


def reported_of(names):
    wanted, stop = st.sets(st.integers(1, 40)), st.one_of(st.none(), st.integers(1, 40))
    return given(st.sampled_from(sorted(names)), wanted, st.booleans(), stop)


@reported_of(SOURCES.keys() - LIKE_ANOTHER)
@settings(max_examples=60, deadline=None)
def test_what_is_reported_when_is_that_of_single_steps(name, wanted, looks, stop):
    check_what_is_reported(name, wanted, looks, stop)


@pytest.mark.slow
@reported_of(LIKE_ANOTHER)
@settings(max_examples=60, deadline=None)
def test_what_is_reported_of_more_sources(name, wanted, looks, stop):
    check_what_is_reported(name, wanted, looks, stop)


def check_what_is_reported(name, wanted, looks, stop):
    trainer, state = trained()
    steps = fold(name)
    total = len(steps) - 1
    last = stop if stop is not None and stop <= total else total
    report = Watching(wanted, looks, stop)
    taken = []
    source = SOURCES[name]()
    counted = source if isinstance(source, Data) else (taken.append(1) or item for item in source)
    fitted = trainer.fit(state, counted, report=report)
    assert raw(fitted) == raw(steps[last][0])
    expected = [s for s in sorted(wanted | {stop} - {None}) if s <= last]
    assert [s for s, _, _ in report.called] == expected
    assert [loss for _, loss, _ in report.called] == [steps[s][1] for s in expected]
    if looks:
        assert [seen for _, _, seen in report.called] == [raw(steps[s][0]) for s in expected]
    assert report.losses == [loss for _, loss in steps[1 : last + 1]]
    assert report.asked == list(range(1, len(report.asked) + 1)) and len(report.asked) >= last
    if not isinstance(source, Data):
        assert len(taken) == last, "fit took exactly the items of the steps that it ran"


@given(st.integers(0, 20), st.sets(st.integers(1, 20), max_size=3), st.booleans())
@settings(max_examples=20, deadline=None)
def test_an_exception_of_the_data_comes_after_all_steps_before_it(good, wanted, prefetch):
    trainer, state = trained()
    steps = fold("list")

    def source():
        yield from SOURCES["list"]()[:good]
        raise OSError("the disk is gone")

    report = Watching(wanted, True, None)
    data = Data.from_iterable(source).prefetch(2) if prefetch else source()
    with pytest.raises(OSError, match="the disk is gone") as caught:
        trainer.fit(state, data, report=report)
    assert raw(caught.value.kaun_state) == raw(steps[good][0])
    assert [s for s, _, _ in report.called] == sorted(s for s in wanted if s <= good)
    assert report.losses == [loss for _, loss in steps[1 : good + 1]]


@pytest.mark.parametrize("bad", [1, 2, 3, 9])
def test_an_exception_of_a_loss_comes_at_its_item(bad):
    trainer, state = trained()
    steps = fold("list")
    taken = []

    def source():
        for i, (x, loss) in enumerate(SOURCES["list"](), start=1):
            taken.append(i)
            yield (x, loss) if i != bad else (x, lambda out: out.no_such_method())

    with pytest.raises(AttributeError, match="no_such_method") as caught:
        trainer.fit(state, source())
    assert taken[-1] == bad, "nothing was pulled beyond it"
    assert raw(caught.value.kaun_state) == raw(steps[bad - 1][0])


RAGGED = {"arrays", "float64 and int64", "jax arrays", "list", "prefetched"}  # another shape, which compiles again


# The others come to the loop as one of these does.
LONG = {"closures", "float64 and int64", "jax arrays", "jax list", "prefetched"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in sorted(SOURCES)]
)
def test_one_program_for_blocks_of_any_size(name):
    with rng.scope(7):
        trainer = kaun.Trainer(model=layers.linear(5, 3), optimizer=optax.sgd(1e-2))
        state = trainer.init()
    for every in (1000, 7, 3):
        trainer.fit(state, SOURCES[name](), report=kaun.reports.every(every, lambda step, loss, state: None))
    found = [c for c in trainer.compilations if c.where == "fit"]
    shapes, codes = (2 if name in RAGGED else 1), 1
    if name in ("two losses", "numbers"):
        codes = 2
    assert len(found) == shapes * codes + (name == "captured weights"), [c.why for c in found]


def foreign():
    """A model of another library, say, with a convolution that XLA:CPU runs slowly inside of loops."""

    def apply(vars, x, *, training, ctx):
        y = lax.conv_general_dilated(x, vars.params["w"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        return y.mean(axis=(2, 3)), vars

    init = lambda *, dtype: Vars(params={"w": jnp.full((3, 2, 3, 3), 0.1, dtype)}, state={}, dtype=dtype)
    return Layer(init=init, apply=apply, name="foreign")


@pytest.mark.parametrize(
    ("large", "of"),
    [
        pytest.param(False, np.asarray, id="kept out of loops-numpy"),
        pytest.param(True, jnp.asarray, id="too large for a stack-jax"),
        pytest.param(False, jnp.asarray, id="kept out of loops-jax", marks=pytest.mark.slow),
        pytest.param(True, np.asarray, id="too large for a stack-numpy", marks=pytest.mark.slow),
    ],
)
def test_what_is_not_stacked_is_right_too(of, large):
    rows = np.random.default_rng(2).normal(size=(700, 1300) if large else (24, 2, 16, 16)).astype(np.float32)
    labels = np.random.default_rng(3).integers(0, 3, len(rows)).astype(np.int32)
    with rng.scope(4):
        model = layers.linear(1300, 3) if large else foreign()
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(1e-2))
        state = trainer.init()
        data = Data.batches((of(rows), of(labels)), batch_size=220 if large else 5, shuffle=True)
    data = data.with_loss(losses.cross_entropy_sparse).epochs(3)
    expected = state
    for x, loss in data:
        _, expected = trainer.step(expected, x, loss=loss)
    assert raw(trainer.fit(state, data)) == raw(expected)
    repeated = Data.repeat(5, next(iter(data)))
    expected = state
    for x, loss in repeated:
        _, expected = trainer.step(expected, x, loss=loss)
    assert raw(trainer.fit(state, repeated)) == raw(expected)


def test_a_user_may_write_to_arrays_between_items():
    trainer, state = trained()
    x, y = np.empty((5, 5), np.float32), np.empty(5, np.int32)

    def source():
        for i in range(7):
            x[:], y[:] = X[i * 5 : i * 5 + 5], Y[i * 5 : i * 5 + 5]
            yield x, lambda out: losses.cross_entropy_sparse(out, y)

    expected = state
    for item in source():
        _, expected = trainer.step(expected, item[0], loss=item[1])
    assert raw(trainer.fit(state, source())) == raw(expected)


def test_rows_are_read_after_the_report_of_the_step_before_them():
    trainer = kaun.Trainer(model=layers.linear(1, 1, bias=False), optimizer=optax.sgd(0.0))
    with rng.scope(0):
        x, y = np.ones((12, 1), np.float32), np.zeros((12, 1), np.float32)
        data = Data.batches((x, y), batch_size=2, shuffle=True).with_loss(losses.mse)
        state = trainer.init()
    seen = []

    def report(step, loss, state):
        seen.append(loss)
        x[:] = step + 1

    trainer.fit(state, data, report=report)
    weight = state.vars.params["weight"].item()
    np.testing.assert_allclose(seen, [(weight * k) ** 2 for k in range(1, 7)], rtol=1e-6)
