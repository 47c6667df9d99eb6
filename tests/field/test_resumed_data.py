"""Data that a resumed run got wrong in silence, one test for each situation in which a user met it."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, losses, rng
from kaun.checkpoint import Directory
from kaun.errors import ResumeMismatch


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def made():
    with rng.scope(0):
        trainer = kaun.Trainer(model=kaun.layers.linear(1, 1), optimizer=optax.sgd(0.01))
        return trainer, trainer.init()


def with_loss(data):
    return data.map(lambda x: (x, x)).with_loss(losses.mse)


def rows(n=10):
    return [np.full((2, 1), i, np.float32) for i in range(n)]


def run(made, data, path, kill=0, **options):
    """A fit that is killed after some steps; the items that its steps took are those that its report counted."""
    trainer, state = made

    def report(step, loss, state):
        if step == kill:
            raise Killed

    return trainer.fit(state, data, report=report, checkpoints=Directory(path / "runs", **options))


def killed(made, data, path, after=4, **options):
    with pytest.raises(Killed):
        run(made, data, path, after, **options)


class Loader:
    """A loader that shuffles its rows in each pass, by a generator of its own."""

    def __init__(self, generator, says=10):
        self.generator, self.says = generator, says

    def __len__(self):
        return self.says

    def __iter__(self):
        order = list(range(10))
        self.generator.shuffle(order)
        return iter([rows()[i] for i in order])


GENERATORS = {"random": random.Random, "NumPy": np.random.default_rng, "RandomState": np.random.RandomState}


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("how", ["unseeded", "reused", "seeded"])
def test_a_loader_whose_generator_has_another_state_is_refused(made, tmp_path, kind, how):
    """A notebook: the loader shuffles by a generator that has no seed, or by the one of the run that was killed."""
    seed = () if how == "unseeded" else (0,)
    loader = Loader(GENERATORS[kind](*seed))
    data = lambda loader: with_loss(Data.from_iterable(loader))
    killed(made, data(loader), tmp_path)
    again = loader if how == "reused" else Loader(GENERATORS[kind](*seed))
    if how == "seeded":
        whole = made[0].fit(made[1], data(Loader(GENERATORS[kind](0))))
        assert jnp.array_equal(run(made, data(again), tmp_path).vars.params["weight"], whole.vars.params["weight"])
        return
    text = r"(?s)data differs:\n  Data.from_iterable: the random generator `generator` \(\w+\) has another state: it is not seeded, or was drawn from since. Make it again from a seed"
    with pytest.raises(ResumeMismatch, match=text):
        run(made, data(again), tmp_path)


@pytest.mark.parametrize("bare", [False, True])
def test_a_stream_that_draws_its_order_inside_is_known_by_its_last_item(made, tmp_path, bare):
    """webdataset's shuffle without a seed makes its generator when it is opened: 25 of 32 rows, without a word."""

    def stream(seed):
        def opened():
            order = np.random.default_rng(next(seeds) if seed is None else seed).permutation(10)
            for i in order:
                y = rows()[i]
                yield y, lambda out, y=y: losses.mse(out, y)

        return opened

    seeds = iter(range(10))
    loader = lambda f: type("Stream", (), {"__iter__": lambda self: f()})()
    data = lambda seed: loader(stream(seed)) if bare else Data.from_iterable(stream(seed))
    killed(made, data(3), tmp_path / "seeded")
    assert int(run(made, data(3), tmp_path / "seeded").step) == 10
    killed(made, data(None), tmp_path)
    with pytest.raises(
        ResumeMismatch,
        match=r"item 3 \(counted from 0\), made again, is another one.*Seed the loader, .*random_map\(f\)",
    ):
        run(made, data(None), tmp_path)
    with pytest.warns(UserWarning, match=r"(?s)item 3 .*is resumed, because accept= contains 'data'"):
        assert int(run(made, data(None), tmp_path, accept={"data"}).step) == 10


def test_a_loader_that_became_shorter_is_refused(made, tmp_path):
    """Files were removed between two starts of a script: the run ended at once, as if it were finished."""
    killed(made, with_loss(Data.from_iterable(Shrinking(10))), tmp_path)
    with pytest.raises(ResumeMismatch, match="the data has 2 items now, and the run has taken 4 already"):
        run(made, with_loss(Data.from_iterable(Shrinking(2))), tmp_path)


class Shrinking:
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(rows(self.n))


@pytest.mark.parametrize("says", [3, 20])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_loader_that_says_a_wrong_length_is_resumed_and_run_again(made, tmp_path, says, epochs):
    """A stream says the length of its index, and filters: "there are 3 items now, and the run has taken 8"."""

    class Liar(Shrinking):
        def __len__(self):
            return says

    data = lambda: with_loss(Data.from_iterable(Liar(8))).epochs(epochs)
    killed(made, data(), tmp_path, after=6)
    for _ in range(2):
        assert int(run(made, data(), tmp_path).step) == 8 * epochs
    longer = with_loss(Data.from_iterable(Liar(8))).epochs(epochs + 1)
    assert int(run(made, longer, tmp_path).step) == 8 * (epochs + 1)


