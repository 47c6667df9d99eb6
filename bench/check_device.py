"""Whether kaun's promises for many devices hold on the devices that JAX finds here: ``make check-device``.

A line for each promise with what was found and its bar, and a verdict at the end; the exit status is 1 where one does
not hold. ``make check-device`` takes eight simulated devices of the CPU where JAX finds no accelerator;
``make check-device DEVICES=`` takes the CPU as it is. For a GPU or TPU install JAX for it in an environment of its own:
``make check-device VENV=.venv-gpu ALSO='jax[cuda13]'``.

It lies in bench/ beside the loops whose times it compares (``bench.scale``); the tests of the same promises are in
tests/scale, for eight simulated devices and for two processes.
"""

import argparse
import dataclasses
import math
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import kaun
from bench import scale
from kaun import Data, checkpoint, layers, losses, reports, rng, sharding
from kaun._engine import StepInputs, find_step
from kaun._engine.program import count_on_device

TOLERANCE = 1e-6
COLLECTIVES = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
SHAPE = re.compile(r"f32\[([0-9,]+)\]")
FEATURES, WIDTH, CLASSES, BATCH = 16, 256, 8, 52
LENGTH, VOCAB, DIM = 8, 32, 32


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: What is promised.
        bar: How it is judged, in words.
        found: What was found, in words.
        holds: Whether it holds, None if it could not be checked.
    """

    what: str
    bar: str
    found: str
    holds: bool | None

    def __str__(self) -> str:
        verdict = {True: "ok", False: "FAILED", None: "not checked"}[self.holds]
        return f"{verdict:12} {self.what}: {self.found} ({self.bar})"


def count() -> int:
    return len(jax.devices())


# Models, data and trainers


def perceptron() -> Any:
    return layers.sequential(
        [layers.linear(FEATURES, WIDTH), layers.layer_norm(WIDTH), layers.relu(), layers.linear(WIDTH, CLASSES)]
    )


def transformer() -> Any:
    attend = lambda: layers.residual(layers.layer_norm(DIM) >> layers.multi_head_attention(DIM, 4, is_causal=True))
    widen = lambda: layers.sequential([layers.linear(DIM, 64), layers.gelu(), layers.linear(64, DIM)])
    blocks = [part for _ in range(2) for part in (attend(), layers.residual(layers.layer_norm(DIM) >> widen()))]
    return layers.sequential([layers.embedding(VOCAB, DIM), *blocks, layers.linear(DIM, VOCAB)])


def rows_of(n: int) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(0)
    return g.normal(size=(n, FEATURES)).astype(np.float32), g.integers(0, CLASSES, n).astype(np.int32)


def tokens() -> Data:
    found = np.random.default_rng(1).integers(0, VOCAB, (3 * 16, LENGTH + 1))
    return Data.batches((found[:, :-1], found[:, 1:]), 16).with_loss(losses.cross_entropy_sparse)


def shardings() -> dict[str, sharding.Sharding]:
    """The shardings of the table; tensor parallel and replicas of shards need a number of devices that 2 divides."""
    found = {
        "DP": sharding.data_parallel(),
        "FSDP": sharding.fsdp(min_size=64),
        "FSDP gather": sharding.fsdp(min_size=64, gather=True),
    }
    if count() % 2 == 0:
        heads = {"*_proj.*": P(None, "model"), "*.inner.right.0.weight": P(None, "model")}
        both = sharding.mesh(data=-1, model=2)
        rest = sharding.fsdp(both, axis="data", min_size=64)
        found["TP"] = sharding.by_path(heads, both)
        found["TP and FSDP"] = sharding.by_path(heads, both, otherwise=rest)
        replicas = sharding.mesh(replica=2, shard=-1)
        found["replicas of shards"] = sharding.fsdp(replicas, axis="shard", min_size=64, rows=("replica", "shard"))
    return found


def made(model: Any, where: sharding.Sharding | None, optimizer: Any, **options: Any) -> tuple[Any, Any]:
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optimizer, sharding=where, **options)
        return trainer, trainer.init()


def content(value: Any) -> list[bytes]:
    """The bytes of all arrays."""
    arrays = [jax.random.key_data(a) if kaun.tree.is_key(a) else a for a in jax.tree.leaves(value)]
    return [np.asarray(a).tobytes() for a in arrays]


def fold(trainer: Any, state: Any, data: Data) -> Any:
    for x, loss in data:
        value, state = trainer.step(state, x, loss=loss)
        value.block_until_ready()  # simulated devices may wait for each other for ever where too much is queued
    return state


def misplaced(trainer: Any, state: Any) -> list[str]:
    """The paths of the arrays that do not lie where the sharding says."""
    where = jax.tree.leaves(trainer.sharding.of(state))
    pairs = zip(kaun.tree.flatten(state)[0].items(), where, strict=True)
    return [path for (path, leaf), w in pairs if not leaf.sharding.is_equivalent_to(w, leaf.ndim)]


# The rows


def loss_of_each_step() -> Iterator[Row]:
    """From one state each: the state of the run on one device, given to the others."""
    x, y = rows_of(4 * BATCH - 8)
    with rng.scope(1):
        data = Data.batches((x, y), BATCH, shuffle=True).with_loss(losses.cross_entropy_sparse).epochs(26)
    for name, optimizer in (("sgd", optax.sgd(0.1)), ("adam", optax.adam(1e-2))):
        alone, state = made(perceptron(), None, optimizer)
        others = {kind: made(perceptron(), where, optimizer)[0] for kind, where in list(shardings().items())[:2]}
        worst = dict.fromkeys(others, 0.0)
        for item, loss in data:
            value, after = alone.step(state, item, loss=loss)
            for kind, trainer in others.items():
                found = float(trainer.step(state, item, loss=loss)[0])
                worst[kind] = max(worst[kind], abs(found - float(value)) / abs(float(value)))
            state = after
        text = ", ".join(f"{kind} {error:.1e}" for kind, error in worst.items())
        what = f"losses of 104 steps are those of one device, ragged batches, {name}"
        yield Row(what, f"at most {TOLERANCE:g} relative", text, max(worst.values()) <= TOLERANCE)


def transformers() -> Iterator[Row]:
    data = tokens()
    alone, now = made(transformer(), None, optax.adam(1e-3))
    steps = []
    for x, loss in data:
        value, after = alone.step(now, x, loss=loss)
        steps.append((now, x, loss, float(value)))
        now = after
    for name, where in shardings().items():
        trainer, state = made(transformer(), where, optax.adam(1e-3))
        end, folded = trainer.fit(state, data), fold(trainer, state, data)
        found = [float(trainer.step(state, x, loss=loss)[0]) for state, x, loss, _ in steps]
        error = max(abs(a - b) / b for a, (*_, b) in zip(found, steps, strict=True))
        fits = sum(c.where == "fit" for c in trainer.compilations)
        yield Row(
            f"transformer, {name}: the loss of each step is that of one device, and one program is compiled",
            f"at most {TOLERANCE:g} relative, 1 program", f"{error:.1e}, {fits}", error <= TOLERANCE and fits == 1,
        )  # fmt: skip
        yield Row(f"transformer, {name}: fit is the fold of step", "equal bytes", *same(end, folded))
        moved = misplaced(trainer, end) + misplaced(trainer, folded)
        yield Row(f"transformer, {name}: no array of the state moves", "none", ", ".join(moved) or "none", not moved)


def same(a: Any, b: Any) -> tuple[str, bool]:
    different = sum(x != y for x, y in zip(content(a), content(b), strict=True))
    return ("equal", True) if not different else (f"{different} arrays differ", False)


def optimizers() -> Iterator[Row]:
    x, y = rows_of(3 * BATCH - 8)
    data = Data.batches((x, y), BATCH).with_loss(losses.cross_entropy_sparse)
    chosen = {
        "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
        "momentum": optax.sgd(0.1, momentum=0.9),
    }
    for name, optimizer in chosen.items():
        trainer, state = made(perceptron(), sharding.fsdp(min_size=64), optimizer)
        end, folded = trainer.fit(state, data), fold(trainer, state, data)
        moved = misplaced(trainer, end) + misplaced(trainer, folded)
        text, equal = same(end, folded)
        found = f"{text}, moved: {', '.join(moved) or 'none'}"
        yield Row(
            f"FSDP with {name}: fit is the fold of step, no array moves", "equal, none", found, equal and not moved
        )


def fresh_states() -> Iterator[Row]:
    found = []
    for where in (None, sharding.fsdp(min_size=64)):
        with rng.scope(7):
            trainer = kaun.Trainer(model=transformer(), optimizer=optax.adam(1e-3), sharding=where)
            found.append((trainer.init(), rng.next_key()))
    yield Row("a state made in pieces, and the next key, are those of one device", "equal bytes", *same(*found))


def programs() -> Iterator[Row]:
    many, is_cpu = count() > 1, jax.default_backend() == "cpu"
    for name, where in shardings().items():
        if name not in ("DP", "FSDP gather"):
            continue
        lists = [collectives(compiled(where, entry=entry)) for entry in ("step", "fit")]
        texts = [", ".join(f"{n} {kind}" for kind, n in found.items()) or "none" for found in lists]
        text = texts[0] if lists[0] == lists[1] else f"{texts[0]}, and in a block {texts[1]}"
        # One gather for each array that is spread, and one reduction of all gradients, beside that of the look at them.
        most = {"all-reduce": 1} if name == "DP" else {"all-gather": 5, "all-reduce": 1, "reduce-scatter": 5}
        few = all(n <= most[kind] for kind, n in lists[0].items() if kind in most) or not is_cpu
        holds = set(lists[0]) <= set(most) and lists[0] == lists[1] and few
        bar = f"{' or '.join(sorted(most))} alone, the same in a block of steps"
        yield Row(f"{name}: collectives of a step", bar, text, holds if many else None)


def ensembles() -> Iterator[Row]:
    """Two members on each device, which exchange nothing."""
    x, y = rows_of(3 * BATCH)
    data = Data.batches((x, y), BATCH).with_loss(losses.cross_entropy_sparse)
    trainer, _ = made(perceptron(), None, optax.inject_hyperparams(optax.adam)(1e-2))
    alone = kaun.Ensemble(trainer, 2 * count())
    many = kaun.Ensemble(trainer, 2 * count(), sharding=sharding.members())
    with rng.scope(0):
        now = alone.init(learning_rate=np.geomspace(1e-3, 1e-1, 2 * count()))
    placed, worst = many.make_state(now.vars).replace(opt_state=now.opt_state, key=now.key), 0.0
    end, folded = many.fit(placed, data), fold(many, placed, data)
    for item, loss in data:
        value, after = alone.step(now, item, loss=loss)
        found = many.step(now, item, loss=loss)[0]
        worst, now = max(worst, float(np.abs(np.asarray(found) / np.asarray(value) - 1).max())), after
    what = f"an ensemble of {2 * count()} members"
    bar = f"at most {TOLERANCE:g} relative"
    yield Row(f"{what}: the losses of each step are those on one device", bar, f"{worst:.1e}", worst <= TOLERANCE)
    yield Row(f"{what}: fit is the fold of step", "equal bytes", *same(end, folded))
    runner = many._runner(None, False)
    exchanged = [collectives(compiled_of(runner, placed, 64, entry), least=0) for entry in ("step", "fit")]
    none = exchanged == [{}, {}]
    found = "none" if none else str(exchanged)
    yield Row(f"{what}: collectives of a step", "none", found, none if count() > 1 else None)


def memory() -> Iterator[Row]:
    _, state = made(perceptron(), sharding.fsdp(min_size=64), optax.adam(1e-3))
    carry = jax.tree.leaves((state.vars, state.opt_state))
    whole, each = sum(a.nbytes for a in carry), sum(a.addressable_shards[0].data.nbytes for a in carry)
    small = sum(a.nbytes for a in carry if a.sharding.is_fully_replicated)
    found = f"{each:,} of {whole:,}, {small:,} of them small"
    holds = each <= (whole - small) / count() + small if count() > 1 else None
    yield Row("FSDP: bytes of the state on each device", f"at most 1/{count()}, and the small arrays", found, holds)
    for name, where in list(shardings().items())[:2]:
        program = compiled(where, entry="fit")
        alias, own = program.memory.alias_size_in_bytes, program.state_bytes
        found = f"{alias:,} of {own:,} bytes"
        yield Row(f"{name}: the state's memory is used again", "all of it", found, own <= alias <= own + 64 + own // 50)


def work() -> Iterator[Row]:
    # Of Adam and of the looks at values that are not finite, which each device does for all parameters.
    update = 60 * (FEATURES * WIDTH + WIDTH * WIDTH + WIDTH * CLASSES + 3 * WIDTH)
    hidden = [layers.linear(FEATURES, WIDTH), layers.relu(), layers.linear(WIDTH, WIDTH), layers.relu()]
    model = layers.sequential([*hidden, layers.linear(WIDTH, CLASSES)])
    cases = {"": (512 * count(), 1), ", ragged": (512 * count() + 4, 1), ", microbatches": (512 * count(), 4)}
    for text, (rows, parts) in cases.items():
        places = (None, sharding.data_parallel())
        one, spread = (compiled(where, rows, model=model, microbatches=parts).flops for where in places)
        known = count() > 1 and bool(one) and bool(spread)
        found = f"{spread:.3g} of {one:.3g}" if one and spread else "XLA does not say"
        bar = f"at most 1.3/{count()} and the update"
        yield Row(f"DP{text}: FLOPs of a device", bar, found, spread <= 1.3 / count() * one + update if known else None)


def resumed() -> Iterator[Row]:
    x, y = rows_of(6 * BATCH)
    data = Data.batches((x, y), BATCH).with_loss(losses.cross_entropy_sparse)
    stop = reports.every(3, lambda step, loss, state: 1 / (step != 3))
    trainer, state = made(perceptron(), sharding.fsdp(min_size=64), optax.adam(1e-2))
    whole = trainer.fit(state, data)
    for name, where in (("the same devices", trainer.sharding), ("one device", None)):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            runs = checkpoint.Directory(folder, every=1)
            try:
                trainer.fit(state, data, report=stop, checkpoints=runs)
            except ZeroDivisionError as error:
                begun = error.kaun_state
            saved = runs.load(made(perceptron(), None, optax.adam(1e-2))[1])
            again, start = made(perceptron(), where, optax.adam(1e-2))
            end = again.fit(start, data, checkpoints=runs)
        leaves = zip(jax.tree.leaves(end.vars), jax.tree.leaves(whole.vars), strict=True)
        error = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in leaves)
        warned = sum("the state was on" in str(warning.message) for warning in seen)
        moved = where is None and count() > 1
        ends = error <= 1e-5 and warned == moved if where is None else error == 0 and not warned
        found = f"{same(saved.vars, begun.vars)[0]}, {error:.1e}, {warned}"
        bar = "equal bytes in the file, at the end " + ("1e-5" if where is None else "0") + f", {int(moved)} warnings"
        yield Row(f"a run of FSDP, resumed on {name}", bar, found, same(saved.vars, begun.vars)[1] and ends)


def times(quick: bool) -> Iterator[Row]:
    """Beside hand-written loops. Of simulated devices by the CPU time: the wall time of eight on two cores is noise."""
    simulated = jax.default_backend() == "cpu"
    tasks = scale.QUICK if quick else scale.TASKS
    for name, task in tasks.items():
        for kind in scale.KINDS:
            found = scale.measure(task, kind, 5 if quick else 15)
            ratios = {loop: scale.ratio(found, loop, int(simulated)) for loop in ("control", "fit")}
            noise = abs(ratios["control"] - 1)
            bar = 1.05 + max(noise, 0.1 if simulated else 0.0)
            text = f"{ratios['fit']:.2f}, and the same loop again {ratios['control']:.2f}"
            of = "CPU time" if simulated else "wall time"
            what = f"{kind}, {name}: {of} of fit to a loop written by hand"
            yield Row(what, f"at most {bar:.2f}, 1.05 and the noise", text, ratios["fit"] <= bar)


# Programs


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program: its text, what XLA says of its memory and FLOPs, and the bytes of the state on a device."""

    text: str
    memory: Any
    flops: float
    state_bytes: int


