"""Laws 3 and 4: one compile, never stale, never silent."""

import array
import collections
import dataclasses
import enum
import functools
import threading
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Context, Data, Layer, Vars, layers, losses, rng
from kaun._loss import capture
from kaun.errors import CaptureError, RecompilationWarning

X = np.ones((4, 2), np.float32)


@functools.cache
def made():
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
        return trainer, trainer.init()


@pytest.fixture(scope="module")
def linear():
    return fresh()


def fresh():
    """A trainer that has compiled nothing yet, and its state."""
    trainer, state = made()
    return dataclasses.replace(trainer), state


def direct(trainer, state, loss):
    """The loss without kaun: the closure as Python runs it now."""
    return float(loss(trainer.model.apply(state.vars, jnp.asarray(X), training=True)[0]))


def test_a_thousand_fresh_closures_compile_once():
    trainer, state = fresh()
    g = np.random.default_rng(0)
    labels = [g.normal(size=(4, 1)).astype(np.float32) for _ in range(1000)]
    seen = []
    items = Data.from_items(labels).map(lambda y: (X, lambda out: losses.mse(out, y)))
    trainer.fit(state, items, report=lambda step, loss, state: seen.append(loss))
    assert [c.where for c in trainer.compilations] == ["fit"]
    assert len(set(seen)) == 1000, "each step must have used its own labels"


@dataclasses.dataclass
class Batch:
    y: object
    weight: float = 1.0


class Namespace:
    def __init__(self, **values):
        self.__dict__.update(values)


y_global = np.zeros((4, 1), np.float32)
settings_global = {"scale": 1.0, "y": np.zeros((4, 1), np.float32)}


def reads_globals(out):
    return helper(out) * settings_global["scale"]


def helper(out):
    return losses.mse(out, y_global)


def by_cell(y):
    return lambda out: losses.mse(out, y)


def by_default(y):
    return lambda out, y=y: losses.mse(out, y)


def by_keyword_default(y):
    def loss(out, *, y=y):
        return losses.mse(out, y)

    return loss


def by_partial(y):
    return functools.partial(lambda y, out: losses.mse(out, y), y)


def by_partial_keyword(y):
    return functools.partial(losses.mse, targets=y)


def by_nested(y):
    def inner(out):
        return losses.mse(out, y)

    return lambda out: inner(out)


def by_containers(y):
    held = {"a": [y, (y, 1)], 3: None}
    return lambda out: losses.mse(out, held["a"][0]) + losses.mse(out, held["a"][1][0])


def by_dataclass(y):
    batch = Batch(y)
    return lambda out: losses.mse(out, batch.y) * batch.weight


def by_bound_dataclass(y):
    @dataclasses.dataclass(frozen=True)
    class Objective:
        y: object

        def loss(self, out):
            return losses.mse(out, self.y)

    return Objective(y).loss


def by_pytree(y):
    ctx = Context(y=y)
    return lambda out: losses.mse(out, ctx["y"])


def by_jitted(y):
    return jax.jit(lambda out: losses.mse(out, y))


def by_decorator(y):
    def twice(f):
        @functools.wraps(f)
        def wrapped(out):
            return 2.0 * f(out)

        return wrapped

    return twice(lambda out: losses.mse(out, y))


def by_vmapped(y):
    return lambda out: jax.vmap(lambda o, t: jnp.mean((o - t) ** 2))(out, y).mean()


def by_recursion(y):
    def power(out, n):
        return losses.mse(out, y) if n == 0 else power(out, n - 1) * 2.0

    return lambda out: power(out, 2)


def by_frozen(y):
    return capture.snapshot_loss(by_cell(y))


def by_callable_dataclass(y):
    @dataclasses.dataclass
    class Objective:
        y: object

        def __call__(self, out):
            return losses.mse(out, self.y)

    return Objective(y)


MAKERS = [v for k, v in list(globals().items()) if k.startswith("by_")]


KINDS = ["numpy", "jax", "float64"]


# Each maker with one kind; all pairs in the long form.
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        pytest.param(make, kind, id=f"{make.__name__}-{kind}", marks=[] if i % 3 == j else pytest.mark.slow)
        for i, make in enumerate(MAKERS)
        for j, kind in enumerate(KINDS)
    ],
)
def test_captured_arrays_are_followed_and_compile_once(make, kind, recwarn):
    trainer, state = fresh()
    g = np.random.default_rng(1)
    for _ in range(4):
        y = g.normal(size=(4, 1)).astype(np.float32)
        y = {"numpy": y, "jax": jnp.asarray(y), "float64": y.astype(np.float64)}[kind]
        loss = make(y)
        value, _ = trainer.step(state, X, loss=loss)
        np.testing.assert_allclose(float(value), direct(trainer, state, loss), rtol=1e-5)
    expected = 4 if make in (by_callable_dataclass, by_bound_dataclass) else 1  # a new class each time is new code
    assert len(trainer.compilations) == expected, trainer.compilations


