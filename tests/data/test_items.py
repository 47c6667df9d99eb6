"""What users give to fit, step and evaluate: items parsed and refused in one place."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaun import Context
from kaun.data.items import (
    Item,
    LabelledItem,
    check_context,
    check_loss,
    empty_data,
    loss_attacher,
    not_data,
)

CTX = Context(mask=jnp.ones(2))


def test_items_are_parsed():
    assert Item.parse((1, abs), 1) == (1, abs, None)
    assert Item.parse([1, abs, CTX], 1) == (1, abs, CTX)
    assert Item.parse((1, abs, None), 1).ctx is None


parts = st.sampled_from([1, abs, None, CTX, "text", {"x": 1}])


@given(st.one_of(st.lists(parts, max_size=4), st.lists(parts, max_size=4).map(tuple), parts))
def test_training_items_are_those_that_parse_but_for_their_context(item):
    try:
        x, loss, ctx = Item.parse(item, 1)
    except TypeError:
        assert not Item.is_training_item(item) or not isinstance(item[2], Context | None)
    else:
        assert Item.is_training_item(item) and (x, loss) == tuple(item[:2]) and callable(loss)
        assert ctx is (item[2] if len(item) == 3 else None)


def test_items_of_another_form_name_their_number_and_the_way_out():
    for item, received in [((1, 2), r"a tuple of \(int, int\)"), ([abs], r"a list of \(builtin"), (3, "int")]:  # fmt: skip
        with pytest.raises(TypeError, match=rf"item 7 is {received}.*with_loss"):
            Item.parse(item, 7)
    with pytest.raises(TypeError, match=r"item 7 is a tuple of \(int, builtin.*, dict\)\. Write \(x, loss, Context\("):
        Item.parse((1, abs, {"mask": 1}), 7)


def test_items_with_labels_are_parsed():
    assert LabelledItem.parse((1, 2), 1) == (1, 2, None)
    assert LabelledItem.parse([1, 2, CTX], 1) == (1, 2, CTX)
    with pytest.raises(
        TypeError, match=r"item 3 is a tuple of \(int, builtin.*This item is for fit.*without with_loss"
    ):
        LabelledItem.parse((1, abs), 3)
    for item, received in [((1, 2, 3), r"a tuple of \(int, int, int\)"), ([1], r"a list of \(int\)"), (1.0, "float")]:
        with pytest.raises(TypeError, match=rf"item 4 is {received}. To make them from arrays, write Data.batches"):
            LabelledItem.parse(item, 4)


def test_a_loss_is_attached_to_labels():
    x, loss, ctx = loss_attacher(lambda output, y: output - y)((np.ones(2), 3.0, CTX))
    assert x.tolist() == [1, 1] and loss(5.0) == 2.0 and ctx is CTX
    with pytest.raises(TypeError, match=r"these items already have a loss. Remove with_loss"):
        loss_attacher(lambda output, y: output)((1, abs))


def test_losses_and_contexts_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"step\(loss=...\) expected a function.*received float32\[\]"):
        check_loss(jnp.float32(1))
    with pytest.raises(TypeError, match=r"ctx expected a kaun.Context, received dict"):
        check_context({"mask": 1})
    assert check_loss(abs) is abs and check_context(None) is None


@pytest.mark.parametrize("entry", ["fit", "evaluate", "predict"])
def test_the_words_for_no_data(entry):
    assert "received int" in not_data(3)
    assert str(empty_data(entry)).startswith(f"{entry} received no items: the data is empty. An iterator or generator")
