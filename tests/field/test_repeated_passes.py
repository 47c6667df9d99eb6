"""A loop over epochs in Python trains in one order: the warning for it, and where there is none."""

import itertools
import warnings

import jax
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, rng
from kaun.data import newest_pass

TEXT = (
    r"received a pass on which this run was trained already, from step 0 on\. Each iteration of a shuffled or random "
    r"pipeline has the same order and the same random numbers\. For others in each epoch write "
    r"trainer.fit\(state, train.epochs\(3\)\), or take pass e as train.epoch\(e\)"
)
X = np.arange(12, dtype=np.float32).reshape(6, 2)


def fresh(seed=0):
    with rng.scope(seed):
        trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.01))
        return trainer, trainer.init()


def batches(shuffle=True, seed=0):
    with rng.scope(seed):
        return Data.batches((X, X[:, :1]), 2, shuffle=shuffle).with_loss(losses.mse)


def noisy():
    with rng.scope(0):
        return batches(False).random_map(lambda key, item: item)


def fit(trainer, state, train):
    return trainer.fit(state, train)


def steps(trainer, state, train):
    for x, loss in train:
        _, state = trainer.step(state, x, loss=loss)
    return state


ENTRIES = {"fit": fit, "step": steps}


PASSES = {
    "batches": batches,
    "random_map": noisy,
    "prefetch": lambda: batches().prefetch(1),
    "map": lambda: batches().map(lambda b: b),
    "items": lambda: Data.from_items([(X, _mean)] * 3).shuffle(),
}
IN_SHORT = {
    *(("fit", name) for name in ("batches", "map", "random_map", "items")),
    ("step", "batches"),
    ("step", "prefetch"),
}


@pytest.mark.parametrize(
    ("entry", "made"),
    [
        pytest.param(*case, marks=() if case in IN_SHORT else pytest.mark.slow)
        for case in itertools.product(ENTRIES, PASSES)
    ],
)
def test_a_loop_over_epochs_warns_once(entry, made):
    """`for _ in range(3): state = trainer.fit(state, train)`, as in other libraries: 3 epochs in one order."""
    trainer, state = fresh()
    with rng.scope(7):
        train = PASSES[made]()
    train_on = ENTRIES[entry]
    state = train_on(trainer, state, train)
    with pytest.warns(UserWarning, match=f"{entry} {TEXT}") as caught:
        state = train_on(trainer, state, train)
    (warning,) = caught
    assert warning.filename == __file__
    state = train_on(trainer, state, train)
    assert int(state.step) == 9


def _mean(out):
    return out.mean()


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_pipeline_that_is_made_again_in_the_loop_is_the_same_pass(entry):
    trainer, state = fresh()
    state = ENTRIES[entry](trainer, state, batches())
    with pytest.warns(UserWarning, match=TEXT):
        ENTRIES["fit"](trainer, state, batches().epoch(0))


@pytest.mark.parametrize("entry", ENTRIES)
def test_passes_that_are_others_do_not_warn(entry):
    train_on, train = ENTRIES[entry], batches()
    trainer, state = fresh()
    end = train_on(trainer, state, train.epochs(2))
    for e in range(2, 4):
        end = train_on(trainer, end, train.epoch(e))
    end = train_on(trainer, end, train.epochs(9).skip(12))
    end = train_on(trainer, end, batches(seed=1))
    for _ in range(2):
        end = train_on(trainer, end, batches(shuffle=False))
    train_on(trainer, state, train)  # begins again
    train_on(trainer, trainer.init(), train)
    other, _ = fresh()
    train_on(other, end, train)


def test_the_same_epochs_again_warn():
    trainer, state = fresh()
    state = trainer.fit(state, batches().epochs(3))
    state = trainer.fit(state, batches().epochs(2))
    with pytest.warns(UserWarning, match=TEXT):
        trainer.fit(state, batches().epochs(3))


def test_items_that_are_looked_at_or_stepped_elsewhere_do_not_warn():
    """Between two steps on its own batches a script counts the rows of the training data."""
    trainer, state = fresh()
    train = batches()
    state = steps(trainer, state, train)
    rows = sum(len(x) for x, _ in train)
    items = iter(train)
    first = next(items)
    _, state = trainer.step(state, X, loss=_mean)
    other, begun = fresh(1)
    _, begun = other.step(begun, first[0], loss=first[1])
    assert rows == 6 and int(state.step) == 4
    with pytest.warns(UserWarning, match=f"step {TEXT}"):
        steps(trainer, state, itertools.islice(train, 1))


def test_a_step_inside_of_jit_and_a_loss_that_is_gone_cost_nothing():
    trainer, state = fresh()
    train = batches()
    for _ in range(2):
        for x, loss in train:
            state = jax.jit(lambda state, x, f=loss: trainer.step(state, x, loss=f)[1])(state, x)
            break
    items = iter(train)
    _, loss = next(items)
    assert newest_pass.loss is not None and newest_pass.loss() is loss
    items.close()
    del loss
    assert newest_pass.loss() is None


def test_a_resumed_run_does_not_warn(tmp_path):
    trainer, state = fresh()

    def report(step, loss, state):
        if step == 2:
            raise KeyError

    runs = kaun.checkpoint.Directory(tmp_path / "runs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError):
            trainer.fit(state, batches(), report=report, checkpoints=runs)
        for _ in range(2):
            assert int(trainer.fit(state, batches(), checkpoints=runs).step) == 3