def test_globals_are_followed_too():
    trainer, state = fresh()
    for i in range(4):
        globals()["y_global"] = np.full((4, 1), i, np.float32)
        value, _ = trainer.step(state, X, loss=reads_globals)
        np.testing.assert_allclose(float(value), direct(trainer, state, reads_globals), rtol=1e-5)
    assert len(trainer.compilations) == 1
    settings_global["scale"] = 3.0
    try:
        value, _ = trainer.step(state, X, loss=reads_globals)
        np.testing.assert_allclose(float(value), direct(trainer, state, reads_globals), rtol=1e-5)
    finally:
        settings_global["scale"] = 1.0
    assert len(trainer.compilations) == 2
    assert "settings_global['scale'] changed from 1.0 to 3.0" in trainer.compilations[-1].why


def test_generators_that_share_one_cell_keep_their_labels_apart():
    trainer, state = fresh()
    ys = [np.full((4, 1), i, np.float32) for i in range(6)]

    def generator():
        for y in ys:
            yield X, lambda out: losses.mse(out, y)

    apart = [(X, by_cell(y)) for y in ys]
    for data in (generator(), Data.from_iterable(generator), Data.from_iterable(generator).prefetch(3)):
        seen, expected = [], []
        trainer.fit(state, data, report=lambda step, loss, state: seen.append(loss))
        trainer.fit(state, apart, report=lambda step, loss, state: expected.append(loss))
        assert seen == expected


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


STATICS = [0, 1, True, False, 1.0, 0.0, -0.0, 2, "a", b"a", None, 1j, 0j, Colour.RED, Colour.BLUE, (1,), [1], (True,)]


@given(st.lists(st.sampled_from(range(len(STATICS))), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_static_values_are_told_apart_by_type_and_value(picks):
    def make(value):
        return lambda out: (value, out)

    keys = {}
    for i in picks:
        key, arrays = capture.capture_loss(make(STATICS[i]))
        assert arrays == []
        keys.setdefault(key, set()).add(i)
    assert all(len(group) == 1 for group in keys.values()), "two different values must not share a program"
    assert len(keys) == len(set(picks)), "and one value must not make two"


def test_nan_is_one_value():
    make = lambda v: lambda out: out * v
    assert capture.capture_loss(make(float("nan")))[0] == capture.capture_loss(make(float("nan")))[0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda t, s: t.step(s, X[:2], loss=by_cell(y_global[:2])),
            r"x changed from float32\[4, 2\] to float32\[2, 2\]",
        ),
        (lambda t, s: t.step(s, X, loss=by_cell(y_global), training=False), "training changed from True to False"),
    ],
)
def test_the_library_says_why_it_compiled_again(change, text):
    import re

    trainer, state = fresh()
    trainer.step(state, X, loss=by_cell(np.zeros((4, 1), np.float32)))
    assert trainer.compilations[0].why == "first" and trainer.compilations[0].seconds > 0
    assert "<lambda>" in trainer.compilations[0].code and "test_closures.py" in trainer.compilations[0].code
    change(trainer, state)
    assert re.search(text, trainer.compilations[1].why), trainer.compilations[1].why


def test_changed_static_dtype_and_identity_are_named():
    def make(alpha, y, thing):
        return lambda out: losses.mse(out, jnp.asarray(y, jnp.float32)) * alpha if thing is not None else out.sum()

    y = np.zeros((4, 1), np.float32)
    thing = object()
    trainer, state = fresh()
    trainer.step(state, X, loss=make(0.1, y, thing))
    trainer.step(state, X, loss=make(0.2, y, thing))
    assert "captured alpha changed from 0.1 to 0.2" in trainer.compilations[1].why
    trainer.step(state, X, loss=make(0.2, y, object()))
    assert "captured thing changed from object object at" in trainer.compilations[2].why
    trainer.step(state, X, loss=make(0.2, y.astype(np.int32), thing))
    assert "captured y changed from float32[4, 1] to int32[4, 1]" in trainer.compilations[3].why


