"""Datasets of the Hugging Face library as data."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

datasets = pytest.importorskip("datasets")

from kaun import Data  # noqa: E402
from kaun._run import identity, position  # noqa: E402
from kaun._run.differences import differences  # noqa: E402


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
    words = lambda old, new: differences(identity.describe_data(old), identity.describe_data(new), 0)
    assert words(Data.from_iterable(made()), Data.from_iterable(made())) == []
    assert len(words(Data.from_iterable(made()), Data.from_iterable(made(1)))) == 1
    program = (
        "import datasets; print(datasets.Dataset.from_dict("
        "{'x': [[float(i), 0] for i in range(10)], 'y': list(range(10))})._fingerprint)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == identity.describe_data(Data.from_iterable(made()))[0]["fingerprint"], done.stderr


# Resumed streams


def stream(kind):
    made = datasets.Dataset.from_dict({"x": list(range(23)), "y": list(range(23))}).to_iterable_dataset(num_shards=3)
    match kind:
        case "map":
            return made.map(lambda row: {"x": row["x"] * 2}).filter(lambda row: row["x"] % 3)
        case "numpy":
            return made.with_format("numpy").map(lambda rows: {"x": rows["x"] + 1}, batched=True, batch_size=4)
        case "buffer":
            return made.shuffle(seed=3, buffer_size=8)
    return made.skip(2).take(15)


@pytest.mark.parametrize("kind", ["take", "map", "numpy", "buffer"])
def test_a_stream_is_resumed_by_its_state_where_that_is_exact(kind):
    """A late resume read the stream from its start; a shuffle buffer cannot be restored, and must be filled again."""
    data = lambda: Data.from_iterable(stream(kind)).map(lambda row: int(row["x"])).epochs(3)
    whole = list(data())
    for n in (1, 8, 15, 24, len(whole) - 1):
        rest = position.resume_from(data(), 0)
        items = iter(rest)
        assert list(itertools.islice(items, n)) == whole[:n]
        where = json.loads(json.dumps(position.position(rest)))
        assert (where is None) == (kind == "buffer")
        items.close()
        assert list(position.resume_from(data(), n, where)) == whole[n:]


def test_the_state_of_a_generator_of_a_stream_counts():
    """`stream.shuffle()` without a seed has another order in each process."""
    made = lambda seed: Data.from_iterable(stream("take").shuffle(seed=seed, buffer_size=4))
    words = lambda old, new: differences(identity.describe_data(old), identity.describe_data(new), 0)
    assert words(made(1), made(1)) == []
    (line,) = words(made(None), made(None))
    assert "generator` (Generator) has another state: it is not seeded" in line


def test_rows_by_index_count_by_the_fingerprint_too():
    """Through from_items another data set of the same length was trained on without a word."""
    words = lambda old, new: differences(identity.describe_data(old), identity.describe_data(new), 0)
    assert words(Data.from_items(made()), Data.from_items(made())) == []
    (line,) = words(Data.from_items(made()), Data.from_items(made(1)))
    assert line.startswith("Data.from_items: items at 'fingerprint' was ")
    captured = lambda rows: Data.from_fn(10, lambda i: rows[i])
    assert words(captured(made()), captured(made())) == [] and words(captured(made()), captured(made(1)))
