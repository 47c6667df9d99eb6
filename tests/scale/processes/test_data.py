"""Pipelines in two processes: each reads half of the rows, and the batches are those of one process."""

import runpy
from pathlib import Path

import numpy as np

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