def test_a_float_that_changes_every_time_is_warned_about_once_and_named():
    trainer, state = fresh()

    def make(alpha):
        return lambda out: losses.mse(out, y_global) * alpha

    for i in range(7):
        trainer.step(state, X, loss=make(float(i)))
    with pytest.warns(RecompilationWarning, match=r"captured alpha changed from 6.0 to 7.0.*jnp.asarray\(alpha\)"):
        trainer.step(state, X, loss=make(7.0))
    for i in range(8, 12):
        trainer.step(state, X, loss=make(float(i)))  # a second warning would be an error


# Refusals


def refused(loss, text):
    trainer, state = fresh()
    with pytest.raises(CaptureError, match=text):
        trainer.step(state, X, loss=loss)
    with pytest.raises(CaptureError, match=text):
        trainer.fit(state, [(X, loss)])


class Holder:
    def __init__(self, y):
        self.y = y

    def loss(self, out):
        return losses.mse(out, self.y)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_an_array_behind_a_plain_object_is_lifted(kind):
    trainer, state = fresh()
    module = types.ModuleType("not_a_library")
    makers = [
        lambda cfg: lambda out: losses.mse(out, cfg.y),
        lambda cfg: cfg.loss,
        lambda cfg: lambda out: losses.mse(out, vars(module)["hidden"]["y"]),
    ]
    for i in range(4):
        y = kind(np.full((4, 1), i, np.float32))
        module.hidden = {"y": y}
        for make in makers:
            loss = make(Holder(y))
            value, _ = trainer.step(state, X, loss=loss)
            np.testing.assert_allclose(float(value), direct(trainer, state, loss), rtol=1e-6)
    assert len(trainer.compilations) == len(makers)


def test_an_array_that_no_walk_can_find_is_refused():
    holder = Holder(jnp.zeros((4, 1)))
    hidden = weakref.ref(holder)
    refused(lambda out: losses.mse(out, hidden().y), r"(?s)reads an array float32\[4, 1\] through an object.*Assign it")


def test_attributes_of_plain_objects_are_never_stale():
    trainer, state = fresh()
    cfg = Namespace(alpha=1.0, weights=np.ones(3), inner=Namespace(beta=2.0), unused=np.zeros(3))

    def loss(out):
        return losses.mse(out, y_global) * cfg.alpha * cfg.weights.sum() * cfg.inner.beta

    def check():
        value, _ = trainer.step(state, X, loss=loss)
        np.testing.assert_allclose(float(value), direct(trainer, state, loss), rtol=1e-6)
        return len(trainer.compilations)

    assert check() == 1
    cfg.unused[0] = 5.0
    assert check() == 1, "what the code does not name does not matter"
    cfg.alpha = 0.5
    assert check() == 2
    cfg.weights[1] = 7.0
    assert check() == 2, "an array is an argument of the program"
    cfg.inner.beta = 9.0
    assert check() == 3


def test_a_class_and_a_property_used_as_configuration_are_never_stale():
    class Config:
        alpha = 1.0
        base = 2.0

        @property
        def doubled(self):
            return self.base * 2

    trainer, state = fresh()
    config = Config()
    loss = lambda out: losses.mse(out, y_global) * Config.alpha + config.doubled

    def check():
        value, _ = trainer.step(state, X, loss=loss)
        np.testing.assert_allclose(float(value), direct(trainer, state, loss), rtol=1e-6)

    check()
    Config.alpha = 3.0
    check()
    config.base = 5.0
    check()


class Scale:
    def __init__(self):
        self.held = 1.0

    def __call__(self, value):
        return value * SCALE

    def __getitem__(self, i):
        return self.held


SCALE = 1.0


@jax.custom_jvp
def scaled(value):
    return value * SCALE


scaled.defjvp(lambda primals, tangents: (scaled(primals[0]), tangents[0] * SCALE))


@functools.lru_cache
def cached(n):
    return SCALE * n


