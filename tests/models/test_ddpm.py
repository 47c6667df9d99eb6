"""examples/models/ddpm.py: a diffusion model whose samples are distributed as its data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import rng


@pytest.fixture(scope="module")
def ddpm(family):
    return family("ddpm")


@pytest.fixture(scope="module")
def trained(ddpm):
    return ddpm.main(steps=800, width=32, samples=500)


def test_samples_are_distributed_as_the_data(ddpm, trained):
    trainer, state, history, found = trained
    assert int(state.step) == len(history.losses) == 800
    # Without the model the error is the variance of the noise, 1.
    assert history.losses[:5].mean() > 0.5
    assert history.losses[-100:].mean() < 0.25
    assert found["near"] > 0.8
    assert np.abs(found["shares"] - 0.25).max() < 0.06
    assert found["spread"] == pytest.approx(ddpm.SPREAD, rel=0.3)
    before = ddpm.describe_samples(ddpm.draw_samples(trainer, trainer.init(), 500))
    assert before["near"] < 0.5


def test_the_error_is_smallest_where_noise_is_all_there_is(ddpm, trained):
    trainer, state, *_ = trained
    _, left = ddpm.noise_schedule(100)
    random, x = np.random.default_rng(0), ddpm.make_points(500, seed=3)
    errors = []
    for t in (0, 50, 99):
        noise = random.normal(size=x.shape)
        noisy = np.sqrt(left[t]) * x + np.sqrt(1 - left[t]) * noise
        found = trainer.predict(state, {"noisy": noisy.astype(np.float32), "t": np.full(500, t, np.int32)})
        errors.append(((found - noise) ** 2).mean())
    assert errors[2] < 0.05 < errors[1] < errors[0] < 1.1


def test_the_schedule_leaves_noise_alone(ddpm):
    for levels in (100, 1000):
        added, left = ddpm.noise_schedule(levels)
        assert len(added) == levels and (np.diff(left) < 0).all() and left[-1] < 1e-3
    assert ddpm.noise_schedule(1000)[0][[0, -1]] == pytest.approx([1e-4, 0.02])


def test_each_row_has_a_step_and_noise_of_its_own(ddpm):
    model = ddpm.make_model(width=8, blocks=1)
    with rng.scope(0):
        variables = model.init(dtype=jnp.float32)

    @jax.jit
    def drawn(key):
        with rng.scope(key):
            return model.apply(variables, {"data": jnp.zeros((2000, 2))}, training=True)[0]

    one, two = (np.asarray(drawn(jax.random.key(seed))["noise"]) for seed in (1, 2))
    assert abs(one.mean()) < 0.1 and one.std() == pytest.approx(1, abs=0.05)
    assert np.abs(one - two).min(axis=1).max() > 0.5
    times = ddpm.embed_time(jnp.arange(100), 8)
    assert times.shape == (100, 8) and np.abs(np.diff(times, axis=0)).max(axis=1).min() > 0.1