class OnDisk:
    """A sequence of another library, such as an h5py data set."""

    def __init__(self, values):
        self.__dict__["values"] = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return self.values[i]


def test_a_sequence_of_another_library_is_resumed_and_its_items_compared(made, tmp_path):
    """h5py data sets through from_items: those of another file were trained on without a word."""
    data = lambda values: with_loss(Data.from_items(OnDisk(values)))
    killed(made, data(rows()), tmp_path)
    with pytest.raises(
        ResumeMismatch, match=r"item 3 .*made again, is another one than in that run: the data has changed"
    ):
        run(made, data([row + 1 for row in rows()]), tmp_path)
    assert int(run(made, data(rows()), tmp_path).step) == 10
    with pytest.raises(ResumeMismatch, match="items at 'len' was 10, is 9"):
        run(made, data(rows(9)), tmp_path / "")


class EpochLoader:
    """A loader whose order is a function of its epoch, as that of a DistributedSampler."""

    def __init__(self):
        self.epoch, self.seen = 7, []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        self.seen.append(self.epoch)
        order = np.random.default_rng(self.epoch).permutation(10)
        return iter([rows()[i] for i in order])


@pytest.mark.parametrize("factory", [False, True])
def test_epochs_set_the_epoch_of_a_loader(made, tmp_path, factory):
    """Four processes with a DistributedSampler: without set_epoch each of the three epochs had the same order."""
    loader = EpochLoader()
    data = Data.from_iterable((lambda: loader) if factory else loader)
    passes = [[int(x[0, 0]) for x in data.epoch(e)] for e in range(3)]
    assert len(set(map(tuple, passes))) == 3 and loader.seen == [0, 1, 2]
    assert [int(x[0, 0]) for x in data.epochs(3)] == [*passes[0], *passes[1], *passes[2]]
    assert [int(x[0, 0]) for x in data.map(lambda x: x).epochs(2).epochs(2).skip(20).take(10)] == passes[2]
    loader.set_epoch(2)
    assert [int(x[0, 0]) for x in data] == passes[2], "outside of epochs it is the user's"
    again = lambda: with_loss(Data.from_iterable((lambda: EpochLoader()) if factory else EpochLoader())).epochs(3)
    whole = made[0].fit(made[1], again())
    killed(made, again(), tmp_path, after=14)
    end = run(made, again(), tmp_path)
    assert jnp.array_equal(end.vars.params["weight"], whole.vars.params["weight"])


class Stateful:
    """A loader with ``state_dict()`` and ``load_state_dict(state)``, as those of torchdata."""

    def __init__(self, made):
        self.made, self.at, self.start = made, 0, 0

    def __iter__(self):
        self.at, self.start = self.start, 0
        while self.at < 10:
            self.at += 1
            self.made.append(self.at - 1)
            yield rows()[self.at - 1]

    def state_dict(self):
        return {"at": self.at, ("nested", 1): [b"bytes", np.arange(2), None, 2**80, (1.5, "x")]}

    def load_state_dict(self, state):
        assert state[("nested", 1)][0] == b"bytes" and state[("nested", 1)][1].tolist() == [0, 1]
        assert state[("nested", 1)][2:] == [None, 2**80, (1.5, "x")]
        self.start = state["at"]


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_loader_with_a_state_dict_is_set_to_its_position(made, tmp_path, epochs):
    """A late restart of a run over a large stream read everything before it again."""
    count = 10 * epochs
    data = lambda read: with_loss(Data.from_iterable(Stateful(read))).epochs(epochs)
    whole = made[0].fit(made[1], data([]))
    for stop in (count - 3, count):
        path = tmp_path / str(stop)
        killed(made, data([]), path, after=stop)
        read = []
        end = run(made, data(read), path)
        assert jnp.array_equal(end.vars.params["weight"], whole.vars.params["weight"]) and int(end.step) == count
        assert read == list(range(10 - count + stop, 10))


GLOBAL = {
    "np.random": (lambda x: x + np.random.normal(), r"NumPy's global generator \(np.random\)"),
    "random": (lambda x: x + random.random(), r"Python's global generator \(random\)"),
    "unscoped": (
        lambda x: x + jax.random.normal(rng.next_key()),
        r"rng.next_key\(\), (outside of any rng.scope|in the rng.scope around fit)",
    ),
}


