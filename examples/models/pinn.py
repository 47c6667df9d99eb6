"""A physics-informed network (Raissi, Perdikaris and Karniadakis, 2019): the heat equation, solved without a grid.

Run it with: python examples/models/pinn.py

A bar is hot in the middle and held at 0 at both ends. The network never sees the solution: its loss is how far it is
from the equation u_t = k u_xx inside, and from the known values at the start and at both ends. The script prints how
far it is from the exact solution.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, reports, rng

K = 0.1  # how fast heat spreads


def make_model(*, width=32, depth=3):
    """Make the model: from points (t, x) [n, 2] to {"u": the temperature [n, 1], "residual": u_t - K u_xx [n, 1]}."""
    net = [layers.linear(2, width), layers.tanh()]
    for _ in range(depth - 1):
        net += [layers.linear(width, width), layers.tanh()]

    def forward(m, points):
        # Rows do not depend on each other, so the derivative along an axis of all points is that of each point.
        def derivative(f, axis):
            along = jnp.zeros_like(points).at[:, axis].set(1)
            return lambda points: jax.jvp(f, (points,), (along,))[1]

        u_t = derivative(m.net, 0)(points)
        u_xx = derivative(derivative(m.net, 1), 1)(points)
        return {"u": m.net(points), "residual": u_t - K * u_xx}

    return layers.module({"net": layers.sequential([*net, layers.linear(width, 1)])}, forward, name="pinn")


def exact(points):
    """Return the solution [n, 1] for u(0, x) = sin(pi x) and u(t, 0) = u(t, 1) = 0."""
    t, x = points[:, :1], points[:, 1:]
    return np.exp(-K * np.pi**2 * t) * np.sin(np.pi * x)


def make_points(*, inside=256, border=64):
    """Make random points (t, x) in the unit square, with the values [n, 1] at the border, and which are on it [n, 1].

    Inside, where no values are known, they are 0.
    """
    draw = np.random.default_rng(np.asarray(jax.random.key_data(rng.next_key())))
    points = draw.uniform(size=(inside + 3 * border, 2)).astype(np.float32)
    start, left, right = np.split(np.arange(inside, len(points)), 3)
    points[start, 0] = 0  # t = 0
    points[left, 1], points[right, 1] = 0, 1  # x = 0 and x = 1
    on_border = np.arange(len(points))[:, np.newaxis] >= inside
    return points, np.where(on_border, exact(points), 0).astype(np.float32), on_border


def distance(output, target):
    """Return the loss: how far the network is from the equation inside, and from the values at the border."""
    values, on_border = target
    equation = losses.mse(output["residual"], jnp.zeros_like(values), where=~on_border)
    border = losses.mse(output["u"], values, where=on_border)
    return equation + 10 * border, {"equation": equation, "border": border}


def grid():
    """Return 41 x 41 points of the unit square, as [1681, 2]."""
    axis = np.linspace(0, 1, 41, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)


def main(*, steps=400, seed=0, **sizes):
    with rng.scope(seed):
        # L-BFGS needs few steps, but the same points in each of them.
        trainer = kaun.Trainer(model=make_model(**sizes), optimizer=optax.lbfgs())
        state = trainer.init(dtype=jnp.float32)
        points, values, on_border = make_points()
    item = (points, lambda output: distance(output, (values, on_border)))
    history = reports.history()
    state = trainer.fit(state, Data.repeat(steps, item), report=history)

    error = float(np.abs(trainer.predict(state, grid())["u"] - exact(grid())).max())
    print(f"The loss was {history.losses[0]:.4f} at the start, and {history.losses[-1]:.7f} at the end.")
    print(f"The largest error of the temperature is {error:.4f}, where the temperature is 0 to 1.")
    return trainer, state, history, error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Solve the heat equation with a physics-informed network.")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default 400)")
    main(**vars(parser.parse_args()))
