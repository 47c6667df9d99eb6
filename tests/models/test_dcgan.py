"""examples/models/dcgan.py: two convolutional networks learn to draw digits."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="module")
def dcgan(family):
    return family("dcgan")


@pytest.fixture(scope="module")
def trained(dcgan):
    return dcgan.main(steps=150, channels=8)


def test_drawn_images_come_closer_to_the_real_ones(dcgan, trained):
    (generator, _), states, distances = trained
    assert {name: int(state.step) for name, state in states.items()} == {"generator": 150, "discriminator": 150}
    assert distances[0] > 40
    assert distances[150] < 0.35 * distances[0]
    z = np.random.default_rng(0).normal(size=(500, 1, 1, 16)).astype(np.float32)
    drawn = np.asarray(generator.predict(states["generator"], z))
    assert drawn.shape == (500, 8, 8, 1)
    assert np.abs(drawn).max() <= 1
    # The mean image of the digits: dark at the sides, where each digit is empty.
    real = dcgan.load_images()
    assert np.corrcoef(drawn.mean(axis=0).ravel(), real.mean(axis=0).ravel())[0, 1] > 0.8
    assert 0.7 < drawn.std() / real.std() < 1.3


def test_real_and_drawn_images_have_statistics_of_their_own(dcgan, trained):
    (_, discriminator), states, _ = trained
    real, drawn = dcgan.load_images()[:16], -dcgan.load_images()[16:32]
    judge = jax.jit(lambda x: discriminator.model.apply(states["discriminator"].vars, x, training=True))
    out, after = judge({"real": real, "drawn": drawn})
    alone, _ = judge({"real": real, "drawn": real})
    assert out["real"].shape == (16,)
    np.testing.assert_allclose(out["real"], alone["real"], rtol=1e-5)
    before = states["discriminator"].vars.state["net"][3]["running_mean"]
    assert not np.array_equal(before, after.state["net"][3]["running_mean"])


def test_the_distance_is_that_of_normal_distributions(dcgan):
    a = np.random.default_rng(0).normal(size=(500, 4))
    assert dcgan.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert dcgan.frechet_distance(a, a + 3) == pytest.approx(4 * 9)
    # Covariances with one basis: the squared differences of the standard deviations.
    assert dcgan.frechet_distance(a, 3 * a) == pytest.approx(
        (2 * a.mean(0)) @ (2 * a.mean(0)) + 4 * np.cov(a.T).trace()
    )
