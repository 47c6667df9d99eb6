"""Laws 5, 6, 7, 8 and 10: values last, stopping is exact, reports, predict, nothing is lost."""

import copy
import gc
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Data, EarlyStop, layers, losses, reports, rng

N = 8


@pytest.fixture(scope="module")
def run():
    """A trainer with dropout and running statistics, its data, and the states of the plain fold of step."""
    with rng.scope(1):
        model = layers.sequential([layers.linear(3, 4), layers.batch_norm(4), layers.dropout(0.5), layers.linear(4, 2)])
        trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.1))
        state = trainer.init()
        g = np.random.default_rng(0)
        arrays = g.normal(size=(N * 4, 3)).astype(np.float32), g.integers(0, 2, N * 4)
        data = Data.batches(arrays, batch_size=4, shuffle=True).with_loss(losses.cross_entropy_sparse)
    folded, values, now = [], [], state
    for x, loss in data:
        value, now = trainer.step(now, x, loss=loss)
        folded.append(as_bytes(now))
        values.append(float(value))
    return trainer, state, data, folded, values


def as_bytes(tree):
    leaves = jax.tree_util.tree_leaves(tree)
    plain = [jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a for a in leaves]
    return [np.asarray(a).tobytes() for a in plain]


WAYS = {
    "state": lambda s: s,
    "vars": lambda s: s.vars,
    "leaf": lambda s: s.vars.params[0]["weight"],
    "numpy view": lambda s: np.asarray(s.vars.params[0]["weight"])[1:],
    "shard": lambda s: s.opt_state[0].mu[0]["weight"].addressable_data(0),
    "put": lambda s: jax.device_put(s.vars.params),
    "copied": copy.copy,
    "deep": copy.deepcopy,
    "pickled": lambda s: pickle.loads(pickle.dumps(jax.tree.map(np.asarray, s.vars.params))),
    "closure": lambda s: lambda: s,
    "mapped": lambda s: jax.tree.map(lambda a: a, s),
    "dlpack": lambda s: np.from_dlpack(s.vars.params[0]["weight"]),
}


def contents(kept):
    kept = kept() if callable(kept) and not isinstance(kept, kaun.TrainState) else kept
    return as_bytes(kept)


@given(st.lists(st.tuples(st.integers(1, N), st.sampled_from(sorted(WAYS))), max_size=6), st.integers(1, N))
@settings(max_examples=40, deadline=None)
def test_whatever_a_report_keeps_stays_as_it_was(run, picks, stop):
    """States, parts of them, arrays, views, copies, kept at random steps, against the plain fold byte for byte."""
    trainer, state, data, folded, values = run
    given_bytes = as_bytes(state)
    kept = []

    def report(step, loss, state):
        assert loss == values[step - 1]
        for at, way in picks:
            if at == step:
                thing = WAYS[way](state)
                kept.append((step, way, thing, contents(thing)))
        if step == stop:
            raise EarlyStop

    end = trainer.fit(state, data, report=report)
    assert as_bytes(end) == folded[stop - 1]
    assert as_bytes(state) == given_bytes
    for step, way, thing, before in kept:
        assert contents(thing) == before, way
        if way in ("state", "copied", "deep", "mapped", "closure"):
            assert contents(thing) == folded[step - 1], (step, way)


def test_a_state_kept_without_being_looked_at_is_the_state_of_its_step(run):
    trainer, state, data, folded, _ = run
    kept = []
    end = trainer.fit(state, data, report=lambda step, loss, state: kept.append(state))
    assert [as_bytes(s) for s in kept] == folded
    assert as_bytes(end) == folded[-1]
    assert [int(s.step) for s in kept] == list(range(1, N + 1))


def test_a_state_handed_to_another_thread_stays(run):
    trainer, state, data, folded, _ = run
    seen, threads = {}, []

    def report(step, loss, state):
        t = threading.Thread(target=lambda: seen.setdefault(step, as_bytes(state)))
        threads.append(t)
        t.start()

    trainer.fit(state, data, report=report)
    [t.join() for t in threads]
    assert [seen[i] for i in range(1, N + 1)] == folded


def test_states_in_a_garbage_cycle_do_no_harm(run):
    trainer, state, data, folded, _ = run

    def report(step, loss, state):
        cycle = [state]
        cycle.append(cycle)

    assert as_bytes(trainer.fit(state, data, report=report)) == folded[-1]
    gc.collect()


def test_fits_inside_a_report(run):
    trainer, state, data, folded, _ = run
    inner = []

    def report(step, loss, state):
        if step in (2, 5):
            inner.append((step, trainer.fit(state, data.skip(step))))
            trainer.predict(state, np.ones((1, 3), np.float32))

    assert as_bytes(trainer.fit(state, data, report=report)) == folded[-1]
    for _, end in inner:
        assert as_bytes(end) == folded[-1], "going on from a state in the middle gives the same end"


