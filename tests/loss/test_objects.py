"""Losses that read objects: what they read is seen as it is now, arrays are lifted, and the objects stay as they are."""

import argparse
import collections
import dataclasses
import enum
import functools
import gc
import logging
import queue
import random
import string
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kaun
from kaun import losses, rng
from kaun._loss import capture_loss, rebuild_loss, snapshot_loss, trace_loss
from kaun._loss.rebuild import Rebuilt
from kaun.errors import CaptureError

OUT = jnp.array([1.0, 2.0])


def full(value):
    return np.full(2, value, np.float32)


def traced(loss):
    """The key of a loss, and its value as a step computes it: traced, under jit."""
    key, arrays = capture_loss(loss)

    def run(out, arrays):
        with rng.scope(0):
            return trace_loss(key, arrays, out)[0]

    return key, float(jax.jit(run)(OUT, arrays))


class Base:
    scale_of_class = 2.0
    table = full(1)

    def loss(self, out):
        return losses.mse(out, self.targets) * self.scale

    @property
    def scale(self):
        return self.alpha * self.scale_of_class

    @functools.cached_property
    def slow(self):
        return self.alpha * 3

    @classmethod
    def of_class(cls, out):
        return out.mean() * cls.scale_of_class

    @staticmethod
    def of_nothing(out):
        return out.sum()


class Objective(Base):
    def __init__(self):
        self.alpha, self.targets, self.unread = 1.0, full(0), full(7)
        self.inner = types.SimpleNamespace(y=full(0), w=1.0)

    def loss(self, out):
        own = self.slow + self.of_class(out) + self.of_nothing(out) + (self.table * out).sum()
        return super().loss(out) + own + losses.mse(out, self.inner.y) * self.inner.w

    def __call__(self, out):
        return self.loss(out) + len(self)

    def __len__(self):
        return int(self.alpha)


WAYS = {
    "method": lambda obj: obj.loss,
    "object": lambda obj: obj,
    "lambda": lambda obj: lambda out: obj.loss(out),
    "called": lambda obj: lambda out: obj(out),
    "partial": lambda obj: functools.partial(obj.loss),
    "listed": lambda obj: lambda out, objects=(obj, [obj]): objects[1][0].loss(out),
}


@pytest.mark.parametrize("way", WAYS)
def test_methods_properties_and_what_they_inherit(way, monkeypatch):
    obj = Objective()
    loss = lambda: WAYS[way](obj)

    def check():
        obj.__dict__.pop("slow", None)
        expected = float(loss()(OUT))
        obj.__dict__.pop("slow", None)
        key, value = traced(loss())
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert "slow" not in vars(obj), "the object stays as it is"
        return key

    first = check()
    obj.targets, obj.inner.y = jnp.array([5.0, 6.0]), full(3)
    assert check() is first, "arrays are arguments"
    monkeypatch.setattr(Base, "table", full(4))
    assert check() is first
    obj.unread = 1
    assert check() is first, "what the code does not read does not count"
    for change in (
        lambda: setattr(obj, "alpha", 2.0),
        lambda: setattr(obj.inner, "w", 5.0),
        lambda: monkeypatch.setattr(Base, "scale_of_class", 3.0),
        lambda: monkeypatch.setattr(Base, "of_nothing", staticmethod(lambda out: out.max())),
        lambda: setattr(obj, "table", full(9)),
    ):
        change()
        key = check()
        assert key is not first
        first = key


@dataclasses.dataclass
class Fields:
    y: object = dataclasses.field(default_factory=lambda: full(2))
    table: dict = dataclasses.field(default_factory=lambda: {"a": 1.0})

    def loss(self, out):
        return losses.mse(out, self.y) * self.table["a"]


class Slots:
    __slots__ = ("unset", "w", "y")

    def __init__(self):
        self.y, self.w = full(2), 2.0

    def loss(self, out):
        return losses.mse(out, self.y) * self.w


class AttributeDict(dict):
    __getattr__ = dict.__getitem__


class Text(str):
    """A kind of string."""


class Number(int):
    extra = 3.0


Pair = collections.namedtuple("Pair", "y w")


class Kind(enum.Enum):
    A = 1

    @property
    def weight(self):
        return KIND_WEIGHT


