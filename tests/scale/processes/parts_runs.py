"""What the processes of a group run: a run of steps that saves checkpoints in parts, and reads them."""

import functools
import hashlib
import os
import signal
import time
import traceback
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, checkpoint, layers, losses, reports, rng, sharding
from kaun.checkpoint import Best, Store, group_for
from kaun.checkpoint.disk import Disk

WIDTH = 64


def where(on=None):
    return sharding.fsdp(on or sharding.mesh(data=-1), min_size=64)


@functools.cache
def trainer(on=None):
    model = layers.sequential([layers.linear(WIDTH, 8), layers.tanh(), layers.linear(8, 2)])
    return kaun.Trainer(model=model, optimizer=optax.adam(0.01), sharding=where(on))


@functools.cache
def start(seed=0, on=None):
    """A state of which a weight and its moments are spread over all devices."""
    with rng.scope(seed):
        return trainer(on).init()


@jax.jit
def advance(state):
    change = lambda leaf: leaf if kaun.tree.is_key(leaf) else leaf + jnp.asarray(1, leaf.dtype)
    return jax.tree.map(change, state)


@functools.cache
def everywhere():
    return jax.jit(lambda array: array, out_shardings=where().replicated)


def digest(state):
    """The SHA-256 of all leaves, from the values that this process can read."""
    found = hashlib.sha256()
    for path, leaf in kaun.tree.flatten(state)[0].items():
        array = jax.random.key_data(leaf) if kaun.tree.is_key(leaf) else leaf
        if not array.is_fully_addressable:
            array = everywhere()(array)
        found.update(path.encode() + np.asarray(array).tobytes())
    return found.hexdigest()


class Dying(Disk):
    """A disk at one of whose operations this process, or the one that waits for it, is killed.

    Args:
        at: The start of the operation and its file as text, and its number among those of this text; None: never.
        folder: Where another process that is to be killed is awaited; None: this one is killed.
    """

    def __init__(self, at=None, folder=None):
        self.at, self.folder, self.count = at, folder, 0

    def reach(self, name, arguments):
        text = f"{name} {' '.join(a.name for a in arguments if isinstance(a, Path))}"
        if self.at is None or not text.startswith(self.at[0]):
            return
        self.count += 1
        if self.count == self.at[1]:
            if self.folder is None:
                os.kill(os.getpid(), signal.SIGKILL)
            (self.folder / "reached").touch()
            while not (self.folder / "killed").exists():
                time.sleep(0.01)


def _dying(name):
    def operation(self, *arguments):
        self.reach(name, arguments)
        return getattr(Disk, name)(self, *arguments)

    return operation


for _name in ("make_folder", "create", "write", "sync", "close", "sync_folder", "rename"):
    setattr(Dying, _name, _dying(_name))


def do_not_wait_long():
    """From now on: what is compiled before may take its time, where the machine has other work."""
    os.environ["KAUN_TIMEOUT"] = "3"


def run(folder, steps, killed=None, at=None, by=None, **options):
    """Save each step up to the last one.

    Process ``killed`` is killed where process ``by`` comes to an operation of the disk, see ``Dying``.
    """
    disk = Dying(at if jax.process_index() == by else None, None if by == killed else Path(folder).parent)
    state = start()
    group = group_for(Path(folder), state)
    with Store.open(checkpoint.Directory(folder, **options), disk, group) as store:
        saved = store.newest(state)
        first = 0 if saved is None else saved.step
        state = state if saved is None else saved.state
        for step in range(first + 1, steps + 1):
            state = advance(state)
            best = Best("loss", "min", 1.0, min(step, 2)).fact()
            store.save(step, state, {"a": np.arange(step), "state": state.vars.params[0]["weight"]}, {"best": best})
            if killed is not None and step == 1:
                store.join()
                do_not_wait_long()
        store.join()
    return first, digest(state)


