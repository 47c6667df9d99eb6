"""JAX's compile cache: a second process finds every program of the first, closures and all."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys

import jax
import jax.monitoring
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, metrics, rng

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
counts = {"hits": 0, "misses": 0}


def listen(event, **more):
    for name in counts:
        counts[name] += event == f"/jax/compilation_cache/cache_{name}"


jax.monitoring.register_event_listener(listen)
x = np.random.default_rng(0).normal(size=(23, 8, 8, 1)).astype(np.float32)
y = np.arange(23, dtype=np.int32) % 3
with rng.scope(0):
    if sys.argv[2] == "conv":
        parts = [layers.conv2d(1, 4), layers.batch_norm(4), layers.relu(), layers.dropout(0.5), layers.flatten()]
        model = layers.sequential([*parts, layers.linear(256, 3)])
    else:
        parts = [layers.flatten(), layers.linear(64, 4), layers.relu(), layers.dropout(0.5)]
        model = layers.sequential([*parts, layers.linear(4, 3)])
    trainer = kaun.Trainer(model=model, optimizer=optax.adam(1e-3))
    state = trainer.init()
    batches = Data.batches((x, y), batch_size=5, shuffle=True)
settings = {"alpha": 0.5, "names": {"a", "b", "c"}}
weights = np.array([1.0, 2.0, 3.0], np.float32)


def loss(b):
    return lambda out: losses.cross_entropy_sparse(out * weights[None] * settings["alpha"], b[1]) * len(settings["names"])


whole = batches.take(4)
state = trainer.fit(state, whole.map(lambda b: (b[0], loss(b))).epochs(2))
state = trainer.fit(state, whole.with_loss(losses.cross_entropy_sparse))
value, state = trainer.step(state, x[:5], loss=loss((x, y[:5])))
trainer.predict(state, x)
trainer.evaluate(state, batches, {"accuracy": metrics.accuracy, "own": lambda p, t: (p.sum(), p.size)})
print(json.dumps({**counts, "value": float(value), "compilations": len(trainer.compilations)}))
"""


def run(folder, model, seed, flags):
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(folder), model]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "XLA_FLAGS": flags}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", ["dense", pytest.param("conv", marks=pytest.mark.slow)])
def test_a_second_process_compiles_nothing(tmp_path, model, xla_flags):
    cold, warm = (run(tmp_path, model, seed, xla_flags) for seed in (1, 2))
    assert cold["misses"] > cold["compilations"] > 5
    assert warm["misses"] == 0 and warm["hits"] > warm["compilations"]
    assert warm["value"] == cold["value"]
