"""What to write in place of a call whose arguments Python refuses: by function, and by the argument.

The argument "" stands for too many or too few positional ones. In a text, {value} is what was given.
"""

from __future__ import annotations

__all__ = ["CALLS", "FIT", "FIT_TAKES", "OF_ALL"]

_SEED = "the seed is that of the RNG scope. Write\n    with rng.scope({seed}):\n        state = trainer.init()"
_LOSS = "the loss belongs to the items of the data. Write data.with_loss(losses.mse)"
_MEASURE = (
    'metrics are given to evaluate. Write trainer.evaluate(state, data, {{"accuracy": metrics.accuracy}}), or during '
    'fit reports.validate(trainer, valid, {{"accuracy": metrics.accuracy}}, each=train)'
)
_ACTIVATION = "an activation is a layer. Write layers.sequential([{name}(...), {layer}])"
_BIAS = "write bias={value}"
_SHUFFLED = "the order belongs to the data. Write Data.batches((x, y), batch_size=32, shuffle=True)"
_BATCHED = "the data make the batches. Write Data.batches((x, y), batch_size={value})"
_ITEMS = "it is a part of the data. Write trainer.fit(state, Data.batches((x, y), batch_size=32).with_loss(losses.mse))"
_PASSES = "the data say how many passes there are. Write trainer.fit(state, data.epochs({value}))"
_REPORT = "write report=, with reports.all_of(a, b) for several"
_VALIDATE = (
    'a report validates. Write report=reports.validate(trainer, valid, {{"loss": losses.mse}}, each=train), with '
    "valid = Data.batches((x, y), batch_size=256)"
)
_DEVICE = "arrays lie on JAX's default device. Write Trainer(..., sharding=sharding.data_parallel()) for several"
_LAST = (
    "data are channels-last, [batch, height, width, channels]. Write x.transpose(0, 2, 3, 1) for images from PyTorch"
)
_RATE = "write rate={value}, or layers.dropout({value})"
_BATCH_FIRST = "x is [batch, length, channels] always. Leave it out"

FIT_TAKES = "state, data, *, ctx=None, report=None, checkpoints=None"

FIT: dict[str, str] = {
    "epochs": _PASSES,
    "n_epochs": _PASSES,
    "num_epochs": _PASSES,
    "max_epochs": _PASSES,
    "steps": "the data say how many steps there are. Write trainer.fit(state, data.take({value}))",
    "max_steps": "the data say how many steps there are. Write trainer.fit(state, data.take({value}))",
    "steps_per_epoch": "the data say how many steps there are. Write trainer.fit(state, data.take({value}))",
    "initial_epoch": "write trainer.fit(state, data.epochs(n).skip(steps)), or resume with checkpoints=",
    "batch_size": _BATCHED,
    "shuffle": _SHUFFLED,
    "validation_data": _VALIDATE,
    "valid_data": _VALIDATE,
    "val_data": _VALIDATE,
    "eval_set": _VALIDATE,
    "val_dataloaders": _VALIDATE,
    "validation_split": "split the arrays first, x[:n] and x[n:]. Then " + _VALIDATE,
    "validation_freq": "write reports.validate(..., each=steps)",
    "callbacks": _REPORT,
    "callback": _REPORT,
    "reports": _REPORT,
    "verbose": "a report shows the progress. Write report=reports.progress()",
    "progress": "write report=reports.progress()",
    "progress_bar": "a report shows the progress. Write report=reports.progress()",
    "metrics": _MEASURE,
    "loss": _LOSS,
    "loss_fn": _LOSS,
    "optimizer": "the trainer has it. Write kaun.Trainer(model=model, optimizer=optimizer)",
    "learning_rate": "the optimizer has it. Write kaun.Trainer(model=model, optimizer=optax.adam({value}))",
    "lr": "the optimizer has it. Write kaun.Trainer(model=model, optimizer=optax.adam({value}))",
    "class_weight": "the loss takes it. Write data.with_loss(functools.partial(losses.cross_entropy_sparse, "
    "class_weights=weights)), with an array [classes]",
    "sample_weight": "the data have it. Write Data.batches((x, y), batch_size=32, sample_weights=weights)",
    "checkpoint": "write checkpoints=checkpoint.Directory({value})",
    "checkpoint_dir": "write checkpoints=checkpoint.Directory({value})",
    "ckpt_path": "write checkpoints=checkpoint.Directory({value})",
    "resume": "a directory resumes. Write checkpoints=checkpoint.Directory(path)",
    "context": "write ctx=Context(name=array)",
    "seed": _SEED,
    "key": _SEED,
    "rng": _SEED,
    "training": "fit trains always. Without an update write trainer.evaluate(state, data, metrics)",
    "accumulate_grad_batches": "write kaun.Trainer(..., accumulate={value})",
    "train": "the data are the second argument. Write trainer.fit(state, data)",
    "x": _ITEMS,
    "y": _ITEMS,
}
"""The arguments of ``fit`` in Keras, Lightning and scikit-learn."""

