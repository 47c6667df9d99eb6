"""PyTorch's loaders as data: tensors as arrays in the same memory, workers that are not forked, fingerprints."""

import dataclasses
import itertools
import json
import multiprocessing
import subprocess
import sys
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader, Dataset, TensorDataset  # noqa: E402

from kaun import Data, Trainer, checkpoint, layers, losses, rng  # noqa: E402
from kaun._run import identity, position  # noqa: E402
from kaun._run.differences import differences  # noqa: E402
from kaun.data import convert  # noqa: E402
from kaun.errors import ResumeMismatch  # noqa: E402


class Pair(NamedTuple):
    x: object
    y: object


@dataclasses.dataclass
class Batch:
    x: object
    y: object


DTYPES = ["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]


@pytest.mark.parametrize("name", [*DTYPES, "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_a_tensor_is_an_array_in_the_same_memory(name):
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(getattr(torch, name))
    array = convert.as_arrays(tensor)
    assert array.dtype == jnp.dtype(name) and array.shape == (2, 3)
    assert array.ctypes.data == tensor.data_ptr()
    np.testing.assert_array_equal(array.astype(np.complex64), tensor.to(torch.complex64).numpy())


def test_tensors_that_are_no_plain_memory():
    tensor = torch.arange(6.0).reshape(2, 3)
    for special in (tensor.t(), tensor[:, ::2], tensor.clone().requires_grad_(), torch.complex(tensor, tensor).conj()):
        np.testing.assert_array_equal(convert.as_arrays(special), special.detach().resolve_conj().numpy())
    scalar = convert.as_arrays(torch.tensor(3.0, dtype=torch.bfloat16))
    assert scalar.shape == () and scalar.dtype == jnp.bfloat16
    with pytest.raises(
        TypeError, match=r"expected dense tensors, received a sparse_coo tensor of shape \[2, 3\].*to_dense\(\)"
    ):
        convert.as_arrays(tensor.to_sparse())


class Rows(Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return self.make(torch.full((2,), float(i)), i)


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x, y),
        lambda x, y: {"x": x, "y": y},
        lambda x, y: Pair(x, y),
        lambda x, y: {"in": (x, [x, x]), "y": y},
    ],
    ids=["tuple", "dict", "namedtuple", "nested"],
)
def test_a_data_loader_gives_trees_of_arrays(make):
    loader = DataLoader(Rows(make), batch_size=2)
    data = Data.from_iterable(loader)
    assert len(data) == 3
    for tensors, arrays in zip(loader, data, strict=True):

        def compare(a, b):
            if isinstance(a, torch.Tensor):
                assert isinstance(b, np.ndarray)
                np.testing.assert_array_equal(a.numpy(), b, strict=True)
            else:
                assert type(a) is type(b)
                keys = a if isinstance(a, dict) else range(len(a))
                for k in keys:
                    compare(a[k], b[k])

        compare(tensors, arrays)


def test_dataclasses_of_a_collate_function():
    loader = DataLoader(
        Rows(lambda x, y: (x, y)),
        batch_size=2,
        collate_fn=lambda rows: Batch(torch.stack([x for x, _ in rows]), len(rows)),
    )
    found = list(Data.from_iterable(loader))
    assert [type(b) for b in found] == [Batch] * 3
    assert found[0].x.tolist() == [[0, 0], [1, 1]] and isinstance(found[0].x, np.ndarray)


def xy(n=24):
    x = torch.arange(n * 4, dtype=torch.float32).reshape(n, 4) / 100
    return x, torch.arange(n) % 3


def trained(data):
    with rng.scope(0):
        trainer = Trainer(
            model=layers.sequential([layers.linear(4, 8), layers.tanh(), layers.linear(8, 3)]),
            optimizer=optax.adam(0.01),
        )
        state = trainer.init(dtype=jnp.float32)
    return trainer.fit(state, data.with_loss(losses.cross_entropy_sparse).epochs(2))


def test_a_fit_on_a_data_loader_is_the_fit_on_its_arrays():
    x, y = xy()
    one = trained(
        Data.from_iterable(DataLoader(TensorDataset(x, y), batch_size=7)).map(lambda b: (b[0], b[1].astype(np.int32)))
    )
    other = trained(Data.batches((x.numpy(), y.numpy().astype(np.int32)), 7))
    for a, b in zip(one.vars.params[0].values(), other.vars.params[0].values(), strict=True):
        np.testing.assert_array_equal(a, b)


def forking(**options):
    return DataLoader(TensorDataset(*xy()), batch_size=8, num_workers=1, **options)


@pytest.mark.parametrize("make", [
    lambda loader: Data.from_iterable(loader),
    lambda loader: list(Data.from_iterable(lambda: loader)),
    lambda loader: trained_on(loader),
    lambda loader: list(position.resume_from(loader, 0)),
], ids=["from_iterable", "factory", "fit", "resumed"])  # fmt: skip
def test_workers_that_would_be_forked_are_refused(make):
    loader = forking(multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match=r'(?s)has num_workers=1 and would fork.*multiprocessing_context="forkserver"\) \(or "spawn"\).*'
                       r'__main__.*num_workers=0.*prefetch\(2\)'):  # fmt: skip
        make(loader)


def trained_on(loader):
    trainer = Trainer(model=layers.linear(4, 3), optimizer=optax.sgd(0.1))
    return trainer.fit(trainer.init(dtype=jnp.float32), loader)


def test_the_default_way_to_start_workers_counts_and_is_not_fixed_by_asking():
    default = multiprocessing.get_all_start_methods()[0]
    program = (
        "import multiprocessing, torch\n"
        "from torch.utils.data import DataLoader\n"
        "from kaun import Data\n"
        "loader = DataLoader([1, 2, 3], num_workers=1)\n"
        "try:\n    Data.from_iterable(loader); print('taken')\n"
        "except RuntimeError as error:\n    print('refused')\n"
        "print(multiprocessing.get_start_method(allow_none=True))\n"
        "multiprocessing.set_start_method('spawn')\n"
        "Data.from_iterable(loader); Data.from_iterable(DataLoader([1]))\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{'refused' if default == 'fork' else 'taken'}\nNone\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_started_anew_survive_fit(tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(
        "import jax.numpy as jnp, numpy as np, optax, torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "from kaun import Data, Trainer, layers, losses, rng\n"
        "if __name__ == '__main__':\n"
        "    x, y = torch.ones(32, 4), torch.zeros(32, dtype=torch.int64)\n"
        f"    loader = DataLoader(TensorDataset(x, y), 8, num_workers=2, multiprocessing_context={method!r}, persistent_workers=True)\n"
        "    data = Data.from_iterable(loader).map(lambda b: (b[0], b[1].astype(np.int32))).with_loss(losses.cross_entropy_sparse)\n"
        "    with rng.scope(0):\n"
        "        trainer = Trainer(model=layers.linear(4, 3), optimizer=optax.sgd(0.1))\n"
        "        state = trainer.init(dtype=jnp.float32)\n"
        "    state = trainer.fit(state, data.epochs(2))\n"
        "    state = trainer.fit(state, data.prefetch(2))\n"
        "    print(int(state.step))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=500)
    assert (done.returncode, done.stdout) == (0, "12\n"), done.stderr


# ---- Fingerprints ------------------------------------------------------------------------------------------------


def words(old, new):
    return differences(identity.describe_data(old), identity.describe_data(new), 0)


def test_what_a_data_loader_is():
    x, y = xy()
    made = lambda x=x, n=4, seed=1, **options: Data.from_iterable(
        DataLoader(TensorDataset(x, y), n, shuffle=True, generator=torch.Generator().manual_seed(seed), **options)
    )
    assert words(made(), made()) == []
    assert words(made(), made(n=5)) == [
        "Data.from_iterable: len was 6, is 5",
        "Data.from_iterable: batch_size was 4, is 5",
    ]
    assert words(made(), made(seed=2)) == ["Data.from_iterable: seed was 1, is 2"]
    assert words(made(), made(drop_last=True)) == ["Data.from_iterable: drop_last was False, is True"]
    assert words(made(), made(x=x + 1)) == [
        "Data.from_iterable: the content of arrays at '0' has changed (float32[24, 4])"
    ]


def test_captured_tensors_count_by_content():
    made = lambda value: Data.from_items([1]).map((lambda t: lambda x: x * t)(torch.full((2,), value)))
    assert words(made(1.0), made(1.0)) == []
    assert len(words(made(1.0), made(2.0))) == 1


def test_the_rest_of_a_data_loader_is_pulled():
    x, y = xy()
    data = Data.from_iterable(DataLoader(TensorDataset(x, y), 4)).map(lambda b: b[1].tolist()).epochs(2)
    rest = position.resume_from(data, 8)
    assert list(rest) == list(data)[8:]
    assert position.position(rest) is None


# ---- Resumed loaders ---------------------------------------------------------------------------------------------


class Counted(Dataset):
    """Rows that count how often one is read."""

    def __init__(self, n=25):
        self.n, self.reads = n, 0

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.reads += 1
        return torch.tensor([float(i)]), i


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def default_seed(loader):
    torch.manual_seed(3)
    return loader


SAMPLER = torch.utils.data.RandomSampler
LOADERS = {
    "in order": lambda rows: DataLoader(rows, 4),
    "seeded": lambda rows: DataLoader(rows, 4, shuffle=True, generator=seeded(1)),
    "default generator": lambda rows: default_seed(DataLoader(rows, 4, shuffle=True)),
    "drop_last": lambda rows: DataLoader(rows, 4, shuffle=True, generator=seeded(1), drop_last=True),
    "one generator": lambda rows: (
        lambda g: DataLoader(rows, 4, generator=g, sampler=SAMPLER(rows, True, 70, generator=g))
    )(seeded(3)),
    "batch sampler": lambda rows: DataLoader(
        rows, batch_sampler=torch.utils.data.BatchSampler(SAMPLER(rows, generator=seeded(9)), 3, False)
    ),
    "rows": lambda rows: DataLoader(rows, batch_size=None, shuffle=True, generator=seeded(1)),
}
STAGES = {
    "epochs": lambda data: data.epochs(3),
    "groups": lambda data: data.map_batch(2, lambda group: group[-1]).epochs(3),
    "groups of all": lambda data: data.epochs(3).map_batch(2, lambda group: group[0]),
}


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", LOADERS)
def test_a_late_resume_reads_no_batch_that_it_skips(name, stages):
    """Four steps after a restart read 640 rows, because all batches before them were made again."""

    def data(rows):
        return STAGES[stages](Data.from_iterable(LOADERS[name](rows))).map(lambda b: np.asarray(b[1]).tolist())

    whole = list(data(Counted()))
    for n in (1, 6, 7, 8, len(whole) - 1, len(whole)):
        rows, checked = Counted(), []
        made = data(rows)
        rest = position.resume_from(made, n, None, lambda count, item, final: checked.append((count, item)) or True)
        items = iter(rest)
        first = next(items, None)
        assert rows.reads <= 18, "the group of the last item and the next one"
        assert ([] if first is None else [first, *items]) == whole[n:]
        assert checked[-1] == (n, whole[n - 1])
        if isinstance(whole[0], list) and stages == "epochs":
            bare = [b[1].tolist() for b in position.resume_from(LOADERS[name](Counted()), 3)]
            assert bare == [b[1].tolist() for b in LOADERS[name](Counted())][3:]


class Noisy(Counted):
    """Rows with noise that a worker draws, as transforms of torchvision do."""

    def __getitem__(self, i):
        return super().__getitem__(i)[0] + torch.randn(1), i


def check_noisy(loader):
    data = lambda: Data.from_iterable(loader()).map(lambda b: b[0].tolist()).epochs(2)
    whole = list(data())
    last = lambda count, item, final: (count, item) == (9, whole[8])
    assert list(position.resume_from(data(), 9, None, last)) == whole[9:]


def test_where_unread_batches_give_another_item_all_are_read():
    """Transforms draw from the generator of the process: batches that were not read left it in another state."""
    check_noisy(lambda: default_seed(DataLoader(Noisy(), 4, shuffle=True)))


@pytest.mark.slow
def test_workers_that_draw_are_replayed():
    options = {"num_workers": 1, "multiprocessing_context": "forkserver"}
    check_noisy(lambda: DataLoader(Noisy(), 4, shuffle=True, generator=seeded(1), **options))


def killed_and_resumed(tmp_path, first, second):
    with rng.scope(0):
        trainer = Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(1e-3))
        state = trainer.init()

    def report(step, loss, state):
        if step == 4:
            raise KeyError

    data = lambda loader: Data.from_iterable(loader).map(lambda b: (b[0], b[0])).with_loss(losses.mse)
    runs = checkpoint.Directory(tmp_path / "runs")
    with pytest.raises(KeyError):
        trainer.fit(state, data(first), report=report, checkpoints=runs)
    return trainer.fit(state, data(second), checkpoints=runs)


def test_an_unseeded_loader_is_refused(tmp_path):
    """`DataLoader(rows, shuffle=True)` without a seed: the resumed run had 25 of 32 rows, without a word."""
    loader = lambda: DataLoader(Counted(), 4, shuffle=True)
    torch.seed()
    with pytest.raises(
        ResumeMismatch, match=r"PyTorch's global generator \(torch\) has another state, and the loader draws"
    ):
        killed_and_resumed(tmp_path, loader(), loader())
    assert int(killed_and_resumed(tmp_path / "in order", DataLoader(Counted(), 4), DataLoader(Counted(), 4)).step) == 7


def test_a_generator_that_is_used_again_is_refused(tmp_path):
    """A cell of a notebook, run again after Ctrl-C: the loader's generator is where the first run left it."""
    loader = DataLoader(Counted(), 4, shuffle=True, generator=seeded(0))
    with pytest.raises(
        ResumeMismatch, match=r"the random generator `generator` \(Generator\) has another state: it is not seeded"
    ):
        killed_and_resumed(tmp_path, loader, loader)
    loader = lambda: DataLoader(Counted(), 4, shuffle=True, generator=seeded(0))
    assert int(killed_and_resumed(tmp_path / "seeded", loader(), loader()).step) == 7


class Drawing(Counted):
    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def __getitem__(self, i):
        return torch.tensor([float(i)]) + float(self.generator.random()), i


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Drawing(np.random.default_rng(0)), r"the loader's Drawing reads `generator` \(Generator\)"),
        (Noisy, r"draws from PyTorch's global generator \(torch\)"),
    ],
)
def test_data_sets_that_draw_are_refused(tmp_path, make, text):
    loader = lambda: DataLoader(make(), 4)
    with pytest.raises(ValueError, match=rf"(?s)cannot be resumed with the same items, .*{text}.*data.random_map"):
        killed_and_resumed(tmp_path, loader(), loader())


def test_the_epoch_of_a_distributed_sampler_is_set():
    sampler = torch.utils.data.distributed.DistributedSampler(Counted(), num_replicas=2, rank=0, seed=1)
    data = Data.from_iterable(DataLoader(Counted(), 4, sampler=sampler)).map(lambda b: b[1].tolist())
    passes = [list(data.epoch(e)) for e in range(3)]
    assert list(data.epochs(3)) == [*passes[0], *passes[1], *passes[2]] and passes[0] != passes[1] != passes[2]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_torchdata_is_set_to_its_position():
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    for stages in STAGES.values():
        data = lambda rows, stages=stages: stages(
            Data.from_iterable(stateful(rows, 4, shuffle=True, generator=seeded(1)))
        ).map(lambda b: b[1].tolist())
        whole = list(data(Counted()))
        for n in (1, 6, 7, 8, len(whole) - 1):
            rest = position.resume_from(data(Counted()), 0)
            items = iter(rest)
            assert list(itertools.islice(items, n)) == whole[:n]
            where, rows = json.loads(json.dumps(position.position(rest))), Counted()
            items = iter(position.resume_from(data(rows), n, where))
            first = next(items, None)
            assert rows.reads <= 10 and ([] if first is None else [first, *items]) == whole[n:]