def stale_cases():
    """What a loss reads in roundabout ways, and how it is changed."""
    deque, counter, table = collections.deque([1.0]), collections.Counter(a=1), collections.UserDict(a=1.0)
    numbers, raw, view = array.array("d", [1.0]), bytearray(b"a"), {"a": 1.0}
    values = view.values()
    proxy, config, scale = types.MappingProxyType(view), Namespace(w1=1.0), Scale()

    class Mine(list):
        pass

    mine = Mine([1.0])
    n = 1

    def set_scale(value):
        global SCALE
        SCALE = value
        cached.cache_clear()

    return {
        "deque": (lambda out: out.mean() * deque[0], lambda: deque.append(deque.popleft() + 1)),
        "counter": (lambda out: out.mean() * counter["a"], lambda: counter.update("a")),
        "user dict": (lambda out: out.mean() * table["a"], lambda: table.update(a=3.0)),
        "array": (lambda out: out.mean() * numbers[0], lambda: numbers.__setitem__(0, 3.0)),
        "bytes": (lambda out: out.mean() * raw[0], lambda: raw.__setitem__(0, 7)),
        "proxy": (lambda out: out.mean() * proxy["a"], lambda: view.update(a=9.0)),
        "values": (lambda out: out.mean() * sum(values), lambda: view.update(b=4.0)),
        "subclass": (lambda out: out.mean() * mine[0], lambda: mine.__setitem__(0, 5.0)),
        "callable": (lambda out: scale(out.mean()), lambda: set_scale(SCALE + 1)),
        "callable itself": (lambda out: out.mean() * scale[0], lambda: setattr(scale, "held", 8.0)),
        "custom_jvp": (lambda out: scaled(out.mean()), lambda: set_scale(SCALE + 1)),
        "lru_cache": (lambda out: out.mean() * cached(2), lambda: set_scale(SCALE + 1)),
        "getattr": (lambda out: out.mean() * getattr(config, "w1", n), lambda: setattr(config, "w1", 6.0)),
        "vars": (lambda out: out.mean() * sum(vars(config).values()), lambda: setattr(config, "w2", 6.0)),
    }


@pytest.mark.parametrize("case", sorted(stale_cases()))
def test_roundabout_reads_are_never_stale(linear, case):
    trainer, state = linear
    loss, change = stale_cases()[case]
    for _ in range(3):
        value, _ = trainer.step(state, X, loss=loss)
        np.testing.assert_allclose(float(value), direct(trainer, state, loss), rtol=1e-6)
        change()


def test_vmapped_helpers_of_libraries_are_no_writes(linear):
    trainer, state = linear
    y = np.full((4, 1), 2.0, np.float32)
    each = jax.vmap(lambda o, t: (o - t) ** 2)
    loss = lambda out: each(out, y).mean()
    value, _ = trainer.step(state, X, loss=loss)
    np.testing.assert_allclose(float(value), direct(trainer, state, loss), rtol=1e-6)


def test_numbers_read_from_a_traced_output_are_explained(linear):
    trainer, state = linear
    for loss in (lambda out: out.mean() * float(out.sum()), lambda out: jnp.mean(np.asarray(out))):
        with pytest.raises(Exception, match=r"(?i)tracer") as caught:
            trainer.step(state, X, loss=loss)
        assert any("In loss `<lambda>` (test_closures.py:" in note for note in caught.value.__notes__)


def test_writes_are_refused():
    count = 0

    def writes_nonlocal(out):
        nonlocal count
        count += 1
        return out.mean()

    refused(writes_nonlocal, "`writes_nonlocal` .* assigns to the nonlocal variable `count`")

    def writes_global(out):
        global written_by_a_loss
        written_by_a_loss = 1
        return out.mean()

    refused(writes_global, "assigns to the global variable `written_by_a_loss`")
    history, table, thing = [], {}, Namespace(n=0)
    refused(lambda out: (history.append(1), out.mean())[1], "writes to a list, dict or object that it captures")
    refused(lambda out: (table.update(a=out), out.mean())[1], "writes to a list, dict or object")

    def writes_attribute(out):
        thing.n = out
        return out.mean()

    refused(writes_attribute, "writes to a list, dict or object")
    assert history == [] and table == {} and thing.n == 0, "what was written while tracing is put back"


def test_iterators_generators_and_foreign_arrays_are_refused():
    it = iter([1.0, 2.0])
    refused(lambda out: out.mean() * next(it), "captures `it`, a list_iterator, an iterator.*y = next")
    generator = np.random.default_rng(0)
    refused(
        lambda out: out.mean() * generator.normal(),
        "captures `generator`, a Generator, a random generator.*rng.next_key",
    )
    words = np.array(["a"])
    refused(lambda out: out.mean() * (words == "a").sum(), r"`words`, a NumPy array of dtype <U1.*np.asarray")

    class Foreign:
        def __array__(self, dtype=None, copy=None):
            return np.zeros((4, 1), np.float32)

    foreign = Foreign()
    refused(lambda out: out.mean() + foreign, "`foreign`, a Foreign, an array of another library")
    masked = np.ma.masked_array(np.zeros(3), mask=[0, 1, 0])
    refused(lambda out: out.mean() + masked.sum(), "`masked`, a masked array")


