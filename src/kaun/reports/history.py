"""The losses of a run and what was measured in it, and their curves."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from kaun import _html
from kaun._calls import public, shown, with_advice
from kaun._messages import optional_package
from kaun._paths import saved_picture
from kaun._processes import is_first
from kaun._report import Report
from kaun._run import StepValues, pack_results, saved_values, unpack_results
from kaun.reports.epochs import PassMeans
from kaun.reports.log import loss_array
from kaun.train import TrainState

__all__ = ["History", "history"]

COLUMNS = 1000  # Agg gives up on lines of some hundred thousand strokes, and a page has not that many columns
MEDIANS = 500
ACROSS = 4  # curves of results in one row
PALE, STRONG, MEASURED = "#a9c6e8", "#1f5fa8", "#c8501e"


@public
def history() -> History:
    """Return the report that records the loss of every step without making ``fit`` wait for any.

    It asks for no step, so ``fit`` runs as fast as without it. Passed to several fits, or in a resumed run, it
    continues from where it was. In one ``all_of`` with reports that measure (``validate``) it keeps their results too.
    Its ``epochs`` are the averages over each pass, in which each step counts by its weight.

    Examples:
        >>> import numpy as np
        >>> from kaun import reports
        >>> history = reports.history()
        >>> history.block(1, {"loss": np.array([0.9, 0.7, 0.6], np.float32)})  # fit does this
        >>> history.losses
        array([0.9, 0.7, 0.6], dtype=float32)
        >>> history.steps
        array([1, 2, 3])
    """
    return History()


@with_advice
class History(Report):
    """The losses recorded so far; made by ``history()``. See there.

    Attributes:
        results: What other reports measured: pairs of a step, numbered as in ``steps``, and values by name.
    """

    results: list[tuple[int, dict[str, float]]]

    def __init__(self) -> None:
        self.results = []
        self._losses = array("f")
        self._members: list[np.ndarray] = []
        self._first_step = 1
        self._epochs: list[dict[str, Any]] = []  # of the passes that are over
        self._pass, self._resumed = PassMeans(), False

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The averages over each pass, a dict for each; the last pass may not be over.

        A dict has ``"epoch"``, the number of the pass in this history, from 1; ``"step"``, its last step so far,
        numbered as in ``steps``; ``"loss"`` and the scalars that the loss returned as floats, their weighted means: a
        scalar counts by the number of examples of its batch and a ``losses.Mean`` by its weight; and for
        ``Counted.parts`` the metric of all rows of the pass (an array where the metric is one). Steps that were skipped
        are left out. A mean is NaN where its weights are all 0.

        The passes are those of ``train.epochs(n)``, where the length of ``train`` is known (``take``, ``skip``,
        ``prefetch`` and maps may follow ``epochs``). Of any other data each fit is one pass. A run that is resumed
        continues the pass that it was in.

        Examples:
            >>> import jax.numpy as jnp, numpy as np, optax, kaun
            >>> from kaun import Data, layers, losses, reports, rng
            >>> x, weights = jnp.ones((5, 1)), jnp.array([1.0, 1.0, 0.0, 0.0, 1.0])
            >>> def loss(out, weights):
            ...     return losses.mse.parts(out, 2 * jnp.ones(out.shape), weights=weights)
            >>> train = Data.batches((x, weights), batch_size=2).with_loss(loss)  # of weights 2, 0 and 1
            >>> with rng.scope(0):
            ...     trainer = kaun.Trainer(model=layers.linear(1, 1), optimizer=optax.sgd(0.0))
            ...     state = trainer.init()
            >>> state = trainer.fit(state, train.epochs(2), report=(history := reports.history()))
            >>> [(epoch["epoch"], epoch["step"]) for epoch in history.epochs]
            [(1, 3), (2, 6)]
            >>> bool(np.isclose(history.epochs[0]["loss"], history.losses[0]))
            True
        """
        return [dict(epoch) for epoch in (*self._epochs, *([self._row()] if self._pass.steps else []))]

    @property
    def losses(self) -> np.ndarray:
        """The loss of each step recorded, shape (n,), read-only; later steps do not change it.

        It is float32, or float64 where a loss was.
        """
        losses = np.array(self._losses)
        losses.flags.writeable = False
        return losses

    @property
    def member_losses(self) -> np.ndarray:
        """The losses of the members of an ensemble, [steps, members], NaN where a member did not run.

        A step of a single model has no members: the array has shape (0, 0) if all are such steps.
        """
        return np.concatenate(self._members) if self._members else np.zeros((0, 0), np.float32)

    @property
    def steps(self) -> np.ndarray:
        """The number of each step recorded, int64 of shape (n,), beginning with ``state.step`` after the first one."""
        return np.arange(self._first_step, self._first_step + len(self._losses))

    @overload
    def plot(self, path: None = None, *, log: bool = False, window: int | None = None) -> Any: ...

    @overload
    def plot(self, path: str | os.PathLike[str], *, log: bool = False, window: int | None = None) -> Path: ...

    def plot(self, path: str | os.PathLike[str] | None = None, *, log: bool = False, window: int | None = None) -> Any:
        """Draw the losses, pale, and their running median with matplotlib; return the figure, or the path of the file.

        Without a path it returns the ``matplotlib.figure.Figure``, which a notebook shows.

        The median at a step is taken over the steps around it, cut off at the end of the run and narrowed at its start,
        where the loss falls fast. In a run longer than 1000 steps, the pale part is the band between the lowest
        and the highest loss of neighbouring steps, so that no spike is lost. Losses that are not finite are left out.
        A ``"loss"`` that another report measured is drawn over them; each other value has its own curve below, over the
        same steps.

        Args:
            path: The file to write; the suffix is the format (``.png``, ``.svg``, ``.pdf``), default ``.png``. Missing
                folders are made. By default none is written.
            log: Whether the loss axis is logarithmic; losses of 0 or less are then left out. Default False.
            window: The number of steps around one whose median is drawn, rounded up to an odd number; default a
                twentieth of the run, at least 5.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there is no finite (with ``log``, no positive) loss to draw, or ``window`` is less than 1.
            TypeError: If ``window`` is not an int.

        Examples:
            >>> import pathlib, tempfile
            >>> import numpy as np
            >>> from kaun import reports
            >>> history = reports.history()
            >>> history.block(1, {"loss": np.geomspace(2.0, 0.1, 500, dtype=np.float32)})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     written = history.plot(pathlib.Path(folder) / "loss.png", log=True)
            ...     written.name, written.stat().st_size > 10_000
            ('loss.png', True)
        """
        window = _checked_window(window, len(self._losses))
        steps, losses = self.steps, self.losses.astype(np.float64)
        losses[~np.isfinite(losses) | (log & (losses <= 0))] = np.nan
        if np.isnan(losses).all():
            raise ValueError(
                f"history.plot has nothing to draw: none of the {len(losses)} losses recorded is "
                f"{'positive' if log else 'a finite number'}. Pass the history to fit first, "
                "trainer.fit(state, data, report=history), and look at history.losses."
            )
        figure = _figure(steps, losses, window, self.results)
        if log:
            figure.axes[0].set_yscale("log")
        return saved_picture("history.plot", figure, path, writes=is_first())

    def __repr__(self) -> str:
        if not self._losses:
            return "<history: no steps recorded>"
        shown = [f"{len(self)} steps to step {self.steps[-1]}", f"loss {self._losses[-1]:.4g}"]
        shown += [", ".join(f"{name}={v:.4g}" for name, v in values.items()) for _, values in self.results[-1:]]
        return f"<history: {', '.join(shown)}>"

    def _repr_html_(self) -> str:
        finite = self.losses[np.isfinite(self.losses)].astype(np.float64)
        parts = [_html.curve(_thinned(finite), "loss")] if len(finite) else []
        scalars = [{name: v for name, v in epoch.items() if np.ndim(v) == 0} for epoch in self.epochs]
        for title, rows in (
            ("averages over each pass", scalars),
            ("results of other reports", [{"step": step, **values} for step, values in self.results]),
        ):
            if rows:
                names = list(dict.fromkeys(name for row in rows for name in row))
                cells = [[row.get(name, "") for name in names] for row in rows[::-1]]
                parts.append(_html.folded(f"{title}, the newest first", _html.table(names, cells)))
        return _html.document(repr(self)[1:-1], *parts)

    def block(self, first_step: int, values: Mapping[str, np.ndarray]) -> None:
        """Record a block of steps; called by ``fit``."""
        if not self._losses:
            self._first_step = int(values["step"][0]) if "step" in values else first_step
        for _, part, ends in StepValues.of(first_step, values).by_pass():
            self._record(part["loss"])
            if "losses" in part:
                self._members.append(np.ma.filled(part["losses"], np.nan))
            self._pass.add(part)
            if ends:
                self._close()

    def _record(self, losses: np.ndarray) -> None:
        if losses.dtype == np.float64 and self._losses.typecode == "f":
            self._losses = array("d", self._losses)
        self._losses.frombytes(losses.astype(self._losses.typecode).tobytes())

    def _row(self) -> dict[str, Any]:
        last = self._first_step + len(self._losses) - 1
        return {"epoch": len(self._epochs) + 1, "step": last, **self._pass.results()}

    def _close(self) -> None:
        """End the pass that is running."""
        if self._pass.steps:
            self._epochs.append(self._row())
            self._pass = PassMeans()

    def begin(
        self, first_step: int, total: int | None, measured: frozenset[str] = frozenset(), every: int = 1,
        state: TrainState | None = None, /,
    ) -> None:  # fmt: skip
        """Begin a fit; called by ``fit``."""
        if not self._resumed:
            self._close()
        self._resumed = False

    def observe(self, step: int, values: Mapping[str, float], state: TrainState) -> None:
        """Record what another report measured after the last step recorded; called by ``all_of``."""
        at = self._first_step + len(self._losses) - 1 if self._losses else step
        # A second time, in a run that was interrupted while this step was reported.
        if self.results and self.results[-1][0] == at and self.results[-1][1].keys() == values.keys():
            self.results.pop()
        self.results.append((at, dict(values)))

    def snapshot(self) -> dict[str, Any]:
        """Return all that it recorded, for a checkpoint."""
        recorded = {"losses": self.losses, "first_step": self._first_step, **pack_results(self.results)}
        recorded |= {"member_losses": self.member_losses} if self._members else {}
        return recorded | {"epochs": self._epochs, "pass": self._pass.snapshot()}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        losses, self._first_step = saved_values(self, values, "losses", "first_step")
        self.results = unpack_results(self, values)
        if "pass" in values:  # not in a checkpoint of an earlier version
            self._epochs, self._pass = list(values["epochs"]), PassMeans.restored(values["pass"])
        self._resumed = True
        self._members = [np.asarray(values["member_losses"])] if "member_losses" in values else []
        losses = np.asarray(losses)
        self._losses = array("d" if losses.dtype == np.float64 else "f", losses.tobytes())

    def wants(self, step: int) -> bool:
        """Return False: it needs only blocks."""
        return False

    def __call__(self, step: int, loss: float, state: TrainState, /) -> None:
        """Record one step; for your own function that calls it. ``fit`` calls ``block``."""
        self.block(step, {"loss": loss_array(loss)})

    def __len__(self) -> int:
        """Return the number of steps recorded."""
        return len(self._losses)


