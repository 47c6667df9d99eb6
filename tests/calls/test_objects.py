"""Objects that are no containers, values that do not change, and names that are near to a wrong one."""

import collections.abc
import traceback

import numpy as np
import optax
import pytest

import kaun
from kaun import Data, checkpoint, layers, losses, metrics, reports, rng

LOOP = (
    "'TrainState' object has no items. fit returns the state alone, state = trainer.fit(state, data), and step two values, "
    "loss, state = trainer.step(state, x, loss=loss_of_output). Of an ensemble, a member is states.member(i)."
)
MODEL = (
    "'Layer' object has no items. It is a function, and its parts are not kept. Write parts = [a, b], model = "
    "layers.sequential(parts); the parameters of the first one are state.vars.params[0]."
)
MEMBERS = (
    "'Ensemble' object has no items. Write [states.member(i) for i in range(many.n)] for the states of its members."
)
STOPPING = 'Write reports.early_stopping("accuracy", mode="max", patience=5).'
SCOPE = "Randomness is that of a scope. Write with rng.scope(42): around what draws."
KEYS = "Write rng.next_key(), and jax.random.split for several keys."
OPTAX = "An optimizer is one of optax, given to kaun.Trainer(model=model, optimizer=optax.adam(1e-3))."
CALLS = {
    "state['params']": "'TrainState' object has no items. Write state.vars.params, nested dicts and lists of arrays.",
    "state[0]": LOOP,
    "loss, new = state": LOOP,
    "list(state)": LOOP,
    "state.vars['weight']": "'Vars' object has no items. Write vars.params, nested dicts and lists of arrays, or vars.state.",
    "model[0]": MODEL,
    "model['hidden']": MODEL,
    "[layer for layer in model]": MODEL,
    "many[0]": MEMBERS,
    "list(many)": MEMBERS,
    "trainer.fit(state, model)": "received Layer. To train on one batch many times, write Data.repeat(1000, (x, loss)).",
    "reports.validate(trainer, state, {'mse': losses.mse}, each=2)": "received TrainState. Pass a kaun.Data or a list; for a generator write "
    "Data.from_items(list(generator)).",
    "metrics.evaluate(print, state)": "builtin_function_or_method and TrainState. Write evaluate(f, data).",
    "state.step += 1": "TrainState is immutable: use state = state.replace(step=...).",
    "state.vars.params = {}": "Vars is immutable: instead of .params = ..., make another one, vars = vars.replace(params=...).",
    "del state.vars.params": "instead of .params = ..., make another one, vars = vars.replace(params=...).",
    "model.name = 'a'": "make another layer, Layer(init=..., apply=...).",
    "model >> np.tanh": "compose expected layers, received tanh. Write layers.tanh().",
    "Data.batches(x, 4, y)": "Data.batches expected shuffle to be a bool, received float32[8, 1]. The arrays are one argument: "
    "Data.batches((x, y), batch_size=64).",
    "Data.folds(x, 2, 4, y)": "Data.folds expected shuffle to be a bool, received float32[8, 1]. The arrays are one argument: "
    "Data.folds((x, y), 5, batch_size=64).",
    "Data.zip([data, data])": "of a list of pipelines pass the pipelines, Data.zip(*sources).",
    "Data.mix(data, data)": "Make a Data of it first, Data.from_items(items) or Data.from_iterable(loader).",
    "losses.cross_entropy_sparse(x, y[:, 0].astype(int), class_weights={0: 1.0, 1: 5.0})": "received dict. Write jnp.asarray("
    "[class_weights[i] for i in range(len(class_weights))]).",
    "reports.combine": "Write reports.all_of(a, b).",
    "reports.CallbackList": "Write reports.all_of(a, b).",
    "layers.Sequential": "Write layers.sequential([a, b]).",
    "kaun.EarlyStopping": STOPPING,
    "kaun.Adam": OPTAX,
    "kaun.SGD": OPTAX,
    "kaun.jit": "Write jax.jit. fit, step, predict and evaluate are compiled as they are.",
    "rng.seed": SCOPE,
    "rng.manual_seed": SCOPE,
    "rng.PRNGKey": KEYS,
    "rng.split": KEYS,
    "Data.load": "Load arrays first. Write Data.batches((x, y), batch_size=32).",
    "Data.read_csv": "Load arrays first. Write Data.batches((x, y), batch_size=32).",
}  # fmt: skip


@pytest.fixture(scope="module")
def names():
    x, y = np.ones((8, 2), np.float32), np.ones((8, 1), np.float32)
    trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1))
    known = {
        "x": x,
        "y": y,
        "trainer": trainer,
        "model": trainer.model,
        "state": trainer.init(),
        "np": np,
        "kaun": kaun,
    }
    known |= {"many": kaun.Ensemble(trainer, 2), "data": Data.batches((x, y), 4), "Data": Data, "layers": layers}
    return known | {"losses": losses, "metrics": metrics, "reports": reports, "rng": rng, "checkpoint": checkpoint}


@pytest.mark.parametrize("call", CALLS)
def test_it_says_what_to_write(call, names):
    with pytest.raises((TypeError, AttributeError)) as caught:
        exec(call, names)
    assert str(caught.value).endswith(CALLS[call])
    lines = "".join(traceback.format_exception(caught.value)).splitlines()
    assert len(lines) <= 30 and not [line for line in lines if "/src/kaun/" in line], lines


def test_objects_without_items_are_none_to_python(names):
    for value in (names["state"], names["state"].vars, names["model"], names["many"]):
        assert not isinstance(value, (collections.abc.Iterable, collections.abc.Sequence))
        match value:
            case [*_]:
                pytest.fail("a sequence")
            case _:
                assert np.asarray(value).shape == ()
