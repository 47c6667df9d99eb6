"""Calls that Python, or kaun, refuses: each says what to write, in few lines. No program is compiled for it."""

import inspect
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, metrics, reports
from kaun._calls import explained

X, Y = np.ones((8, 2), np.float32), np.ones((8, 1), np.float32)


def of_library(module, name="Dense", base=object):
    """An object whose class inherits from one of a library, which is not imported."""
    module_class = type("Module", (base,), {"__module__": module, "__call__": lambda self, x: x})
    return type(name, (module_class,), {"__module__": "mine"})()


def function_of(module, name):
    def f(predictions, targets):
        return predictions

    f.__module__, f.__name__ = module, name
    return f


class Wanting(reports.Report):
    def want(self, step):
        return True


@pytest.fixture(scope="module")
def names():
    trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
    data = Data.batches((X, Y), 4)
    known = {"kaun": kaun, "layers": layers, "losses": losses, "metrics": metrics, "reports": reports, "Data": Data}
    known |= {"jax": jax, "jnp": jnp, "of_library": of_library, "function_of": function_of, "Wanting": Wanting}
    known |= {"np": np, "history": reports.history()}
    known |= {"stopper": reports.early_stopping("loss", mode="min", patience=1)}
    known |= {"x": X, "y": Y, "data": data, "train": data.with_loss(losses.mse), "optimizer": trainer.optimizer}
    return known | {"trainer": trainer, "model": trainer.model, "state": trainer.init()}