def _thinned(values: np.ndarray, most: int = 240) -> list[float]:
    """At most twice ``most`` of the values in order, the lowest and the highest of each stretch."""
    if len(values) <= most:
        return values.tolist()
    stretches = [each for each in np.array_split(values, most) if len(each)]
    ends = [sorted((int(each.argmin()), int(each.argmax()))) for each in stretches]
    return [float(each[i]) for each, pair in zip(stretches, ends, strict=True) for i in pair]


def _checked_window(window: int | None, recorded: int) -> int:
    if window is None:
        return max(5, recorded // 20) | 1
    if isinstance(window, bool) or not isinstance(window, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"history.plot expected window as a number of steps, an int, received {shown(window)}.")
    if window < 1:
        raise ValueError(f"history.plot expected a window of at least 1 step, received {window}.")
    return window | 1


def _figure(
    steps: np.ndarray, losses: np.ndarray, window: int, results: Sequence[tuple[int, Mapping[str, float]]] = ()
) -> Any:
    """A new matplotlib Figure, made without pyplot, whose figures, settings and windows are the user's."""
    optional_package("history.plot", "matplotlib", "plot")
    from matplotlib.figure import Figure

    names = sorted({name for _, values in results for name in values} - {"loss"})
    lines = -(-len(names) // ACROSS)
    figure: Any = Figure(figsize=(8, 4.5 + 1.8 * lines), dpi=150, layout="constrained")
    grid = figure.add_gridspec(1 + lines, max(1, min(len(names), ACROSS)), height_ratios=[4.5] + [1.8] * lines)
    axes = figure.add_subplot(grid[0, :])
    if len(losses) > COLUMNS:
        left = np.linspace(0, len(losses), COLUMNS, endpoint=False).astype(int)
        low, high = np.fmin.reduceat(losses, left), np.fmax.reduceat(losses, left)
        axes.fill_between(steps[left], low, high, color=PALE, linewidth=0.5, label="loss, lowest to highest")
    else:
        marker = "o" if len(losses) <= 50 else None  # a single step between gaps draws no line
        axes.plot(steps, losses, color=PALE, linewidth=1, marker=marker, markersize=3, label="loss")
    centres, medians = _running_median(losses, window)
    axes.plot(steps[centres], medians, color=STRONG, linewidth=2, label=f"median of {window} steps")
    if points := _points(results, "loss"):
        axes.plot(*points, color=MEASURED, linewidth=2, marker="o", markersize=3, label="validation loss")
    _finish(axes, xlabel="" if names else "step", ylabel="loss")
    axes.legend(frameon=False, loc="upper right")  # matplotlib searches "best" for seconds where there are many points
    for i, name in enumerate(names):
        below = figure.add_subplot(grid[1 + i // ACROSS, i % ACROSS], sharex=axes)
        below.plot(*_points(results, name) or ((), ()), color=STRONG, marker="o", markersize=3)
        _finish(below, title=name, xlabel="step" if i // ACROSS == lines - 1 else "")
    return figure


def _points(results: Sequence[tuple[int, Mapping[str, float]]], name: str) -> list[tuple[float, ...]]:
    """The steps and the finite values of a name; empty without any."""
    points = [(step, values[name]) for step, values in results if math.isfinite(values.get(name, math.nan))]
    return list(zip(*points, strict=True))


def _finish(axes: Any, **texts: str) -> None:
    axes.set(**texts)
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _running_median(losses: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The medians of the finite losses around at most ``MEDIANS`` evenly spaced positions, and these positions."""
    centres = np.unique(np.linspace(0, len(losses) - 1, MEDIANS).astype(int))
    medians = np.full(len(centres), np.nan)
    for i, centre in enumerate(centres):
        half = min(window // 2, max(centre, 3))
        around = losses[max(0, centre - half) : centre + half + 1]
        finite = around[~np.isnan(around)]
        if finite.size:
            medians[i] = np.median(finite)
    return centres, medians