def test_two_threads_fit_from_one_state(run):
    trainer, state, data, folded, _ = run
    ends = {}
    threads = [
        threading.Thread(target=lambda i=i: ends.setdefault(i, as_bytes(trainer.fit(state, data)))) for i in range(2)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert ends == {0: folded[-1], 1: folded[-1]}


@pytest.mark.parametrize("make", [optax.lbfgs, lambda: optax.contrib.prodigy(), lambda: optax.contrib.dog(0.1)])
def test_optimizer_states_that_alias_the_parameters(make):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=make())
        state = trainer.init()
        before = as_bytes(state)
        x, y = np.ones((4, 2), np.float32), np.zeros((4, 1), np.float32)
        end = trainer.fit(state, Data.repeat(3, (x, lambda out: losses.mse(out, y))))
        assert as_bytes(state) == before and int(end.step) == 3


# Stopping


@given(st.integers(1, N), st.sampled_from(["list", "generator", "data"]))
@settings(max_examples=20, deadline=None)
def test_early_stop_is_exact(run, k, form):
    trainer, state, data, folded, _ = run
    items = list(data)
    taken = []

    def counting():
        for item in items:
            taken.append(item)
            yield item

    source = {"list": lambda: items, "generator": counting, "data": lambda: Data.from_iterable(counting)}[form]()

    def report(step, loss, state):
        if step == k:
            raise EarlyStop

    end = trainer.fit(state, source, report=report)
    assert as_bytes(end) == folded[k - 1]
    if form != "list":
        assert len(taken) == k
    if form == "generator":
        rest = trainer.fit(end, source) if k < N else end
        assert as_bytes(rest) == folded[-1], "the user's own generator continues where fit left it"


def test_early_stop_is_not_swallowed_when_it_comes_from_elsewhere(run):
    trainer, state, data, folded, _ = run

    def stopping():
        yield from data.take(3)
        raise EarlyStop("from data")

    with pytest.raises(EarlyStop, match="from data") as caught:
        trainer.fit(state, Data.from_iterable(stopping))
    assert as_bytes(caught.value.kaun_state) == folded[2]

    def loss(out):
        raise EarlyStop("from loss")

    with pytest.raises(EarlyStop, match="from loss"):
        trainer.fit(state, [(np.ones((4, 3), np.float32), loss)])


# Reports


@given(st.integers(1, N + 2))
@settings(max_examples=10, deadline=None)
def test_every_is_called_for_its_steps_only(run, n):
    trainer, state, data, folded, values = run
    seen = []
    trainer.fit(state, data, report=reports.every(n, lambda step, loss, s: seen.append((step, loss, as_bytes(s)))))
    assert seen == [(i, values[i - 1], folded[i - 1]) for i in range(n, N + 1, n)]


def test_the_loss_is_a_float_and_the_step_an_int(run):
    trainer, state, data, *_ = run
    kinds = set()
    trainer.fit(state, data, report=lambda step, loss, state: kinds.add((type(step), type(loss), type(state))))
    assert kinds == {(int, float, kaun.TrainState)}


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 300])
@pytest.mark.parametrize("asked", [None, 7])
def test_blocks_cover_every_step_once_and_in_order(run, length, asked):
    trainer, state, data, *_ = run
    item = next(iter(data))
    losses_seen, blocks, calls, log = [], [], [], []

    class Watcher:
        def __call__(self, step, loss, state):
            calls.append((step, loss))
            assert sum(len(v) for _, v in blocks) == step, "a block arrives before the call of its last step"

        def wants(self, step):
            log.append(step)
            return asked is not None and step % asked == 0

        def block(self, first_step, values):
            names = [
                "loss",
                "loss_weight",
                "grad_norm",
                "learning_rate",
                "step",
                "step_time",
                "examples_per_step",
                "examples_per_second",
            ]
            assert set(values) == set(names) and (values["loss_weight"] == values["examples_per_step"]).all()
            assert {v.shape for v in values.values()} == {values["loss"].shape} and values["loss"].dtype == np.float32
            blocks.append((first_step, values["loss"]))

        def begin(self, first_step, total):
            log.append(("begin", first_step, total))

        def end(self):
            log.append("end")

    trainer.fit(state, Data.repeat(length, item), report=Watcher())
    trainer.fit(state, Data.repeat(length, item), report=lambda step, loss, state: losses_seen.append(loss))
    assert [f for f, _ in blocks] == list(np.cumsum([1, *(len(v) for _, v in blocks)])[:-1])
    assert np.concatenate([v for _, v in blocks]).tolist() == losses_seen
    assert calls == [(i, losses_seen[i - 1]) for i in range(7, length + 1, 7) if asked]
    assert log == [("begin", 1, length), *range(1, length + 1), "end"]


# Predict