PROGRAM = (
    "    state = trainer.init()\n"
    "    data = Data.batches((x, y), batch_size={}, shuffle=True).with_loss(losses.mse)\n"
    "    state = trainer.fit(state, data{})"
)
CALLS = {
    # fit as in Keras, scikit-learn and Lightning.
    "trainer.fit(x, y, epochs=3)": "received (float32[8, 2], float32[8, 1], epochs=3). Write\n"
    + PROGRAM.format(32, ".epochs(3)"),
    "trainer.fit(x, y)": "received (float32[8, 2], float32[8, 1]). Write\n" + PROGRAM.format(32, ""),
    "trainer.fit(x, y, batch_size=16)": PROGRAM.format(16, ""),
    "trainer.fit(x, y, validation_data=(x, y))": PROGRAM.format(32, "")
    + "\nfit has no argument validation_data=: a report validates. Write report=reports.validate(",
    "trainer.fit(state, x, y)": "Write\n    data = Data.batches((x, y), batch_size=32, shuffle=True).with_loss(",
    "trainer.fit(train)": "received (Data). Write\n    state = trainer.init()\n    state = trainer.fit(state, data)",
    "trainer.fit(train, epochs=3)": "state = trainer.fit(state, data.epochs(3))",
    "trainer.fit(state)": "received the state alone. Write trainer.fit(state, data).",
    "trainer.fit()": "Write\n    state = trainer.init()\n    data = Data.batches(",
    "trainer.fit(train, state)": "fit expected the state first, received (Data, TrainState). Write trainer.fit(state, data).",
    "trainer.fit(state, train, reports.history())": "all else by name, received (TrainState, Data, History). Write trainer."
    "fit(state, data, report=report).",
    "trainer.fit(state, train, epochs=3)": "Write trainer.fit(state, data.epochs(3)).",
    "trainer.fit(state, train, callbacks=[])": "fit has no argument callbacks=: write report=, with reports.all_of(a, b)",
    "trainer.fit(state, train, metrics=['accuracy'])": 'Write trainer.evaluate(state, data, {"accuracy": metrics.accuracy})',
    "trainer.fit(state, train, verbose=1, lr=0.1)": "Write report=reports.progress().\nfit has no argument lr=: the optimizer",
    "trainer.fit(state, train, reprot=print)": "fit has no argument reprot=: write report=print.",
    "trainer.fit(state, train, zz=1)": "its arguments are (state, data, *, ctx=None, report=None, checkpoints=None).",
    "trainer.fit(state, train, report=[print, print])": "received a list of 2: print, print. Write reports.all_of(a, b).",
    "trainer.fit(state, train, report=Wanting())": "has a method `want`, which fit does not call; the nearest name that it "
    "calls is `wants`. Write def wants(self, step)",
    "trainer.fit(state, train, report=reports.early_stopping('valid_loss', mode='min', patience=1))": "A report watches "
    "'valid_loss', which no report of this fit measures; measured names: none. A value has the name that validate was "
    'given; only columns and the bar add "valid_". Write early_stopping("loss", ...), and reports.validate(trainer, valid, '
    '{"loss": ...}, each=train).',
    "trainer.fit(state, train, report=reports.all_of(reports.validate(trainer, data, {'loss': losses.mse}, each=2), "
    "reports.early_stopping('val_loss', mode='min', patience=1)))": 'measured names: \'loss\'. A value has the name that '
    'validate was given; only columns and the bar add "valid_". Write early_stopping("loss", ...).',
    "trainer.fit(state, [(x, losses.cross_entropy_sparse)])": "takes (logits, indices), and is called with the model's "
    "output alone. Write data.with_loss(losses.cross_entropy_sparse) for items (x, y), or lambda output: losses."
    "cross_entropy_sparse(output, y).",
    "trainer.step(state, x, loss=lambda output, target: output)": "takes (output, target), and is called with the model's "
    "output alone. Write data.with_loss(f) for items (x, y), or lambda output: f(output, y).",
    "trainer.fit(state, (x, y))": "item 1 is float32[8, 2]. For one pair write [(x, loss)]; for arrays x and y write "
    "Data.batches((x, y), batch_size=32).with_loss(losses.mse).",
    "trainer.fit(state, [(x, jnp.mean, {'mask': x})])": "function, dict). Write (x, loss, Context(name=array)).",
    "trainer.fit(state, train, ctx=kaun.Context(x))": "Context expected names, received float32[8, 2]. Write Context(name=array).",
    # step.
    "trainer.step(state, x, y)": "step expected a state, an input and loss=, received (TrainState, float32[8, 2], float32[8, "
    "1]). Write loss, state = trainer.step(state, x, loss=lambda output: losses.mse(output, y)).",
    "trainer.step(x, loss=jnp.mean)": "received (float32[8, 2], loss=mean). Write loss, state = trainer.step(state, x, loss=",
    "trainer.step(state, x)": "received (TrainState, float32[8, 2]). Write loss, state = trainer.step(state, x, loss=",
    "trainer.step(state, x, loss_fn=jnp.mean)": "received (TrainState, float32[8, 2], loss_fn=mean). Write loss, state = ",
    "trainer.step(state, x, loss=jnp.mean, key=3)": "step has no argument key=: the state has the key: the randomness of a step",
    "trainer.step(state, x, loss=jnp.mean, trainin=False)": "step has no argument trainin=: write training=False.",
    "trainer.step(state, x, loss=jnp.mean, zz=3)": "its arguments are (state, x, *, loss, training=True, ctx=None).",
    "trainer.step((jnp.ones(()), state), x, loss=jnp.mean)": "received (float32[], TrainState). A step returns the loss and the "
    "state. Write loss, state = trainer.step(state, x, loss=loss_of_output).",
    "trainer.step(jnp.ones(()), x, loss=jnp.mean)": "received float32[]. A step returns the loss and the state.",
    "trainer.predict(x, state)": "received float32[8, 2]. The state comes first. Write trainer.predict(state, ...), with state = "
    "trainer.init().",
    "state.replace(params={})": "TrainState has no field 'params'. Write state.replace(vars=state.vars.replace(params=params)).",
    "state.replace(zz=1)": "Its fields are vars, opt_state, step, key.",
    "state.replace(vars=state.vars.params)": "state.replace expected kaun.Vars for vars, received dict. Write state.replace(vars="
    "state.vars.replace(params=params)).",
    # A trainer.
    "kaun.Trainer(model=model, optimizer=optimizer, loss=losses.mse)": "Trainer has no argument loss=: the loss belongs to "
    "the items of the data. Write data.with_loss(losses.mse).",
    "kaun.Trainer(model, optimizer)": "Trainer: too many positional arguments; its arguments have names, and both model and "
    "optimizer are needed. Write kaun.Trainer(model=model, optimizer=optax.adam(1e-3)).",
    "kaun.Trainer(model=model)": "Trainer: missing a required argument: 'optimizer'; its arguments have names",
    "kaun.Trainer(model=model, optimizer=optimizer, metrics=[])": "Trainer has no argument metrics=: metrics are given to",
    "kaun.Trainer(model=[model], optimizer=optimizer)": "Write model=layers.sequential([...]).",
    "trainer(x)": "'Trainer' object is not callable. Write trainer.predict(state, x).",
    "model(x)": "'Layer' object is not callable. Its weights are those of a state. Write trainer.predict(state, x), or y, "
    "vars = model.apply(vars, x).",
    "trainer.init(42)": "Trainer.init: too many positional arguments; the seed is that of the RNG scope. Write\n    with rng."
    "scope(42):\n        state = trainer.init()",
    "trainer.init(jnp.float32)": "state = trainer.init()\nA dtype has a name: trainer.init(dtype=jnp.float32)",
    "trainer.init(seed=7)": "Trainer.init has no argument seed=: the seed is that of the RNG scope. Write\n    with rng.scope(7):",
    "trainer.predict(x)": "Trainer.predict: missing a required argument: 'x'; the state comes first. Write trainer.predict("
    "state, x).",
    "trainer.evaluate(x, y)": "it takes a state, the data and the metrics. Write trainer.evaluate(state, Data.batches((x, y), "
    'batch_size=256), {"accuracy": metrics.accuracy}).',
    "kaun.summary(model, x)": "received Layer. Write summary(kaun.Trainer(model=model, optimizer=optax.adam(1e-3)), x).",
    "kaun.summary(trainer, (None, 2))": "received the shape (None, 2). Write kaun.summary(trainer, jax.ShapeDtypeStruct((32, 2), "
    "jnp.float32)), with the axis of the batch.",
    "kaun.summary(trainer)": "summary: missing a required argument: 'x'; it takes a trainer and an input",
    "kaun.Ensemble(trainer)": "it takes a trainer and how many members. Write kaun.Ensemble(trainer, 8).",
    "kaun.Ensemble(trainer, 2).fit(state, train, epochs=3)": "Ensemble.fit has no argument epochs=: the data say how many",
    # Data and reports.
    "Data.batches(x, y, batch_size=4)": "the arrays are one argument. Write Data.batches((x, y), batch_size=32).",
    "Data.from_arrays(x, y, batch_size=4)": "its items are rows. Write Data.batches((x, y), batch_size=4).",
    "Data(x, y)": "Data is made by its class methods: Data.batches((x, y), batch_size=64) for arrays",
    "Data.repeat((x, jnp.mean), 3)": "expected an int for n, received (float32[8, 2], mean). Write Data.repeat(n, item), in this "
    "order.",
    "data.repeat(3)": "it repeats one item, Data.repeat(1000, (x, loss)). For several passes write data.epochs(n).",
    "data.shuffle(1000)": "it takes no buffer size: rows come from all the data. Write data.shuffle().",
    "data.with_loss(of_library('torch.nn.modules.loss', 'CrossEntropyLoss'))": "of PyTorch, which does not compute with JAX. "
    "Write losses.cross_entropy_sparse.",
    "data.with_loss(function_of('torch.nn.functional', 'mse_loss'))": "received mse_loss of PyTorch, which does not compute "
    "with JAX. Write losses.mse.",
    "data.with_loss(of_library('keras.src.losses', 'MeanSquaredError'))": "of Keras, which does not compute with JAX. Write "
    "losses.mse.",
    "trainer.evaluate(state, data, {'a': function_of('sklearn.metrics._classification', 'f1_score')})": "expected the metric "
    "'a' to be a function of JAX arrays, received f1_score of scikit-learn, which does not compute with JAX. Write metrics.f1.",
    "reports.validate(trainer, data, {'a': function_of('sklearn.metrics', 'log')}, each=1)": "Write one of kaun.metrics, or a "
    "function with jax.numpy.",
    "reports.each_epoch(2, print)": "expected the pipeline of one epoch first, received 2. Write each_epoch(train, f), where "
    "fit gets train.epochs(n); for each 2 steps every(2, report).",
    "reports.early_stopping('loss', patience=3)": "it needs mode= and patience=. Write reports.early_stopping(\"loss\", mode=",
    "reports.EarlyStopping('loss', patience=3)": "its function makes it. Write stopper = reports.early_stopping(",
    "kaun.checkpoint.Directory('runs', save_best_only=True)": "checkpoint.Directory has no argument save_best_only=: write best="
    '("accuracy", "max"), with the name of a value that a report measures.',
    "kaun.checkpoint.Directory()": "it takes the folder, and all else by name. Write checkpoint.Directory(",
    "losses.cross_entropy_sparse(x, np.array(['a', 'b'] * 4))": "cross_entropy_sparse expected numbers for indices, received "
    "str32[8]. For class indices of other values write classes, indices = np.unique(indices, return_inverse=True).",
    # Layers.
    "layers.linear(2, 4, activation='relu')": "an activation is a layer. Write layers.sequential([layers.linear(...), "
    "layers.relu()]).",
    "layers.linear(2, 4, activation=jnp.tanh)": "layers.tanh()]).",
    "layers.linear(64)": "missing a required argument: 'out_features'; it takes both sizes. Write layers.linear(in_features, "
    "out_features).",
    "layers.linear(2, 4, use_bias=False)": "layers.linear has no argument use_bias=: write bias=False.",
    "layers.linear(2, 4, out_feature=3)": "layers.linear has no argument out_feature=: write out_features=3.",
    "layers.linear(2, 4, zz=3)": "its arguments are (in_features, out_features, bias=True, *, weight_init=..., bias_init=...).",
    "layers.sequential(model, layers.relu())": "the layers are one list. Write layers.sequential([a, b]).",
    "layers.sequential([model, jax.nn.relu])": "sequential expected layers, received relu. Write layers.relu().",
    "layers.sequential([model, jax.nn.hard_tanh])": "For a plain function write layers.fn(jax.nn.hard_tanh).",
    "model >> jnp.sin": "compose expected layers, received sin. For a plain function write layers.fn(jnp.sin).",
    "layers.sequential([model, layers.relu])": "received relu. Call it: layers.relu().",
    "layers.sequential([layers.linear])": "received linear. Call it: layers.linear(in_features, out_features).",
    "layers.dropout(p=0.5)": "layers.dropout has no argument p=: write rate=0.5, or layers.dropout(0.5).",
    "layers.embedding(num_embeddings=9, embedding_dim=3)": "write vocab_size=9.\nlayers.embedding has no argument embedding_dim=: "
    "write embed_dim=3.",
    "layers.conv2d(1, 8, strides=2)": "layers.conv2d has no argument strides=: write stride=2.",
    "layers.conv2d(1, 8, kernel=3)": "layers.conv2d has no argument kernel=: write kernel_size=3.",
    "layers.sequential([model, 'relu'])": "received 'relu'. Write layers.relu().",
    "layers.sequential([('a', model)])": 'Names are the keys of a dict. Write layers.sequential({"hidden": a, "out": b}).',
    "layers.sequential([[model]])": "Write its layers in the same list, or layers.sequential([...]) in place of it.",
    "layers.sequential([model, None])": "received None. Leave it out.",
    "layers.relu(x)": "layers.relu: too many positional arguments; it makes a layer, and the model applies it.",
    # Models of other libraries.
    "kaun.Trainer(model=of_library('flax.nnx.module'), optimizer=optimizer)": "received Dense. Write model=interop.flax_nnx("
    "module).",
    "kaun.Trainer(model=of_library('flax.linen.module'), optimizer=optimizer)": "Write model=interop.linen(module, sample)",
    "kaun.Trainer(model=type(of_library('flax.linen.module')), optimizer=optimizer)": "Dense is a class: make the module first, "
    "write model=interop.linen(module, sample)",
    "kaun.Trainer(model=of_library('equinox._module'), optimizer=optimizer)": "Write model=interop.equinox(module).",
    "kaun.Trainer(model=of_library('haiku._src.module'), optimizer=optimizer)": "Write model=interop.haiku(hk.transform_with_"
    "state(forward), sample)",
    "kaun.Trainer(model=of_library('torch.nn.modules.module'), optimizer=optimizer)": "There is no adapter for models of "
    "PyTorch: write the model with kaun.layers, and copy its weights, vars = interop.safetensors.into(model.init(), ",
    "kaun.Trainer(model=of_library('keras.src.layers.layer'), optimizer=optimizer)": "There is no adapter for models of Keras",
    "layers.sequential([of_library('flax.nnx.module')])": "sequential expected layers, received Dense. Write interop.flax_nnx("
    "module).",
    "model >> of_library('equinox._module')": "compose expected layers, received Dense. Write interop.equinox(module).",
}  # fmt: skip

