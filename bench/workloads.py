"""What is trained: models, data and initial weights, without any framework.

A new workload is one more entry of ``WORKLOADS`` (or, with a model of a new kind, one function for its weights here
and one for its forward pass in each of the runners that should have it).
"""

import dataclasses
from collections.abc import Callable, Iterator
from pydoc_data import topics
from typing import Any

import numpy as np

from bench import networks
from kaun import Data, rng

Arrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Workload:
    """One training task.

    Attributes:
        name, about: its name in the tables, and what it is.
        model: "dense" (linear layers with an activation between them), "cnn", "gpt", or one of ``networks.NAMES``.
        sizes: the widths of a dense model, from input to output.
        make: makes the whole data, ``(x, y)``.
        batch, steps: the rows of a batch and the steps of one pass.
        repeats: whether each step has the same batch; otherwise the rows come shuffled.
        passes: how often the pass is timed.
        rate: of Adam.
        tolerance: how far the final losses of two runners may be apart, relative to the larger (see ``close``).
        runners: the only ones that run it, None for all.
    """

    name: str
    about: str
    model: str
    make: Callable[[int], Arrays]
    batch: int
    steps: int
    passes: int
    rate: float
    tolerance: float
    sizes: tuple[int, ...] = ()
    repeats: bool = False
    runners: tuple[str, ...] | None = None

    @property
    def binary(self) -> bool:
        """Whether there is one logit for each item, and not one for each class."""
        return bool(self.sizes) and self.sizes[-1] == 1

    @property
    def rows(self) -> int:
        return self.batch if self.repeats else self.batch * self.steps

    def data(self) -> Arrays:
        """All rows, images as [height, width, channels]."""
        return self.make(self.rows)

    def order(self) -> np.ndarray:
        """The rows of each batch of a pass, [steps, batch]: the order of kaun's own shuffle."""
        if self.repeats:
            return np.tile(np.arange(self.batch), (self.steps, 1))
        with rng.scope(0):
            return np.stack(list(Data.batches(np.arange(self.rows), self.batch, shuffle=True)))

    def batches(self, x: Any, y: Any, order: np.ndarray) -> Iterator[tuple[Any, Any]]:
        """The batches of some steps, gathered one by one as they are asked for."""
        if self.repeats:
            return ((x, y) for _ in order)
        return ((x[rows], y[rows]) for rows in order)

    def weights(self) -> Any:
        """The initial weights, in kaun's layout: [in, out] and HWIO."""
        g = np.random.default_rng(1)
        if self.model == "dense":
            return [_linear(g, a, b) for a, b in zip(self.sizes, self.sizes[1:], strict=False)]
        if self.model in networks.NAMES:
            return networks.module(self.model).weights(g)
        return _cnn_weights(g) if self.model == "cnn" else _gpt_weights(g)


def close(a: float, b: float, tolerance: float) -> bool:
    """Whether two losses agree: relative to the larger one, and below 1e-3 to that."""
    return abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-3)


def _linear(g: np.random.Generator, a: int, b: int) -> dict[str, np.ndarray]:
    return {"weight": networks.uniform(g, a, b, (a, b)), "bias": np.zeros(b, np.float32)}


def _conv(g: np.random.Generator, a: int, b: int) -> dict[str, np.ndarray]:
    return {"weight": networks.uniform(g, 9 * a, 9 * b, (3, 3, a, b)), "bias": np.zeros(b, np.float32)}


def _cnn_weights(g: np.random.Generator) -> list[dict[str, np.ndarray]]:
    return [_conv(g, 1, 16), _conv(g, 16, 32), _linear(g, 7 * 7 * 32, 128), _linear(g, 128, 10)]


VOCAB, WIDTH, BLOCKS, HEADS, LENGTH = 256, 128, 4, 4, 128


def _norm() -> dict[str, np.ndarray]:
    return {"weight": np.ones(WIDTH, np.float32), "bias": np.zeros(WIDTH, np.float32)}


def _gpt_weights(g: np.random.Generator) -> dict[str, Any]:
    def block() -> dict[str, Any]:
        projections = {key: networks.uniform(g, WIDTH, WIDTH, (WIDTH, WIDTH)) for key in ("q", "k", "v", "out")}
        mlp = {"up": _linear(g, WIDTH, 4 * WIDTH), "down": _linear(g, 4 * WIDTH, WIDTH)}
        return {"norm1": _norm(), **projections, "norm2": _norm(), **mlp}

    return {
        "tokens": 0.02 * g.standard_normal((VOCAB, WIDTH), np.float32),
        "positions": 0.02 * g.standard_normal((LENGTH, WIDTH), np.float32),
        "blocks": [block() for _ in range(BLOCKS)],
        "norm": _norm(),
        "head": _linear(g, WIDTH, VOCAB),
    }


