"""A training run as a user would write it, killed again and again by ``test_runs.py``; not a test.

Dropout, batch_norm, a schedule, shuffled epochs, a ragged last batch, reports that keep files and state.
"""

import hashlib
import sys
from pathlib import Path

import jax
import numpy as np
import optax

import kaun
from kaun import Data, checkpoint, layers, losses, metrics, reports, rng

EPOCHS = 8


def main(folder: Path) -> None:
    g = np.random.default_rng(0)
    x, y = g.normal(size=(90, 6)).astype(np.float32), g.integers(0, 3, 90).astype(np.int32)
    with rng.scope(7):
        model = layers.sequential([layers.linear(6, 3), layers.batch_norm(3), layers.dropout(0.3)])
        schedule = optax.warmup_cosine_decay_schedule(0.0, 0.05, 10, 12 * EPOCHS)
        trainer = kaun.Trainer(model=model, optimizer=optax.adamw(schedule))
        state = trainer.init()
        pairs = Data.batches((x, y), 8, shuffle=True)
        train = pairs.with_loss(losses.cross_entropy_sparse)
    history = reports.history()
    stopper = reports.early_stopping("accuracy", mode="max", patience=100)
    report = reports.all_of(
        reports.every(1, lambda step, loss, state: print(step, flush=True)),
        history,
        reports.jsonl(folder / "log.jsonl"),
        reports.csv(folder / "log.csv"),
        reports.validate(trainer, pairs, {"accuracy": metrics.accuracy}, each=train),
        stopper,
    )
    runs = checkpoint.Directory(folder / "checkpoints", every=5, best=("accuracy", "max"), forever=32)
    state = trainer.fit(state, train.epochs(EPOCHS), report=report, checkpoints=runs)
    best = runs.load(state, at="best")
    assert int(best.step) == stopper.best_step
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (best.vars, stopper.best.vars)), strict=True))
    digest = hashlib.sha256(repr(runs.steps()).encode())
    for leaf in jax.tree.leaves((state.vars, state.opt_state, state.step, stopper.best.vars, best.opt_state)):
        digest.update(np.asarray(leaf).tobytes())
    digest.update(history.losses.tobytes() + repr(history.results).encode())
    print("end", digest.hexdigest(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
