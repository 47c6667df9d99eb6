"""What the processes of a group run."""

import dataclasses
import functools
import io
import os
import signal
import threading
import time
import traceback
import warnings
import zlib
from pathlib import Path

import jax
import numpy as np
import optax

import kaun
from kaun import Data, EarlyStop, _processes, averages, layers, losses, reports, rng, sharding


def meet(times):
    """The values of all processes, each time."""
    channel = _processes.Channel("meet", what="the meeting")
    return [channel.exchange(f"{jax.process_index()}-{i}", repr) for i in range(times)]


def wait(names, missing=None, late=None):
    for name in names:
        time.sleep(here(late))
        if not here(missing):
            _processes.barrier(name, timeout=None if missing is late is None else 0.3)
    return _processes.is_first()


def seconds_of_a_meeting():
    channel = _processes.Channel("clock")
    channel.exchange("", repr)
    start = time.perf_counter()
    for _ in range(100):
        channel.exchange("a", repr)
    return (time.perf_counter() - start) / 100


# Fits. The trainer and its programs are made once in each process.


@functools.cache
def trainer():
    with rng.scope(0):
        made = kaun.Trainer(model=layers.linear(3, 2), optimizer=optax.adam(0.1), sharding=sharding.data_parallel())
        return made, made.init()


def batch(i, rows=8):
    x = np.random.default_rng(i).normal(size=(rows, 3)).astype(np.float32)
    y = x[:, :2] * 0.5
    return x, lambda output: losses.mse(output, y)


def bytes_of(tree):
    return zlib.crc32(
        b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree_util.tree_leaves((tree.vars, tree.opt_state)))
    )


def fit(data, report=None, state=None, **kwargs):
    """What a fit gave: how it ended, after which step, and a checksum of the state."""
    made, start = trainer()
    how = "returned"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = made.fit(state or start, data, report=report, **kwargs)
    except BaseException as error:
        traceback.print_exc()
        how = "\n".join(
            [f"{type(error).__name__}: {error}", *[n for n in getattr(error, "__notes__", []) if n.startswith("Also")]]
        )
        state = getattr(error, "kaun_state", None)
    step = None if state is None else int(state.step)
    return how, step, state and bytes_of(state), [str(each.message) for each in caught]


def here(process):
    return jax.process_index() == process


def folded(steps):
    """The checksum of the state after some steps, taken one by one."""
    made, state = trainer()
    for i in range(steps):
        x, loss = batch(i)
        _, state = made.step(state, x, loss=loss)
    return bytes_of(state)


def plain(n):
    return fit([batch(i) for i in range(n)])


def loader(n, process=None, fails=None, ends=None, what=ValueError):
    """Items from a generator, which in one process fails at an item or ends there."""

    def items():
        for i in range(n):
            if here(process) and i == fails:
                raise what("no such file")
            if here(process) and i == ends:
                return
            yield batch(i)

    return items


def data_fails(process, at, n=20):
    return fit(Data.from_iterable(loader(n, process, fails=at)))


def data_ends(process, at, n=20):
    return fit(Data.from_iterable(loader(n, process, ends=at)))


def report_does(process, at, what, everywhere=True, n=20):
    """A report that stops or fails in one process; it is in that one alone, or in all of them."""

    def report(step, loss, state):
        if here(process) and step == at:
            raise EarlyStop if what == "stop" else OSError("disk full")

    given = reports.every(at, report) if what == "stop" else report
    return fit([batch(i) for i in range(n)], given if everywhere or here(process) else None)


def loss_fails(process, at):
    """A loss that fails in one process, when it is traced for an item of another shape."""

    def loss(output):
        if here(process) and len(output) == 4:
            raise ArithmeticError("no such row")
        return (output**2).mean()

    return fit(Data.from_iterable(lambda: ((batch(i, 4 if i == at else 8)[0], loss) for i in range(10))))


def signalled(process, at, number):
    """One process gets a signal while it takes its items, of which the later ones take longer."""

    def items():
        for i in range(2000):
            if here(process) and i == at:
                os.kill(os.getpid(), number)
            time.sleep(0.005 * (i > at))
            yield batch(i)

    return fit(Data.from_iterable(items))


