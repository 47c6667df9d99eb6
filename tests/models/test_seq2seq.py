"""examples/models/seq2seq.py: numbers in words are translated to digits."""

import numpy as np
import pytest

from kaun import Context


@pytest.fixture(scope="module")
def seq2seq(family):
    return family("seq2seq")


@pytest.fixture(scope="module")
def trained(seq2seq):
    return seq2seq.main(steps=200)


def test_numbers_that_it_has_not_seen_are_translated_exactly(trained):
    _, state, losses, right = trained
    assert int(state.step) == len(losses) == 200
    assert losses[:5].mean() > 1.5
    assert losses[-20:].mean() < 0.05
    assert right == 1.0


def test_words_after_the_end_of_a_row_have_no_effect(seq2seq, trained):
    trainer, state, *_ = trained
    data = seq2seq.make_data([7, 42, 905, 110, 999])
    filled = np.where(data["words"] == 0, 5, data["words"])
    assert (filled != data["words"]).any()
    assert seq2seq.translate(trainer, state, data) == ["7", "42", "905", "110", "999"]
    assert seq2seq.translate(trainer, state, data | {"words": filled}) == ["7", "42", "905", "110", "999"]
    whole = np.full(5, filled.shape[1])
    assert seq2seq.translate(trainer, state, data | {"words": filled, "lengths": whole})[0] != "7"


def test_what_is_written_is_what_teacher_forcing_predicts(seq2seq, trained):
    trainer, state, *_ = trained
    data = seq2seq.make_data([7, 42, 905, 110, 999])
    ctx = Context(lengths=data["lengths"])
    written = np.asarray(trainer.predict(state, {"source": data["words"]}, ctx=ctx))
    assert written.shape == (5, 6)
    before = np.concatenate([np.full((5, 1), seq2seq.START, np.int32), written[:, :-1]], axis=1)
    logits = trainer.predict(state, {"source": data["words"], "target": before}, ctx=ctx)
    assert logits.shape == (5, 6, 13)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), written)


def test_numbers_are_spelled(seq2seq):
    spelled = {0: "zero", 17: "seventeen", 42: "forty two", 300: "three hundred", 90_019: "ninety thousand nineteen"}
    assert {number: " ".join(seq2seq.spell(number)) for number in spelled} == spelled
    data = seq2seq.make_data([8, 42])
    assert [seq2seq.WORDS[i] for i in data["words"][1]] == ["forty", "two"]
    np.testing.assert_array_equal(data["lengths"], [1, 2])
    np.testing.assert_array_equal(data["symbols"], [[1, 11, 2, 0], [1, 7, 5, 2]])