def _truth_table(rows: int) -> Arrays:
    x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    return x, np.array([[0], [1], [1], [0]], np.float32)


def _classified(shape: tuple[int, ...], classes: int) -> Callable[[int], Arrays]:
    """Random rows, in classes that a linear model could separate."""

    def make(rows: int) -> Arrays:
        g = np.random.default_rng(0)
        x = g.standard_normal((rows, *shape), np.float32)
        flat = x.reshape(rows, -1)
        return x, (flat @ g.standard_normal((flat.shape[1], classes), np.float32)).argmax(1).astype(np.int32)

    return make


def _text(length: int = LENGTH, symbols: int = VOCAB) -> Callable[[int], Arrays]:
    """Windows of Python's own help texts as bytes, each with the same one a byte further on."""

    def make(rows: int) -> Arrays:
        text = np.frombuffer("\n\n".join(topics.topics.values()).encode(), np.uint8).astype(np.int32) % symbols
        x = text[: rows * length].reshape(rows, length)
        y = text[1 : rows * length + 1].reshape(rows, length)
        return x, y

    return make


# Who runs the larger networks.
LARGER = ("hand", "kaun", "nnx", "torch")
WIDTHS = (8, 32, 128, 512, 2048)


def _width(n: int) -> Workload:
    steps = 500 if n <= 128 else 150 if n <= 512 else 20
    return Workload(
        f"width{n}", f"32-{n}-{n}-10, batches of 32, shuffled host arrays.", "dense", _classified((32,), 10),
        batch=32, steps=steps, passes=3, rate=1e-4, tolerance=5e-3, sizes=(32, n, n, 10),
        runners=("hand", "hand-synced", "hand-scan", "kaun"),
    )  # fmt: skip


WORKLOADS = {
    w.name: w
    for w in [
        Workload(
            "xor", "2-4-1, a batch of 4, the same at each of 1,000 steps.", "dense", _truth_table,
            batch=4, steps=1000, passes=7, rate=1e-2, tolerance=2e-3, sizes=(2, 4, 1), repeats=True,
        ),
        Workload(
            "mlp", "784-256-128-10, batches of 128, shuffled host arrays.", "dense", _classified((784,), 10),
            batch=128, steps=100, passes=5, rate=1e-4, tolerance=2e-3, sizes=(784, 256, 128, 10),
        ),
        Workload(
            "cnn", "28x28x1, conv 16, pool, conv 32, pool, 128, 10, batches of 64, shuffled host arrays.", "cnn",
            _classified((28, 28, 1), 10), batch=64, steps=40, passes=3, rate=1e-4, tolerance=2e-3,
        ),
        Workload(
            "gpt", "256 bytes, width 128, 4 layers, 4 heads, 128 learned positions, batches of 8 windows of text.",
            "gpt", _text(), batch=8, steps=20, passes=3, rate=2e-4, tolerance=2e-3,
        ),
        Workload(
            "adam50m", "4096-4096-4096-4096, 50M parameters, batches of 8: the optimizer is most of it.", "dense",
            _classified((4096,), 4096), batch=8, steps=10, passes=2, rate=1e-5, tolerance=2e-3,
            sizes=(4096, 4096, 4096, 4096),
        ),
        Workload(
            "lstm", "256 bytes, width 64, one LSTM of 128 units, batches of 32 windows of 64 bytes of text.", "lstm",
            _text(64), batch=32, steps=50, passes=3, rate=2e-5, tolerance=2e-3, runners=LARGER,
        ),
        Workload(
            "nanogpt", "nanoGPT's setting for a CPU: 65 symbols, width 128, 4 layers, 4 heads, no biases, exact gelu, "
            "tied head, batches of 12 windows of 64.", "nanogpt", _text(64, 65), batch=12, steps=50, passes=3,
            rate=2e-4, tolerance=2e-3, runners=LARGER,
        ),
        # Adam's first step moves each weight by the rate, also where its gradient is rounding error: at a rate of 1e-5
        # the losses after it differed by 1.2e-5.
        Workload(
            "resnet18", "ResNet-18 on images of 32x32x3, batches of 32; its losses are those of training mode.",
            "resnet", _classified((32, 32, 3), 10), batch=32, steps=4, passes=2, rate=1e-6, tolerance=2e-3,
            runners=LARGER,
        ),
        *map(_width, WIDTHS),
    ]
}  # fmt: skip


def quick(workload: Workload, steps: int | None = None) -> Workload:
    """The same task with few steps, timed once."""
    return dataclasses.replace(workload, steps=steps or max(2, workload.steps // 5), passes=1)
