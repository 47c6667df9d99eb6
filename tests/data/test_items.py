"""What users give to fit and step, looked at."""

import jax.numpy as jnp
import pytest

from kaun import Context
from kaun.data.items import check_context, check_loss, empty_data, known_length, not_data, parse_item


def test_items_are_taken_apart():
    loss, ctx = abs, Context(mask=jnp.ones(2))
    assert parse_item((1, loss), 1) == (1, loss, None)
    assert parse_item([1, loss, ctx], 1) == (1, loss, ctx)


def test_items_of_another_form_name_their_number_and_the_way_out():
    for item, received in [((1, 2), r"a tuple of \(int, int\)"), ([abs], r"a list of \(builtin"), (3, "int")]:
        with pytest.raises(TypeError, match=rf"item 7 is {received}.*with_loss"):
            parse_item(item, 7)


def test_losses_and_contexts_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"step\(loss=...\) expected a function.*received float32\[\]"):
        check_loss(jnp.float32(1))
    with pytest.raises(TypeError, match=r"ctx expected a kaun.Context, received dict"):
        check_context({"mask": 1})
    assert check_loss(abs) is abs and check_context(None) is None


def test_lengths_and_the_words_for_no_data():
    assert known_length([1, 2]) == 2 and known_length(iter([1])) is None
    assert "received int" in not_data(3) and "used up" in str(empty_data())