NAMES = {
    "trainer.save": "'Trainer' object has no attribute 'save'. Write checkpoint.save(path, state)",
    "trainer.load": "Write state = checkpoint.load(path, like=trainer.init()).",
    "trainer.compile": "Nothing is compiled ahead. Write trainer = kaun.Trainer(model=model, optimizer=",
    "trainer.train": "There is no mode to set: fit and step train, predict and evaluate do not. Write state = trainer.fit(",
    "trainer.eval": "Write trainer.predict(state, x).",
    "trainer.zz": "'Trainer' object has no attribute 'zz'",
    "state.save": "it has vars, opt_state, step and key. Write checkpoint.save(path, state).",
    "state.params": "Write state.vars.params.",
    "model.parameters": "A model has no parameters itself: those of a state are state.vars.params.",
    "data.with_los": "'Data' object has no attribute 'with_los'. Write data.with_loss.",
    "data.zz": "'Data' object has no attribute 'zz'",
    "trainer.predit": "Write trainer.predict.",
    "model.aply": "Write model.apply.",
    "history.history": "Write history.losses, of each step, history.epochs, their averages, or history.results.",
    "history.los": "Write history.losses.",
    "stopper.best_state": "'EarlyStopping' object has no attribute 'best_state'. Write stopper.best.",
    "data.cache": "Arrays in memory need none.",
    "kaun.fit": "module 'kaun' has no attribute 'fit'. Write trainer = kaun.Trainer(model=model, optimizer=optimizer), state",
    "kaun.nn": "Write kaun.layers.",
    "kaun.Linear": "module 'kaun' has no attribute 'Linear'. Write layers.linear(in_features, out_features).",
    "kaun.MSELoss": "Write losses.mse.",
    "kaun.ReduceLROnPlateau": "The optimizer does it: optax.chain(",
    "kaun.Trianer": "Write kaun.Trainer.",
    "kaun.zz": "It has Context, Data, EarlyStop,",
    "kaun.interop.keras": "There is no adapter for its models: write the model with kaun.layers, and copy its weights",
    "kaun.interop.nnx": "Write interop.flax_nnx(module).",
    "kaun.checkpoint.CheckpointManager": "Write checkpoint.Directory(path).",
    "kaun.sharding.ddp": "Write sharding.data_parallel().",
    "kaun.averages.EMA": "Write averages.ema(decay).",
    "layers.Linear": "module 'kaun.layers' has no attribute 'Linear'. Write layers.linear(in_features, out_features).",
    "layers.dense": "Write layers.linear(in_features, out_features).",
    "layers.Conv2D": "Write layers.conv2d(in_channels, out_channels).",
    "layers.MaxPooling2D": "Write layers.max_pool2d(kernel_size).",
    "layers.BatchNorm1d": "Write layers.batch_norm(num_features).",
    "layers.MultiHeadDotProductAttention": "Write layers.multi_head_attention(embed_dim, num_heads).",
    "layers.ReLU": "Write layers.relu().",
    "layers.Input": "A model has no input layer",
    "layers.linaer": "Write layers.linear(in_features, out_features).",
    "layers.zz": "module 'kaun.layers' has no attribute 'zz'",
    "losses.MSELoss": "Write losses.mse.",
    "losses.CrossEntropyLoss": "Write losses.cross_entropy_sparse for class indices, losses.cross_entropy for one-hot rows",
    "losses.SparseCategoricalCrossentropy": "Write losses.cross_entropy_sparse.",
    "losses.softmax_cross_entropy_with_integer_labels": "Write losses.cross_entropy_sparse.",
    "losses.sigmoid_binary_cross_entropy": "Write losses.binary_cross_entropy.",
    "losses.l2_loss": "Write losses.mse.",
    "metrics.accuracy_score": "Write metrics.accuracy.",
    "metrics.roc_auc_score": "Write metrics.auc.",
    "metrics.mean_squared_error": "A loss is a metric too: write losses.mse.",
    "reports.ModelCheckpoint": "fit keeps checkpoints. Write trainer.fit(state, data, checkpoints=checkpoint.Directory(path",
    "reports.CSVLogger": "Write reports.csv(path).",
}