KIND_WEIGHT = 1.0


class Items(list):
    pass


def cycle(y):
    a, b = Objective(), Objective()
    a.other, b.other, a.targets, b.targets = b, a, y, y
    return lambda out: losses.mse(out, a.other.other.targets) * b.other.alpha + losses.mse(out, b.targets)


def reads(value, f):
    return lambda out: f(value, out)


KINDS = {
    "dataclass": lambda y: Fields(y).loss,
    "slots": lambda y: (lambda s: (setattr(s, "y", y), s.loss)[1])(Slots()),
    "namespace": lambda y: reads(types.SimpleNamespace(y=y, w=1.0), lambda n, out: losses.mse(out, n.y) * n.w),
    "arguments": lambda y: reads(argparse.Namespace(y=y, w=1.0), lambda n, out: losses.mse(out, n.y) * n.w),
    "attribute dict": lambda y: reads(AttributeDict(y=y, w=1.0), lambda n, out: losses.mse(out, n.y) * n["w"]),
    "named tuple": lambda y: reads(Pair(y, 1.0), lambda n, out: losses.mse(out, n.y) * n.w),
    "items": lambda y: reads(Items([y, 2.0]), lambda n, out: losses.mse(out, n[0]) * n[1]),
    "text": lambda y: reads((Text("abc"), Number(3), y), lambda n, out: out.sum() * len(n[0]) * n[1] * n[1].extra),
    "deque": lambda y: reads(collections.deque([y], 3), lambda n, out: losses.mse(out, n[0]) * n.maxlen),
    "counter": lambda y: reads((collections.Counter("aab"), y), lambda n, out: losses.mse(out, n[1]) * n[0]["a"]),
    "defaults": lambda y: reads(
        collections.defaultdict(int, a=1, b=y), lambda n, out: losses.mse(out, n["b"]) * n["a"]
    ),
    "ordered": lambda y: reads(
        collections.OrderedDict(b=2.0, a=y),
        lambda n, out: losses.mse(out, list(n.values())[1]) * next(iter(n.values())),
    ),
    "user dict": lambda y: reads(collections.UserDict(y=y), lambda n, out: losses.mse(out, n["y"])),
    "set": lambda y: reads(({1, "a"}, y), lambda n, out: losses.mse(out, n[1]) * len(n[0])),
    "cycle": cycle,
    "enum": lambda y: reads((Kind.A, y), lambda n, out: losses.mse(out, n[1]) * n[0].weight),
}


@pytest.mark.parametrize("kind", KINDS)
def test_objects_of_every_kind_compile_once(kind):
    keys = set()
    for i in range(3):
        loss = KINDS[kind](full(i))
        key, value = traced(loss)
        np.testing.assert_allclose(value, float(loss(OUT)), rtol=1e-6)
        keys.add(key)
    assert len(keys) == 1


def test_a_class_used_as_configuration():
    class Config:
        y = full(1)
        alpha = 2.0

        @staticmethod
        def double(x):
            return 2 * x

    loss = lambda out: losses.mse(out, Config.y) * Config.double(Config.alpha)
    first, value = traced(loss)
    Config.y = full(3)
    assert traced(loss) == (first, float(loss(OUT)))
    Config.alpha = 5.0
    assert traced(loss)[0] is not first and traced(loss)[1] == float(loss(OUT)) != value


def test_functions_loggers_and_objects_of_libraries_are_never_refused():
    log = logging.getLogger("kaun.test")
    generator_of_library = functools.lru_cache(lambda: 2.0)
    twice = jax.vmap(lambda x: 2 * x)

    @jax.custom_vjp
    def custom(x):
        return x * KIND_WEIGHT

    custom.defvjp(lambda x: (x, None), lambda residual, g: (g,))

    def loss(out):
        log.debug("%s", out)
        log.info("traced")
        return custom(twice(out)).mean() * generator_of_library()

    key, value = traced(loss)
    assert value == 6.0 and traced(loss)[0] is key


def test_a_function_keeps_its_attributes():
    def loss(out):
        return out.mean() * loss.alpha

    for alpha in (1.0, 2.0):
        loss.alpha = alpha
        assert traced(loss)[1] == 1.5 * alpha


