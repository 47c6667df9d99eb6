"""What to write in place of a call whose arguments Python refuses: by function, and by the argument.

Names that share a text are one key, with spaces between them. The argument "" stands for too many or too few
positional ones. In a text, {value} is what was given.
"""

from __future__ import annotations

from kaun._calls.layer_texts import DEVICE, LAYERS
from kaun._calls.measure_texts import MEASURES
from kaun._calls.renamed import spread, spread_all

__all__ = ["CALLS", "FIT", "FIT_TAKES", "STEP", "STEP_TAKES"]

_SEED = "the seed is that of the RNG scope. Write\n    with rng.scope({seed}):\n        state = trainer.init()"
_LOSS = "the loss belongs to the items of the data. Write data.with_loss(losses.mse)"
_MEASURE = (
    'metrics are given to evaluate. Write trainer.evaluate(state, data, {{"accuracy": metrics.accuracy}}), or during '
    'fit reports.validate(trainer, valid, {{"accuracy": metrics.accuracy}}, each=train)'
)
_BATCHED = "the data make the batches. Write Data.batches((x, y), batch_size={value})"
_PASSES = "the data say how many passes there are. Write trainer.fit(state, data.epochs({value}))"
_VALIDATE = (
    'a report validates. Write report=reports.validate(trainer, valid, {{"loss": losses.mse}}, each=train), with '
    "valid = Data.batches((x, y), batch_size=256)"
)

FIT_TAKES = "state, data, *, ctx=None, report=None, checkpoints=None"

FIT = spread({
    "epochs n_epochs num_epochs max_epochs": _PASSES,
    "steps max_steps steps_per_epoch":
        "the data say how many steps there are. Write trainer.fit(state, data.take({value}))",
    "initial_epoch": "write trainer.fit(state, data.epochs(n).skip(steps)), or resume with checkpoints=",
    "batch_size": _BATCHED,
    "shuffle": "the order belongs to the data. Write Data.batches((x, y), batch_size=32, shuffle=True)",
    "validation_data valid_data val_data eval_set val_dataloaders": _VALIDATE,
    "validation_split": "split the arrays first, x[:n] and x[n:]. Then " + _VALIDATE,
    "validation_freq": "write reports.validate(..., each=steps)",
    "callbacks callback reports": "write report=, with reports.all_of(a, b) for several",
    "verbose progress_bar": "a report shows the progress. Write report=reports.progress()",
    "progress": "write report=reports.progress()",
    "metrics": _MEASURE,
    "loss loss_fn": _LOSS,
    "optimizer": "the trainer has it. Write kaun.Trainer(model=model, optimizer=optimizer)",
    "learning_rate lr": "the optimizer has it. Write kaun.Trainer(model=model, optimizer=optax.adam({value}))",
    "class_weight": "the loss takes it. Write data.with_loss(functools.partial(losses.cross_entropy_sparse, "
    "class_weights=weights)), with an array [classes]",
    "sample_weight": "the data have it. Write Data.batches((x, y), batch_size=32, sample_weights=weights)",
    "checkpoint checkpoint_dir ckpt_path": "write checkpoints=checkpoint.Directory({value})",
    "resume": "a directory resumes. Write checkpoints=checkpoint.Directory(path)",
    "context": "write ctx=Context(name=array)",
    "seed key rng": _SEED,
    "training": "fit trains always. Without an update write trainer.evaluate(state, data, metrics)",
    "accumulate_grad_batches": "write kaun.Trainer(..., accumulate={value})",
    "train": "the data are the second argument. Write trainer.fit(state, data)",
    "x y":
        "it is a part of the data. Write trainer.fit(state, Data.batches((x, y), batch_size=32).with_loss(losses.mse))",
})  # fmt: skip
"""The arguments of ``fit`` in Keras, Lightning and scikit-learn."""

_TRAINER: dict[str, str] = {
    "": "its arguments have names, and both model and optimizer are needed. Write kaun.Trainer(model=model, "
    "optimizer=optax.adam(1e-3))",
    "loss loss_fn criterion": _LOSS,
    "metrics": _MEASURE,
    "max_epochs epochs": _PASSES,
    "batch_size": _BATCHED,
    "callbacks": "fit takes reports. Write trainer.fit(state, data, report=reports.all_of(a, b))",
    "report": "fit takes reports. Write trainer.fit(state, data, report=report)",
    "logger": "fit takes reports. Write trainer.fit(state, data, report=reports.tensorboard(folder))",
    "checkpoints": "fit takes them. Write trainer.fit(state, data, checkpoints=checkpoint.Directory(path))",
    "learning_rate lr": "the optimizer has it. Write optimizer=optax.adam({value})",
    "lr_scheduler": "the optimizer has it. Write optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, steps))",
    "schedule": "the optimizer has it. Write optimizer=optax.adam(schedule)",
    "weight_decay": "the optimizer has it. Write optimizer=optax.adamw(1e-3, weight_decay={value})",
    "gradient_clip_val clip": "the optimizer clips. Write optimizer=optax.chain(optax.clip_by_global_norm({value}), "
    "optax.adam(1e-3))",
    "seed key rng": _SEED,
    "dtype": "write trainer.init(dtype={value})",
    "mixed_precision": 'write precision="mixed_bfloat16"',
    "accumulate_grad_batches gradient_accumulation_steps": "write accumulate={value}",
    "ema": "write average=averages.ema(0.999)",
    "regularizer regularization": "write penalty=, a function of the parameters",
    "device devices accelerator": DEVICE,
    "freeze": 'write trainable=lambda path: path.startswith("head")',
    "params": "a state has the parameters. Write trainer.make_state(vars)",
}

