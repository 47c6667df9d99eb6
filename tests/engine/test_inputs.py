"""StepInputs: what of an item decides which program runs it, and what is only passed along."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kaun._engine.inputs import StepInputs, is_host, is_number
from kaun.context import Context

X = np.zeros((2, 3), np.float32)


RAGGED = np.array([np.ones(1), np.ones(2)], object)


@dataclasses.dataclass
class Batch:
    x: object
    y: object


class Tensor:
    dtype, shape = np.dtype("f4"), ()

    def numpy(self):
        return np.float32(1)


def mean(out):
    return out.mean()


def test_equal_keys_are_equal_programs():
    def key(x=X, loss=mean, ctx=None):
        return StepInputs(x, loss, ctx).key

    assert key() == key(X + 1) and hash(key()) == hash(key(X + 1))
    others = [
        key(np.zeros((3, 3), np.float32)),
        key(np.zeros((2, 3), np.int32)),
        key([X]),
        key(loss=lambda out: out.sum()),
        key(ctx=Context(a=X)),
        key(jnp.asarray(X)),
        key(2.0),
        key(2),
    ]
    assert len({key(), *others}) == 9
    assert key(jnp.asarray(2.0)) != key(jnp.float32(2.0)), "a weak type is another program"


def test_leaves_are_split_as_they_were_put_in():
    y = np.ones(4, np.float32)
    inputs = StepInputs({"a": X, "b": (X + 1,)}, lambda out: (out - y).sum(), Context(mask=X + 2))
    assert [a.flat[0] for a in inputs.leaves] == [0, 1, 1, 2]
    a, b, y, mask = given = [jnp.full(2, float(i)) for i in range(4)]
    x, arrays, ctx = inputs.split(given)
    assert x["a"] is a and x["b"][0] is b and arrays[0] is y and ctx["mask"] is mask


def test_split_gives_jax_arrays():
    inputs = StepInputs((X, 3.0), mean, None)
    x, _, _ = inputs.split(inputs.leaves)
    assert all(isinstance(leaf, jax.Array) for leaf in x) and x[1].weak_type


def test_owned_leaves_are_copies_of_what_may_change():
    mine, device = X.copy(), jnp.ones(2)
    inputs = StepInputs((mine, device, 3.0), mean, None)
    owned = inputs.owned()
    mine[:] = 7
    assert owned[0].max() == 0 and owned[1] is device and owned[2] == 3.0
    assert inputs.leaves[0] is mine


@pytest.mark.parametrize(
    ("x", "text"),
    [
        ("a", "x expected a NumPy or JAX array of numbers, received str"),
        (
            {"a": RAGGED},
            r"x at 'a' expected .* received an array of dtype object\. Its elements are objects, for example arrays of different shapes: pad them",
        ),
        (
            [Batch(X, X)],
            r"x at '0' expected .* received Batch\. Register it as a pytree, jax.tree_util.register_dataclass\(Batch\); the model then receives",
        ),
        (
            Tensor(),
            r"x expected .* received Tensor\. Data.from_iterable\(loader\) converts the tensors of another library",
        ),
        ({"a": [1, None, b"a"]}, "x at 'a.2' expected a NumPy or JAX array of numbers, received bytes"),
        (np.ma.masked_array([1.0]), "received a masked array of dtype float64"),
        (np.array(["a"]), "received an array of dtype <U1"),
    ],
)
def test_inputs_are_numbers(x, text):
    with pytest.raises(TypeError, match=text):
        StepInputs(x, mean, None)


def test_inputs_are_described_in_words():
    y = jnp.zeros(4, jnp.int32)
    words = StepInputs({"a": X}, lambda out: (out - y).sum() * 2, Context(mask=X)).describe()
    assert words["x.a"] == "float32[2, 3]" and words["ctx['mask']"] == "float32[2, 3]"
    assert words["captured y"] == "int32[4]"
    assert "test_inputs.py" in StepInputs(X, mean, None).code and StepInputs(X, None, None).code == ""


def test_kinds_of_leaves():
    assert [is_host(a) for a in (X, np.float32(1), jnp.ones(1), 1.0)] == [True, True, False, False]
    assert [is_number(a) for a in (X, np.float64(1), jnp.ones(1), 1.0, True, 1j)] == [
        False,
        False,
        False,
        True,
        True,
        True,
    ]
    assert jax.tree_util.tree_leaves(StepInputs(1.0, None, None).leaves) == [1.0]


def test_leaves_have_names_and_can_be_others():
    class Batch:
        def __init__(self, y):
            self.y = y

    y, batch = X[:, 0], Batch(X)
    loss = lambda out: (out - y).sum() + (batch.y * out).sum() + sum(a.sum() for a in [X][:1])
    inputs = StepInputs({"a": X, "b": [X, 2.0]}, loss, Context(mask=X))
    names = inputs.names()
    assert len(names) == len(inputs.leaves)
    assert names[:3] == ["x.a", "x.b.0", "x.b.1"] and names[-1] == "ctx['mask']"
    assert {"y, captured by the loss", "batch.y, captured by the loss"} <= set(names)
    by_name = dict(zip(names, inputs.leaves, strict=True))
    assert by_name["y, captured by the loss"] is y and by_name["batch.y, captured by the loss"] is X
    assert StepInputs(X, None, None).names() == ["x"]
    other = inputs.with_leaves([2 * leaf for leaf in inputs.leaves])
    assert other.key == inputs.key and other.examples == inputs.examples and other.leaves[2] == 4.0