@pytest.mark.parametrize("name", ["", "__main__"])
def test_a_notebook(name):
    scope = {"__name__": name} if name else {}
    code = (
        "from kaun import losses\n"
        "w = 1.0\n"
        "class C:\n"
        "    a = 1.0\n"
        "    def __init__(self, y): self.y = y\n"
        "    def loss(self, out): return losses.mse(out, self.y) * self.a * w\n"
        "def f(out): return losses.mse(out, y) * w\n"
    )
    exec(compile(code, "<ipython-input-1-5a>", "exec"), scope)
    keys = set()
    for i in range(3):
        scope["y"] = full(i)
        for loss in (scope["f"], scope["C"](full(i)).loss):
            key, value = traced(loss)
            assert value == float(loss(OUT))
            keys.add(key)
    assert len(keys) == 2
    scope["w"] = 3.0
    assert traced(scope["f"])[1] == float(scope["f"](OUT)) and traced(scope["f"])[0] not in keys


# Refusals


class Computed:
    def __getattr__(self, name):
        return 1.0


class Failing(Exception):
    pass


COMPUTED, FAILING = Computed(), Failing()


def by_name(obj, name):
    return lambda out: out.mean() * getattr(obj, name)


def by_name_with_default(obj, name):
    return lambda out: out.mean() * getattr(obj, name, 2.0)


def asks_by_name(obj, name):
    return lambda out: out.mean() * hasattr(obj, name)


class ByName:
    def __init__(self):
        self.weight = 1.0

    def loss(self, out):
        return out.mean() * getattr(self, KIND_NAME)


KIND_NAME = "weight"
BEFORE = r"reads `weight` of a \w+ by a name that is computed when it runs.*weight = config.weight, and capture weight"


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (
            lambda out: out.mean() * COMPUTED.alpha,
            "`COMPUTED`, a Computed, .*`__getattr__`.*weight = config.weight",
        ),
        (
            lambda out: out.mean() * len(FAILING.args),
            "a Failing, which does not keep its state in `__dict__` or slots",
        ),
        (by_name(types.SimpleNamespace(weight=1.0), "weight"), BEFORE),
        (by_name_with_default(types.SimpleNamespace(), "weight"), BEFORE),
        (asks_by_name(ByName(), "weight"), BEFORE),
        (ByName().loss, BEFORE),
        (lambda out: out.mean() * globals()["KIND_WEIGHT"], r"calls `globals\(\)`.*weight = globals\(\)\[name\]"),
    ],
    ids=range(7),
)
def test_what_is_read_by_computed_names_is_refused(loss, text):
    with pytest.raises(CaptureError, match=rf"(?s)loss `.*{text}"):
        traced(loss)


def test_a_module_that_computes_its_attributes_is_refused():
    module = types.ModuleType("test_objects")  # of the package in which the loss is defined
    module.__getattr__ = lambda name: 2.0
    module.__name__ = __name__
    loss = lambda out: out.mean() * module.weight
    with pytest.raises(CaptureError, match=r"reads `weight` .* computed by `__getattr__` .*capture weight"):
        traced(loss)
    module.__name__ = "lazy_package"
    assert traced(loss)[1] == 3.0, "in another package it is read as it is"


def test_what_cannot_be_captured_is_refused_where_it_is_used():
    class Holder:
        def __init__(self):
            self.numbers, self.random, self.y = iter([1]), np.random.default_rng(0), full(0)

        def fine(self, out):
            return losses.mse(out, self.y) + 0 * jax.random.uniform(rng.next_key())

        def takes(self, out):
            return out.mean() * next(self.numbers)

        def draws(self, out):
            return out.mean() * self.random.normal()

        def maybe(self, out):
            return out.mean() * getattr(self, "random", None).normal()

    holder = Holder()
    assert traced(holder.fine)[1] == 2.5
    with pytest.raises(CaptureError, match=r"reads `numbers` of a Holder, a list_iterator, an iterator: .*y = next"):
        traced(holder.takes)
    for loss in (holder.draws, holder.maybe):
        with pytest.raises(CaptureError, match="reads `random` of a Holder, a Generator, a random generator: "):
            traced(loss)
    assert next(holder.numbers) == 1