@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize("form", ["from_fn", "map", "loader", "prefetch", "scope"])
def test_augmentation_by_a_global_generator_is_refused(made, tmp_path, name, form):
    """`data.map(lambda x: x + np.random.normal(...))`: after a restart the run went on with other numbers."""
    f, text = GLOBAL[name]
    forms = {
        "from_fn": lambda: Data.from_fn(10, lambda i: f(rows()[i])),
        "map": lambda: Data.from_items(rows()).map(f),
        "loader": lambda: Data.from_iterable(lambda: map(f, rows())),
        "prefetch": lambda: Data.from_items(rows()).map(f).prefetch(1),
        "scope": lambda: Data.from_items(rows()).map(f),
    }
    expected = (
        rf"(?s)fit\(checkpoints=...\) cannot be resumed with the same items, because making an item of .* draws from {text}"
        r".*train = data.random_map\(lambda key, item: augment\(key, item\)\).*accept=\{\"data\"\}"
    )
    scope = rng.scope(3) if form == "scope" else None
    data = with_loss(forms[form]())
    if form == "scope":
        with scope, pytest.raises(ValueError, match=expected):
            run(made, data, tmp_path)
    else:
        with pytest.raises(ValueError, match=expected):
            run(made, data, tmp_path)
    if form == "map":
        with pytest.warns(UserWarning, match="The run continues, because accept= contains 'data'") as warned:
            run(made, data, tmp_path, accept={"data"})
        assert len(warned) == 1


class Augment:
    def __init__(self, generator):
        self.generator = generator

    def __call__(self, x):
        return self.shifted(x)

    def shifted(self, x):
        return x + np.float32(self.generator.random())


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize(
    "form", ["map", "from_fn", "map_batch", "object", "method", "from_items", "default", "cached", "loader"]
)
def test_augmentation_by_a_captured_generator_is_refused(made, tmp_path, kind, form):
    """`generator = np.random.default_rng(0)` above a map: the second process begins with its first numbers again."""
    generator = GENERATORS[kind](0)
    shift = lambda x: x + np.float32(generator.random())
    items = Data.from_items(rows())
    forms = {
        "map": lambda: items.map(shift),
        "from_fn": lambda: Data.from_fn(10, lambda i: shift(rows()[i])),
        "map_batch": lambda: items.map_batch(1, lambda group: shift(group[0])),
        "object": lambda: items.map(Augment(generator)),
        "method": lambda: items.map(Augment(generator).shifted),
        "from_items": lambda: Data.from_items(Drawing(generator)),
        "default": lambda: items.map(lambda x, g=generator: x + np.float32(g.random())),
        "cached": lambda: Data.from_fn(10, functools.cache(lambda i: shift(rows()[i]))),
        "loader": lambda: Data.from_iterable(Mapped(shift)),
    }
    with pytest.raises(
        ValueError,
        match=r"(?s)because .* reads `[\w.]+` \(\w+\)\. The state of that generator is not saved\..*random_map",
    ):
        run(made, with_loss(forms[form]()), tmp_path)


class Mapped:
    """A loader with a transform, as those of Hugging Face."""

    def __init__(self, f):
        self.f = f

    def __iter__(self):
        return map(self.f, rows())


class Drawing:
    def __init__(self, generator):
        self.generator = generator

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return rows()[i] + np.float32(self.generator.random())


def test_random_numbers_of_the_index_are_no_augmentation_to_refuse(made, tmp_path):
    """Generators and scopes that are made inside the function from the item are pure, and random_map always is."""

    def pure(i):
        with rng.scope(i):
            return (
                rows()[i] + np.random.default_rng((3, i)).random(dtype=np.float32) + jax.random.normal(rng.next_key())
            )

    def data():
        with rng.scope(1):
            drawn = Data.from_fn(10, pure).random_map(lambda key, x: x + jax.random.normal(key, x.shape))
            return with_loss(drawn).epochs(2)

    whole = made[0].fit(made[1], data())
    killed(made, data(), tmp_path, after=13)
    assert jnp.array_equal(run(made, data(), tmp_path).vars.params["weight"], whole.vars.params["weight"])


def test_a_cell_of_a_notebook_that_is_run_twice_names_the_state_to_pass(made, tmp_path):
    """`state = trainer.fit(state, ..., checkpoints=runs)`, twice: the second state is the one that the first returned."""
    trainer, state = made
    runs = Directory(tmp_path / "runs")
    state = trainer.fit(state, with_loss(Data.from_items(rows())), checkpoints=runs)
    text = (
        r"(?s)its key differs:\n  the state's step at the start of the run was 0, is 10\. This state is probably what that run "
        r"returned, .*notebook that is run twice\. Pass the state that the run began with: run the cell "
        r"that makes it again, and give the result another name, trained = trainer\.fit\(state, train, checkpoints=runs\)"
    )
    with pytest.raises(ResumeMismatch, match=f"(?i){text}"):
        trainer.fit(state, with_loss(Data.from_items(rows())), checkpoints=runs)