def compiled(
    where: sharding.Sharding | None, rows: int = 0, entry: str = "step", model: Any = None, **options: Any
) -> Compiled:
    """A step, or a block of them that overwrites its state, of the perceptron or another model."""
    trainer, state = made(model or perceptron(), where, optax.adam(1e-3), **options)
    return compiled_of(trainer, state, rows or 64 * count(), entry)


def compiled_of(trainer: Any, state: Any, rows: int, entry: str) -> Compiled:
    """The same of a trainer and its state."""
    x, y = rows_of(rows)
    inputs = StepInputs(x, lambda out: losses.cross_entropy_sparse(out, y), None)
    leaves, structure = jax.tree.flatten((state.vars, state.opt_state, state.step))
    traced = find_step(trainer._programs, structure, leaves, state.key, inputs, True)
    placing, one = traced.placing, count_on_device(1)
    if entry == "step":
        program, arguments = traced.program("step unpacked", (False, False)), (leaves, state.key, one, inputs.leaves)
        if placing is not None:
            arguments = leaves, state.key, placing.put_everywhere(one), placing.put_item(inputs.leaves)
    else:
        program = traced.program("fit in place", (True, True))
        stacks = [np.stack([a] * traced.capacity) for a in inputs.leaves]
        arguments = placing.put_block((leaves, state.key, traced.status, one, [], stacks), (True, True))
    found = program.jitted.lower(*arguments).compile()
    size = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
    flops = float((found.cost_analysis() or {}).get("flops", 0.0))
    return Compiled(found.as_text(), found.memory_analysis(), flops, size)