def test_an_array_that_was_refused_may_be_replaced():
    obj = types.SimpleNamespace(y=np.array(["a", "b"]))
    loss = lambda out: losses.mse(out, obj.y)
    for _ in range(2):
        with pytest.raises(CaptureError, match="reads `y` of a SimpleNamespace, a NumPy array of dtype <U1"):
            traced(loss)
    obj.y = full(0)
    assert traced(loss)[1] == 2.5


def test_an_attribute_that_nobody_has_is_missing():
    obj = types.SimpleNamespace(y=1.0)
    for loss in (lambda out: out.mean() * obj.missing, lambda out: out.mean() * Base.missing):
        with pytest.raises(AttributeError, match="missing"):
            traced(loss)
    assert traced(lambda out: out.mean() * getattr(obj, "missing", 2.0))[1] == 3.0


class Writer:
    count = 0

    def __init__(self):
        self.items, self.n, self.table, self.some = [1], 0, {"a": 1}, {1}
        self.last = collections.deque([1])
        self.inner = types.SimpleNamespace(items=[1], n=0)

    def append(self, out):
        self.items.append(out)

    def extend(self, out):
        self.inner.items.extend([out])

    def augmented(self, out):
        self.items += [out]

    def item(self, out):
        self.items[0] = out

    def key(self, out):
        self.table["b"] = out

    def update(self, out):
        self.table.update(a=out)

    def delete(self, out):
        del self.table["a"]

    def add(self, out):
        self.some.add(2)

    def left(self, out):
        self.last.appendleft(out)

    def attribute(self, out):
        self.n = out

    def new_attribute(self, out):
        self.fresh = out

    def passed_on(self, out):
        writes_to(self.inner, out)

    def of_class(self, out):
        type(self).count = out

    def of_class_by_name(self, out):
        Writer.count = out

    def deleted(self, out):
        del self.n

    def by_setattr(self, out):
        setattr(self, "n", out)  # noqa: B010

    def in_module(self, out):
        SETTINGS.value = out

    def in_function(self, out):
        writes_to.last = out


def writes_to(obj, out):
    obj.n = out


SETTINGS = types.ModuleType("settings_of_test")
SETTINGS.value = 1.0
WRITES = [name for name, f in vars(Writer).items() if isinstance(f, types.FunctionType) and name != "__init__"]


@pytest.mark.parametrize("write", WRITES)
def test_writes_are_refused_and_leave_nothing_behind(write):
    writer = Writer()
    method = getattr(writer, write)

    def loss(out):
        method(out)
        return out.mean()

    with pytest.raises(CaptureError, match="writes to a list, dict or object that it captures"):
        traced(loss)
    assert vars(writer) == vars(Writer()) and Writer.count == 0 and SETTINGS.value == 1.0
    assert "last" not in vars(writes_to)


def test_an_attribute_set_on_a_module_of_a_library_is_refused_and_taken_back():
    def loss(out):
        losses.kept_by_a_test = out
        return losses.mse(out, jnp.zeros_like(out))

    with pytest.raises(CaptureError, match="writes to a list, dict or object that it captures"):
        traced(loss)
    assert not hasattr(losses, "kept_by_a_test")


SEEN = []


class WritesOutside:
    @property
    def scale(self):
        SEEN.append(self)
        return 1.0

    def __getitem__(self, i):
        SEEN.append(i)
        return 1.0


@pytest.mark.parametrize("read", [lambda obj: obj.scale, lambda obj: obj[0]])
def test_properties_and_operators_that_write_are_refused(read):
    obj = WritesOutside()
    with pytest.raises(CaptureError, match="writes to a list, dict or object that it captures"):
        traced(lambda out: out.mean() * read(obj))
    assert SEEN == []


RECORD = []
NOISE = np.random.default_rng(0)
WEIGHTS = iter([1.0, 2.0])
FACTOR = 1.0


def recorded(out):
    RECORD.append(out)
    return out.mean()


class Recording:
    made = []

    def super_method(self, out):
        return recorded(out)

    def __call__(self, out):
        return recorded(out)

    def __getitem__(self, out):
        return recorded(out)

    @property
    def mean(self):
        return recorded(OUT)

    @classmethod
    def of_class(cls, out):
        cls.made.append(out)
        return out.mean()

    @property
    def noise(self):
        return NOISE.normal()

    @property
    def weight(self):
        return next(WEIGHTS)