def test_constants_made_by_the_loss_itself_are_fine(linear):
    trainer, state = linear
    loss = lambda out: jnp.mean(out * np.array([[0.5]], np.float32)) + jnp.asarray([1.0, 2.0]).sum()
    value, _ = trainer.step(state, X, loss=loss)
    np.testing.assert_allclose(float(value), direct(trainer, state, loss), rtol=1e-6)


def test_a_loss_may_draw_random_numbers(linear):
    trainer, state = linear
    loss = lambda out: jnp.mean((out - jax.random.normal(rng.next_key(), out.shape)) ** 2)
    a, after = trainer.step(state, X, loss=loss)
    b, _ = trainer.step(state, X, loss=loss)
    c, _ = trainer.step(after, X, loss=loss)
    assert float(a) == float(b) != float(c)


def test_numpy_arrays_may_be_written_to_right_after_the_step():
    """XLA reads NumPy memory late: what counts is what was there when the step was called."""
    trainer, state = fresh()
    x, y = np.ones((4, 2), np.float32), np.zeros((4, 1), np.float32)
    expected, _ = trainer.step(state, x.copy(), loss=by_cell(y.copy()))
    for _ in range(20):
        value, _ = trainer.step(state, x, loss=by_cell(y))
        x[:], y[:] = 1e6, 1e6
        assert float(value) == float(expected)
        x[:], y[:] = 1.0, 0.0

    def reusing():
        for i in range(8):
            x[:], y[:] = i, i
            yield x, by_cell(y)

    copies = [(np.full((4, 2), i, np.float32), by_cell(np.full((4, 1), i, np.float32))) for i in range(8)]
    seen, wanted = [], []
    trainer.fit(state, reusing(), report=lambda s, loss, _: seen.append(loss))
    trainer.fit(state, copies, report=lambda s, loss, _: wanted.append(loss))
    assert seen == wanted


def test_caches_are_bounded():
    trainer, state = fresh()
    trainer._programs._capacity = 4
    for n in range(1, 8):
        trainer.predict(state, np.ones((n, 2), np.float32)) if n != 7 else None
    assert len(trainer._programs._table) == 4
    before = len(trainer.compilations)
    trainer.predict(state, np.ones((6, 2), np.float32))
    assert len(trainer.compilations) == before
    trainer.predict(state, np.ones((1, 2), np.float32))
    assert len(trainer.compilations) == before + 1


def test_two_threads_share_one_trainer():
    trainer, state = fresh()
    ys = [np.full((4, 1), i, np.float32) for i in range(16)]
    expected = [float(trainer.step(state, X, loss=by_cell(y))[0]) for y in ys]
    found = {}

    def work(name):
        found[name] = [float(trainer.step(state, X, loss=by_cell(y))[0]) for y in ys]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert found == {0: expected, 1: expected}
    assert len(trainer.compilations) == 1


def test_a_step_works_inside_the_users_own_jit(linear):
    trainer, state = linear
    y = jnp.zeros((4, 1))

    @jax.jit
    def two(state, x, y):
        _, state = trainer.step(state, x, loss=lambda out: losses.mse(out, y))
        return trainer.step(state, x, loss=lambda out: losses.mse(out, y))

    value, after = two(state, jnp.asarray(X), y)
    _, one = trainer.step(state, X, loss=by_cell(y))
    expected, two_steps = trainer.step(one, X, loss=by_cell(y))
    np.testing.assert_allclose(float(value), float(expected), rtol=1e-6)
    assert int(after.step) == int(two_steps.step) == 2


def test_dropping_a_state_tree_with_other_leaves_is_refused():
    def apply(vars, x, *, training, ctx):
        return x * vars.params["w"], vars.replace(state={"n": vars.state["n"] + jnp.float32(1)})

    init = lambda *, dtype: Vars(params={"w": jnp.ones((), dtype)}, state={"n": jnp.zeros((), jnp.int32)}, dtype=dtype)
    trainer = kaun.Trainer(model=Layer(init=init, apply=apply), optimizer=optax.sgd(0.1))
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(TypeError, match=r"found after the step\):\n  state\.n: expected int32\[\], found float32"),
    ):
        trainer.step(trainer.init(), X, loss=lambda out: out.mean())
