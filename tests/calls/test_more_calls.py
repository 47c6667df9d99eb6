"""More calls with the habits of PyTorch, Keras and scikit-learn: each says what to write. No program is compiled."""

import traceback

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, averages, checkpoint, layers, losses, metrics, reports, rng

CALLS = {
    "losses.mse(x, y, reduction='mean')": "losses.mse has no argument reduction=: a loss is the mean. For the "
    "sum write losses.mse.parts(...).total.",
    "losses.mse()": "losses.mse: missing a required argument: 'predictions'; the function is the loss itself, "
    "which data.with_loss(losses.mse) takes; its arguments are (predictions, targets, *, weights=None, "
    "where=None).",
    "losses.mse(x)": "losses.mse: missing a required argument: 'targets'; the function is the loss itself, which "
    "data.with_loss(losses.mse) takes; its arguments are (predictions, targets, *, weights=None, where=None).",
    "losses.mse.parts(x)": "losses.mse.parts: missing a required argument: 'targets'; the function is the loss "
    "itself, which data.with_loss(losses.mse.parts) takes; its arguments are (predictions, targets, *, "
    "weights=None, where=None).",
    "losses.cross_entropy_sparse(x, labels, from_logits=True)": "losses.cross_entropy_sparse has no argument "
    "from_logits=: it takes logits always. Leave it out, and leave softmax and sigmoid out of the model.",
    "losses.cross_entropy(x, weight=3)": "losses.cross_entropy has no argument weight=: write weights= for "
    "elements or rows; losses of classes take class_weights=, an array [classes].",
    "losses.huber(x, x, beta=1.0)": "losses.huber has no argument beta=: write delta=1.0.",
    "losses.focal(x, x, 1, 2, 3)": "losses.focal: too many positional arguments; the function is the loss "
    "itself, which data.with_loss(losses.focal) takes; its arguments are (logits, labels, alpha=None, "
    "gamma=2.0, *, weights=None, where=None).",
    "losses.mse(x, labels)": "mse expected equal shapes, received predictions float32[8, 2] and targets "
    "int32[8]: they are not broadcast. Make targets.shape equal predictions.shape.",
    "losses.mse(predictions=x, labels=y)": "losses.mse has no argument labels=: its arguments are (predictions, "
    "targets, *, weights=None, where=None). Write losses.mse(predictions, targets).",
    "losses.Mean(1.0, 2.0, reduction='sum')": "losses.Mean has no argument reduction=: a Mean is the quotient of its sums. "
    "For a sum return its total.",
    "losses.Mean(1.0)": "losses.Mean: missing a required argument: 'weight'; it takes two sums. Write losses.Mean((values * "
    "weights).sum(), weights.sum()), or losses.mse.parts(output, y).",
    "losses.triplet(x, x)": "losses.triplet: missing a required argument: 'negative'; the function is the loss "
    "itself, which data.with_loss(losses.triplet) takes; its arguments are (anchor, positive, negative, "
    "margin=1.0, *, weights=None, where=None).",
    "metrics.accuracy()": "metrics.accuracy: missing a required argument: 'predictions'; the function is the "
    'metric itself, as in trainer.evaluate(state, data, {"name": metrics.accuracy}); its arguments are '
    "(predictions, targets, *, weights=None).",
    "metrics.accuracy(x, labels, normalize=False)": "metrics.accuracy has no argument normalize=: it is the "
    "share always. Multiply it by the number of rows.",
    "metrics.top_k_accuracy()": "metrics.top_k_accuracy: missing a required argument: 'k'; it makes the metric. "
    "Write metrics.top_k_accuracy(5), then (scores, indices) are its arguments.",
    "metrics.top_k_accuracy(x, labels)": "metrics.top_k_accuracy: too many positional arguments; it makes the "
    "metric. Write metrics.top_k_accuracy(5), then (scores, indices) are its arguments.",
    "metrics.f1(x, labels, average='binary')": 'f1 expected average="macro", "micro" or "weighted", received '
    "'binary'.",
    "metrics.f1(x, labels, num_classes=3)": "f1 expected as many classes as the scores have columns, received "
    "num_classes=3 and predictions float32[8, 2]. Leave num_classes out.",
    "metrics.Tracker(3)": "metrics.Tracker: too many positional arguments; it takes no argument. Write tracker = "
    'metrics.Tracker(), tracker.observe("loss", loss).',
    "metrics.Tracker().observe(3)": "metrics.Tracker.observe: missing a required argument: 'value'; a value has "
    'a name. Write tracker.observe("loss", value).',
    "metrics.Counted()": "metrics.Counted: missing a required argument: 'counts'; it takes two functions, "
    "Counted(counts=..., result=...). For a metric of kaun write metrics.Counted.of(metrics.f1).",
    "metrics.evaluate(data)": "metrics.evaluate: missing a required argument: 'data'; it takes a function of an "
    'item and the data. For a trained model write trainer.evaluate(state, data, {"accuracy": '
    "metrics.accuracy}).",
    "many.step(states, x, y)": "Ensemble.step: too many positional arguments; a loss is a function of the "
    "output. Write loss, states = many.step(states, x, loss=lambda output: losses.mse(output, y)).",
    "many.step(states, x)": "Ensemble.step: missing a required argument: 'loss'; a loss is a function of the "
    "output. Write loss, states = many.step(states, x, loss=lambda output: losses.mse(output, y)).",
    "many.step(states, x, loss_fn=jnp.mean)": "Ensemble.step has no argument loss_fn=: write loss=, a function "
    "of the output: lambda output: losses.mse(output, y).",
    "many.fit(states)": "Ensemble.fit: missing a required argument: 'data'; it takes the states and the data. "
    "Write states = many.fit(states, data).",
    "many.predict(x)": "Ensemble.predict: missing a required argument: 'x'; the states come first. Write "
    "many.predict(states, x).",
    "many.init(42)": "Ensemble.init: too many positional arguments; the seed is that of the RNG scope. Write\n    "
    "with rng.scope(42):\n        states = many.init()\nA dtype has a name: many.init(dtype=jnp.float32)",
    "many.evaluate(states, data)": "Ensemble.evaluate: missing a required argument: 'metrics'; it takes the "
    'states, the data and the metrics. Write many.evaluate(states, data, {"accuracy": metrics.accuracy}).',
    "reports.history(100)": "reports.history: too many positional arguments; it takes no argument, and keeps "
    "each step. Write history = reports.history().",
    "reports.history(path='a')": "reports.history has no argument path=: it keeps values in memory. Write "
    "reports.jsonl('a') or reports.csv('a') for a file.",
    "reports.csv()": "reports.csv: missing a required argument: 'path'; it writes a file. Write "
    'reports.csv("runs/log").',
    "reports.tensorboard()": "reports.tensorboard: missing a required argument: 'folder'; it takes a folder. "
    'Write reports.tensorboard("runs/digits").',
    "reports.time_limit()": "reports.time_limit: missing a required argument: 'minutes'; it takes minutes. Write "
    "reports.time_limit(minutes=30).",
    "reports.time_limit(hours=3)": "reports.time_limit has no argument hours=: write "
    "reports.time_limit(minutes=60 * 3).",
    "reports.learning_rate()": "reports.learning_rate: missing a required argument: 'schedule'; it takes the "
    "schedule. Write reports.learning_rate(optax.cosine_decay_schedule(1e-3, steps)).",
    "reports.throughput(3)": "reports.throughput: too many positional arguments; its arguments are (*, "
    "tokens=None, flops=None, peak_flops=None).",
    "reports.plot()": "reports.plot: missing a required argument: 'path'; it takes the path of a picture. Write "
    'reports.plot("curves.svg"), or history.plot() after fit.',
    "reports.all_of(reports=[print])": "reports.all_of has no argument reports=: write reports.all_of(a, b).",
    "reports.validate(trainer, train, {'mse': losses.mse}, each=2)": "validate expected data of items (x, y), "
    'received items with a loss, which are for fit. Write validate(trainer, valid, {"loss": losses.mse}, '
    "each=train), with valid as it is before with_loss.",
    "reports.validate(trainer, [(x, losses.mse)], {'mse': losses.mse}, each=2)": "validate expected data of "
    'items (x, y), received items with a loss, which are for fit. Write validate(trainer, valid, {"loss": '
    "losses.mse}, each=train), with valid as it is before with_loss.",
    "history.plot('a', 'b', 'c')": "reports.History.plot: too many positional arguments; it takes the path of a "
    'picture, or none. Write history.plot("loss.svg"), in a notebook history.plot().',
    "Data.from_items()": "Data.from_items: missing a required argument: 'items'; the items are one list. Write "
    "Data.from_items([a, b]).",
    "Data.from_items(1, 2)": "Data.from_items: too many positional arguments; the items are one list. Write "
    "Data.from_items([a, b]).",
    "Data.from_fn(lambda i: i)": "Data.from_fn: missing a required argument: 'f'; it takes how many items there "
    "are, and a function of their number. Write Data.from_fn(n, f).",
    "Data.from_iterable()": "Data.from_iterable: missing a required argument: 'iterable'; it takes a loader, or "
    "a function that makes one. Write Data.from_iterable(loader).",
    "Data.folds((x, y))": "Data.folds: missing a required argument: 'k'; it takes the arrays, how many folds, "
    "and the size of a batch. Write Data.folds((x, y), 5, batch_size=32).",
    "Data.stack(1, 2)": "Data.stack: too many positional arguments; the items are one list. Write Data.stack([a, "
    "b]).",
    "Data.batches((x, y))": "Data.batches: missing a required argument: 'batch_size'; the arrays are one "
    "argument. Write Data.batches((x, y), batch_size=32).",
    "Data.batches((x, y), batch=4)": "Data.batches has no argument batch=: write batch_size=4.",
    "data[0]": "A pipeline is iterated: its items have no index. Write next(iter(data.skip(0))).",
    "data[0:3]": "A pipeline is iterated: its items have no index. Write list(data.skip(a).take(b - a)).",
    "data + data": "Data + Data: pipelines are not added. Write Data.concat(a, b).",
    "data.map(lambda x, y: x)": "takes (x, y). Write data.map(lambda item: f(*item)): an item (x, y) is one "
    "argument.",
    "data.filter(lambda x, y: True)": "takes (x, y). Write data.filter(lambda item: f(*item)): an item (x, y) is "
    "one argument.",
    "data.random_map(lambda item: item)": "takes (item). Write data.random_map(lambda key, item: ...).",
    "data.random_map(lambda key, x, y: x)": "takes (key, x, y). Write data.random_map(lambda key, item: f(key, "
    "*item)): an item (x, y) is one argument.",
    "data.map_batch(3, lambda: 0)": "takes (). Write data.map_batch(lambda items: ...).",
    "Data.from_fn(3, lambda: 0)": "takes (). Write Data.from_fn(lambda i: ...).",
    "data.map(model)": "map calls its function with (item), and `Layer` takes (). Write data.map(lambda item: "
    "...).",
    "data.map()": "Data.map: missing a required argument: 'f'; it takes a function of an item. Write "
    "data.map(lambda item: ...).",
    "data.batch()": "Data.batch: missing a required argument: 'n'; it takes the size of a batch. Write "
    "data.batch(32).",
    "data.batch(batch_size=3)": "Data.batch has no argument batch_size=: write data.batch(3).",
    "data.take()": "Data.take: missing a required argument: 'n'; it takes how many items. Write data.take(10).",
    "data.prefetch(buffer_size=3)": "Data.prefetch has no argument buffer_size=: write data.prefetch(3).",
    "data.epochs(n_epochs=3)": "Data.epochs has no argument n_epochs=: write data.epochs(3).",
    "data.epoch()": "Data.epoch: missing a required argument: 'e'; it takes the number of a pass, from 0. Write "
    "data.epoch(e), or data.epochs(3) for several.",
    "data.bucket(3)": "Data.bucket: missing a required argument: 'edges'; it takes the length of a row, the "
    "edges and the size of a batch. Write data.bucket(lambda row: len(row[0]), [16, 32], batch_size=8).",
    "data.sample(3)": "Data.sample: missing a required argument: 'n'; it takes the weights and how many items to "
    "draw. Write data.sample(weights, n).",
    "model.apply(x)": "Layer.apply: missing a required argument: 'x'; it takes variables and an input, and "
    "returns both. Write y, vars = model.apply(vars, x).",
    "model.apply(state.vars, x, train=True)": "Layer.apply has no argument train=: write training=True.",
    "model.init(42)": "Layer.init: too many positional arguments; the seed is that of the RNG scope. Write\n    "
    "with rng.scope(42):\n        vars = model.init()\nA dtype has a name: model.init(dtype=jnp.float32)",
    "model(x, y)": "'Layer' object is not callable. Its weights are those of a state. Write "
    "trainer.predict(state, x), or y, vars = model.apply(vars, x).",
    "kaun.Layer(model)": "Layer: too many positional arguments; its arguments have names. Write Layer(init=init, "
    "apply=apply).",
    "kaun.Vars(params={})": "Vars: missing a required argument: 'state'; write Vars(params={...}, state={}, "
    "dtype=jnp.float32).",
    "state.vars.replace(zz=3)": "Vars has no argument zz=: its arguments are (params, state, dtype).",
    "state.replace(3)": "TrainState.replace: too many positional arguments; what is replaced has a name. Write "
    "state.replace(vars=vars).",
    "state.member()": "TrainState.member: missing a required argument: 'i'; it takes the number of a member. "
    "Write states.member(0).",
    "kaun.Context().set('a')": "Context.set: missing a required argument: 'value'; it takes a name and an array. "
    'Write ctx.set("name", array).',
    "kaun.lr_range(trainer, train)": "kaun.lr_range: missing a required argument: 'data'; it takes a trainer, a "
    "state and data. Write kaun.lr_range(trainer, state, data).",
    "kaun.explain(trainer)": "kaun.explain: missing a required argument: 'error'; it takes the trainer and the "
    "exception. Write\n    except kaun.NonFiniteLoss as error:\n        print(kaun.explain(trainer, error))",
    "kaun.cache()": "kaun.cache: missing a required argument: 'path'; it takes a folder. Write "
    'kaun.cache("~/.cache/kaun").',
    "kaun.summary(trainer, x, depth=3)": "summary has no argument depth=: it shows all layers. Leave it out.",
    "rng.scope()": "rng.scope: missing a required argument: 'seed_or_key'; it takes one seed or key. Write\n    "
    "with rng.scope(42):\n        state = trainer.init()",
    "rng.scope(seed=3)": "rng.scope has no argument seed=: write rng.scope(3).",
    "rng.next_key(3)": "rng.next_key: too many positional arguments; it gives one key of the scope. Write "
    "jax.random.split(rng.next_key(), n) for n of them.",
    "kaun.grad.grad(lambda p: p)": "grad.grad: missing a required argument: 'params'; its arguments are (f, "
    "params). Write grad.grad(f, params).",
    "checkpoint.Directory('runs').load()": "checkpoint.Directory.load: missing a required argument: 'like'; it "
    "takes a state of the same structure. Write runs.load(like=trainer.init()).",
    "checkpoint.save(state)": "checkpoint.save: missing a required argument: 'tree'; the path comes first. Write "
    'checkpoint.save("digits.safetensors", state).',
    "checkpoint.load('x.safetensors')": "checkpoint.load: missing a required argument: 'like'; it takes the path "
    "and a tree of the same structure. Write checkpoint.load(path, like=trainer.init()).",
    "checkpoint.save('x', state, overwrite=True)": "checkpoint.save has no argument overwrite=: a file of that "
    "name is replaced. Leave it out.",
    "averages.ema()": "averages.ema: missing a required argument: 'decay'; it takes the decay. Write "
    "Trainer(average=averages.ema(0.999)).",
    "averages.ema(beta=0.9)": "averages.ema has no argument beta=: write averages.ema(0.9).",
    "averages.swa(10)": "averages.swa: too many positional arguments; its arguments have names. Write "
    "averages.swa(start=1000, every=100).",
    "averages.update_statistics(state)": "averages.update_statistics: missing a required argument: 'state'; it "
    "takes a trainer, a state and data. Write averages.update_statistics(trainer, state, data).",
    "trainer.fit(state, train, nonsense=1)": "fit has no argument nonsense=: its arguments are (state, data, *, ctx=None, "
    "report=None, checkpoints=None).",
    "trainer.step(state, x, loss=jnp.sum, nonsense=1)": "step has no argument nonsense=: its arguments are (state, x, *, "
    "loss, training=True, ctx=None).",
    "layers.residual()": "layers.residual: missing a required argument: 'inner'; its arguments are (inner). "
    "Write layers.residual(inner).",
    "layers.bidirectional(model, model)": "layers.bidirectional: too many positional arguments; its arguments are (layer). "
    "Write layers.bidirectional(layer).",
    "layers.mish(x)": "layers.mish: too many positional arguments; it makes a layer, and the model applies it. Write "
    "layers.sequential([..., layers.mish()]), or jax.nn on arrays.",
    "layers.elu(inplace=True)": "layers.elu has no argument inplace=: nothing is in place. Leave it out.",
    "layers.relu(negative_slope=0.2)": "layers.relu has no argument negative_slope=: write layers.leaky_relu(slope=0.2).",
    "layers.glu(dim=1)": "layers.glu has no argument dim=: it is the last axis. Leave it out.",
    "layers.conv_transpose2d(3, 4, 3, strides=2)": "layers.conv_transpose2d has no argument strides=: write stride=2.",
    "layers.conv1d(3, 4, 3, data_format='NCW')": "layers.conv1d has no argument data_format=: data are channels-last, "
    "[batch, ..., channels]. Write jnp.moveaxis(x, 1, -1) for data of PyTorch's layout.",
    "layers.drop_path(drop_prob=0.1)": "layers.drop_path has no argument drop_prob=: write rate=0.1, or layers.drop_path(0.1).",
    "layers.spatial_dropout()": "layers.spatial_dropout: missing a required argument: 'rate'; it takes the rate. Write "
    "layers.spatial_dropout(0.1).",
    "layers.rms_norm(normalized_shape=4)": "layers.rms_norm has no argument normalized_shape=: write dim=4.",
    "layers.group_norm(groups=2, channels=4)": "layers.group_norm has no argument groups=: write num_groups=2.\n"
    "layers.group_norm has no argument channels=: write num_channels=4.",
    "layers.instance_norm(3, affine=True)": "layers.instance_norm has no argument affine=: scale and shift are parameters "
    "always. Leave it out, or Trainer(..., trainable=) freezes them.",
    "layers.global_avg_pool(2)": "layers.global_avg_pool: too many positional arguments; it takes no argument. Write "
    "layers.global_avg_pool().",
    "layers.lora(model, r=4)": "layers.lora has no argument r=: write rank=4.",
    "layers.upsample2d(scale_factor=2)": "layers.upsample2d has no argument scale_factor=: write scale=2.",
    "layers.remat(model, model)": "remat(policy=...) expected None or a function of jax.checkpoint_policies, received "
    "linear(2, 1). Write policy=jax.checkpoint_policies.dots_saveable.",
    "kaun.sharding.mesh(4)": "sharding.mesh: too many positional arguments; its axes have names. Write sharding.mesh(data=4).",
    "layers.repeat(model)": "layers.repeat: missing a required argument: 'n'; its arguments are (layer, n, "
    "remat=False). Write layers.repeat(layer, n).",
    "layers.fn(model)": "fn expected a function of one argument, received the layer linear(2, 1). Use it as it is.",
    "layers.activation(model)": "activation expected a function of one array, received linear(2, 1). Write "
    "activation(jax.nn.relu6).",
    "layers.group_norm(8)": "layers.group_norm: missing a required argument: 'num_channels'; its arguments are "
    "(num_groups, num_channels, eps=1e-05). Write layers.group_norm(num_groups, num_channels).",
    "layers.softmax(dim=1)": "layers.softmax has no argument dim=: it is the last axis. Leave it out.",
    "layers.lstm(4, 8, return_sequences=True)": "layers.lstm has no argument return_sequences=: it returns all "
    "steps. For the last one write layers.lstm(...) >> layers.fn(lambda y: y[:, -1]), and of padded rows take the state, "
    "return_state=True.",
    "kaun.Trainer(model=model, optimizer=optax.adam)": "Trainer(optimizer=...) expected an object with init and "
    "update, as optax's have, received adam, which has no init and no update. Did you forget to call it? "
    "Write optimizer=optax.adam(1e-3).",
    "kaun.Trainer(model=model, optimizer=optimizer, average=averages.ema)": "Trainer(average=...) expected "
    "averages.ema(decay), averages.swa(start=, every=) or averages.from_optimizer(f), received ema. Did you "
    "forget to call it? Write average=averages.ema(0.999).",
    "trainer.init(dtype='no dtype')": "init(dtype=...) expected a floating dtype, received 'no dtype'. Use "
    "dtype=jnp.float32.",
}  # fmt: skip

