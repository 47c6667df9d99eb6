"""throughput: tokens per second and model FLOPs utilization, in the rows of loggers."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, layers, losses, reports, rng

IDS = np.arange(80, dtype=np.int32).reshape(10, 8) % 7


def fit(tmp_path, report, loss=lambda out: losses.mse(out, jnp.zeros(out.shape))):
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.embedding(7, 4), optimizer=optax.sgd(0.1))
        state = trainer.init()
    data = Data.batches(IDS, 4).map(lambda x: (x, loss))
    trainer.fit(state, data, report=reports.all_of(reports.jsonl(tmp_path / "rows.jsonl"), report))
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def test_rows_of_loggers_have_both(tmp_path):
    rows = fit(tmp_path, reports.throughput(tokens=8, flops=1e6, peak_flops=1e9))
    for row, examples in zip(rows, [4, 4, 2], strict=True):
        assert row["tokens_per_second"] == pytest.approx(8 * examples / row["step_time"], rel=1e-5)
        assert row["mfu"] == pytest.approx(1e-3 / row["step_time"], rel=1e-5)


def test_tokens_may_be_counted_by_the_loss(tmp_path):
    loss = lambda out: (losses.mse(out, jnp.zeros(out.shape)), {"real": jnp.int32(3)})
    rows = fit(tmp_path, reports.every(1, reports.throughput(tokens="real")), loss)
    assert [row["tokens_per_second"] * row["step_time"] for row in rows] == pytest.approx([3] * 3, rel=1e-5)
    assert "mfu" not in rows[0]
    with pytest.raises(
        ValueError,
        match=r"throughput\(tokens='real'\) needs a scalar of that name, which the loss does not return. Return it: \(loss, \{'real': mask.sum\(\)\}\)",
    ):
        fit(tmp_path / "second", reports.throughput(tokens="real"))


def test_xla_counts_a_multiply_add_as_two_and_the_body_of_a_loop_once():
    x, y = jnp.ones((64, 32)), jnp.zeros((64, 16))
    of = lambda k: (
        kaun.summary(
            kaun.Trainer(model=layers.linear(32, 16, bias=False), optimizer=optax.sgd(0.1), microbatches=k),
            x,
            lambda out: losses.mse(out, y),
        ).cost.flops
    )
    by_hand = 2 * 64 * 32 * 16 * 2  # the output, and the gradient of the weights
    assert by_hand < of(1) < 1.2 * by_hand
    assert of(4) < 0.5 * by_hand


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({}, ValueError, r"expected tokens=, or flops= and peak_flops=, or all three. Write throughput\(tokens=512"),
        ({"flops": 1.0}, ValueError, "expected tokens=, or flops= and peak_flops="),
        ({"tokens": 5, "peak_flops": 1.0}, ValueError, "expected tokens=, or flops= and peak_flops="),
        ({"tokens": 0}, ValueError, "expected tokens to be a finite number above 0, received 0. Write tokens=512."),
        ({"flops": float("inf"), "peak_flops": 1.0}, ValueError, "expected flops to be a finite number above 0"),
        ({"tokens": 5.0}, TypeError, r"expected tokens as the number of tokens of an example, .* received 5.0"),
        ({"flops": "1"}, TypeError, r"expected flops as a number, received '1'. Write flops=1e12"),
    ],
)
def test_arguments_are_checked(given, error, text):
    with pytest.raises(error, match="^throughput " + text):
        reports.throughput(**given)
