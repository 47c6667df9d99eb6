import jax
import numpy as np
import pytest
from scipy.integrate import solve_ivp


@pytest.fixture(scope="module")
def node(family):
    return family("neural_ode")


@pytest.fixture(scope="module")
def trained(node):
    return node.main(epochs=50, substeps=1)


def test_it_follows_the_spiral_beyond_the_times_of_its_training(node, trained):
    _, _, history, error = trained
    assert history.losses[:5].mean() > 0.01
    assert history.losses[-20:].mean() < 3e-4  # the noise has 1e-4
    assert error < 0.1  # the whole motion, 4 seconds from starts at a distance of 1; trained on 0.7 seconds


def test_its_motion_solves_the_equation_that_it_learned(node, trained):
    trainer, state, _, _ = trained
    first, _, last = (jax.tree.map(lambda a: np.asarray(a, np.float64), p) for p in state.vars.params["field"])
    field = lambda _, y: np.tanh(y @ first["weight"] + first["bias"]) @ last["weight"] + last["bias"]
    start, times = np.array([[1.2, 0.0], [0.0, -1.0]], np.float32), node.times_of(41)
    motions = trainer.predict(state, (start, times))
    assert motions.shape == (2, 41, 2)
    for motion, y in zip(motions, start, strict=True):
        solved = solve_ivp(field, (0, times[-1]), y, t_eval=times.astype(np.float64), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(motion, solved.y.T, atol=1e-4)


def test_the_exact_spiral(node):
    start, times = np.array([[1.0, 0.5]], np.float32), node.times_of(11)
    solved = solve_ivp(
        lambda _, y: [-0.1 * y[0] - y[1], -0.1 * y[1] + y[0]], (0, 1), start[0], t_eval=times, rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(node.spiral(start, times)[0], solved.y.T, atol=1e-6)
