"""Measure `evaluate` and `predict` against jitted loops written by hand: ``python -m bench.passes [rounds]``.

Both sides run the same layers on the same batches, in turn in one process; the loop by hand adds up on the device and
reads once, or reads each output. Printed are medians of the wall time of one batch, and of the ratios within a round.
"ragged" has a last batch that is one row short, "padded" the same rows with ``pad=True``.
"""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kaun
from kaun import Data, layers, losses, metrics, rng


def mlp():
    model = layers.sequential(
        [*(layers.linear(784, 256), layers.relu()), *(layers.linear(256, 128), layers.relu()), layers.linear(128, 10)]
    )
    return model, (784,), 128, 200


def cnn():
    parts = [
        layers.conv2d(1, 16),
        layers.relu(),
        layers.max_pool2d(2),
        layers.flatten(),
        layers.linear(14 * 14 * 16, 10),
    ]
    return layers.sequential(parts), (28, 28, 1), 64, 50


def xor():
    return layers.sequential([layers.linear(2, 4), layers.tanh(), layers.linear(4, 10)]), (2,), 4, 1000


def loops(model, state):
    """A mean loss and accuracy, and all outputs, as one would write them by hand."""

    def forward(params, x):
        vars = state.vars.replace(params=params)
        return model.apply(vars, x, training=False, ctx=kaun.Context())[0]

    @jax.jit
    def counted(params, total, x, y):
        logits = forward(params, x)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).sum()
        return total + jnp.stack([loss, (logits.argmax(-1) == y).sum().astype(jnp.float32)])

    def evaluate(batches):
        total, rows = jnp.zeros(2), 0
        for x, y in batches:
            total, rows = counted(state.vars.params, total, x, y), rows + len(x)
        return np.asarray(total) / rows

    output = jax.jit(forward)

    def predict(batches):
        return np.concatenate([np.asarray(output(state.vars.params, x)) for x, _ in batches])

    return evaluate, predict


def cases(make):
    """By name: the pass by kaun, and by hand."""
    model, shape, batch, number = make()
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
        state = trainer.init()
    draw = np.random.default_rng(0)
    measured = {"loss": losses.cross_entropy_sparse, "accuracy": metrics.accuracy}
    evaluate, predict = loops(model, state)
    for kind, rows in (("even", batch * number), ("ragged", batch * number - 1), ("padded", batch * number - 1)):
        x = draw.normal(size=(rows, *shape)).astype(np.float32)
        y = draw.integers(0, 10, rows).astype(np.int32)
        plain = Data.batches((x, y), batch)
        data = Data.batches((x, y), batch, pad=True) if kind == "padded" else plain
        inputs, hand_inputs = data.map(lambda item: item[0]), plain
        by_kaun, by_hand = trainer.evaluate(state, data, measured), evaluate(plain)
        np.testing.assert_allclose([by_kaun["loss"], by_kaun["accuracy"]], by_hand, rtol=1e-5)
        yield (
            f"evaluate {kind}", number,
            lambda data=data: trainer.evaluate(state, data, measured), lambda plain=plain: evaluate(plain),
        )  # fmt: skip
        np.testing.assert_allclose(trainer.predict(state, inputs), predict(plain), rtol=1e-5, atol=1e-6)
        yield (
            f"predict {kind}", number,
            lambda inputs=inputs: trainer.predict(state, inputs), lambda plain=hand_inputs: predict(plain),
        )  # fmt: skip


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """By model and pass: the microseconds of a batch by kaun and by hand, and the ratio."""
    found = {}
    for make in (xor, mlp, cnn):
        for name, number, by_kaun, by_hand in cases(make):
            measured = []
            for i in range(rounds + 1):
                times = {}
                for run in (by_kaun, by_hand) if i % 2 else (by_hand, by_kaun):
                    start = time.perf_counter()
                    run()
                    times[run] = time.perf_counter() - start
                measured.append((times[by_kaun] / number, times[by_hand] / number))
            ratio = statistics.median(a / b for a, b in measured[1:])
            a, b = (statistics.median(column) * 1e6 for column in zip(*measured[1:], strict=True))
            found[f"{make.__name__} {name}"] = {"kaun": a, "hand": b, "ratio": ratio}
            print(f"{make.__name__:4} {name:16} kaun {a:9.1f} us  by hand {b:9.1f} us  {ratio:.2f}", flush=True)
    return found


if __name__ == "__main__":
    measure(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
