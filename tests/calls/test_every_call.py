"""Every public function, class and method: a call that Python refuses is explained, and nothing public is in the way."""

import copy
import inspect
import pickle
import re
import traceback
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, Data, averages, checkpoint, grad, interop, layers, losses, metrics, reports, rng, sharding
from kaun._calls import is_explained
from kaun.interop import safetensors

X, Y = np.ones((8, 2), np.float32), np.ones((8, 1), np.float32)
MODULES = [averages, checkpoint, grad, interop, layers, losses, metrics, reports, rng, safetensors, sharding]
METHODS = [kaun.Data, kaun.Ensemble, kaun.Layer, kaun.Trainer, kaun.Vars]
METHODS += [checkpoint.Directory, metrics.Counted, metrics.Tracker]
# A state is made at each step, and a report is called at each block of steps: a wrapper would cost each of them.
AS_PYTHON = {"sharding.put", "TrainState", "Context", "Data", "EarlyStop", "NonFiniteLoss"}
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def public_functions():
    for module in (kaun, *MODULES):
        for name in getattr(module, "__all__", None) or [n for n in dir(module) if not n.startswith("_")]:
            value = getattr(module, name)
            if isinstance(value, types.FunctionType):
                yield f"{module.__name__.removeprefix('kaun.')}.{name}", value
                if hasattr(value, "parts"):
                    yield f"{module.__name__.removeprefix('kaun.')}.{name}.parts", value.parts
    for kind in METHODS:
        for name in dir(kind):
            method = inspect.getattr_static(kind, name)
            method = method.__func__ if isinstance(method, (classmethod, staticmethod)) else method
            if isinstance(method, types.FunctionType) and not name.startswith(("_", "tree_")):
                yield f"{kind.__name__}.{name}", method


FUNCTIONS = dict(public_functions())


def test_every_public_function_and_method_explains_wrong_calls():
    assert len(FUNCTIONS) > 200
    assert not [name for name, f in FUNCTIONS.items() if not is_explained(f) and name not in AS_PYTHON]


def test_an_argument_that_is_not_there_is_named_with_what_to_write():
    for f in FUNCTIONS.values():
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(f).parameters.values())
        if takes_any or not is_explained(f) or hasattr(f, "__signature__"):
            continue
        with pytest.raises(TypeError) as caught:
            f(no_such_argument=1)
        text = str(caught.value)
        said, _, rest = text.partition(" has no argument no_such_argument=: ")
        takes, _, call = rest.partition(". Write ")
        assert re.fullmatch(r"(its arguments are \(.+\)|it takes no argument)\.?", takes), text
        parameters = inspect.signature(f).parameters.values()
        needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
        of_module = "." in said and said.islower()  # a method's object has a name of the user's
        if of_module and (needed or takes == "it takes no argument"):
            assert re.fullmatch(rf"{re.escape(said)}\(.*\)\.", call), text
        shown = "".join(traceback.format_exception(caught.value)).splitlines()
        assert len(shown) <= 8 and not [line for line in shown if "/kaun/_calls/" in line], shown


class Own:
    """An object whose repr has an address, and a function that has one too."""


