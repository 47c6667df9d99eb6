"""Values that a layer or loss of kaun refuses, found outside of a compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kaun import Context, layers, losses, rng
from kaun._step import fresh_carry, make_settings, refused_values

X = np.ones((4, 2), np.float32)


def refused(model, loss, x=X, **options):
    given = {
        "on_nonfinite": "raise",
        "trainable": None,
        "precision": None,
        "microbatches": 1,
        "average": None,
        **options,
    }
    settings = make_settings(model=model, optimizer=optax.sgd(0.1), **given)
    with rng.scope(0):
        carry = fresh_carry(settings, model.init(dtype=jnp.float32))
    return refused_values(settings, carry, jax.random.key(0), x, Context(), loss)


def wrong_labels(output):
    return losses.cross_entropy_sparse(output, np.array([0, 1, 2, -1]))


@pytest.mark.parametrize(
    "loss", [wrong_labels, jax.jit(wrong_labels), lambda out: jax.lax.map(lambda _: wrong_labels(out), X).sum()]
)
@pytest.mark.parametrize(
    "options", [{}, {"microbatches": 2}, {"precision": "mixed_bfloat16"}, {"trainable": lambda path: path == "bias"}]
)
def test_a_loss_that_refuses_its_labels_wherever_it_is_called(loss, options):
    error = refused(layers.linear(2, 3), loss, **options)
    assert type(error) is ValueError and "received indices[3] = -1 (1 of 4 are outside)" in str(error)
    assert error.__traceback__ is None, "which would hold all activations"


def test_a_layer_that_refuses_its_input():
    model = layers.sequential([layers.embedding(3, 2), layers.dropout(0.5), layers.linear(2, 1)])
    error = refused(model, jnp.mean, x=np.array([[0, 5]]), microbatches=1)
    assert str(error).startswith("embedding(3, 2) at '0' expected indices in [0, 3), received 5 at position [0, 1].")
    assert error.__notes__ == ["In the model's layer '0'."] if hasattr(error, "__notes__") else True


def raises(error):
    def loss(output):
        raise error

    return loss


def test_other_errors_are_no_refusal():
    assert refused(layers.linear(2, 3), lambda out: out.mean() * jnp.inf) is None
    for error in (ValueError("the user's"), TypeError("kind"), ZeroDivisionError(), FloatingPointError()):
        assert refused(layers.linear(2, 3), raises(error)) is None
    with pytest.raises(KeyboardInterrupt):
        refused(layers.linear(2, 3), raises(KeyboardInterrupt()))