class Inheriting(Recording):
    def super_method(self, out):
        return super().super_method(out)


class Registered:
    def __init__(self, out):
        RECORD.append(out)
        self.factor = out.mean()


class Registering(type):
    def __call__(cls, *args):
        RECORD.append(args)
        return super().__call__(*args)


class Meta(metaclass=Registering):
    factor = 1.0


RECORDING = Inheriting()


@pytest.mark.parametrize(
    "loss",
    [
        RECORDING.super_method, Recording.of_class, lambda out: RECORDING(out), lambda out: RECORDING[out],
        lambda out: RECORDING.mean * out.mean(), lambda out: Registered(out).factor,
        lambda out: Meta().factor * out.mean(),
    ],
)  # fmt: skip
def test_writes_by_code_that_is_used_where_it_is_are_refused_too(loss):
    with pytest.raises(CaptureError, match="writes to a list, dict or object that it captures"):
        traced(loss)
    assert not RECORD and not Recording.made


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda out: RECORDING.noise * out.mean(), "captures `RECORDING`, a Generator, a random generator"),
        (lambda out: RECORDING.weight * out.mean(), "captures `RECORDING`, a list_iterator, an iterator"),
    ],
)
def test_what_a_property_may_not_read_is_refused(loss, text):
    with pytest.raises(CaptureError, match=text):
        traced(loss)


class FromInit:
    def __init__(self):
        self.factor = FACTOR


class FromNew:
    def __new__(cls):
        made = object.__new__(cls)
        made.factor = FACTOR
        return made


@dataclasses.dataclass
class FromPostInit:
    factor: float = 0.0

    def __post_init__(self):
        self.factor += FACTOR


@pytest.mark.parametrize("kind", [FromInit, FromNew, FromPostInit])
def test_what_a_constructor_reads_is_seen_as_it_is_now(kind, monkeypatch):
    def loss(out):
        return kind().factor * out.mean()

    keys, values = [], []
    for value in (1.0, 2.0):
        monkeypatch.setitem(globals(), "FACTOR", value)
        key, result = traced(loss)
        keys.append(key)
        values.append(result)
    assert values == [1.5, 3.0] and keys[0] != keys[1]


def test_a_default_of_a_dataclass_that_the_loss_makes_is_seen_as_it_is_now():
    @dataclasses.dataclass
    class Settings:
        factor: float = 1.0

    loss = lambda out: Settings().factor * out.mean()
    before, value = traced(loss)
    Settings.__init__.__defaults__ = (2.0,)
    after, changed = traced(loss)
    assert (value, changed) == (1.5, 3.0) and before != after


def test_a_traced_value_put_into_an_object_of_a_library_is_refused():
    waiting = queue.Queue()

    def loss(out):
        waiting.put(out)
        return out.mean()

    with pytest.raises(CaptureError, match="writes to a list, dict or object"):
        traced(loss)
    assert not waiting.queue


def test_a_write_is_undone_when_the_loss_fails():
    writer = Writer()

    def loss(out):
        Writer.count = out
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        traced(loss)
    assert Writer.count == 0 and writer.count == 0


# What is read in other ways than by the name of a variable or of the object's own attribute


class Table:
    """Holds arrays and numbers in the class, and reads them in many ways."""

    rows = full(1)
    tree = {"a": full(1)}
    alpha = 1.0

    def by_type(self, out):
        return (type(self).rows * out).sum()

    def by_class(self, out):
        return (self.__class__.rows * out).sum()

    def inside(self, out):
        return (type(self).tree["a"] * out).sum() + self.tree["a"].sum()

    @classmethod
    def of_class(cls, out):
        return (cls.rows * out).sum()

    @classmethod
    def passed_on(cls, out):
        return rows_of(cls, out)

    def by_class_method(self, out):
        return self.of_class(out) + (self.rows * out).sum()

    def by_helper(self, out):
        return self.passed_on(out) + (self.rows * out).sum()

    @property
    def shared(self):
        return read_global()

    def by_property(self, out):
        return (out * read_global()).sum() + (out * self.shared).sum()

    def as_dict(self):
        return vars(self)

    def by_vars(self, out):
        return out.mean() * sum(self.as_dict().values()) * self.alpha