def shown(error):
    """The text in a terminal."""
    return "".join(traceback.format_exception(error)).rstrip("\n")


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_call_says_what_to_write(call, names):
    with pytest.raises(TypeError if "early_stopping('val" not in call else ValueError) as caught:
        eval(call, names)
    assert CALLS[call] in str(caught.value)
    assert len(shown(caught.value).splitlines()) <= 30


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_not_there_says_what_to_write(name, names):
    owner, _, attribute = name.rpartition(".")
    with pytest.raises(AttributeError) as caught:
        eval(name, names)
    assert NAMES[name] in str(caught.value)
    assert len(shown(caught.value).splitlines()) <= 30
    assert not hasattr(eval(owner, names), attribute)


def test_a_name_that_is_a_module_of_kaun_says_what_to_write_until_something_imports_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "kaun.train")
    with pytest.raises(AttributeError, match=r"Write state = trainer\.fit"):
        kaun.__getattr__("train")


def test_signatures_are_the_true_ones():
    assert list(inspect.signature(kaun.Trainer.fit).parameters) == [
        "self", "state", "data", "ctx", "report", "checkpoints",
    ]  # fmt: skip
    assert str(inspect.signature(layers.dropout)) == "(rate: 'float') -> 'Layer[Float, Float]'"
    assert list(inspect.signature(kaun.Trainer).parameters)[:2] == ["model", "optimizer"]
    assert list(inspect.signature(Data.batches).parameters)[:2] == ["arrays", "batch_size"]
    assert kaun.Trainer.predict.__doc__.startswith("Return the model's output")


def test_an_error_of_the_function_itself_is_not_replaced():
    @explained("layers.linear")
    def inner(x):
        return x + f(x)  # noqa: F821

    @explained("layers.linear")
    def calls_another_wrongly(x):
        return len(x, x)

    with pytest.raises(NameError):
        inner(1)
    with pytest.raises(TypeError, match=r"^len\(\) takes exactly one argument \(2 given\)$"):
        calls_another_wrongly([])
