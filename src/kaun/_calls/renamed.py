"""What other libraries call the layers, losses, metrics and reports of kaun, and their methods of models."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ADVICE", "RENAMED", "spread", "spread_all"]


def spread(texts: Mapping[str, str]) -> dict[str, str]:
    """Return a table with an entry for each name, of one in which names that share a text are one key."""
    return {name: text for names, text in texts.items() for name in names.split(" ")}


def spread_all(tables: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    return {kind: spread(texts) for kind, texts in tables.items()}


# In lower case, without underscores and a "loss" at the end: names that differ in more than that.
RENAMED = spread_all({
    "layers": {
        "dense densegeneral fullyconnected lazylinear mlp": "linear", "conv": "conv2d",
        "convtranspose conv2dtranspose": "conv_transpose2d", "conv1dtranspose": "conv_transpose1d", "swish": "silu",
        "embed": "embedding", "batchnorm1d batchnorm2d batchnorm3d batchnormalization": "batch_norm",
        "layernormalization": "layer_norm", "rmsnormalization": "rms_norm", "groupnormalization": "group_norm",
        "instancenorm1d instancenorm2d instancenormalization": "instance_norm",
        "spatialdropout1d spatialdropout2d dropout1d dropout2d": "spatial_dropout",
        "droppath stochasticdepth": "drop_path", "simplernn": "rnn", "lstmcell optimizedlstmcell": "lstm",
        "grucell": "gru", "attention multiheadattention multiheaddotproductattention": "multi_head_attention",
        "maxpooling1d": "max_pool1d", "maxpooling2d maxpool": "max_pool2d", "avgpool averagepooling2d": "avg_pool2d",
        "averagepooling1d": "avg_pool1d",
        "adaptiveavgpool1d adaptiveavgpool2d globalaveragepooling1d globalaveragepooling2d": "global_avg_pool",
        "globalmaxpooling1d globalmaxpooling2d adaptivemaxpool2d": "global_max_pool",
        "upsample upsampling2d": "upsample2d", "lambda identity": "fn", "modulelist moduledict": "module",
        "list chain serial": "sequential", "rotaryembedding": "rope", "positionalencoding": "sinusoidal_positions",
        "positionalembedding": "positions",
    },
    "losses": {
        "l2 squarederror meansquarederror": "mse", "l1 absoluteerror meanabsoluteerror": "mae", "smoothl1": "huber",
        "crossentropy sparsecategoricalcrossentropy nll softmaxcrossentropywithintegerlabels": "cross_entropy_sparse",
        "categoricalcrossentropy softmaxcrossentropy": "cross_entropy",
        "bce bcewithlogits binarycrossentropywithlogits sigmoidbinarycrossentropy binarycrossentropy":
            "binary_cross_entropy",
        "binaryfocalcrossentropy sigmoidfocal": "focal", "kldiv kl kldivergence": "kl_divergence",
        "cosineembedding cosinesimilarity": "cosine_distance", "hingeembedding": "hinge", "tripletmargin": "triplet",
        "ntxent": "info_nce", "poisson": "poisson_nll", "logcosh": "log_cosh",
    },
    "metrics": {
        "accuracyscore sparsecategoricalaccuracy categoricalaccuracy multiclassaccuracy": "accuracy",
        "f1score fbetascore": "f1", "precisionscore": "precision", "recallscore": "recall",
        "rocaucscore auroc rocauc": "auc", "averageprecisionscore": "average_precision",
        "topkcategoricalaccuracy sparsetopkcategoricalaccuracy topkaccuracyscore": "top_k_accuracy", "r2score": "r2",
        "rootmeansquarederror": "rmse", "mae": "mean_absolute_error", "jaccardscore iou jaccardindex": "mean_iou",
        "confusionmatrix": "confusion_matrix", "mean average": "Tracker",
    },
    "reports": {
        "csvlogger": "csv", "tensorboardlogger": "tensorboard", "wandblogger": "wandb", "mlflowlogger": "mlflow",
        "tqdm progbarlogger progressbar tqdmprogressbar": "progress", "lambdacallback everyn periodic": "every",
        "timer": "time_limit", "callbacklist combine compose chain all": "all_of", "evaluation validation": "validate",
        "learningratemonitor": "learning_rate",
    },
    "averages": {
        "exponentialmovingaverage movingaverage": "ema", "averagedmodel swamodel stochasticweightaveraging": "swa",
        "updatebn": "update_statistics",
    },
    "checkpoint": {
        "checkpointmanager checkpointer modelcheckpoint": "Directory", "restore restorecheckpoint loadweights": "load",
        "savecheckpoint saveweights dump": "save",
    },
    "interop": {"nnx": "flax_nnx", "flax": "linen", "eqx": "equinox", "hk": "haiku"},
    "sharding": {
        "ddp dp distributeddataparallel pmap replicate": "data_parallel", "fullyshardeddataparallel zero": "fsdp",
    },
})  # fmt: skip

_SAVE = "Write checkpoint.save(path, state)"
_LOAD = "Write state = checkpoint.load(path, like=trainer.init())"
_OPTIMIZER = "An optimizer is one of optax, given to kaun.Trainer(model=model, optimizer=optax.adam(1e-3))."
_SCOPE = "Randomness is that of a scope. Write with rng.scope(42): around what draws."
_EVALUATION = "There is no mode to set: fit and step train, predict and evaluate do not."

ADVICE = spread_all({
    "Trainer": {
        "() apply forward": "Write trainer.predict(state, x).",
        "=": "write trainer = dataclasses.replace(trainer, {name}=...). It compiles its own programs.",
        "pickle": "a Trainer cannot be pickled: its model and optimizer are closures. Pickle the function that builds "
        "the trainer, and the state: pickle.dumps((build_trainer, state)); call build_trainer() in the other process.",
        "save save_model save_weights state_dict": f"{_SAVE}: the state has all that was trained.",
        "save_checkpoint": f"{_SAVE}, or during fit checkpoints=checkpoint.Directory(path).",
        "load load_model load_weights restore": f"{_LOAD}.",
        "compile": "Nothing is compiled ahead. Write trainer = kaun.Trainer(model=model, optimizer=optax.adam(1e-3)), "
        "and data.with_loss(losses.mse).",
        "train": f"{_EVALUATION} Write state = trainer.fit(state, data).",
        "eval": f"{_EVALUATION} Write trainer.predict(state, x).",
        "test score": 'Write trainer.evaluate(state, data, {"accuracy": metrics.accuracy}).',
        "validate": 'Write trainer.evaluate(state, data, {"accuracy": metrics.accuracy}), or during fit '
        "reports.validate(...).",
        "train_step training_step train_on_batch update":
            "Write loss, state = trainer.step(state, x, loss=lambda output: losses.mse(output, y)).",
        "predict_proba": "Write jax.nn.softmax(trainer.predict(state, x)).",
        "partial_fit fit_transform": "Write state = trainer.fit(state, data).",
        "summary": "Write kaun.summary(trainer, x).",
        "history": "A report keeps it. Write report=(history := reports.history()) in fit.",
        "callbacks": "Reports are given to fit. Write trainer.fit(state, data, report=reports.all_of(a, b)).",
        "loss": "The loss belongs to the data. Write data.with_loss(losses.mse).",
        "params weights parameters": "A trainer has no parameters itself: those of a state are state.vars.params.",
        "state": "A trainer holds no state. Write state = trainer.init(), state = trainer.fit(state, data).",
        "lr learning_rate": "The optimizer has it. Write dataclasses.replace(trainer, optimizer=optax.adam(1e-4)).",
        "zero_grad": "A step computes its own gradient: leave it out.",
        "backward": "A step computes the gradient. Write loss, state = trainer.step(state, x, loss=loss_of_output).",
        "to": "Arrays lie on JAX's default device. Write Trainer(..., sharding=sharding.data_parallel()) for several.",
        "cuda": "Arrays lie on JAX's default device, which is the GPU where JAX has one.",
        "replace": "Write dataclasses.replace(trainer, optimizer=optimizer).",
    },
    "TrainState": {
        "[]": "fit returns the state alone, state = trainer.fit(state, data), and step two values, loss, state = "
        "trainer.step(state, x, loss=loss_of_output). Of an ensemble, a member is states.member(i).",
        "[str]": "Write state.vars.params, nested dicts and lists of arrays.",
        "save": f"{_SAVE}.",
        "load restore": f"{_LOAD}.",
        "state_dict": f"{_SAVE}, or read state.vars.params.",
        "params weights parameters": "Write state.vars.params.",
        "state": "Write state.vars.state.",
        "dtype": "Write state.vars.dtype.",
        "apply_gradients": "Write loss, state = trainer.step(state, x, loss=lambda output: losses.mse(output, y)).",
        "apply_fn predict": "Write trainer.predict(state, x).",
        "fit": "Write state = trainer.fit(state, data).",
        "loss": "fit's report receives the loss. Write report=(history := reports.history()), history.losses.",
        "history": "A report keeps it. Write report=(history := reports.history()) in fit.",
        "backward": "A step computes the gradient. Write loss, state = trainer.step(state, x, loss=loss_of_output).",
        "eval train": _EVALUATION,
        "tx": "The trainer has the optimizer: trainer.optimizer.",
        "optimizer": "The trainer has the optimizer, trainer.optimizer, and the state what it keeps, state.opt_state.",
        "rng": "Write state.key.",
        "ema": "Write state.averaged, with Trainer(average=averages.ema(0.999)).",
        "members": "Write state.member(i).",
        "replace(params=)": "Write state.replace(vars=state.vars.replace(params=params)).",
        "replace(state=)": "Write state.replace(vars=state.vars.replace(state=state)).",
    },
    "Vars": {
        "[]": "Write vars.params, nested dicts and lists of arrays, or vars.state.",
        "=": "instead of .{name} = ..., make another one, vars = vars.replace({name}=...).",
        "weight": "Write vars.params, and in it the path of the layer.",
        "weights parameters": "Write vars.params.",
        "batch_stats": "Write vars.state.",
    },
    "Directory": {
        "restore": "Write runs.load(like=trainer.init()).",
        "save": "fit saves. Write trainer.fit(state, data, checkpoints=runs), or checkpoint.save(path, state).",
        "latest_step": "Write runs.steps()[-1].",
        "all_steps": "Write runs.steps().",
        "best_step": 'Write runs.load(like, at="best").step.',
    },
    "Tracker": {
        "update add log": 'Write tracker.observe("loss", loss).',
        "compute result avg": 'Write tracker.mean("loss").',
    },
    "Ensemble": {
        "[]": "Write [states.member(i) for i in range(many.n)] for the states of its members.",
        "members": "Write [states.member(i) for i in range(many.n)].",
        "models": "Its members share one model, many.trainer.model; their weights are states.member(i).vars.",
        "save": "Write checkpoint.save(path, states).",
        "load": "Write states = checkpoint.load(path, like=many.init()).",
    },
    "History": {
        "history": "Write history.losses, of each step, history.epochs, their averages, or history.results.",
        "loss train_loss": "Write history.losses.",
        "val_loss": "Write history.results, what reports.validate measured.",
        "epoch": "Write history.epochs.",
        "params": "A history has numbers alone: history.losses, history.epochs and history.results.",
        "show": "Write history.plot().",
        "model": "A history has numbers alone: the state is what fit returns.",
    },
    "EarlyStopping": {
        "best_state best_weights": "Write stopper.best.",
        "restore_best_weights": "Write state = stopper.best after fit.",
        "best_score": "Write stopper.best_value.",
        "best_epoch best_step": "Write stopper.best.step.",
        "stopped_epoch": "The state that fit returned says it: state.step.",
        "early_stop": "The state that fit returned says where it ended: state.step.",
    },
    "interop": {
        "torch pytorch keras tensorflow": "There is no adapter for its models: write the model with kaun.layers, and "
        "copy its weights, vars = interop.safetensors.into(model.init(), interop.safetensors.load(path), rules).",
    },
    "Layer": {
        "[]": "It is a function, and its parts are not kept. Write parts = [a, b], model = layers.sequential(parts); "
        "the parameters of the first one are state.vars.params[0].",
        "()": "Its weights are those of a state. Write trainer.predict(state, x), or y, vars = model.apply(vars, x).",
        "parameters params weights weight bias state_dict":
            "A model has no parameters itself: those of a state are state.vars.params.",
        "forward predict": "Write trainer.predict(state, x).",
        "fit": "Write trainer = kaun.Trainer(model=model, optimizer=optax.adam(1e-3)), state = trainer.init(), "
        "state = trainer.fit(state, data).",
        "compile": "Write trainer = kaun.Trainer(model=model, optimizer=optax.adam(1e-3)).",
        "summary": "Write kaun.summary(trainer, x).",
        "train eval": _EVALUATION,
        "save": f"{_SAVE}: a state has the weights.",
        "load": f"{_LOAD}.",
        "layers": "A model does not keep its layers: those of a sequential are the list that it was made of.",
        "zero_grad": "A step computes its own gradient: leave it out.",
        "cuda": "Arrays lie on JAX's default device, which is the GPU where JAX has one.",
        "add append": "A model does not change. Write layers.sequential([a, b]), or a >> b.",
        "trainable": 'The trainer says what trains: Trainer(..., trainable=lambda path: path.startswith("head")).',
        "to": "Arrays lie on JAX's default device. Write Trainer(..., sharding=sharding.data_parallel()) for several.",
    },
    "Data": {
        "load read_csv": "Load arrays first. Write Data.batches((x, y), batch_size=32).",
        "cache": "Arrays in memory need none. Write Data.from_items(list(data)) to keep what a slow pipeline makes.",
        "padded_batch": "Write data.bucket(length, edges, batch_size), or Data.batches(..., pad=True).",
        "enumerate": "Write Data.zip(Data.from_items(range(n)), data).",
        "interleave": "Write Data.mix(sources, weights).",
        "concatenate": "Write Data.concat(a, b).",
        "as_numpy_iterator": "Iterate it: for batch in data.",
        "split": "Write data.take(n) and data.skip(n), or split the arrays first.",
        "random_split": "Split the arrays first, or write Data.folds((x, y), k, batch_size).",
        "set_epoch": "Write data.epoch(e), or data.epochs(n): each pass in another order.",
        "augment": "Write data.random_map(lambda key, item: ...).",
        "apply": "Write data.map(f).",
        "to": "Arrays go to the device in fit.",
        "loader": "A Data is iterated as it is: trainer.fit(state, data).",
        "from_generator": "Write Data.from_iterable(f), with f a function without arguments that makes the generator.",
        "from_tensor_slices from_numpy": "Write Data.from_arrays(x, y), or Data.batches((x, y), batch_size=32).",
        "from_tensors": "Write Data.repeat(1, item).",
        "from_dataset": "Write Data.from_items(dataset) for one with len() and [i], Data.from_iterable(dataset) else.",
        "from_torch from_loader": "Write Data.from_iterable(loader).",
        "from_list": "Write Data.from_items(items).",
        "from_pandas": 'Write Data.batches((frame[["a"]].to_numpy(np.float32), frame["y"].to_numpy()), batch_size=32).',
        "from_dict": "Write Data.batches({\"x\": x, \"y\": y}, batch_size=32).",
        "range": "Write Data.from_items(range(n)).",
        "unbatch": "Write Data.from_arrays(x, y): its items are rows.",
        "window": "Write data.map_batch(n, f).",
        "cardinality": "Write len(data).",
        "reduce numpy": "Iterate it: for item in data.",
        "shape": "A pipeline has items, not one array. Write next(iter(data)) for the first.",
        "collate": "Write Data.stack(items), or data.map_batch(n, f).",
        "train_test_split": "Split the arrays first, x[:n] and x[n:], or write Data.folds((x, y), k, batch_size).",
    },
    "kaun": {
        "fit": "Write trainer = kaun.Trainer(model=model, optimizer=optimizer), state = trainer.init(), state = "
        "trainer.fit(state, data).",
        "train": "Write state = trainer.fit(state, data).",
        "compile": "Write trainer = kaun.Trainer(model=model, optimizer=optimizer).",
        "Model": "Write layers.sequential([...]), or layers.module(parts, forward).",
        "Module": "Write layers.module(parts, forward).",
        "Sequential": "Write layers.sequential([...]).",
        "nn": "Write kaun.layers.",
        "optim optimizers optimizer Adam AdamW SGD RMSprop Adagrad Lion": _OPTIMIZER,
        "DataLoader": "Write kaun.Data.batches((x, y), batch_size=32).",
        "Dataset": "Write kaun.Data.from_items(items).",
        "data": "Write kaun.Data.",
        "utils": "Write kaun.Data for pipelines, kaun.checkpoint for files.",
        "callbacks": "Write kaun.reports.",
        "loss": "Write kaun.losses.",
        "metric": "Write kaun.metrics.",
        "save": f"{_SAVE}.",
        "load": f"{_LOAD}.",
        "EarlyStopping": 'Write reports.early_stopping("accuracy", mode="max", patience=5).',
        "jit": "Write jax.jit. fit, step, predict and evaluate are compiled as they are.",
        "seed manual_seed set_seed random": _SCOPE,
        "State": "Write kaun.TrainState.",
        "activations": "Activations are layers, layers.relu(), or functions of jax.nn.",
        "initializers": "Initializers are those of jax.nn.initializers.",
        "evaluate": 'Write trainer.evaluate(state, data, {"accuracy": metrics.accuracy}).',
        "predict": "Write trainer.predict(state, x).",
    },
    "rng": {
        "seed manual_seed set_seed default_rng": _SCOPE,
        "key PRNGKey split": "Write rng.next_key(), and jax.random.split for several keys.",
    },
    "layers": {
        "Sequential": "Write layers.sequential([a, b]).",
        "Input InputLayer":
            "A model has no input layer: each layer says its sizes. Write layers.linear(in_features, out_features).",
        "Identity": "Write layers.fn(lambda x: x).",
        "Lambda": "Write layers.fn(f).",
        "Reshape": "Write layers.fn(lambda x: x.reshape(len(x), 4, 4)).",
        "Permute": "Write layers.fn(lambda x: x.transpose(0, 2, 1)).",
        "Add": "Write layers.residual(inner), or layers.module(parts, forward).",
        "Concatenate": "Write layers.module(parts, forward), with jnp.concatenate in forward.",
        "Rescaling": "Write layers.fn(lambda x: x / 255).",
        "Normalization": "Normalize the arrays first, or write layers.fn(lambda x: (x - mean) / std).",
        "Model": "Write layers.sequential([...]), or layers.module(parts, forward).",
        "Parameter": "Write layers.parameter(shape).",
        "Transformer TransformerEncoder TransformerEncoderLayer":
            "Write the block with layers.module, and layers.repeat(block, n) for n of them.",
        "GaussianNoise RandomFlip": "Write data.random_map(lambda key, item: ...) to augment.",
    },
    "losses": {
        "CrossEntropyLoss CrossEntropy NLLLoss nll_loss": "Write losses.cross_entropy_sparse for class indices, "
        "losses.cross_entropy for one-hot rows; both take logits.",
        "BCELoss BinaryCrossentropy":
            "Write losses.binary_cross_entropy, which takes logits: leave the sigmoid out of the model.",
    },
    "metrics": {
        "mse mean_squared_error MeanSquaredError loss Loss": "A loss is a metric too: write losses.mse.",
        "log_loss": "A loss is a metric too: write losses.cross_entropy_sparse.",
        "classification_report": "Write metrics.precision, metrics.recall and metrics.f1, or metrics.confusion_matrix.",
    },
    "reports": {
        "ModelCheckpoint": 'fit keeps checkpoints. Write trainer.fit(state, data, checkpoints='
        'checkpoint.Directory(path, best=("accuracy", "max"))).',
        "checkpoint BackupAndRestore":
            "fit keeps checkpoints. Write trainer.fit(state, data, checkpoints=checkpoint.Directory(path)).",
        "ReduceLROnPlateau": "The optimizer does it: optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau()).",
        "LearningRateScheduler": "The optimizer has it: optax.adam(optax.cosine_decay_schedule(1e-3, steps)).",
        "TerminateOnNaN": 'The trainer stops at the first: Trainer(..., on_nonfinite="raise"), the default.',
        "Callback": "Write a function (step, loss, state), or a subclass of reports.Report.",
        "EarlyStop": "Write raise kaun.EarlyStop.",
        "TensorBoard": "Write reports.tensorboard(folder).",
    },
})  # fmt: skip
"""By kind of object or module, and by name; "()" stands for a call of it, "=" for an assignment, "pickle" for that."""
