"""The learning rate against the optimizer's own, in blocks of any length."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kaun import Data, Trainer, layers, losses, reports, rng

MODULE = importlib.import_module("kaun.reports.learning_rate")


class Seen:
    def __init__(self):
        self.steps, self.rates = [], []

    def wants(self, step):
        return False

    def __call__(self, step, loss, state):
        pass

    def block(self, first_step, values):
        self.steps += range(first_step, first_step + len(values["loss"]))
        self.rates += values["learning_rate"].tolist()
        assert values["learning_rate"].dtype == np.float32


SCHEDULES = {
    "cosine": optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, 200),
    "pieces": optax.piecewise_constant_schedule(1e-2, {30: 0.5, 90: 0.1}),
    "joined": optax.join_schedules([optax.constant_schedule(0.5), optax.exponential_decay(0.5, 10, 0.9)], [15]),
    "constant": optax.constant_schedule(1e-3),
    "mine": lambda count: jnp.where(count < 40, 0.25, 1 / (1 + count)),
}


def by_hand(schedule, n):
    with jax.numpy_dtype_promotion("standard"):
        return np.array([schedule(jnp.int32(i)) for i in range(n)], np.float32)


def values(n, first=1, **more):
    return {"loss": np.zeros(n, np.float32), "step": np.arange(first, first + n), **more}


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_the_rate_with_which_the_optimizer_updated(name):
    """sgd on a loss of gradient 1 moves a weight by the rate."""
    with rng.scope(0):
        trainer = Trainer(model=layers.linear(1, 1, bias=False), optimizer=optax.sgd(SCHEDULES[name]))
        start = trainer.init()
    weights = [float(start.vars.params["weight"][0, 0])]
    seen = Seen()
    keep = lambda step, loss, state: weights.append(float(state.vars.params["weight"][0, 0]))
    report = reports.all_of(seen, reports.every(50, reports.learning_rate(SCHEDULES[name])), keep)
    data = Data.repeat(120, (jnp.ones((1, 1)), lambda out: -out.sum()))
    trainer.fit(start, data, report=report)
    assert seen.steps == list(range(1, 121))
    np.testing.assert_allclose(seen.rates, np.diff(weights), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(seen.rates, by_hand(SCHEDULES[name], 120), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cuts", [[300], [1, 63, 64, 65, 107], [7] * 42 + [6]])
def test_blocks_of_any_length_in_few_programs(cuts):
    seen, first, compiled = Seen(), 1, []
    schedule = SCHEDULES["cosine"]
    report = reports.all_of(seen, reports.learning_rate(lambda count: compiled.append(1) or schedule(count)))
    for n in cuts:
        report.block(first, values(n, first))
        first += n
    np.testing.assert_allclose(seen.rates, by_hand(schedule, 300), rtol=1e-6, atol=1e-8)
    assert len(compiled) == 1


def test_rates_are_there_long_before_their_steps(monkeypatch):
    """Each chunk is dispatched a chunk of steps before its first rate is read; none is evaluated twice, few are kept."""
    monkeypatch.setattr(MODULE, "CHUNK", 8)
    seen, dispatched, rate = Seen(), [], reports.learning_rate(lambda count: count.astype(jnp.float32))
    rates = rate._rates
    rate._rates = lambda counts: dispatched.append((len(seen.rates), int(counts[0]))) or rates(counts)
    report = reports.all_of(rate, seen)
    report.begin(1, None)
    assert dispatched == [(0, 0)]
    first = 1
    for n in [3, 5, 1, 7, 30, 2]:
        report.block(first, values(n, first))
        first += n
        assert len(rate._chunks) <= 3
    assert seen.rates == list(range(48))
    assert [start for _, start in dispatched] == [8 * i for i in range(len(dispatched))]
    assert all(at <= start for at, start in dispatched)
    assert dispatched[:3] == [(0, 0), (0, 8), (8, 16)]


def test_a_skipped_step_made_no_update_also_after_a_restart():
    schedule = lambda count: count.astype(jnp.float32)
    seen, rate = Seen(), reports.learning_rate(schedule)
    skipped = np.array([False, True, True, False, True, False])
    reports.all_of(seen, rate).block(1, values(4, skipped=skipped[:4]))
    again = reports.learning_rate(schedule)
    again.restore(rate.snapshot())
    report = reports.all_of(again, seen)
    report.block(5, values(2, 5, skipped=skipped[4:]))
    report.block(7, values(1, 7))
    assert seen.rates == [0, 1, 1, 1, 2, 2, 3]
    report.block(1, values(2, 101))  # the second fit of this life
    report.block(1, values(2, 1))
    assert seen.rates[7:] == [97, 98, 0, 1]


def test_it_takes_the_place_of_what_fit_knows_and_by_itself_it_does_nothing():
    seen = Seen()
    known = values(2, learning_rate=np.array([9, 9], np.float32))
    reports.all_of(reports.learning_rate(lambda count: 0.5), seen).block(1, known)
    assert seen.rates == [0.5, 0.5] and known["learning_rate"].tolist() == [9, 9]
    alone = reports.learning_rate(lambda count: 0.5)
    assert not alone.wants(1) and alone.measures == ("learning_rate",)
    alone(1, 0.5, None)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (
            1e-3,
            r"learning_rate expected a schedule, a function of the count of updates, received 0\.001\. For a constant rate .*optax\.constant_schedule",
        ),
        (None, "received None"),
    ],
)
def test_errors(schedule, text):
    with pytest.raises(TypeError, match=text):
        reports.learning_rate(schedule)


def test_what_is_no_scalar_and_no_cpu_are_errors(monkeypatch):
    report = reports.learning_rate(functools.partial(jnp.full, 3))
    with pytest.raises(
        TypeError,
        match=r"learning_rate expected a schedule that returns a scalar; .* returned shape \(3,\)\. Pass the schedule that the optimizer uses",
    ):
        reports.all_of(Seen(), report).block(1, values(1))

    def missing(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", missing)
    with pytest.raises(
        RuntimeError,
        match=r"learning_rate evaluates the schedule on JAX's CPU device, and this process has none\. Add it .*JAX_PLATFORMS=cuda,cpu",
    ):
        reports.learning_rate(optax.constant_schedule(1.0))


def test_the_loggers_get_it(tmp_path):
    with rng.scope(0):
        trainer = Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(SCHEDULES["pieces"]))
        start = trainer.init()
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2)
    data = Data.repeat(4, (x, lambda out: losses.mse(out, x[:, :1])))
    report = reports.all_of(reports.csv(tmp_path / "a.csv"), reports.learning_rate(SCHEDULES["pieces"]))
    trainer.fit(start, data, report=report)
    lines = [line.split(",") for line in (tmp_path / "a.csv").read_text().splitlines()]
    assert [line[lines[0].index("learning_rate")] for line in lines[1:]] == ["0.01"] * 4
