"""examples/models/vae.py: a variational autoencoder on normal data, whose entropy and moments are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import rng


@pytest.fixture(scope="module")
def vae(family):
    return family("vae")


@pytest.fixture(scope="module")
def trained(vae):
    return vae.main(steps=600)


def test_the_loss_comes_close_to_the_entropy(trained):
    _, state, history, found = trained
    assert int(state.step) == len(history.losses) == 600
    assert history.losses[:5].mean() > 9
    assert found["entropy"] == pytest.approx(6.632, abs=1e-3)
    # 20,000 rows: the mean of a loss with a standard deviation of 1.7 is known to 0.012.
    assert found["entropy"] - 0.04 < found["loss"] < found["entropy"] + 0.2
    assert history.losses[-50:].mean() == pytest.approx(found["loss"], abs=0.15)


def test_samples_have_the_mean_and_the_covariance_of_the_data(vae, trained):
    trainer, *_, found = trained
    assert found["mean"] < 0.1
    assert found["covariance"] < 0.12
    with rng.scope(5):
        samples = vae.draw_samples(trainer, trainer.init(), 20_000)
    _, mean, covariance = vae.make_data(1)
    assert np.abs(samples.mean(axis=0) - mean).max() > 1  # before the training
    assert np.abs(np.cov(samples.T) - covariance).max() / covariance.max() > 0.5


def test_latents_are_drawn_from_the_run_key_and_scaled_by_the_encoder(vae, trained):
    trainer, state, *_ = trained
    x, _, _ = vae.make_data(20_000, seed=2)
    one, two = (trainer.predict(state, {"data": x}) for _ in range(2))
    np.testing.assert_array_equal(one["output"], two["output"])
    other = trainer.predict(state.replace(key=jax.random.key(7)), {"data": x})
    np.testing.assert_array_equal(one["mean"], other["mean"])
    assert not np.array_equal(one["output"], other["output"])
    # What the encoder gives to all data together is the prior: that is what samples begin with.
    draws = one["mean"] + jnp.exp(one["log_variance"] / 2) * np.random.default_rng(0).normal(size=(20_000, 2))
    np.testing.assert_allclose(np.cov(np.asarray(draws).T), np.eye(2), atol=0.1)


def test_the_loss_is_that_of_normal_distributions(vae):
    random = np.random.default_rng(0)
    x, output, mean, log_variance = random.normal(size=(4, 5, 3)).astype(np.float32)
    variance = np.exp(random.normal(size=(5, 3))).astype(np.float32)
    out = {"mean": mean, "log_variance": log_variance, "output": output, "variance": variance}
    value, terms = vae.negative_elbo(out, x)
    density = -((x - output) ** 2 / variance + np.log(2 * np.pi * variance)).sum(axis=1) / 2
    np.testing.assert_allclose(terms["reconstruction"], -density.mean(), rtol=1e-5)
    np.testing.assert_allclose(value - terms["kl"], terms["reconstruction"], rtol=1e-5)
    # The divergence from the standard normal distribution, as a mean over draws.
    draws = mean + np.exp(log_variance / 2) * random.normal(size=(20_000, 5, 3))
    ratio = (draws**2 - (draws - mean) ** 2 / np.exp(log_variance) - log_variance).sum(axis=2) / 2
    np.testing.assert_allclose(terms["kl"], ratio.mean(), rtol=0.02)