REFUSED = """
    kaun.Trainer(model=model, optimizer=optax.adam)
    kaun.Trainer(model=model, optimizer=optax)
    kaun.Trainer(model=model, optimizer=Own())
    kaun.Trainer(model=model, optimizer=optimizer, average=averages.ema)
    kaun.Trainer(model=model, optimizer=optimizer, sharding=sharding.fsdp)
    kaun.Trainer(model=model, optimizer=optimizer, penalty=Own())
    kaun.Trainer(model=model, optimizer=optimizer, trainable=Own())
    kaun.Trainer(model=model, optimizer=optimizer, precision=Own())
    kaun.Trainer(model=model, optimizer=optimizer, microbatches=Own())
    kaun.Trainer(model=Own(), optimizer=optimizer)
    kaun.Ensemble(trainer, Own())
    kaun.Ensemble(Own(), 2)
    kaun.cache(Own())
    kaun.summary(Own(), X)
    kaun.explain(Own(), Own())
    kaun.lr_range(trainer, state, train, low=Own())
    trainer.fit(state, train, report=Own())
    trainer.fit(state, train, report=[print, Own()])
    trainer.fit(state, train, checkpoints=Own())
    trainer.fit(state, train, ctx=Own())
    trainer.fit(state, Own())
    trainer.fit(state, [(X, Own())])
    trainer.step(state, X, loss=Own())
    trainer.step(state, X, loss=jnp.mean, training=Own())
    trainer.step(state, Own(), loss=jnp.mean)
    trainer.predict(state, Own())
    trainer.evaluate(state, data, {"a": Own()})
    trainer.make_state(Own())
    trainer.init(dtype=Own())
    state.replace(vars=[Own()])
    losses.mse(Own(), X)
    losses.huber(X, X, delta=Own())
    metrics.accuracy(Own(), X)
    metrics.f1(X, Y, average=Own())
    metrics.top_k_accuracy(Own())
    metrics.Counted.of(Own())
    metrics.Tracker().observe("a", Own())
    reports.every(print, 3)
    reports.every(3, Own())
    reports.each_epoch(Own(), print)
    reports.early_stopping(Own(), mode="min", patience=1)
    reports.early_stopping("loss", mode=Own(), patience=1)
    reports.validate(trainer, data, {"a": losses.mse}, each=Own())
    reports.validate(trainer, data, {"a": losses.mse}, each=2, of=Own())
    reports.validate(trainer, Own(), {"a": losses.mse}, each=2)
    reports.csv(Own())
    reports.jsonl(Own())
    reports.plot(Own())
    reports.watch(Own())
    reports.profile(Own())
    reports.progress(Own())
    reports.time_limit(Own())
    reports.learning_rate(Own())
    reports.throughput(tokens=Own())
    rng.scope(Own()).__enter__()
    Context(Own())
    Data.batches(Own(), 4)
    Data.batches((X, Y), Own())
    Data.from_items(Own())
    Data.from_iterable(Own())
    Data.from_fn(3, Own())
    Data.concat(Own())
    data.map(Own())
    data.filter(Own())
    data.with_loss(Own())
    data.take(Own())
    layers.linear(Own(), 2)
    layers.linear(2, 2, bias=Own())
    layers.linear(2, 2, weight_init=Own()).init()
    layers.sequential(Own())
    layers.sequential([Own()])
    layers.module(lambda m, x: x, {})
    layers.module({"a": model}, Own())
    layers.fn(Own())
    layers.activation(Own())
    layers.remat(model, policy=Own())
    layers.lora(model, 2, Own())
    layers.upsample2d(2, method=Own())
    layers.conv2d(1, 2, padding=Own())
    kaun.Layer(init=Own(), apply=Own())
    averages.ema(Own())
    averages.swa(start=Own(), every=1)
    averages.from_optimizer(Own())
    sharding.fsdp(Own())
    sharding.by_path(Own())
    checkpoint.Directory(Own())
    checkpoint.Directory("runs", every=Own())
    checkpoint.Directory("runs", keep=Own())
    checkpoint.Directory("runs", best=Own())
    checkpoint.save(Own(), state)
    interop.export(Own(), state.vars)
"""


@pytest.fixture(scope="module")
def names():
    trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
    data = Data.batches((X, Y), 4)
    found = {
        "trainer": trainer,
        "model": trainer.model,
        "state": trainer.init(),
        "data": data,
        "optimizer": optax.sgd(1),
    }
    return {**globals(), **found, "train": data.with_loss(losses.mse)}


def test_no_text_has_the_address_of_an_object(names):
    for call in REFUSED.strip().splitlines():
        with pytest.raises((TypeError, ValueError)) as caught:
            eval(call.strip(), names)
        lines = "".join(traceback.format_exception(caught.value)).splitlines()
        assert not ADDRESS.search(str(caught.value)) and len(lines) <= 30, (call, str(caught.value))
        assert not [line for line in lines if "/src/kaun/" in line and "File" in line], (call, lines)