_TRAINER: dict[str, str] = {
    "": "its arguments have names, and both model and optimizer are needed. Write kaun.Trainer(model=model, "
    "optimizer=optax.adam(1e-3))",
    "loss": _LOSS,
    "loss_fn": _LOSS,
    "criterion": _LOSS,
    "metrics": _MEASURE,
    "max_epochs": _PASSES,
    "epochs": _PASSES,
    "batch_size": _BATCHED,
    "callbacks": "fit takes reports. Write trainer.fit(state, data, report=reports.all_of(a, b))",
    "report": "fit takes reports. Write trainer.fit(state, data, report=report)",
    "logger": "fit takes reports. Write trainer.fit(state, data, report=reports.tensorboard(folder))",
    "checkpoints": "fit takes them. Write trainer.fit(state, data, checkpoints=checkpoint.Directory(path))",
    "learning_rate": "the optimizer has it. Write optimizer=optax.adam({value})",
    "lr": "the optimizer has it. Write optimizer=optax.adam({value})",
    "lr_scheduler": "the optimizer has it. Write optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, steps))",
    "schedule": "the optimizer has it. Write optimizer=optax.adam(schedule)",
    "weight_decay": "the optimizer has it. Write optimizer=optax.adamw(1e-3, weight_decay={value})",
    "gradient_clip_val": "the optimizer clips. Write optimizer=optax.chain(optax.clip_by_global_norm({value}), "
    "optax.adam(1e-3))",
    "clip": "the optimizer clips. Write optimizer=optax.chain(optax.clip_by_global_norm({value}), optax.adam(1e-3))",
    "seed": _SEED,
    "key": _SEED,
    "rng": _SEED,
    "dtype": "write trainer.init(dtype={value})",
    "mixed_precision": 'write precision="mixed_bfloat16"',
    "accumulate_grad_batches": "write accumulate={value}",
    "gradient_accumulation_steps": "write accumulate={value}",
    "ema": "write average=averages.ema(0.999)",
    "regularizer": "write penalty=, a function of the parameters",
    "regularization": "write penalty=, a function of the parameters",
    "device": _DEVICE,
    "devices": _DEVICE,
    "accelerator": _DEVICE,
    "freeze": 'write trainable=lambda path: path.startswith("head")',
    "params": "a state has the parameters. Write trainer.make_state(vars)",
}

_DATA = "the arrays are one argument. Write Data.batches((x, y), batch_size=32)"

