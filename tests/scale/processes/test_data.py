"""Pipelines in two processes: each reads half of the rows, and the batches are those of one process."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

SCENARIOS = str(Path(__file__).with_name("data_scenarios.py"))
HERE = runpy.run_path(SCENARIOS)


def equal(left, right):
    return all(np.array_equal(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True))


def test_local_reads_half_of_the_rows_and_gives_the_same_bytes(pair):
    expected = HERE["whole_items"]()
    for found, own in pair.run(SCENARIOS, "assembled_items"):
        assert all(equal(found[name], expected[name]) for name in expected)
        assert own["rows"] == ([4, 4, 2 * 7], 4 + 4 + 7)  # each device has all of the 7 rows, which no one divides
        assert own["augmented"] == ([2] * 4, 8) and own["bucket"][0] == [2] * 6


def test_a_loader_that_is_split_by_process_is_put_together(pair):
    for found, message in pair.run(SCENARIOS, "split_loader"):
        assert equal(found, [HERE["X"][:8], HERE["X"][8:16]])
        assert "rows its 2 blocks of devices divide, received 3 rows in float32[3, 2]" in message


def test_items_that_should_be_the_same_or_not_are_compared(pair):
    alike = pair.run(SCENARIOS, "compared", split=False, same=True)
    assert alike == [([(8, 2)], [])] * 2 and pair.run(SCENARIOS, "compared", split=True, same=False)[1][1] == []
    _, refused = pair.run(SCENARIOS, "compared", split=False, same=False)
    assert "the first one of process 0 is another one than float32[8, 2] of process 1. Where each" in refused.text
    _, (shapes, (warned,)) = pair.run(SCENARIOS, "compared", split=True, same=True)
    assert shapes == [(16, 2)] and "of process 0 and 1 are the same, float32[8, 2]: each row would" in warned


def test_a_run_knows_its_items_whatever_process_reads_them(pair):
    assert pair.run(SCENARIOS, "digests") == [HERE["digests"]()] * 2 and HERE["digests"]()[1]


def test_evaluation_is_that_of_one_process(pair):
    expected = HERE["evaluated"](several=False)
    left, right = pair.run(SCENARIOS, "evaluated")
    assert jax.tree.all(jax.tree.map(np.array_equal, left, right))
    assert jax.tree.structure(left) == jax.tree.structure(expected)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-6, atol=1e-6), left, expected))
    assert left["ragged"][0]["accuracy"] == expected["ragged"][0]["accuracy"]


@pytest.mark.parametrize("entry", ["evaluate", "predict"])
def test_an_evaluation_ends_in_all_processes(pair, entry):
    for found in pair.run(SCENARIOS, "uneven", entry=entry, fails=False):
        assert found.kind == "ValueError"
        assert f"{entry} expected as many items in each process, but the data of process 1 ended after 1" in found.text
    other, own = pair.run(SCENARIOS, "uneven", entry=entry, fails=True)
    assert (own.kind, own.text, other.kind) == ("OSError", "no such file", "FailedElsewhere")
    assert "Process 1 failed, so process 0 ends too: OSError: no such file." in other.text