STEP_TAKES = "state, x, *, loss, training=True, ctx=None"

STEP = spread({
    "": "Write loss, state = trainer.step(state, x, loss=lambda output: losses.mse(output, y)).",
    "y loss_fn criterion labels targets": "write loss=, a function of the output: lambda output: losses.mse(output, y)",
    "train": "write training={value}",
    "context": "write ctx=Context(name=array)",
    "metrics": "the loss may return a pair of its value and a dict of other scalars, for reports",
    "seed key rng":
        "the state has the key: the randomness of a step is a function of state.key and state.step. Leave it out",
})  # fmt: skip
"""The arguments of ``step`` in other libraries; "" is a whole sentence."""

_DATA = "the arrays are one argument. Write Data.batches((x, y), batch_size=32)"

CALLS = spread_all({
    "Trainer": _TRAINER,
    "Trainer.init": {
        "": f"{_SEED}\nA dtype has a name: trainer.init(dtype=jnp.float32)",
        "seed key rng rngs": _SEED,
    },
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
    "Ensemble.fit": {"": "it takes the states and the data. Write states = many.fit(states, data)", **FIT},
    "Ensemble.step": {
        **STEP,
        "": "a loss is a function of the output. Write loss, states = many.step(states, x, loss=lambda output: "
        "losses.mse(output, y))",
    },
    "Ensemble.init": {
        "": "the seed is that of the RNG scope. Write\n    with rng.scope({seed}):\n        states = many.init()\n"
        "A dtype has a name: many.init(dtype=jnp.float32)",
    },
    "Ensemble.predict": {"": "the states come first. Write many.predict(states, x)"},
    "Ensemble.evaluate": {
        "": "it takes the states, the data and the metrics. Write many.evaluate(states, data, "
        '{{"accuracy": metrics.accuracy}})',
    },
    "Ensemble": {
        "": "it takes a trainer and how many members. Write kaun.Ensemble(trainer, 8)",
        "model": "it takes a trainer. Write kaun.Ensemble(kaun.Trainer(model=model, optimizer=optimizer), 8)",
    },
    "summary": {
        "": "it takes a trainer and an input, for its shapes. Write kaun.summary(trainer, x)",
        "input_shape input_size":
            "it takes an input. Write kaun.summary(trainer, jax.ShapeDtypeStruct(shape, jnp.float32))",
        "depth": "it shows all layers. Leave it out",
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
    "Layer": {
        "": "its arguments have names. Write Layer(init=init, apply=apply)",
        "forward": "write apply=, a function (vars, x, *, training, ctx) -> (y, vars)",
        "params": "init makes them. Write def init(*, dtype): return Vars(params=params, state={{}}, dtype=dtype)",
    },
    "Layer.init": {
        "": "the seed is that of the RNG scope. Write\n    with rng.scope({seed}):\n        vars = model.init()\n"
        "A dtype has a name: model.init(dtype=jnp.float32)",
        "seed key rngs":
            "the seed is that of the RNG scope. Write\n    with rng.scope({seed}):\n        vars = model.init()",
        "input_shape x": "layers know their sizes. Leave it out",
    },
    "Layer.apply": {
        "": "it takes variables and an input, and returns both. Write y, vars = model.apply(vars, x)",
        "train": "write training={value}",
        "deterministic": "write training=False, the default",
        "mutable": "it returns the variables with the new state always. Leave it out",
        "rngs key": "keys are those of the RNG scope. Write with rng.scope({seed}): around the call",
        "context": "write ctx=Context(name=array)",
    },
    "Vars": {"": "write Vars(params={{...}}, state={{}}, dtype=jnp.float32)"},
    "Vars.replace": {"": "what is replaced has a name. Write vars.replace(params=params)"},
    "TrainState.replace": {"": "what is replaced has a name. Write state.replace(vars=vars)"},
    "TrainState.member": {"": "it takes the number of a member. Write states.member(0)"},
    "Context.set": {"": "it takes a name and an array. Write ctx.set(\"name\", array)"},
    "rng.scope": {
        "": "it takes one seed or key. Write\n    with rng.scope({seed}):\n        state = trainer.init()",
        "seed": "write rng.scope({value})",
        "key": "write rng.scope(key)",
    },
    "rng.next_key": {
        "": "it gives one key of the scope. Write jax.random.split(rng.next_key(), n) for n of them",
    },
    "checkpoint.save": {
        "": "the path comes first. Write checkpoint.save(\"digits.safetensors\", state)",
        "overwrite force": "a file of that name is replaced. Leave it out",
    },
    "checkpoint.load": {
        "": "it takes the path and a tree of the same structure. Write checkpoint.load(path, like=trainer.init())",
        "target item": "write like={value}",
        "strict": "it is strict always, in shapes, dtypes and names. Leave it out",
    },
    "checkpoint.Directory.load": {"": "it takes a state of the same structure. Write runs.load(like=trainer.init())"},
    "averages.ema": {
        "": "it takes the decay. Write Trainer(average=averages.ema(0.999))",
        "beta alpha momentum": "write averages.ema({value})",
    },
    "averages.swa": {"": "its arguments have names. Write averages.swa(start=1000, every=100)"},
    "sharding.mesh": {"": "its axes have names. Write sharding.mesh(data=4)"},
    "averages.update_statistics": {
        "": "it takes a trainer, a state and data. Write averages.update_statistics(trainer, state, data)",
    },
    "kaun.lr_range": {"": "it takes a trainer, a state and data. Write kaun.lr_range(trainer, state, data)"},
    "kaun.explain": {
        "": "it takes the trainer and the exception. Write\n    except kaun.NonFiniteLoss as error:\n        "
        "print(kaun.explain(trainer, error))",
    },
    "kaun.cache": {"": "it takes a folder. Write kaun.cache(\"~/.cache/kaun\")"},
    "Data.from_items": {"": "the items are one list. Write Data.from_items([a, b])"},
    "Data.from_fn": {"": "it takes how many items there are, and a function of their number. Write Data.from_fn(n, f)"},
    "Data.from_iterable": {
        "": "it takes a loader, or a function that makes one. Write Data.from_iterable(loader)",
        "batch_size": "write Data.from_iterable(loader).batch({value})",
    },
    "Data.folds": {
        "": "it takes the arrays, how many folds, and the size of a batch. Write Data.folds((x, y), 5, batch_size=32)",
        "n_splits": "write k={value}",
        "random_state": "the order is that of the RNG scope. Write with rng.scope({seed}): around it",
    },
    "Data.stack": {"": "the items are one list. Write Data.stack([a, b])"},
    "Data.map": {
        "": "it takes a function of an item. Write data.map(lambda item: ...)",
        "num_parallel_calls num_proc": "write data.map(f).prefetch(n): a thread reads ahead",
        "batched": "write data.map_batch(n, f)",
    },
    "Data.map_batch": {"": "it takes the size of a batch and a function of a list. Write data.map_batch(32, f)"},
    "Data.filter": {"": "it takes a function of an item to a bool. Write data.filter(lambda item: ...)"},
    "Data.random_map": {"": "it takes a function of a key and an item. Write data.random_map(lambda key, item: ...)"},
    "Data.batch": {
        "": "it takes the size of a batch. Write data.batch(32)",
        "batch_size": "write data.batch({value})",
        "drop_remainder": "write drop_last={value}",
    },
    "Data.take": {"": "it takes how many items. Write data.take(10)"},
    "Data.skip": {"": "it takes how many items. Write data.skip(10)"},
    "Data.prefetch": {
        "": "it takes how many items. Write data.prefetch(2)",
        "buffer_size": "write data.prefetch({value})",
    },
    "Data.epoch": {"": "it takes the number of a pass, from 0. Write data.epoch(e), or data.epochs(3) for several"},
    "Data.bucket": {
        "": "it takes the length of a row, the edges and the size of a batch. Write data.bucket(lambda row: "
        "len(row[0]), [16, 32], batch_size=8)",
    },
    "Data.sample": {"": "it takes the weights and how many items to draw. Write data.sample(weights, n)"},
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
    "Data.epochs": {
        "": "it takes the number of passes. Write data.epochs(3)",
        "n_epochs num_epochs count": "write data.epochs({value})",
    },
    "checkpoint.Directory": {
        "": "it takes the folder, and all else by name. Write checkpoint.Directory(\"runs/digits\", every=500)",
        "save_best_only": 'write best=("accuracy", "max"), with the name of a value that a report measures',
        "monitor": 'write best=({value}, "max")',
        "max_to_keep save_top_k save_total_limit": "write keep={value}",
        "save_freq save_interval_steps every_n_train_steps": "write every={value}",
        "save_weights_only": "a checkpoint has all of the state. Leave it out, and read directory.load_vars(like)",
    },
    **LAYERS,
    **MEASURES,
})  # fmt: skip
"""By function; ``layers.conv`` and the like stand for a family."""