def other_items(what):
    """Items that differ between the processes."""
    me = jax.process_index()
    if what == "values":
        return fit([batch(i + 100 * me) for i in range(4)])
    if what == "later":
        return fit(Data.from_iterable(lambda: (batch(i + 10000 * me * (i >= 500)) for i in range(1200))))
    if what == "shapes":
        return fit([batch(i, rows=8 + 4 * me) for i in range(4)])
    if what == "unscoped":
        arrays = tuple(np.zeros((8, k), np.float32) for k in (3, 2))
        return fit(Data.batches(arrays, batch_size=2, shuffle=True).with_loss(losses.mse))
    if what == "key":
        with rng.scope(me):
            return fit([batch(i) for i in range(4)], state=trainer()[0].init())
    with rng.scope(0):
        arrays = tuple(np.zeros((8, k), np.float32) for k in (3, 2))
        return fit(Data.batches(arrays, batch_size=2 + 2 * me, shuffle=True).with_loss(losses.mse))


def killed(process, at, timeout, pause=0.0):
    """One process is killed while it takes its items; the others wait so long for it, once all is compiled."""

    def items():
        for i in range(2000):
            if i == at // 2:
                os.environ["KAUN_TIMEOUT"] = str(timeout)
            if here(process) and i == at:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(pause)
            yield batch(i)

    return fit(Data.from_iterable(items))


def ready_made_reports(folder, traced=()):
    """Reports that write: all processes have them, and one writes."""
    place = Path(folder) / str(jax.process_index())
    history, shown = reports.history(), io.StringIO()
    bar = reports.progress(file=shown)
    writers = [reports.csv(place / "log.csv"), reports.plot(place / "loss.png")]
    writers += [reports.profile(place / "trace", traced)] if traced else []
    how = fit([batch(i) for i in range(6)], reports.all_of(history, bar, *writers))
    history.plot(place / "curve.png")
    return how[:3], sorted(path.name for path in place.glob("*")), "6/6" in shown.getvalue(), history.losses.tolist()


def layer_norms_in(process):
    """A report in one process that wants numbers which the step must compute in all of them."""
    watch = reports.watch(every=2)
    report = watch if here(process) else None
    return fit([batch(i) for i in range(6)], report)[:3], watch.steps.tolist()


def seconds_of_steps(n, how):
    """The seconds of a step: of items in memory, of a generator, and with a report of every step; and of a hand loop."""
    made, state = trainer()
    items = [batch(i) for i in range(n)]
    if how == "step":
        start = time.perf_counter()
        for x, loss in items:
            value, state = made.step(state, x, loss=loss)
            jax.block_until_ready(value)
        return (time.perf_counter() - start) / n
    data = {"memory": items, "generator": Data.from_iterable(lambda: iter(items)), "report": items}[how]
    report = (lambda step, loss, state: None) if how == "report" else None
    made.fit(state, items[:200], report=report)
    start = time.perf_counter()
    jax.block_until_ready(made.fit(state, data, report=report))
    return (time.perf_counter() - start) / n


# Trainer(sharding=)


@functools.cache
def sharded(kind, average=None):
    where = {"dp": sharding.data_parallel, "fsdp": lambda: sharding.fsdp(min_size=16)}[kind]()
    model = layers.sequential([layers.linear(3, 8), layers.tanh(), layers.dropout(0.5), layers.linear(8, 2)])
    return kaun.Trainer(model=model, optimizer=optax.adam(0.05), sharding=where)


def whole(leaves):
    """Arrays that may be spread over both processes, in each of them."""
    gather = jax.jit(lambda leaves: leaves, out_shardings=sharding.data_parallel().replicated)
    return [np.asarray(leaf) for leaf in gather(leaves)]


def trained(kind, n=20, rows=8):
    """A fit, the fold of its step, evaluate and predict, of a sharded trainer: checksums of states, and numbers."""
    made = sharded(kind)
    with rng.scope(1):
        start = made.init()
    items = [batch(i, rows if i % 7 else rows - 3) for i in range(n)]
    history = reports.history()
    state = made.fit(start, items, report=history)
    folded, found = start, []
    for x, loss in items:
        value, folded = made.step(folded, x, loss=loss)
        found.append(float(value))
    pairs = [(batch(i)[0], batch(i)[0][:, :2]) for i in range(5)]
    scores = made.evaluate(state, pairs, {"mse": losses.mse})
    (outputs,) = whole([made.predict(state, pairs[0][0])])
    numbers = {"losses": history.losses.tolist(), "scores": scores, "outputs": outputs.tolist()}
    digest = lambda state: zlib.crc32(b"".join(a.tobytes() for a in whole(jax.tree_util.tree_leaves(state.vars))))
    return digest(start), digest(state), digest(folded), found == numbers["losses"], numbers


