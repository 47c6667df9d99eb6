"""PyTorch's loaders as data: tensors as arrays in the same memory, workers that are not forked, fingerprints."""

import dataclasses
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

from kaun import Data, Trainer, layers, losses, rng  # noqa: E402
from kaun._run import identity, position  # noqa: E402
from kaun.data import convert  # noqa: E402


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
    return identity.differences(identity.describe_data(old), identity.describe_data(new), 0)


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