def test_predict_changes_nothing_and_is_deterministic(run):
    trainer, state, data, folded, _ = run
    end = trainer.fit(state, data)
    x = np.random.default_rng(3).normal(size=(5, 3)).astype(np.float32)
    first = as_bytes(trainer.predict(end, x))
    with rng.scope(99):
        assert as_bytes(trainer.predict(end, x)) == first
    assert as_bytes(end) == folded[-1]
    # Compiled, as predict is: run one by one the operations round otherwise, which a sum close to 0 shows.
    by_hand, after = jax.jit(trainer.model.apply, static_argnames="training")(end.vars, jnp.asarray(x), training=False)
    np.testing.assert_allclose(np.asarray(trainer.predict(end, x)), np.asarray(by_hand), rtol=1e-6)
    assert as_bytes(after) == as_bytes(end.vars), "evaluation moves no running statistics"
    one = trainer.predict(end, x[:1])
    np.testing.assert_allclose(np.asarray(one), np.asarray(by_hand)[:1], rtol=1e-5)


def test_evaluation_mode_steps_still_learn(run):
    trainer, state, data, *_ = run
    x, loss = next(iter(data))
    value, after = trainer.step(state, x, loss=loss, training=False)
    again, _ = trainer.step(state, x, loss=loss, training=False)
    out = trainer.predict(state, x)
    np.testing.assert_allclose(float(value), float(loss(out)), rtol=1e-6)
    assert float(value) == float(again)
    assert as_bytes(after.vars.params) != as_bytes(state.vars.params)
    assert as_bytes(after.vars.state) == as_bytes(state.vars.state)
    assert int(after.step) == 1


# Nothing is lost


class Oops(Exception):
    pass


ERRORS = [(w, e) for w in ("data", "loss", "report") for e in (Oops, KeyboardInterrupt, SystemExit, StopIteration)]
ERRORS.remove(("data", StopIteration))  # inside a generator Python itself turns it into a RuntimeError


@pytest.mark.parametrize(("where", "error"), ERRORS)
@pytest.mark.parametrize("k", [1, 3, N])
def test_exceptions_arrive_unchanged_with_the_last_state(run, where, error, k):
    trainer, state, data, folded, _ = run
    raised = error("here")

    def failing(out):
        raise raised

    def source():
        for i, item in enumerate(data, start=1):
            if i == k and where == "data":
                raise raised
            yield (item[0], failing) if i == k and where == "loss" else item

    def report(step, loss, state):
        if step == k and where == "report":
            raise raised

    with pytest.raises(error) as caught:
        trainer.fit(state, source(), report=report)
    assert caught.value is raised
    done = k if where == "report" else k - 1
    assert as_bytes(caught.value.kaun_state) == (folded[done - 1] if done else as_bytes(state))
    rest = trainer.fit(caught.value.kaun_state, data.skip(done)) if done < N else caught.value.kaun_state
    assert as_bytes(rest) == folded[-1], "the run can go on from there"


def test_of_nested_fits_the_outermost_state_is_on_the_exception(run):
    trainer, state, data, folded, _ = run

    def inner_report(step, loss, state):
        raise Oops

    def report(step, loss, state):
        if step == 3:
            trainer.fit(state, list(data), report=inner_report)

    with pytest.raises(Oops) as caught:
        trainer.fit(state, data, report=report)
    assert as_bytes(caught.value.kaun_state) == folded[2]


@pytest.mark.filterwarnings("ignore:step received a pass")  # the passes are the same on purpose
def test_a_real_interrupt_at_any_moment_leaves_a_valid_state(run):
    """SIGINT from a timer, not an exception raised politely at a convenient line.

    The timer counts CPU time: on a busy machine much real time may pass before fit begins.
    """
    import signal

    trainer, state, data, folded, _ = run
    trainer.fit(state, data)
    states = {tuple(as_bytes(state)), *map(tuple, folded)}
    endless = Data.from_iterable(lambda: (item for _ in range(10**6) for item in data))

    known = {0: as_bytes(state)}
    now = state
    for i, (x, loss) in enumerate((item for _ in range(3) for item in data), start=1):
        _, now = trainer.step(now, x, loss=loss)
        known[i] = as_bytes(now)
    assert tuple(known[1]) in states
    for i in range(12):
        old = signal.signal(signal.SIGPROF, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt) as caught:
                signal.setitimer(signal.ITIMER_PROF, 0.002 + 0.0013 * i)
                trainer.fit(state, endless)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, old)
        held = caught.value.kaun_state
        step = int(held.step)
        if step in known:
            assert as_bytes(held) == known[step]
        _, after = trainer.step(held, *[next(iter(data))[0]], loss=next(iter(data))[1])
        assert int(after.step) == step + 1


def test_a_state_of_numpy_arrays_is_taken_as_any_other(run):
    trainer, state, data, folded, _ = run
    assert as_bytes(trainer.fit(jax.device_get(state), data)) == folded[-1]
