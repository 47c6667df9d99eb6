"""What the tests of the two pretrained models share: the examples themselves, and the script that recorded the values."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from kaun.interop import safetensors

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[2] / "examples"

# It needs torch, so it is loaded by the tests that need torch too.
collect_ignore = ["record.py"]


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
def gpt2():
    return loaded(EXAMPLES / "gpt2.py")


@pytest.fixture(scope="session")
def minilm():
    return loaded(EXAMPLES / "minilm.py")


@pytest.fixture(scope="session")
def record():
    for package in ("torch", "transformers"):
        pytest.importorskip(package)
    return loaded(HERE / "record.py")
