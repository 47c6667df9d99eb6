"""grain's datasets as data: a resumed run sets their iterators to the saved position."""

import itertools
import json

import numpy as np
import pytest

grain = pytest.importorskip("grain")

from kaun import Data, losses  # noqa: E402
from kaun._run import identity, position  # noqa: E402
from kaun._run.differences import differences  # noqa: E402


def rows(n=40):
    return [{"x": np.full(3, i, np.float32), "y": np.int32(i % 3)} for i in range(n)]


def map_dataset(seed=3, n=40):
    return grain.MapDataset.source(rows(n)).seed(seed).shuffle().map(lambda row: (row["x"], row["y"])).batch(4)


def iter_dataset():
    return (
        grain.MapDataset.source(rows()).seed(1).shuffle().to_iter_dataset()
        .filter(lambda row: row["y"] != 1).map(lambda row: (row["x"], row["y"])).batch(4, drop_remainder=False)
    )  # fmt: skip


def data_loader():
    sampler = grain.samplers.IndexSampler(40, shuffle=True, seed=1, num_epochs=1)
    first = grain.transforms.Batch(4)
    return grain.DataLoader(data_source=Source(), sampler=sampler, operations=[first])


class Source:
    def __len__(self):
        return 40

    def __getitem__(self, i):
        return (np.full(3, i, np.float32), np.int32(i % 3))

    def __repr__(self):
        return "Source()"


KINDS = [map_dataset, iter_dataset, data_loader]


def flat(items):
    return [(x.tolist(), loss(np.zeros(len(x)))) for x, loss in items]


def pipeline(make, epochs):
    return Data.from_iterable(make()).with_loss(lambda out, y: float(y.sum())).epochs(epochs)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("n", [1, 4, 6])
def test_a_run_goes_on_where_it_was(make, n):
    whole = flat(pipeline(make, 1))
    rest = position.resume_from(pipeline(make, 1), 0)
    items = iter(rest)
    assert flat(itertools.islice(items, n)) == whole[:n]
    where = json.loads(json.dumps(position.position(rest)))
    assert where is not None
    items.close()
    again = position.resume_from(pipeline(make, 1), n, where)
    items = iter(again)
    assert flat([next(items)]) == whole[n : n + 1]
    later = json.loads(json.dumps(position.position(again)))
    items.close()
    assert flat(position.resume_from(pipeline(make, 1), n + 1, later)) == whole[n + 1 :]
    assert flat(position.resume_from(pipeline(make, 1), n)) == whole[n:]


def test_a_position_in_a_later_pass():
    whole = flat(pipeline(map_dataset, 3))
    rest = position.resume_from(pipeline(map_dataset, 3), 0)
    items = iter(rest)
    taken = flat(itertools.islice(items, 14))
    where = position.position(rest)
    items.close()
    assert where["pass"] == 1
    assert taken + flat(position.resume_from(pipeline(map_dataset, 3), 14, where)) == whole


def test_the_position_is_found_without_making_the_items_before():
    made = []

    def counted():
        return (
            grain.MapDataset.source(range(10_000))
            .map(lambda i: made.append(i) or i)
            .to_iter_dataset(grain.ReadOptions(num_threads=0))
        )

    rest = position.resume_from(Data.from_iterable(counted()), 0)
    items = iter(rest)
    list(itertools.islice(items, 9000))
    where = position.position(rest)
    items.close()
    made.clear()
    assert list(position.resume_from(Data.from_iterable(counted()), 9000, where).take(2)) == [9000, 9001]
    assert len(made) <= 3


def test_an_iterator_of_grain_goes_on_too():
    items = position.resume_from(iter(map_dataset()), 0)
    first = [y.tolist() for _, y in itertools.islice(items, 3)]
    again = position.resume_from(iter(map_dataset()), 3, position.position(items))
    assert first + [y.tolist() for _, y in again] == [y.tolist() for _, y in map_dataset()]


def test_what_a_dataset_is():
    words = lambda old, new: differences(identity.describe_data(old), identity.describe_data(new), 0)
    made = lambda **options: Data.from_iterable(map_dataset(**options))
    assert words(made(), made()) == []
    assert words(made(), made(n=80)) == ["Data.from_iterable: len was 10, is 20"]
    assert len(words(made(), made(seed=4))) == 1
    assert len(words(made(), Data.from_iterable(map_dataset().map(lambda b: b)))) >= 1


def test_a_map_dataset_is_a_sequence_too():
    dataset = map_dataset()
    data = Data.from_items(dataset).with_loss(losses.cross_entropy_sparse)
    assert len(data) == 10
    assert [x.tolist() for x, _ in position.resume_from(data, 7)] == [dataset[i][0].tolist() for i in (7, 8, 9)]


class Plain(Source):
    __repr__ = object.__repr__  # another text in each process, which grain compares


def test_a_loader_over_a_source_with_a_default_repr_is_pulled():
    """`__repr__` is missing in most users' sources: the resumed run ended in grain's own ValueError."""
    sampler = grain.samplers.IndexSampler(40, shuffle=True, seed=1, num_epochs=1)
    made = lambda: Data.from_iterable(
        grain.DataLoader(data_source=Plain(), sampler=sampler, operations=[grain.transforms.Batch(4)])
    ).map(lambda b: b[1].tolist())
    rest = position.resume_from(made(), 0)
    items = iter(rest)
    taken = list(itertools.islice(items, 4))
    assert position.position(rest) is None
    items.close()
    assert taken + list(position.resume_from(made(), 4)) == list(made())
