"""Norms of gradients, weights and updates by layer."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, overload

import numpy as np

from kaun import _html
from kaun._calls import public, shown
from kaun._messages import optional_package
from kaun._paths import saved_picture
from kaun._processes import is_first
from kaun._report import NUMBERS, Report
from kaun._run import saved_values
from kaun.train import TrainState

__all__ = ["Watch", "watch"]

KINDS = NUMBERS["layer_norms"]
TITLES = ("norm of the gradient", "norm of the weights", "norm of the update over that of the weights")
LISTED = 12  # layers in a legend


@public
def watch(every: int = 100) -> Watch:
    """Return the report that records, by layer, the norms of gradient, weights and update at every n-th step.

    The compiled step computes them, at these steps alone, and ``fit`` never waits for them. In one ``all_of`` with
    loggers (``jsonl``, ``tensorboard``, ...), these write them as ``grad_norm/0``, ``weight_norm/0`` and
    ``update_ratio/0``, with the path of the layer after the slash. Parameters and losses are bit for bit those of a
    fit without it. The first fit with it compiles a program for it.

    The weights are those before the update, and the gradient is the one at them, without a loss scale. The ratio is the
    norm of the update over that of the weights: 1e-3 is usual, and a layer far above or below the others learns too
    fast or not at all. It is 0 for a step that is discarded, and infinite where the weights are 0. Frozen parameters
    are left out. With ``Trainer(accumulate=k)`` the gradient is that of the item alone, and the ratio is nan at an item
    that makes no update; an ``every`` that is a multiple of k measures updates.

    Args:
        every: The number of steps from one measurement to the next, at least 1, counted as ``state.step``.

    Raises:
        TypeError: If ``every`` is not an int.
        ValueError: If it is less than 1.

    Examples:
        >>> import jax.numpy as jnp, optax, kaun
        >>> from kaun import Data, layers, losses, reports, rng
        >>> with rng.scope(0):
        ...     model = layers.sequential([layers.linear(2, 4), layers.tanh(), layers.linear(4, 1)])
        ...     trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.01))
        ...     state = trainer.init()
        >>> data = Data.repeat(20, (jnp.ones((3, 2)), lambda out: losses.mse(out, jnp.ones((3, 1)))))
        >>> state = trainer.fit(state, data, report=(watch := reports.watch(every=5)))
        >>> watch.steps, watch.layers, watch.update_ratio.shape
        (array([ 5, 10, 15, 20]), ('0', '2'), (4, 2))
    """
    if isinstance(every, bool) or not isinstance(every, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"watch expected a number of steps as an int, received {shown(every)}. Write watch(every=100).")
    if every < 1:
        raise ValueError(f"watch expected a number of steps of at least 1, received {every}. Write watch(every=100).")
    return Watch(every)


class Watch(Report):
    """The norms by layer recorded so far; see ``watch``, which makes it. It prints as a table of the newest step.

    Passed to several fits, or in a resumed run, it continues; for another model it begins again.

    Attributes:
        numbers: The numbers that the step has to compute for it.
        layers: The paths of the layers, sorted.

    Examples:
        >>> import numpy as np
        >>> from kaun import reports
        >>> watch = reports.watch(every=2)
        >>> names = ("grad_norm/0", "weight_norm/0", "update_ratio/0")
        >>> values = {name: np.array([0.5, 0.25], np.float32) for name in names}
        >>> watch.block(1, {**values, "step": np.array([1, 2])})  # fit does this
        >>> watch
        step 2
        layer  gradient  weights  update/weights
        0          0.25     0.25            0.25
    """

    layers: tuple[str, ...]

    def __init__(self, every: int) -> None:
        self._every = every
        self.numbers: Collection[str] | Mapping[str, int] = {"layer_norms": every}
        self.layers = ()
        self._steps: list[int] = []
        self._values: list[np.ndarray] = []

    @property
    def steps(self) -> np.ndarray:
        """The step of each measurement, as ``state.step`` after it, int64 of shape (n,)."""
        return np.array(self._steps, np.int64)

    @property
    def grad_norm(self) -> np.ndarray:
        """The norm of the gradient, of shape (n, layers)."""
        return self._columns(0)

    @property
    def weight_norm(self) -> np.ndarray:
        """The norm of the weights before the update, of shape (n, layers)."""
        return self._columns(1)

    @property
    def update_ratio(self) -> np.ndarray:
        """The norm of the update over that of the weights, of shape (n, layers)."""
        return self._columns(2)

    @overload
    def plot(self, path: None = None) -> Any: ...

    @overload
    def plot(self, path: str | os.PathLike[str]) -> Path: ...

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the norms and the ratio with matplotlib, a line for each layer, as ``history().plot``.

        The axes are logarithmic.

        Args:
            path: The file to write; the suffix is the format (``.png``, ``.svg``, ``.pdf``), default ``.png``. By
                default none is written, and the figure is returned.

        Returns:
            The path of the file, or the figure.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If nothing was recorded.
        """
        if not self._steps:
            raise ValueError(
                "watch.plot has nothing to draw: no step was recorded. Pass the watch to fit first, "
                "trainer.fit(state, data, report=watch), for at least `every` steps."
            )
        optional_package("reports.watch(...).plot", "matplotlib", "plot")
        from matplotlib.figure import Figure  # without pyplot, whose figures and settings are the user's

        figure: Any = Figure(figsize=(8, 9), dpi=150, layout="constrained")
        panels = figure.subplots(3, 1, sharex=True)
        for axes, title, values in zip(
            panels, TITLES, (self.grad_norm, self.weight_norm, self.update_ratio), strict=True
        ):
            shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
            axes.plot(self.steps, shown, linewidth=1, marker="o" if len(shown) <= 50 else None, markersize=3)
            axes.set(title=title, yscale="log")
            axes.grid(color="0.92")
            axes.spines[["top", "right"]].set_visible(False)
        panels[-1].set_xlabel("step")
        figure.legend(panels[0].lines[:LISTED], self.layers[:LISTED], loc="outside right upper", frameon=False)
        return saved_picture("watch.plot", figure, path, writes=is_first())

    def block(self, first_step: int, values: Mapping[str, np.ndarray]) -> None:
        """Record a block of steps; called by ``fit``."""
        steps = values["step"]
        at = np.flatnonzero(steps % self._every == 0)
        layers = tuple(
            sorted([name.removeprefix(KINDS[0]) for name in values if name.startswith(KINDS[0])], key=_place)
        )
        if not at.size or not layers:
            return
        if layers != self.layers:
            self.layers, self._steps, self._values = layers, [], []
        columns = [[np.asarray(values[f"{kind}{layer}"])[at] for layer in layers] for kind in KINDS]
        while self._steps and self._steps[-1] >= steps[at[0]]:  # a run that was interrupted takes these steps again
            self._steps.pop()
            self._values.pop()
        self._steps += steps[at].tolist()
        self._values += list(np.moveaxis(np.array(columns), 2, 0))

    def wants(self, step: int) -> bool:
        """Return False: it needs only blocks."""
        return False

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        """Do nothing: norms arrive in blocks."""

    def snapshot(self) -> dict[str, Any]:
        """Return everything that it recorded, for a checkpoint."""
        return {"layers": list(self.layers), "steps": self.steps, "values": np.array(self._values)}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        layers, steps, recorded = saved_values(self, values, "layers", "steps", "values")
        self.layers, self._steps, self._values = tuple(layers), np.asarray(steps).tolist(), list(np.asarray(recorded))

    def __len__(self) -> int:
        """Return the number of steps recorded."""
        return len(self._steps)

    def __repr__(self) -> str:
        if not self._steps:
            return f"watch(every={self._every}), nothing recorded"
        rows = [("layer", "gradient", "weights", "update/weights")]
        rows += [
            (layer, *[f"{v:.3g}" for v in row]) for layer, row in zip(self.layers, self._values[-1].T, strict=True)
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        pad = lambda i, cell: cell.rjust(widths[i]) if i else cell.ljust(widths[0])
        lines = ["  ".join([pad(i, cell) for i, cell in enumerate(row)]) for row in rows]
        return "\n".join([f"step {self._steps[-1]}", *lines])

    def _repr_html_(self) -> str:
        if not self._steps:
            return _html.preformatted(repr(self))
        newest = zip(self.layers, self._values[-1].T, strict=True)
        rows = [(layer, *map(float, row)) for layer, row in newest]
        head = ("layer", "gradient", "weights", "update/weights")
        return _html.document(f"watch: step {self._steps[-1]}", _html.table(head, rows, most=1000))

    def _columns(self, kind: int) -> np.ndarray:
        return np.array([values[kind] for values in self._values]).reshape(len(self._steps), len(self.layers))


def _place(layer: str) -> list[tuple[int, str]]:
    return [(int(key), "") if key.isdecimal() else (-1, key) for key in layer.split(".")]
