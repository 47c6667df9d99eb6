import numpy as np
import pytest

from kaun import rng


@pytest.fixture(scope="module")
def tabular(family):
    return family("tabular")


@pytest.fixture(scope="module")
def trained(tabular):
    return tabular.main(epochs=8)


def test_it_finds_what_logistic_regression_cannot(trained):
    _, _, history, right, plain = trained
    assert history.epochs[-1]["loss"] < 0.5 * history.epochs[0]["loss"]
    assert right > 0.85
    assert plain < 0.65


def test_the_number_that_counts_is_that_of_the_category(tabular, trained):
    trainer, state, _, _, _ = trained
    with rng.scope(7):
        x, labels, _ = tabular.made_table(200)
    logits = trainer.predict(state, x)
    assert logits.shape == (200, 2)
    assert (logits.argmax(axis=1) == labels).mean() > 0.85
    which, rows = x["categories"][:, 0], np.arange(200)
    others = x["numbers"].copy()
    others[rows, (which + 1) % 4] *= -1  # another number
    assert (trainer.predict(state, x | {"numbers": others}).argmax(axis=1) == labels).mean() > 0.8
    numbers = x["numbers"].copy()
    numbers[rows, which] *= -1  # the one that counts
    assert (trainer.predict(state, x | {"numbers": numbers}).argmax(axis=1) == labels).mean() < 0.2


@pytest.mark.slow
def test_it_is_as_good_as_logistic_regression_on_wine(tabular):
    _, _, history, right, plain = tabular.main(wine=True)
    assert history.epochs[-1]["loss"] < 0.1
    assert right > 0.9
    assert plain > 0.9