NAMES = {
    "Data.from_generator": "type object 'Data' has no attribute 'from_generator'. Write Data.from_iterable(f), with f a function "
    "without arguments that makes the generator.",
    "Data.from_tensor_slices": "Write Data.from_arrays(x, y), or Data.batches((x, y), batch_size=32).",
    "Data.from_item": "type object 'Data' has no attribute 'from_item'. Write data.from_items.",
    "Data.zz": "type object 'Data' has no attribute 'zz'",
    "many.members": "Write [states.member(i) for i in range(many.n)].",
    "state.vars.weight": "'Vars' object has no attribute 'weight'. Write vars.params, and in it the path of the layer.",
    "checkpoint.Directory('runs').restore": "Write runs.load(like=trainer.init()).",
    "metrics.Tracker().update": 'Write tracker.observe("loss", loss).',
    "metrics.Tracker().summry": "Write tracker.summary.",
    "trainer.lr": "The optimizer has it. Write dataclasses.replace(trainer, optimizer=optax.adam(1e-4)).",
    "trainer.zero_grad": "A step computes its own gradient: leave it out.",
    "state.backward": "A step computes the gradient. Write loss, state = trainer.step(state, x, loss=loss_of_output).",
}


@pytest.fixture(scope="module")
def names():
    x, y = np.ones((8, 2), np.float32), np.ones((8, 1), np.float32)
    trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
    data, many = Data.batches((x, y), 4), kaun.Ensemble(trainer, 2)
    known = {"x": x, "y": y, "labels": np.zeros(8, np.int32), "trainer": trainer, "model": trainer.model, "data": data}
    known |= {"state": trainer.init(), "many": many, "states": many.init(), "train": data.with_loss(losses.mse)}
    known |= {"history": reports.history(), "optimizer": trainer.optimizer, "jnp": jnp, "optax": optax, "kaun": kaun}
    known |= {"Data": Data, "averages": averages, "checkpoint": checkpoint, "layers": layers, "losses": losses}
    return known | {"metrics": metrics, "reports": reports, "rng": rng}


def shown(error):
    return "".join(traceback.format_exception(error)).rstrip("\n").splitlines()


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_call_says_what_to_write(call, names):
    with pytest.raises((TypeError, ValueError)) as caught:
        eval(call, names)
    assert str(caught.value).endswith(CALLS[call])
    lines = shown(caught.value)
    assert len(lines) <= 30 and not [line for line in lines if "/src/kaun/" in line], lines


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_not_there_says_what_to_write(name, names):
    with pytest.raises(AttributeError) as caught:
        eval(name, names)
    assert str(caught.value).endswith(NAMES[name])
    lines = shown(caught.value)
    assert len(lines) <= 30 and not [line for line in lines if "/src/kaun/" in line], lines
