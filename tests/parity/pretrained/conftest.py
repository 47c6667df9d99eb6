"""What the tests of pretrained models share: the examples, the script that recorded values, and a step of training."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import rng
from kaun.interop import safetensors

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[2] / "examples"

# It needs torch, so it is loaded by the tests that need torch too.
collect_ignore = ["record.py"]


@pytest.fixture
def comes_back(tmp_path):
    """Check that what a mapping reads of a hub folder is written to the same names and bytes."""

    def check(folder, variables, mapping):
        weights = safetensors.load(folder)
        read = safetensors.into(variables, weights, mapping)
        safetensors.save(tmp_path / "back.safetensors", read, mapping, like=weights)
        again = safetensors.load(tmp_path / "back.safetensors")
        bits = lambda arrays: {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}
        assert bits(again) == bits(weights)

    return check


@pytest.fixture
def as_hub_folder(tmp_path):
    """Write trained variables to a folder that transformers reads, with the config.json of another folder."""

    def write(folder, variables, mapping, like):
        made = tmp_path / "trained"
        made.mkdir()
        shutil.copy(folder / "config.json", made)
        safetensors.save(made / "model.safetensors", variables, mapping, like=like)
        return made

    return write


@pytest.fixture(scope="session")
def gpt2(family):
    return family("gpt")


@pytest.fixture(scope="session")
def minilm(module_at):
    return module_at(EXAMPLES / "minilm.py")


@pytest.fixture(scope="session")
def record(module_at):
    for package in ("torch", "transformers"):
        pytest.importorskip(package)
    return module_at(HERE / "record.py")


@pytest.fixture
def same_training_step(record, comes_back, tmp_path):
    """A function that compares a model with one of transformers: logits, loss, and all parameters after a step of SGD."""
    import torch

    def compare(model, x, loss, reference, given, mapping, rate=0.5):
        record.shaken(reference).train()
        reference.save_pretrained(tmp_path / "before")
        out = reference(**{key: torch.tensor(value) for key, value in given.items()})
        out.loss.backward()
        torch.optim.SGD(reference.parameters(), lr=rate).step()
        reference.save_pretrained(tmp_path / "after")

        with rng.scope(0):
            variables = model.init(dtype=jnp.float32)
            start, expected = (
                safetensors.into(variables, safetensors.load(tmp_path / name), mapping) for name in ("before", "after")
            )
            trainer = kaun.Trainer(model=model, optimizer=optax.sgd(rate))
            state = trainer.make_state(start)
        comes_back(tmp_path / "before", variables, mapping)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        close(trainer.predict(state, x), out.logits.detach().numpy())
        value, after = trainer.step(state, x, loss=loss)
        close(value, out.loss.item())
        jax.tree.map(close, after.vars.params, expected.params)
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start.params, expected.params)
        # A bias of keys adds the same number to all logits, so that it has no gradient.
        return {path for path, by in kaun.tree.flatten(moved)[0].items() if by < 1e-4 and "k_proj.bias" not in path}

    return compare
