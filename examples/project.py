"""A whole project on handwritten digits: split, schedule, class weights, early stopping, resume, log, confusion matrix.

Run it with: python examples/project.py           (a few seconds; needs pip install ".[examples]")
         or: python examples/project.py --epochs 5 --folder somewhere

If it is killed, run it again: the result is the same as without the interruption. If it has finished, it gives the
result again without training.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import train_test_split
from sklearn.utils.class_weight import compute_class_weight

import kaun
from kaun import Data, checkpoint, layers, losses, metrics, reports, rng


def main(*, epochs=40, folder="runs/project", seed=0):
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    x, test_x, y, test_y = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    x, valid_x, y, valid_y = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    balance = compute_class_weight("balanced", classes=np.arange(10), y=y).astype(np.float32)
    loss = functools.partial(losses.cross_entropy_sparse, class_weights=balance)

    with rng.scope(seed):
        train = Data.batches((x, y), batch_size=64, shuffle=True, pad=True).with_loss(loss)
        steps = epochs * len(train)
        rate = optax.warmup_cosine_decay_schedule(0.0, 0.01, warmup_steps=steps // 10, decay_steps=steps)
        model = layers.sequential([layers.linear(64, 64), layers.relu(), layers.dropout(0.2), layers.linear(64, 10)])
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
        trainer = kaun.Trainer(model=model, optimizer=optimizer)
        state = trainer.init()

    valid, test = (Data.batches(arrays, batch_size=64, pad=True) for arrays in ((valid_x, valid_y), (test_x, test_y)))
    validation = reports.validate(trainer, valid, {"accuracy": metrics.accuracy, "loss": loss}, each=train)
    stopper = reports.early_stopping("accuracy", mode="max", patience=10)
    log = reports.csv(Path(folder, "log.csv"), epochs=True)
    report = reports.all_of(reports.progress(), validation, stopper, log)
    runs = checkpoint.Directory(folder, every=len(train))
    trainer.fit(state, train.epochs(epochs), report=report, checkpoints=runs)

    scores = {"accuracy": metrics.accuracy, "confusion": metrics.confusion_matrix}
    scores = trainer.evaluate(stopper.best, test, scores)
    print(f"step {stopper.best_step}: {scores['accuracy']:.2%} of the test images are correct")
    ConfusionMatrixDisplay(scores["confusion"]).plot().figure_.savefig(Path(folder, "confusion.svg"))
    return trainer, stopper, scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train, validate and test a classifier of handwritten digits.")
    parser.add_argument("--epochs", type=int, default=40, help="at most so many passes over the images (default 40)")
    parser.add_argument("--folder", default="runs/project", help="folder of the run (default runs/project)")
    main(**vars(parser.parse_args()))