class Extended(Table):
    def by_super(self, out):
        return (super().rows * out).sum() + self.alpha

    def by_super_later(self, out):
        above = super()
        return (out + out.mean()).sum() + (above.rows * out).sum()


def rows_of(kind, out):
    return (kind.rows * out).sum()


def read_global():
    return GLOBAL_ROWS


GLOBAL_ROWS = full(1)


class Level(enum.Enum):
    LOW = 1

    def __init__(self, _):
        self.weight, self.rows = 1.0, full(1)


@jax.tree_util.register_pytree_node_class
class Tree:
    def __init__(self, y, config):
        self.y, self.config = y, config

    def tree_flatten(self):
        return (self.y,), self.config

    @classmethod
    def tree_unflatten(cls, config, children):
        return cls(*children, config)


class Made:
    def __init__(self, y):
        self.y = y * read_global()

    def loss(self, out):
        return (out * self.y).sum()

    def again(self, out):
        return type(self)(self.y).loss(out)


class MadeAbove(Made):
    def __init__(self):
        super().__init__(2.0)


@dataclasses.dataclass
class MadeFields:
    y: float = 1.0

    def __post_init__(self):
        self.scaled = self.y * read_global()


def scaled_by(self, out, scale):
    return out.mean() * scale


class Words:
    def __str__(self):
        return str(float(read_global()[0]))


class Partial:
    loss = functools.partialmethod(scaled_by, scale=2.0)


class Matched:
    __match_args__ = ("a",)

    def __init__(self):
        self.a, self.b = 1.0, 1.0


MATCHED = Matched()


def by_pattern(out):
    match MATCHED:
        case Matched(a, b=b):
            return out.mean() * a * b
        case _:
            return out.mean()


def own_attribute(out):
    return out.mean() * getattr(own_attribute, "alpha", 2.0)


def helper_with_attribute(out):
    return out


def set_table(name):
    return lambda n: setattr(Table, name, n) if name == "alpha" else setattr(Table, name, full(n))


def set_rows(n):
    globals()["GLOBAL_ROWS"] = full(n)


def in_tree(n):
    Table.tree["a"] = full(n)


def roundabout_cases():
    """Losses, and what changes a value that they read: called with a number."""
    formatter, chained = string.Formatter(), collections.ChainMap({"a": 1.0}, {"b": 2.0})
    table, extended, instance = Table(), Extended(), Table()
    instance.b = 1.0
    config = types.SimpleNamespace(a=1.0)
    of_user = Base()
    of_user.a = 1.0
    tree = Tree(full(1), of_user)
    outer = Pair(Tree(full(1), of_user), 1.0)
    key, made, words = "alpha", Made(2.0), Words()
    return {
        "attribute of the loss": (own_attribute, lambda n: setattr(own_attribute, "alpha", n)),
        "attribute of a helper": (
            lambda out: helper_with_attribute(out).mean() * getattr(helper_with_attribute, "alpha", 2.0),
            lambda n: setattr(helper_with_attribute, "alpha", n),
        ),
        "attribute of a library's object": (
            lambda out: out.mean() * getattr(formatter, "alpha", 2.0), lambda n: setattr(formatter, "alpha", n)
        ),
        "enum": (lambda out: out.mean() * Level.LOW.weight, lambda n: setattr(Level.LOW, "weight", n)),
        "array of an enum": (lambda out: (out * Level.LOW.rows).sum(), lambda n: Level.LOW.rows.__setitem__(0, n)),
        "type(self)": (table.by_type, set_table("rows")),
        "self.__class__": (table.by_class, set_table("rows")),
        "in place": (table.by_class, lambda n: Table.rows.__setitem__(0, n)),
        "in a dict of the class": (table.inside, in_tree),
        "class method": (table.by_class_method, set_table("rows")),
        "class method by name": (lambda out: table.of_class(out), set_table("rows")),
        "cls passed on": (table.by_helper, set_table("rows")),
        "super": (extended.by_super, set_table("rows")),
        "super in a variable": (extended.by_super_later, set_table("rows")),
        "a helper of a property too": (table.by_property, set_rows),
        "vars": (instance.by_vars, lambda n: setattr(instance, "b", n)),
        "class and vars": (instance.by_vars, set_table("alpha")),
        "vars of a class": (lambda out: out.mean() * vars(Table)[key], set_table("alpha")),
        "chained": (lambda out: out.mean() * chained["a"], lambda n: chained.maps.insert(0, {"a": n})),
        "static part of a pytree": (lambda out: out.mean() * tree.config.a, lambda n: setattr(of_user, "a", n)),
        "of one inside": (lambda out: out.mean() * outer.y.config.a, lambda n: setattr(of_user, "a", n)),
        "made inside": (lambda out: Made(2.0).loss(out), set_rows),
        "made inside, of a class that extends": (lambda out: MadeAbove().loss(out), set_rows),
        "made by an object": (made.again, set_rows),
        "dataclass made inside": (lambda out: (out * MadeFields(2.0).scaled).sum(), set_rows),
        "pattern, by position": (by_pattern, lambda n: setattr(MATCHED, "a", n)),
        "pattern, by name": (by_pattern, lambda n: setattr(MATCHED, "b", n)),
        "as text": (lambda out: out.mean() * float(f"{words}"), set_rows),
        "partial method": (
            Partial().loss, lambda n: setattr(Partial, "loss", functools.partialmethod(scaled_by, scale=n))
        ),
        "names of attributes": (
            lambda out: out.mean() * len([n for n in dir(config) if n[0] != "_"]),
            lambda n: setattr(config, f"b{n}".replace(".", "_"), n),
        ),
        "namespace": (lambda out: out.mean() * config.a, lambda n: setattr(config, "a", n)),
    }  # fmt: skip