@pytest.fixture(scope="module")
def public_objects(names):
    trainer, data, many = names["trainer"], names["data"], kaun.Ensemble(names["trainer"], 2)
    counted = metrics.Counted.of(metrics.f1)
    validation = reports.validate(trainer, data, {"mse": losses.mse}, each=2)
    return [
        trainer, names["state"], names["state"].vars, trainer.model, data, Context(a=X), many, many.init(),
        reports.history(), reports.early_stopping("mse", mode="min", patience=1), validation, reports.progress(),
        reports.early_stopping("loss", mode="min", patience=1), reports.watch(), reports.every(2, print),
        reports.all_of(print, validation), reports.time_limit(3), reports.throughput(tokens=3),
        reports.each_epoch(data, print), averages.ema(0.9), averages.swa(start=1, every=1), sharding.data_parallel(),
        checkpoint.Directory("runs"), losses.Mean(jnp.ones(()), 1.0), counted, metrics.Tracker(), kaun.EarlyStop(),
        counted.parts(jnp.eye(2), jnp.array([0, 1])), layers.module({"a": trainer.model}, lambda m, x: m.a(x)),
        losses.mse, losses.mse.parts, metrics.f1, layers.linear, kaun.Data, kaun.Trainer, reports.EarlyStopping,
    ]  # fmt: skip


def test_nothing_public_raises_when_a_debugger_looks_at_it(public_objects):
    for value in public_objects:
        assert (inspect.getmembers(value) and repr(value) and not ADDRESS.search(repr(value))) or callable(value)
        for name in {*dir(value), *dir(type(value)), "no_such_name", "_no_such_name", "__array__", "shape"}:
            assert hasattr(value, name) in (True, False)
        copy.copy(value)
        copy.deepcopy(value)
        inspect.getdoc(value)
        if callable(value):
            assert inspect.signature(value)
        if hasattr(value, "_repr_html_") and not isinstance(value, type):
            assert value._repr_html_()
        try:
            pickle.dumps(value)
        except TypeError as error:
            assert re.search("pickle", str(error))


def test_a_property_without_a_value_says_why(names):
    stopper = reports.early_stopping("mse", mode="min", patience=1)
    with pytest.raises(kaun.errors.Unavailable, match=r"^early_stopping has no best state: 'mse' was not measured yet"):
        _ = stopper.best
    assert not hasattr(stopper, "best") and not hasattr(stopper, "best_step")
    with pytest.raises(kaun.errors.Unavailable, match=r"^state\.averaged: this state has no average"):
        _ = names["state"].averaged
    assert not hasattr(names["state"], "averaged")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (
            "from kaun.layers import Linear",
            "cannot import name 'Linear' from 'kaun.layers'. Write layers.linear(in_features, ",
        ),
        (
            "from kaun import Dense",
            "cannot import name 'Dense' from 'kaun'. Write layers.linear(in_features, out_features).",
        ),
        ("from kaun.losses import mse, MSELoss", "cannot import name 'MSELoss' from 'kaun.losses'. Write losses.mse."),
        ("from kaun.reports import ModelCheckpoint", "from 'kaun.reports'. fit keeps checkpoints. Write trainer.fit("),
    ],
)
def test_an_import_of_another_librarys_name_says_what_to_write(code, text):
    with pytest.raises(ImportError) as caught:
        exec(code, {})
    lines = "".join(traceback.format_exception(caught.value)).splitlines()
    assert text in str(caught.value) and not [line for line in lines if "/src/kaun/" in line], lines
    module, name = re.search(r"from (\S+) import (?:\w+, )?(\w+)", code).groups()
    assert not hasattr(eval(module, {"kaun": kaun}), name)


def test_a_long_model_is_abbreviated_and_its_name_is_whole():
    model = layers.sequential([layers.relu()] * 500)
    lines = repr(model).splitlines()
    assert len(lines) == 61 and lines[0] == "sequential([" and lines[-1] == "])"
    assert lines[30] == "  ... 442 lines more: print(model.name), or kaun.summary(trainer, x) ..."
    assert len(model.name.splitlines()) == 502 and "442 lines more" in model._repr_html_()
    short = layers.sequential([layers.relu()] * 58)
    assert repr(short) == short.name and len(repr(short).splitlines()) == 60