def read(folder, **arguments):
    """The newest checkpoint, as each process has it, and what was warned of."""
    runs, like = checkpoint.Directory(folder), start(1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        state = runs.load(like, **arguments)
    spec = [leaf.sharding == other.sharding for leaf, other in zip(*map(jax.tree.leaves, (state, like)), strict=True)]
    vars = runs.load_vars(like, **arguments)
    same = all(map(np.array_equal, *map(local, (vars, state.vars))))
    return digest(state), all(spec), same, [str(w.message) for w in warned]


def local(tree):
    return [np.asarray(shard.data) for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]


def one_file(folder):
    """``save`` and ``load`` of one file; in process 1 what process 0 wrote is there when ``save`` returns."""
    state, like = advance(start()), start(1)
    checkpoint.save(folder, state)
    there = Path(folder).exists()
    found = checkpoint.load(folder, like=like)
    weight = like.vars.params[0]["weight"]
    half = jax.ShapeDtypeStruct(weight.shape, jnp.bfloat16, sharding=weight.sharding)
    like = like.replace(vars=like.vars.replace(params=[{**like.vars.params[0], "weight": half}, *like.vars.params[1:]]))
    weight = checkpoint.load(folder, like=like, cast=True).vars.params[0]["weight"]
    return there, digest(found), digest(state), str(weight.dtype), weight.sharding == half.sharding


def save_in(folder, wanted):
    """``save`` in one of the processes alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAUN_TIMEOUT", "3")
        if jax.process_index() in wanted:
            checkpoint.save(folder, start())


def fail(folder, at):
    """A save whose disk fails in one process."""

    class Failing(Disk):
        def sync(self, file):
            if self.broken:
                raise OSError(28, "No space left on device")

    disk, state = Failing(), start()
    disk.broken = False
    with Store.open(checkpoint.Directory(folder), disk, group_for(Path(folder), state)) as store:
        store.save(1, state, {}, {})
        store.join()
        disk.broken = jax.process_index() == at
        store.save(2, advance(state), {}, {})
        try:
            store.join()
            said = ""
        except Exception as err:
            said = f"{type(err).__name__}: {err}"
        disk.broken = False
        store.save(3, advance(state), {}, {})
        store.join()
        return said, sorted(entry.name for entry in Path(folder).iterdir())


def not_saved(folder, at):
    """A save of what one process cannot write."""
    state = start()
    with Store.open(checkpoint.Directory(folder), None, group_for(Path(folder), state)) as store:
        store.save(1, state, {"a": {1} if jax.process_index() == at else 1}, {})
        store.join()


def open_there(folder):
    """A directory in another place in each process, as where no file system is shared."""
    here = Path(folder) / str(jax.process_index())
    with Store.open(checkpoint.Directory(here), None, group_for(Path(folder), start())):
        pass


# Fits


def data():
    g = np.random.default_rng(0)
    x, y = g.normal(size=(32, WIDTH)).astype(np.float32), g.normal(size=(32, 2)).astype(np.float32)
    with rng.scope(3):
        return Data.batches((x, y), batch_size=8, shuffle=True).with_loss(losses.mse)


LOOKED = []


def looked():
    """The steps for which the report of a fit was called since this was asked before."""
    found = [*LOOKED]
    LOOKED.clear()
    return found


class Forgetting:
    """A report that cannot say in one process what it keeps after a step."""

    def __init__(self, process, step):
        self.process, self.last, self.step = process, step, 0

    def __call__(self, step, loss, state):
        self.step = step

    def snapshot(self):
        if jax.process_index() == self.process and self.step == self.last:
            raise LookupError("forgotten")
        return {}

    def restore(self, values):
        pass


def fit(folder, epochs=3, fails=None, dies=None, loose=None, by=1, forgets=None, **options):
    """How a fit ended, its last step, and digests of the state, of the best one, and of the history of process 0.

    ``loose``: a file for the variables at the end; warnings of another topology are expected. ``by``: the process in
    which the report fails or forgets.
    """
    stopper, history = reports.early_stopping("loss", mode="min", patience=100), reports.history()

    def look(step, loss, state):
        LOOKED.append(step)
        if step == dies:
            do_not_wait_long()
        if step == dies and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == fails and jax.process_index() == by:
            raise OSError("no such row")

    kept = [stopper, history] if jax.process_index() == 0 else [stopper]
    kept += [] if forgets is None else [Forgetting(by, forgets)]
    report = reports.all_of(*kept, reports.every(1, look))
    how = "returned"
    try:
        runs = checkpoint.Directory(folder, every=2, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if loose is None else "ignore")
            state = trainer().fit(start(), data().epochs(epochs), report=report, checkpoints=runs)
    except BaseException as error:
        traceback.print_exc()
        notes = [note for note in getattr(error, "__notes__", []) if note.startswith("Also")]
        how, state = "\n".join([f"{type(error).__name__}: {error}", *notes]), getattr(error, "kaun_state", None)
    if dies is not None:  # with one process left, no shards of the other can be read
        return how
    if loose is not None:
        checkpoint.save(loose, state.vars)
    values = history.losses.tobytes().hex() if jax.process_index() == 0 else ""
    return how, int(state.step), digest(state), digest(stopper.best), values


def fit_digest(folder, step):
    """The digest of a checkpoint of a fit, read onto the devices that there are."""
    return [digest(checkpoint.Directory(folder).load(start(), at=step))]