@pytest.mark.parametrize("case", roundabout_cases())
def test_what_is_read_in_roundabout_ways_is_never_stale(case):
    loss, change = roundabout_cases()[case]
    programs = {}
    for n in (None, None, 3.0, 4.0, 4.0, 5.0):
        if n is not None:
            change(n)
        key, arrays = capture_loss(loss)
        if key not in programs:
            programs[key] = jax.jit(functools.partial(run_traced, key))
        np.testing.assert_allclose(float(programs[key](OUT, arrays)), float(loss(OUT)), rtol=1e-6)


def run_traced(key, out, arrays):
    with rng.scope(0):
        return trace_loss(key, arrays, out)[0]


def test_an_attribute_of_a_class_by_a_computed_name_is_refused():
    key, table = "alpha", Table()
    for loss in (lambda out: out.mean() * getattr(Table, key), lambda out: out.mean() * getattr(type(table), key)):
        with pytest.raises(
            CaptureError, match="reads `alpha` of a class Table by a name that is computed when it runs"
        ):
            traced(loss)


def test_a_property_that_draws_random_numbers_is_refused():
    generator = np.random.default_rng(0)

    class Noisy:
        @property
        def noise(self):
            return generator.normal()

    noisy = Noisy()
    with pytest.raises(CaptureError, match="captures `noisy`, a Generator, a random generator: "):
        traced(lambda out: out.mean() + noisy.noise)


def test_a_named_tuple_and_a_list_that_is_also_captured_alone():
    rows = [full(1)]
    a_pair = Pair(rows, 1.0)
    loss = lambda out: losses.mse(out, a_pair.y[0]) + rows[0].sum()
    for n in (1, 2):
        rows[0] = full(n)
        np.testing.assert_allclose(traced(loss)[1], float(loss(OUT)), rtol=1e-6)


def test_code_of_ones_own_is_followed_however_much_it_reads():
    """The limit of 500 reads is for packages of others."""
    scope = {"__name__": __name__}
    for i in range(200):
        exec(f"def f{i}(x): return x", scope)
    calls = " + ".join(f"f{i}(out)" for i in range(200))
    exec(f"def f(out, table): return (({calls}) * table.shared).sum()", scope)
    f, table = scope["f"], Table()
    loss = lambda out: f(out, table)
    for n in (1, 2):
        globals()["GLOBAL_ROWS"] = full(n)
        np.testing.assert_allclose(traced(loss)[1], float(loss(OUT)), rtol=1e-6)


