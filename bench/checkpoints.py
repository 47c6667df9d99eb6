"""Seconds to save and restore an Adam state, by kaun and by Orbax: ``python -m bench.checkpoints``.

All run in one process, in turns, with a new folder each time; what is printed is the median, and the median of the
ratios within a round. ``blocked`` is the part of a save after which training continues. A save ends when the checkpoint
is on the disk: both wait for it (fsync). Orbax compresses, 120 MB of noise to 111 MB. kaun's restore verifies every
byte; Orbax's returned other values, and no error, for each of 40 flipped bits. ``file`` is the least that a save and a
restore can take: the bytes alone, written, synced, renamed, and read into memory that JAX takes as it is.
"""

import argparse
import importlib.util
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kaun import Trainer, checkpoint, layers, rng
from kaun.checkpoint import Disk, Store
from kaun.checkpoint.safetensors_header import Memory

PARAMETERS = 10_000_000
WHAT = ("blocked", "saved", "restored")
Times = dict[str, float]


def state_of(parameters: int) -> Any:
    """A state of ten square layers with Adam's two moments, of about so many parameters."""
    width = round((parameters / 10) ** 0.5)
    model = layers.sequential([layers.linear(width, width) for _ in range(10)])
    with rng.scope(0):
        state = Trainer(model=model, optimizer=optax.adam(1e-3)).init(dtype=jnp.float32)
    noise = lambda a: jnp.asarray(np.random.default_rng(a.size).standard_normal(a.shape, np.float32))
    moments = jax.tree.map(lambda a: noise(a) if a.ndim else a, state.opt_state)
    return jax.block_until_ready(state.replace(opt_state=moments))


def by_kaun(state: Any, folder: Path) -> Times:
    with Store.open(checkpoint.Directory(folder)) as store:
        start = time.perf_counter()
        store.save(1, state, {}, {})
        blocked = time.perf_counter() - start
        store.join()
        saved = time.perf_counter() - start
        start = time.perf_counter()
        found = jax.block_until_ready(store.newest(state).state)
        restored = time.perf_counter() - start
    must_be_equal(plain(state), plain(found))
    return {"blocked": blocked, "saved": saved, "restored": restored}


def by_orbax(state: Any, folder: Path) -> Times:
    import orbax.checkpoint as ocp

    tree = plain(state)
    with ocp.StandardCheckpointer() as checkpointer:
        start = time.perf_counter()
        checkpointer.save(folder / "1", tree)
        blocked = time.perf_counter() - start
        checkpointer.wait_until_finished()
        saved = time.perf_counter() - start
        start = time.perf_counter()
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)
        found = jax.block_until_ready(checkpointer.restore(folder / "1", like))
        restored = time.perf_counter() - start
    must_be_equal(tree, found)
    return {"blocked": blocked, "saved": saved, "restored": restored}


def by_file(state: Any, folder: Path) -> Times:
    """Neither names nor checksums, and no thread that waits while training continues."""
    leaves = jax.tree.leaves(plain(state))
    pieces = [np.asarray(leaf).reshape(-1).view(np.uint8).data for leaf in leaves]
    disk, path, target = Disk(), folder / "new", folder / "1"
    start = time.perf_counter()
    disk.make_folder(path)
    file = disk.create(path / "state")
    for piece in pieces:
        disk.write(file, piece)
    disk.sync(file)
    disk.close(file)
    disk.sync_folder(path)
    disk.rename(path, target)
    disk.sync_folder(folder)
    saved = time.perf_counter() - start
    start = time.perf_counter()
    file, _ = disk.open(target / "state")
    memory = Memory(sum(map(len, pieces)))
    raws = [memory.take(len(piece)) for piece in pieces]
    places = np.cumsum([0, *map(len, pieces)]).tolist()
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda raw, at: disk.read_at(file, at, raw.data), raws, places))
    disk.close(file)
    arrays = [raw.view(leaf.dtype).reshape(leaf.shape) for raw, leaf in zip(raws, leaves, strict=True)]
    found = jax.block_until_ready(jax.device_put(arrays))
    restored = time.perf_counter() - start
    must_be_equal(leaves, found)
    return {"blocked": saved, "saved": saved, "restored": restored}


def plain(state: Any) -> dict[str, Any]:
    """A state without the containers and the key that only kaun knows."""
    key = jax.random.key_data(state.key)
    return {"params": state.vars.params, "opt_state": state.opt_state, "step": state.step, "key": key}


def must_be_equal(a: Any, b: Any) -> None:
    if not all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)):
        raise SystemExit("what came back is not what was saved")


def installed() -> dict[str, Callable[[Any, Path], Times]]:
    """kaun, the bytes alone, and Orbax where it is installed."""
    runners: dict[str, Callable[[Any, Path], Times]] = {"kaun": by_kaun, "file": by_file}
    if importlib.util.find_spec("orbax") is None:
        print("orbax: skipped, orbax-checkpoint is not installed")
    else:
        runners["orbax"] = by_orbax
    return runners


def measure(runners: dict[str, Callable[[Any, Path], Times]], parameters: int, rounds: int) -> dict[str, list[Times]]:
    """The times of each runner in each round; one round before them is not counted."""
    state = state_of(parameters)
    found: dict[str, list[Times]] = {name: [] for name in runners}
    for number in range(rounds + 1):
        for name in sorted(runners, reverse=number % 2 == 1):
            folder = Path(tempfile.mkdtemp()).resolve()
            times = runners[name](state, folder)
            shutil.rmtree(folder)
            if number:
                found[name].append(times)
    return found


def ratio(found: dict[str, list[Times]], name: str, to: str, what: str) -> float:
    """The median ratio of two runners' times within a round."""
    return statistics.median(a[what] / b[what] for a, b in zip(found[name], found[to], strict=True))


def table(found: dict[str, list[Times]]) -> list[str]:
    """Medians in seconds, and of the ratios to kaun within a round."""
    lines = [f"{'':10}" + "".join(f"{what:>22}" for what in WHAT)]
    for name, rounds in found.items():
        line = f"{name:10}"
        for what in WHAT:
            times = ratio(found, name, "kaun", what)
            line += f"{statistics.median(each[what] for each in rounds):12.3f} s ({times:.2f}x)".rjust(22)
        lines.append(line)
    return lines


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints", description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(given)
    print("\n".join(table(measure(installed(), options.parameters, options.rounds))))


if __name__ == "__main__":
    main()
