"""What to write in place of a call of a loss, a metric or a report whose arguments Python refuses, as in ``texts``."""

from __future__ import annotations

__all__ = ["MEASURES"]

_COUNTED = "it follows from the arrays. Leave it out"
_PATH = 'it writes a file. Write {name}("runs/log")'

MEASURES: dict[str, dict[str, str]] = {
    "losses": {
        "": "the function is the loss itself, which data.with_loss({name}) takes; its arguments are ({takes})",
        "reduction reduce size_average": "a loss is the mean. For the sum write {name}.parts(...).total",
        "from_logits": "it takes logits always. Leave it out, and leave softmax and sigmoid out of the model",
        "logits input target": "its arguments are ({takes})",
        "weight": "write weights= for elements or rows; losses of classes take class_weights=, an array [classes]",
        "sample_weight": "write weights=, for each element or row",
        "class_weight": "losses of classes take class_weights=, an array [classes]",
        "mask": "write where=, a bool mask",
        "axis dim": "classes are the last axis. Leave it out",
        "num_classes": _COUNTED,
        "beta": "write delta={value}",
        "name": "values have the names of the dict. Write {{\"mse\": losses.mse}} in evaluate and validate",
        "y_true y_pred": "the model's output comes first. Its arguments are ({takes})",
    },
    "losses.Mean": {
        "": "it takes two sums. Write losses.Mean((values * weights).sum(), weights.sum()), or "
        "losses.mse.parts(output, y)",
        "reduction reduce size_average": "a Mean is the quotient of its sums. For a sum return its total",
    },
    "metrics": {
        "": "the function is the metric itself, as in trainer.evaluate(state, data, {{\"name\": {name}}}); its "
        "arguments are ({takes})",
        "sample_weight sample_weights": "write weights=, for each row",
        "normalize": "it is the share always. Multiply it by the number of rows",
        "num_classes multiclass labels": _COUNTED,
        "task": "metrics.accuracy takes classes, metrics.binary_accuracy scores of yes and no. Leave it out",
        "pos_label": "for class 1 of two write a function of your own around metrics.Counted",
        "k topk": "write metrics.top_k_accuracy({value})",
        "squared": "write metrics.rmse for the root, losses.mse without it",
        "name": "values have the names of the dict. Write {{\"name\": {name}}} in evaluate and validate",
        "y_true y_pred y_score": "the model's output comes first. Its arguments are ({takes})",
        "preds target": "its arguments are ({takes})",
        "device": "arrays stay where they are. Leave it out",
    },
    "metrics.top_k_accuracy": {
        "": "it makes the metric. Write metrics.top_k_accuracy(5), then (scores, indices) are its arguments",
    },
    "metrics.Counted": {
        "": "it takes two functions, Counted(counts=..., result=...). For a metric of kaun write "
        "metrics.Counted.of(metrics.f1)",
    },
    "metrics.Tracker": {"": "it takes no argument. Write tracker = metrics.Tracker(), tracker.observe(\"loss\", loss)"},
    "metrics.Tracker.observe": {
        "": "a value has a name. Write tracker.observe(\"loss\", value)",
        "n": "each value counts once. Write metrics.evaluate(f, data) for means that count by rows",
        "step": "it keeps means alone. Write report=reports.jsonl(path) in fit for values of each step",
    },
    "metrics.evaluate": {
        "": "it takes a function of an item and the data. For a trained model write trainer.evaluate(state, data, "
        "{{\"accuracy\": metrics.accuracy}})",
    },
    "metrics.evaluate_many": {
        "": "it takes a function of an item and the data. For a trained model write trainer.evaluate(state, data, "
        "{{\"accuracy\": metrics.accuracy}})",
    },
    "reports": {
        "verbose": "leave it out; what it shows is that of its repr, print(report)",
        "log_every_n_steps every_n_steps": "write reports.every({value}, report)",
        "epoch": "write reports.each_epoch(train, f) for a function of the epoch",
    },
    "reports.history": {
        "": "it takes no argument, and keeps each step. Write history = reports.history()",
        "path": "it keeps values in memory. Write reports.jsonl({value}) or reports.csv({value}) for a file",
        "every": "it keeps each step. Leave it out",
    },
    "reports.History.plot": {
        "": "it takes the path of a picture, or none. Write history.plot(\"loss.svg\"), in a notebook history.plot()",
        "metric": "it shows all that was measured. Leave it out",
        "smooth": "write window={value}",
    },
    "reports.csv": {
        "": _PATH,
        "filename": "write reports.csv({value})",
        "append": "a run that is resumed appends to it. Leave it out",
    },
    "reports.jsonl": {"": _PATH, "filename": "write reports.jsonl({value})"},
    "reports.tensorboard": {
        "": "it takes a folder. Write reports.tensorboard(\"runs/digits\")",
        "log_dir logdir": "write reports.tensorboard({value})",
        "histogram_freq": "norms by layer are those of reports.watch(every=100). Leave it out",
    },
    "reports.wandb": {"": "settings have names, those of wandb.init. Write reports.wandb(project={value})"},
    "reports.time_limit": {
        "": "it takes minutes. Write reports.time_limit(minutes=30)",
        "hours": "write reports.time_limit(minutes=60 * {value})",
        "seconds": "write reports.time_limit(minutes={value} / 60)",
        "timedelta": "write reports.time_limit(minutes=30)",
    },
    "reports.learning_rate": {
        "": "it takes the schedule. Write reports.learning_rate(optax.cosine_decay_schedule(1e-3, steps))",
    },
    "reports.plot": {
        "": "it takes the path of a picture. Write reports.plot(\"curves.svg\"), or history.plot() after fit",
    },
    "reports.all_of": {"reports callbacks": "write reports.all_of(a, b)"},
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
        "every steps": "write each={value}",
    },
    "reports.progress": {
        "desc": "write description={value}",
        "epochs": "it counts steps, and knows their number from the data. Leave it out",
    },
    "reports.EarlyStopping": {
        "": "its function makes it. Write stopper = reports.early_stopping(\"loss\", mode=\"min\", patience=5)",
    },
}  # fmt: skip
"""By function; ``losses``, ``metrics`` and ``reports`` stand for all of a module. {takes} are the true arguments."""
