"""A run whose hyperparameters lie in its state is resumed with those that it began with, and no others."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, rng
from kaun._run.hyperparameters import changed_hyperparameters, hyperparameters
from kaun.checkpoint import Directory, ResumeMismatch

X = jnp.array([[1.0], [2.0]])
TRAIN = Data.repeat(4, (X, lambda out: losses.mse(out, 3 * X)))
TRAINER = kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.inject_hyperparams(optax.sgd)(0.1))


def start(rate):
    with rng.scope(0):
        state = TRAINER.init()
    inner = state.opt_state
    return state.replace(opt_state=inner._replace(hyperparams={"learning_rate": jnp.asarray(rate, jnp.float32)}))


def weight(state):
    return np.asarray(state.vars.params["weight"]).tobytes()


def begun(path):
    def report(step, loss, state):
        if step == 2:
            raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        TRAINER.fit(start(0.1), TRAIN, report=report, checkpoints=Directory(path))


def test_a_run_begun_with_other_hyperparameters_is_another_run(tmp_path):
    begun(tmp_path)
    report = lambda step, loss, state: None
    with pytest.raises(ResumeMismatch) as raised:
        TRAINER.fit(start(0.5), TRAIN, report=report, checkpoints=Directory(tmp_path))
    assert (
        "holds another run, at step 2. Its program differs:\n"
        "  opt_state.hyperparams.learning_rate was 0.1, is 0.5. It is a value of the state, and a resumed run continues "
        "with that of its checkpoint\nTo resume, make them equal again." in str(raised.value)
    )
    # As jnp.geomspace may differ between machines.
    near = start(np.nextafter(np.float32(0.1), np.float32(1)))
    with pytest.warns(UserWarning, match=r"learning_rate was 0\.1, is 0\.5"):
        accepted = TRAINER.fit(start(0.5), TRAIN, report=report, checkpoints=Directory(tmp_path, accept={"program"}))
    for state in (start(0.1), near):  # what was accepted did not change what the run began with
        assert weight(TRAINER.fit(state, TRAIN, report=report, checkpoints=Directory(tmp_path))) == weight(accepted)
    assert weight(accepted) == weight(TRAINER.fit(start(0.1), TRAIN))


def test_a_checkpoint_of_an_older_kaun_has_none(tmp_path):
    begun(tmp_path)
    (manifest,) = tmp_path.glob("step-*/manifest.json")
    found = json.loads(manifest.read_bytes())
    assert found["facts"].pop("hyperparameters") == {"opt_state.hyperparams.learning_rate": ["0.1"]}
    del found["sha256"]
    text = json.dumps(found, separators=(",", ":")).removesuffix("}").encode() + b',"sha256":"'
    manifest.write_bytes(text + hashlib.sha256(text).hexdigest().encode() + b'"}\n')
    end = TRAINER.fit(start(0.5), TRAIN, report=lambda step, loss, state: None, checkpoints=Directory(tmp_path))
    assert weight(end) == weight(TRAINER.fit(start(0.1), TRAIN))


def test_hyperparameters_of_members_are_named_and_counted():
    many = kaun.Ensemble(TRAINER, 3)
    with rng.scope(0):
        old, new = (hyperparameters(many.init(learning_rate=jnp.array(rates))) for rates in ([1, 2, 3], [1, 4, 5]))
    path = "opt_state.inner.hyperparams.learning_rate"
    assert old == {path: ["1.0", "2.0", "3.0"]} and changed_hyperparameters(old, old) == []
    (line,) = changed_hyperparameters(old, new)
    assert line.startswith(f"{path}[1] was 2.0, is 4.0, and 1 more of 3 differ. It is a value")
    large = start(jnp.zeros(5000))
    (line,) = changed_hyperparameters(hyperparameters(large), hyperparameters(start(1)))
    assert "was float32[5000], is 1 numbers" in line
    assert changed_hyperparameters({path: ["nan", "x"]}, {path: ["nan", "y"]})[0].startswith(f"{path}[1] was x, is y.")
    assert len(changed_hyperparameters({path: [{}, []]}, {path: ["0.1", "0.2"]})) == 1