# What stays alive


class Weak(np.ndarray):
    """An array that can be watched."""


def alive_cases():
    y, j = np.ones((1, 2), np.float32).view(Weak), jnp.ones((1, 2))

    class Local:
        def __init__(self):
            self.y, self.j = y, j

        def loss(self, out):
            return losses.mse(out, self.y) + losses.mse(out, self.j)

        __call__ = loss

    @dataclasses.dataclass
    class Data:
        y: object
        j: object

        def loss(self, out):
            return losses.mse(out, self.y) + losses.mse(out, self.j)

    module = types.ModuleType("module_of_test")
    exec("from kaun import losses\ndef f(out): return losses.mse(out, y) + losses.mse(out, j)", module.__dict__)
    module.y, module.j = y, j
    scope = {}
    exec("from kaun import losses\ndef f(out): return losses.mse(out, y) + losses.mse(out, j)", scope)
    scope.update(y=y, j=j)
    inner = lambda out: losses.mse(out, y) + losses.mse(out, j)
    obj, data = Local(), Data(y, j)
    return {
        "cell": (inner, [y, j, inner]),
        "nested": (lambda out: inner(out), [y, j, inner]),
        "jitted": (jax.jit(inner), [y, j, inner]),
        "method": (obj.loss, [y, j, obj, Local]),
        "callable": (obj, [y, j, obj, Local]),
        "dataclass": (data.loss, [y, j, data, Data]),
        "module": (lambda out: module.f(out), [y, j, module, module.f]),
        "notebook": (scope["f"], [y, j, scope["f"]]),
        "class": ((lambda c: lambda out: losses.mse(out, c.y))(type("C", (), {"y": y})), [y]),
        "default": (lambda out, y=y: losses.mse(out, y) + losses.mse(out, j), [y, j]),
        "library object": (reads(random.SystemRandom, lambda n, out: out.mean()), [y]),
    }


@pytest.fixture(scope="module")
def linear():
    import optax

    with rng.scope(0):
        trainer = kaun.Trainer(model=kaun.layers.linear(2, 2, bias=False), optimizer=optax.sgd(0.1))
        return trainer, trainer.init()


@pytest.mark.parametrize("case", sorted(alive_cases()))
def test_nothing_that_a_loss_captured_stays_alive(case, linear):
    trainer, state = linear
    x = np.ones((1, 2), np.float32)

    def run():
        loss, held = alive_cases()[case]
        trainer.step(state, x, loss=loss)
        trainer.fit(state, [(x, loss)] * 3)
        trainer.fit(state, kaun.Data.from_items([(x, loss)] * 3).prefetch(2))
        return [weakref.ref(value) for value in held]

    watched = run()
    gc.collect()
    assert [ref() for ref in watched if ref() is not None] == []


def test_a_key_of_what_is_gone_equals_no_other():
    """The id of an object that is gone may be given to the next one."""
    keys = []
    for _ in range(50):
        marker = queue.Queue()  # of a library: static by identity
        keys.append(capture_loss(reads(marker, lambda n, out: n))[0])
        del marker
    assert len(set(keys)) == 50


def test_a_frozen_loss_keeps_what_it_needs():
    def generator():
        for i in range(3):
            marker = queue.Queue()
            marker.put(i)
            yield lambda: marker.get_nowait()

    frozen = [snapshot_loss(loss) for loss in generator()]
    gc.collect()
    assert [f() for f in frozen] == [0, 1, 2]


def test_stand_ins_hold_what_is_read_and_nothing_else():
    class Holder:
        def __init__(self):
            self.alpha, self.targets, self.unread = 1.0, full(0), full(1)

        def loss(self, out):
            return self.unread

    obj = Holder()
    key, arrays = capture_loss(lambda: (obj, obj.alpha, obj.targets))
    made, alpha, targets = rebuild_loss(key, arrays)()
    assert type(made) is Holder and made is not obj and alpha == 1.0 and targets is obj.targets
    assert vars(made).keys() == {"alpha", "targets"}
    rebuilt = Rebuilt(key, arrays)
    assert not rebuilt.watch.restore()
