"""Where the numbers of a step are in its results: what is put there comes back, in its dtype."""

import jax
import jax.numpy as jnp
import numpy as np

from kaun import metrics
from kaun._engine.numbers import NumberLayout
from kaun._loss import Weighted
from kaun.metrics import CountedParts

SUMS = metrics.Counted(lambda predictions, targets: {}, lambda sums: 0.0)


def numbers(i):
    """The numbers of a step."""
    return {
        "grad_norm": jnp.float32(i),
        "loss_weight": jnp.int32(10 * i),
        "rows": Weighted(jnp.int32(i + 1), None),
        "share": Weighted(jnp.float32(i / 2), jnp.float32(i / 4)),
        "a": CountedParts(SUMS, {"half": jnp.full((2, 3), i, jnp.bfloat16), "bools": jnp.array([i > 0, False])}),
        "b": CountedParts(SUMS, (jnp.int8(i), jnp.zeros((0, 2), jnp.float32), jnp.full(2, i, jnp.float16))),
    }


def test_numbers_come_back_by_name_with_their_weights_and_parts():
    layout = NumberLayout(jax.eval_shape(lambda: numbers(0)))
    results = layout.empty(4)  # room for one step more
    for i in range(3):
        results = [table.at[i].set(row) for table, row in zip(results, layout.rows(numbers(i)), strict=True)]
    columns = layout.columns(results, 3)
    assert {name: column.tolist() for name, column in columns.items()} == {
        "grad_norm": [0, 1, 2], "rows": [1, 2, 3], "share": [0, 0.5, 1],
    }  # fmt: skip
    assert columns["rows"].dtype == np.int32
    weights = layout.weighted(results, 3)
    assert weights["rows"] is None and list(weights) == ["loss", "rows", "share"]
    assert weights["loss"].tolist() == [0, 10, 20] and weights["share"].tolist() == [0, 0.25, 0.5]
    assert weights["loss"].dtype == weights["share"].dtype == np.float64
    parts = layout.parts(results, 3)
    for name in ("a", "b"):
        wanted = jax.tree.map(lambda *leaves: np.stack(leaves), *[numbers(i)[name].counts for i in range(3)])
        same = jax.tree.map(lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype, parts[name].counts, wanted)
        assert all(jax.tree.leaves(same)) and parts[name].counted is SUMS
    assert layout.results == 5 + 5 and layout.bytes == 12 + 2 + 1 + 4


def test_steps_have_one_kind_where_their_results_can_be_concatenated():
    kind = lambda change: NumberLayout(jax.eval_shape(lambda: numbers(0) | change)).kind
    assert kind({}) == kind({})
    for change in (
        {"grad_norm": jnp.int32(0)},
        {"rows": Weighted(jnp.int32(1), jnp.int32(1))},
        {"a": CountedParts(SUMS, jnp.zeros(3))},
        {"b": CountedParts(metrics.Counted.of(metrics.f1), numbers(0)["b"].counts)},
    ):
        assert kind(change) != kind({})


def test_a_step_without_a_mean_has_no_more_results_than_its_scalars():
    given = {"grad_norm": jnp.float32(1), "share": Weighted(jnp.float32(2), None)}
    layout = NumberLayout(given)
    (row,) = layout.rows(given)
    assert row.tolist() == [1, 2] and len(layout.empty(2)) == 1 and layout.weights == {"loss": None, "share": None}
