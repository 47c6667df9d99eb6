"""Datasets of the Hugging Face library as data."""

import subprocess
import sys

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")

from kaun import Data  # noqa: E402
from kaun._run import identity, position  # noqa: E402


def made(k=0):
    return datasets.Dataset.from_dict({"x": [[float(i), k] for i in range(10)], "y": list(range(10))})


def numbers(items):
    return [(np.asarray(item["x"]).tolist(), np.asarray(item["y"]).tolist()) for item in items]


EXPECTED = [([float(i), 0.0], i) for i in range(10)]


@pytest.mark.parametrize("kind", [None, "numpy", "jax"])
def test_rows_of_any_format(kind):
    data = Data.from_iterable(made().with_format(kind))
    assert len(data) == 10
    assert numbers(data) == numbers(data) == EXPECTED
    assert numbers(Data.from_items(made().with_format(kind)).skip(7)) == EXPECTED[7:]


def test_rows_as_tensors_become_arrays():
    pytest.importorskip("torch")
    for item in Data.from_iterable(made().with_format("torch")):
        assert isinstance(item["x"], np.ndarray) and isinstance(item["y"], np.ndarray)
    assert numbers(Data.from_iterable(made().with_format("torch"))) == EXPECTED


def test_batches_of_a_streamed_dataset_are_made_anew_in_each_pass():
    rows = made().with_format("numpy")
    data = Data.from_iterable(lambda: rows.iter(batch_size=4))
    assert [b["y"].tolist() for b in data.epochs(2)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2
    stream = Data.from_iterable(made().to_iterable_dataset())
    assert numbers(stream.epochs(2)) == EXPECTED * 2
    assert numbers(position.resume_from(stream, 6)) == EXPECTED[6:]


def test_rows_of_unequal_length_say_what_to_do():
    ragged = datasets.Dataset.from_dict({"x": [[[1.0], [1.0, 2.0]]] * 3}).with_format("numpy")
    with pytest.raises(TypeError, match=r"Data.stack expected numbers.*received object\[2\] at 'x' of item 0.*[Pp]ad"):
        list(Data.from_iterable(ragged).batch(2))


def test_a_dataset_counts_by_its_own_fingerprint():
    words = lambda old, new: identity.differences(identity.describe_data(old), identity.describe_data(new), 0)
    assert words(Data.from_iterable(made()), Data.from_iterable(made())) == []
    assert len(words(Data.from_iterable(made()), Data.from_iterable(made(1)))) == 1
    program = (
        "import datasets; print(datasets.Dataset.from_dict("
        "{'x': [[float(i), 0] for i in range(10)], 'y': list(range(10))})._fingerprint)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == identity.describe_data(Data.from_iterable(made()))[0]["fingerprint"], done.stderr
