"""Pipelines in two processes: each reads half of the rows, and the batches are those of one process."""

import functools
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

SCENARIOS = str(Path(__file__).with_name("data_scenarios.py"))
HERE = runpy.run_path(SCENARIOS)


def are_parts(found, expected):
    """Whether each process has its parts of the expected items, in which each array has rows."""
    return len(found) == len(expected) and all(
        np.array_equal(part, leaf[rows])
        for item, whole in zip(found, expected, strict=True)
        for parts, leaf in zip(item, whole, strict=True)
        for rows, part in parts
    )


def test_local_reads_half_of_the_rows_and_gives_the_same_bytes(pair):
    expected = HERE["whole_items"]()
    for process, found in enumerate(pair.run(SCENARIOS, "assembled_items")):
        assert all(are_parts(items, expected[name]) for name, (items, _) in found.items())
        assert (
            found["rows"][1] == 4 + 4 + 7 and found["augmented"][1] == 8
        )  # every process has 7 rows of the last batch
        ((start, _), (after, _)), *_ = found["shuffled"][0][0]
        assert (start, after) == (slice(4 * process, 4 * process + 2), slice(4 * process + 2, 4 * process + 4))


def test_a_loader_that_is_split_by_process_is_put_together(pair):
    for found, message in pair.run(SCENARIOS, "split_loader"):
        assert are_parts(found, [[HERE["X"][:8]], [HERE["X"][8:16]]])
        assert "rows its 2 blocks of devices divide, received 3 rows in float32[3, 2]" in message


def test_items_that_should_be_the_same_or_not_are_compared(pair):
    compared = functools.partial(pair.run, SCENARIOS, "compared")
    assert compared(how="whole", same=True) == [([(8, 2)], [])] * 2 and compared(how="split", same=False)[1][1] == []
    _, refused = compared(how="whole", same=False)
    assert "the first one of process 0 is another one than float32[8, 2] of process 1. Where each" in refused.text
    _, refused = compared(how="local", same=True)
    assert (
        "those of process 0 differ from those in (float32[4, 2], float32[8, 2]) of process 1. To make" in refused.text
    )
    _, (shapes, (warned,)) = compared(how="split", same=True)
    assert shapes == [(16, 2)] and "of process 0 and 1 are the same, float32[8, 2]: each row would" in warned


def test_a_run_knows_its_items_whatever_process_reads_them(pair):
    assert pair.run(SCENARIOS, "digests") == [HERE["digests"]()] * 2 and HERE["digests"]()[1]


def same_in_both(pair, name, **arguments):
    """Whether two processes have the very same results, and those of one up to rounding."""
    expected = HERE[name](several=False, **arguments)
    left, right = pair.run(SCENARIOS, name, timeout=240, **arguments)
    close = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-6, atol=1e-6), left, expected)
    return jax.tree.all(jax.tree.map(np.array_equal, left, right)) and jax.tree.all(close)


def test_evaluation_is_that_of_one_process(pair):
    assert same_in_both(pair, "evaluated")


@pytest.mark.slow
def test_fit_on_parts_is_that_on_whole_batches_and_the_fold_of_step(pair):
    assert same_in_both(pair, "fitted")
    for parts, whole, folded in pair.run(SCENARIOS, "fitted"):
        assert all(map(np.array_equal, jax.tree.leaves(parts), jax.tree.leaves(whole)))
        assert all(map(np.array_equal, jax.tree.leaves(parts), jax.tree.leaves(folded)))


@pytest.mark.slow
def test_evaluation_of_ragged_batches_is_that_of_one_process(pair):
    assert same_in_both(pair, "evaluated", options={"drop_last": False})
    assert same_in_both(pair, "read_by_users")


@pytest.mark.slow
def test_what_runs_a_trainer_is_that_of_one_process(pair):
    assert same_in_both(pair, "tools")


@pytest.mark.parametrize("entry", ["evaluate", pytest.param("predict", marks=pytest.mark.slow)])
def test_an_evaluation_ends_in_all_processes(pair, entry):
    for found in pair.run(SCENARIOS, "uneven", entry=entry, fails=False):
        assert found.kind == "ValueError"
        assert f"{entry} expected as many items in each process, but the data of process 1 ended after 1" in found.text
    other, own = pair.run(SCENARIOS, "uneven", entry=entry, fails=True)
    assert (own.kind, own.text, other.kind) == ("OSError", "no such file", "FailedElsewhere")
    assert "Process 1 failed, so process 0 ends too: OSError: no such file." in other.text


def test_a_mesh_has_devices_of_the_process(pair):
    found, refused = pair.run(SCENARIOS, "on_devices_of_the_first")
    assert found == [(8, 2), (8, 2), (7, 2)]
    assert "local(s) expected a mesh with devices of each process, and process 1 of 2 has none of its 2" in refused.text


def test_local_is_for_arrays_that_are_the_same_in_all_processes(pair):
    for found in pair.run(SCENARIOS, "own_arrays"):
        assert "do not begin it alike:\n  the stages of the data are Data.batches(arrays=float32[23, 2] " in found.text
        assert "Data.from_iterable(lambda: Data.batches((x, y), batch_size=64)).assemble(s)" in found.text