def made_outside_a_scope(entry):
    made, state = trainer()
    return str(made.init() if entry == "init" else made.make_state(state.vars))


def page(text):
    """Run a program of the documentation, and return its names: the losses, and how many processes it saw."""
    names = {}
    exec(text, names)
    return names["history"].losses.tolist(), jax.process_count(), Path("run.csv").exists()


def not_finite(at):
    def items():
        for i in range(20):
            x, loss = batch(i)
            yield x * (np.float32("nan") if i == at else np.float32(1)), loss

    return fit(Data.from_iterable(items))


def interrupted(process, number, report_in=None):
    """One process gets a signal at some time, in a fit on items in memory, which needs no vote for each dispatch."""
    if here(process):
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    report = (lambda step, loss, state: None) if here(report_in) else None
    return fit(Data.repeat(10**7, batch(0)), report)


PAIRS = [(batch(i)[0], batch(i)[0][:, :2]) for i in range(3)]
MSE = {"mse": losses.mse}


def metric_fails(process, entry="evaluate", known=True):
    """A metric, or the model's input, that fails in one process alone when it is traced; what an evaluation gives then."""
    made, state = trainer()

    def metric(predictions, targets):
        if here(process):
            raise ArithmeticError("no such class")
        return losses.mse(predictions, targets)

    data = Data.from_items(PAIRS) if known else Data.from_iterable(lambda: iter(PAIRS))
    start, ended = time.monotonic(), ""
    try:
        if entry == "predict":
            made.predict(state, data.map(lambda b: b[0][:, : 3 - here(process)]))
        else:
            made.evaluate(state, data, {"own": metric})
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    return ended, seconds, made.evaluate(state, Data.from_items(PAIRS), MSE)


def tool_fails(process, tool):
    """What runs a fit or an evaluation of its own, and fails in one process alone."""
    made, state = trainer()

    def metric(predictions, targets):
        if here(process):
            raise ArithmeticError("no such class")
        return losses.mse(predictions, targets)

    loss = lambda output: metric(output, output)
    items = [(batch(i)[0], loss) for i in range(12)]
    start, ended = time.monotonic(), ""
    try:
        if tool == "lr_range":
            kaun.lr_range(made, state, items, steps=10)
        elif tool == "validate":
            report = reports.validate(made, PAIRS, {"own": metric}, 2)
            made.fit(state, [batch(i) for i in range(4)], report=report)
        else:
            averaged = dataclasses.replace(made, average=averages.ema(0.9))
            failing = Data.from_iterable(loader(3, process, fails=1, what=ArithmeticError))
            with rng.scope(0):
                state = averaged.make_state(state.vars)
            averages.update_statistics(averaged, state, failing)
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    return ended, time.monotonic() - start


def left_out(process, nested=False):
    """A call that one process makes and the other leaves out; the other one comes to the next call, or to its report."""
    made, state = trainer()
    start, items = time.monotonic(), [batch(i) for i in range(4)]
    report = reports.validate(made, PAIRS, MSE, 2) if nested and here(process) else None
    try:
        if here(process) and not nested:
            made.evaluate(state, PAIRS, MSE)
        made.fit(state, items, report=report)
        ended = "returned"
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    return ended, time.monotonic() - start, made.evaluate(state, PAIRS, MSE)


def evaluated_in_another_order():
    """Two evaluations, of which each process makes the other one first."""
    made, state = trainer()
    arrays = [tuple(np.concatenate(each) for each in zip(*PAIRS[i:], strict=True)) for i in (0, 1)]
    first = arrays[jax.process_index()]
    return made.evaluate(state, Data.batches(first, 8), MSE)


def limited(process):
    return fit(Data.repeat(10**7, batch(0)), reports.time_limit(minutes=0.01) if here(process) else None)