def collectives(program: Compiled, least: int = 64) -> dict[str, int]:
    """How often each kind occurs, those of a few numbers left out: the looks at the loss and the gradient's norm."""
    large = lambda text: (
        not least or any(math.prod(map(int, shape.split(","))) > least for shape in SHAPE.findall(text))
    )
    kinds = [kind for text, kind in COLLECTIVES.findall(program.text) if large(text)]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


CHECKS: dict[str, Callable[[], Iterator[Row]]] = {
    "losses": loss_of_each_step, "transformer": transformers, "optimizers": optimizers, "init": fresh_states,
    "programs": programs, "ensembles": ensembles, "memory": memory, "work": work, "resume": resumed,
}  # fmt: skip


def rows(names: list[str], quick: bool) -> Iterator[Row]:
    checks = {**CHECKS, "times": lambda: times(quick)}
    for name in names or checks:
        try:
            yield from checks[name]()
        except Exception as error:
            yield Row(name, "runs", f"{type(error).__name__}: {error}", False)
            traceback.print_exc()
    if count() % 2:
        yield Row("TP, replicas of shards", "two axes", f"{count()} devices make no mesh of two axes", None)
    if jax.process_count() == 1:
        yield Row("several processes", "make test-scale, with two on this machine", "this is one process", None)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.check_device", description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", choices=[*CHECKS, "times", []], help="by default all")
    parser.add_argument("--quick", action="store_true", help="few rounds for the times")
    options = parser.parse_args(given)
    # A GPU would multiply in TensorFloat-32, whose rounding is larger than the bars.
    jax.config.update("jax_default_matmul_precision", "highest")
    kind = jax.devices()[0].device_kind
    print(f"{count()} devices of {jax.default_backend()} ({kind}), jax {jax.__version__}, kaun {kaun.__version__}\n")
    found = []
    for row in rows(options.checks, options.quick):
        found.append(row)
        print(row, flush=True)
    failed, unknown = (sum(row.holds is value for row in found) for value in (False, None))
    held = len(found) - failed - unknown
    verdict = "FAILED" if failed else "ok"
    print(f"\n{verdict}: {held} promises hold, {failed} do not, {unknown} could not be checked here.")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