CALLS: dict[str, dict[str, str]] = {
    "Trainer": _TRAINER,
    "Trainer.init": {"": _SEED, "seed": _SEED, "key": _SEED, "rng": _SEED, "rngs": _SEED},
    "Trainer.make_state": {
        "": "it takes the variables alone. Write trainer.make_state(vars)",
        "params": "it takes variables. Write trainer.make_state(state.vars.replace(params=params))",
    },
    "Trainer.predict": {
        "": "the state comes first. Write trainer.predict(state, x)",
        "batch_size": "a Data has batches. Write trainer.predict(state, Data.batches(x, batch_size={value}))",
        "training": "predict is evaluation mode. Write trainer.step(state, x, loss=loss) to train",
        "verbose": "it shows nothing. Leave it out",
    },
    "Trainer.evaluate": {
        "": "it takes a state, the data and the metrics. Write trainer.evaluate(state, Data.batches((x, y), "
        'batch_size=256), {{"accuracy": metrics.accuracy}})',
        "batch_size": "the data make the batches. Write trainer.evaluate(state, Data.batches((x, y), "
        'batch_size={value}), {{"accuracy": metrics.accuracy}})',
        "verbose": "it shows nothing. Leave it out",
        "loss": 'a loss is a metric too. Write trainer.evaluate(state, data, {{"loss": losses.mse}})',
    },
    "Trainer.export": {"": "it takes the state and an input, for its shapes. Write trainer.export(state, x)"},
    "Trainer.flush": {"": "it takes the state. Write state = trainer.flush(state)"},
    "Ensemble.fit": FIT,
    "Ensemble": {
        "": "it takes a trainer and how many members. Write kaun.Ensemble(trainer, 8)",
        "model": "it takes a trainer. Write kaun.Ensemble(kaun.Trainer(model=model, optimizer=optimizer), 8)",
    },
    "summary": {
        "": "it takes a trainer and an input, for its shapes. Write kaun.summary(trainer, x)",
        "input_shape": "it takes an input. Write kaun.summary(trainer, jax.ShapeDtypeStruct(shape, jnp.float32))",
        "input_size": "it takes an input. Write kaun.summary(trainer, jax.ShapeDtypeStruct(shape, jnp.float32))",
    },
    "Data.batches": {
        "": _DATA,
        "batch_size": _DATA,
        "num_workers": "write data.prefetch(n): a thread reads ahead",
        "collate_fn": "write Data.from_items(items).map_batch(n, f)",
        "seed": "the order is that of the RNG scope. Write\n    with rng.scope({seed}):\n        data = "
        "Data.batches(arrays, batch_size=32, shuffle=True)",
        "epochs": "write Data.batches(...).epochs({value})",
        "weights": "write sample_weights=",
        "sampler": "write Data.from_arrays(x, y).sample(weights, n).batch(32)",
    },
    "Data.from_arrays": {
        "batch_size": "its items are rows. Write Data.batches((x, y), batch_size={value})",
        "shuffle": "write Data.from_arrays(x, y).shuffle()",
    },
    "Data.repeat": {
        "": "it repeats one item, Data.repeat(1000, (x, loss)). For several passes write data.epochs(n)",
    },
    "Data.shuffle": {
        "": "it takes no buffer size: rows come from all the data. Write data.shuffle()",
        "buffer_size": "it takes no buffer size: rows come from all the data. Write data.shuffle()",
        "seed": "the order is that of the RNG scope. Write\n    with rng.scope({seed}):\n        data = data.shuffle()",
    },
    "Data.with_loss": {"": "it takes the loss alone, a function (output, y). Write data.with_loss(losses.mse)"},
    "Data.epochs": {"": "it takes the number of passes. Write data.epochs(3)"},
    "reports.each_epoch": {
        "": "it takes the pipeline of one epoch and a function. Write reports.each_epoch(train, lambda epoch, state: "
        "print(epoch))",
    },
    "reports.every": {"": "it takes a number of steps and a report. Write reports.every(100, report)"},
    "reports.early_stopping": {
        "": 'it needs mode= and patience=. Write reports.early_stopping("loss", mode="min", patience=5)',
        "restore_best_weights": "the best state is kept always. Write state = stopper.best after fit",
        "metric": "write monitor={value}",
        "verbose": "it shows nothing. Leave it out, and print(stopper) after fit",
        "baseline": "there is none. Write raise kaun.EarlyStop in a report of your own",
    },
    "reports.validate": {
        "": 'it takes four arguments. Write reports.validate(trainer, valid, {{"loss": losses.mse}}, each=train)',
        "every": "write each={value}",
        "steps": "write each={value}",
    },
    "reports.progress": {
        "desc": "write description={value}",
        "epochs": "it counts steps, and knows their number from the data. Leave it out",
    },
    "reports.EarlyStopping": {
        "": "its function makes it. Write stopper = reports.early_stopping(\"loss\", mode=\"min\", patience=5)",
    },
    "layers.sequential": {
        "": "the layers are one list. Write layers.sequential([a, b])",
        "name": "layers have no names of their own. Write layers.sequential({{\"hidden\": a, \"out\": b}}) for paths",
    },
    "layers.linear": {
        "": "it takes both sizes. Write layers.linear(in_features, out_features)",
        "units": "it takes both sizes. Write layers.linear(in_features, {value})",
        "features": "it takes both sizes. Write layers.linear(in_features, {value})",
        "input_shape": "it takes both sizes. Write layers.linear(in_features, out_features)",
        "input_dim": "it takes both sizes. Write layers.linear({value}, out_features)",
        "in_dim": "write in_features={value}",
        "out_dim": "write out_features={value}",
        "kernel_initializer": "write weight_init=, one of jax.nn.initializers",
        "kernel_init": "write weight_init=, one of jax.nn.initializers",
        "kernel_regularizer": "the trainer has it. Write Trainer(..., penalty=f), with f a function of the parameters",
    },
    "layers.dropout": {"": "it takes the rate. Write layers.dropout(0.1)", "p": _RATE, "drop_rate": _RATE},
    "layers.embedding": {
        "": "it takes both sizes. Write layers.embedding(vocab_size, embed_dim)",
        "num_embeddings": "write vocab_size={value}",
        "input_dim": "write vocab_size={value}",
        "embedding_dim": "write embed_dim={value}",
        "output_dim": "write embed_dim={value}",
        "features": "write embed_dim={value}",
        "padding_idx": "mask the loss instead. Write losses.cross_entropy_sparse(..., ignore_index={value})",
    },
    "layers.conv": {
        "": "it takes both numbers of channels. Write {name}(in_channels, out_channels, kernel_size=3)",
        "filters": "it takes both numbers of channels. Write {name}(in_channels, {value})",
        "features": "it takes both numbers of channels. Write {name}(in_channels, {value})",
        "strides": "write stride={value}",
        "dilation_rate": "write dilation={value}",
        "data_format": _LAST,
        "padding_mode": "padding is with zeros. Pad x with jnp.pad in layers.fn",
    },
    "layers.batch_norm": {
        "": "it takes the number of features. Write layers.batch_norm(num_features)",
        "affine": "scale and shift are parameters always. Leave it out, or Trainer(..., trainable=) freezes them",
        "epsilon": "write eps={value}",
        "use_running_average": "the mode says it: fit trains, predict and evaluate do not. Leave it out",
    },
    "layers.layer_norm": {
        "": "it takes the size of the last axis. Write layers.layer_norm(dim)",
        "normalized_shape": "write dim={value}",
        "epsilon": "write eps={value}",
    },
    "layers.recurrent": {
        "": "it takes both sizes. Write {name}(in_features, hidden)",
        "input_size": "write in_features={value}",
        "hidden_size": "write hidden={value}",
        "units": "it takes both sizes. Write {name}(in_features, {value})",
        "batch_first": _BATCH_FIRST,
        "return_sequences": "it returns all steps. For the last one write {name}(...) >> layers.fn(lambda y: y[:, -1])",
        "num_layers": "write layers.sequential([{name}(...), {name}(...)])",
        "bidirectional": "write layers.bidirectional({name}(...))",
    },
    "layers.multi_head_attention": {
        "": "it takes the size and the heads. Write layers.multi_head_attention(embed_dim, num_heads)",
        "dim": "write embed_dim={value}",
        "d_model": "write embed_dim={value}",
        "key_dim": "write head_dim={value}",
        "batch_first": _BATCH_FIRST,
        "causal": "write is_causal={value}",
        "mask": 'the Context has it. Write ctx=Context(attention_mask=mask)',
    },
    "layers.pool": {
        "": "it takes the size of the window. Write {name}(2)",
        "pool_size": "write kernel_size={value}",
        "strides": "write stride={value}",
    },
    "layers.activation": {
        "": "it makes a layer, and the model applies it. Write layers.sequential([..., {name}()]), or jax.nn on arrays",
        "inplace": "nothing is in place. Leave it out",
        "dim": "it is the last axis. Leave it out",
        "axis": "it is the last axis. Leave it out",
        "negative_slope": "write slope={value}",
    },
}  # fmt: skip
"""By function; ``layers.conv`` and the like stand for a family."""

OF_ALL: dict[str, str] = {
    "activation": _ACTIVATION,
    "use_bias": _BIAS,
    "name": 'layers have no names of their own. Write layers.sequential({{"hidden": a, "out": b}}) for paths',
    "dtype": "the variables have it. Write trainer.init(dtype={value})",
    "device": _DEVICE,
    "training": "the mode says it: fit trains, predict and evaluate do not. Leave it out",
    "train": "the mode says it: fit trains, predict and evaluate do not. Leave it out",
    "deterministic": "the mode says it: fit trains, predict and evaluate do not. Leave it out",
    "rngs": "keys are those of the RNG scope. Write with rng.scope(42): around trainer.init()",
    "key": "keys are those of the RNG scope. Write with rng.scope(42): around trainer.init()",
}
"""Arguments that are wrong in any layer."""
