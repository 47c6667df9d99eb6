import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun import rng


@pytest.fixture(scope="module")
def pinn(family):
    return family("pinn")


@pytest.fixture(scope="module")
def trained(pinn):
    return pinn.main(steps=60, width=16, depth=2)


def test_it_finds_the_solution_of_the_heat_equation(pinn, trained):
    trainer, state, history, error = trained
    assert history.losses[-1] < 0.01 * history.losses[0]
    assert error < 0.06
    u = trainer.predict(state, pinn.grid())["u"]
    assert u.shape == (1681, 1)
    assert np.abs(u - pinn.exact(pinn.grid())).max() == error


def test_the_residual_is_that_of_the_networks_derivatives(pinn, trained):
    trainer, state, _, _ = trained
    residual = trainer.predict(state, pinn.grid())["residual"]
    layers = [jax.tree.map(lambda a: np.asarray(a, np.float64), p) for p in state.vars.params["net"] if p]

    def u(t, x):
        h = np.array([t, x])
        for layer in layers[:-1]:
            h = np.tanh(h @ layer["weight"] + layer["bias"])
        return (h @ layers[-1]["weight"] + layers[-1]["bias"])[0]

    h = 1e-4
    for i in range(0, 1681, 311):
        t, x = pinn.grid()[i].astype(np.float64)
        u_t = (u(t + h, x) - u(t - h, x)) / (2 * h)
        u_xx = (u(t, x + h) - 2 * u(t, x) + u(t, x - h)) / h**2
        assert residual[i, 0] == pytest.approx(u_t - pinn.K * u_xx, abs=1e-4)


def test_the_loss_looks_at_the_equation_inside_and_at_values_on_the_border(pinn):
    with rng.scope(0):
        points, values, on_border = pinn.make_points(inside=8, border=4)
    assert on_border.sum() == 12
    assert (np.isin(points, (0, 1)).any(axis=1) == on_border[:, 0]).all()
    np.testing.assert_allclose(values, np.where(on_border, pinn.exact(points), 0), atol=1e-7)
    output = {"u": jnp.where(on_border, values, jnp.nan), "residual": jnp.where(on_border, jnp.nan, 2.0)}
    loss, parts = pinn.distance(output, (values, on_border))
    assert float(loss) == 4.0
    assert jax.tree.map(float, parts) == {"equation": 4.0, "border": 0.0}
