"""wav2vec: it recognizes sequences of tones that it has not heard; greedy decoding merges repeats only."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def trained(family):
    return family("wav2vec").main(steps=250, recordings=1024, batch_size=16)


def test_most_new_recordings_are_decoded_right(trained):
    _, _, losses, right = trained
    assert losses[-20:].mean() < 0.1 * losses[0]
    assert right > 0.75  # by chance less than 0.03


def test_shapes_and_the_reach_of_a_sample(family, trained):
    trainer, state, _, _ = trained
    x, labels = family("wav2vec").make_recordings(2, seed=5)
    assert x.shape == (2, 600)
    assert labels.shape == (2, 3)
    found = trainer.predict(state, x)
    assert found.shape == (2, (59 - 8) // 4 + 1, 5)
    np.testing.assert_allclose(trainer.predict(state, 3 * x), found, atol=1e-3)  # the first norm removes the loudness


def test_decoding_merges_repeats_and_removes_blanks(family):
    best = np.array([[0, 1, 1, 0, 1, 2, 2, 0], [3, 3, 3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 0, 0, 0]])
    assert family("wav2vec").decode(np.eye(4)[best]) == [[1, 1, 2], [3], []]
