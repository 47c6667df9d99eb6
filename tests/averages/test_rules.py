"""What is refused of an average, with its texts, and the rules as values."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import averages, layers, losses, rng

X, Y = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)


def made(average, optimizer=None, **options):
    model = layers.linear(3, 4) >> layers.tanh() >> layers.linear(4, 2)
    with rng.scope(0):
        trainer = kaun.Trainer(model=model, optimizer=optimizer or optax.adam(0.1), average=average, **options)
        return trainer, trainer.init(dtype=jnp.float32)


def fails(ours, theirs):
    """A step of a trainer with a state of another, each by the arguments of `made`; they are made when it is called."""
    make = lambda arguments: made(**arguments) if isinstance(arguments, dict) else made(arguments)
    return lambda: make(ours)[0].step(make(theirs)[1], X, loss=lambda out: losses.mse(out, Y))


ELSEWHERE = r"the state belongs to a trainer with another average. Write state = trainer.make_state\(state.vars\)."


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda: averages.ema("0.9"), TypeError, r"averages.ema expected decay as a number, received '0.9'. Write "),
        (lambda: averages.ema(1.0), ValueError, r"expected a decay of at least 0 and below 1, received 1.0. It is the"),
        (lambda: averages.swa(start=1.5, every=1), TypeError, r"numbers of updates as ints, received start=1.5. Write"),
        (lambda: averages.swa(start=1, every=0), ValueError, r"of at least 1, received every=0. Write averages.swa\("),
        (lambda: averages.from_optimizer(3), TypeError, r"expected a function \(opt_state, params\) -> params, rec"),
        (lambda: made(averages.ema), TypeError, r"received ema\. Did you forget to call it\? Write a"),
        (lambda: made(0.999), TypeError, r"Trainer\(average=...\) expected averages.ema\(decay\), .* received 0.999. W"),
        (lambda: made(None)[1].averaged, ValueError, r"this state has no average of its weights. Write Trainer\(..., a"),
        (
            fails(averages.ema(0.9), None),
            ValueError,
            rf"was made with average=None, but this trainer has average=averages.ema\(0.9\): {ELSEWHERE}",
        ),
        (
            fails(None, averages.ema(0.9)),
            ValueError,
            rf"The state was made with average=averages.ema\(0.9\), but this trainer has average=None: {ELSEWHERE}",
        ),
        (
            fails(averages.swa(start=1, every=2), averages.swa(start=1, every=3)),
            ValueError,
            rf"average=averages.swa\(start=1, every=3\), but .* average=averages.swa\(start=1, every=2\): {ELSEWHERE}",
        ),
        (
            fails(
                {"average": averages.ema(0.9), "optimizer": optax.sgd(0.1), "trainable": lambda path: "left" in path},
                {"average": averages.ema(0.9), "optimizer": optax.sgd(0.1)},
            ),
            ValueError,
            r"The average in the state does not fit the trainable parameters, so [^\n]*\n  right.bias: expected nothing,",
        ),
        (
            lambda: made(averages.from_optimizer(lambda opt_state, params: opt_state.z))[1].averaged,
            TypeError,
            r"test_rules.py:\d+\) raises AttributeError: 'tuple' object has no .*It is called with the optimizer's own",
        ),
        (
            lambda: made(averages.from_optimizer(lambda opt_state, params: params["left"]))[1].averaged,
            TypeError,
            r"returns other shapes \(expected is a parameter that trains\):\n  left.left.bias: expected float32\[4\], ",
        ),
    ],
)  # fmt: skip
def test_errors(act, error, text):
    with pytest.raises(error, match=text):
        act()


def test_rules_are_values():
    assert averages.ema(0.9) == averages.ema(np.float64(0.9)) and hash(averages.ema(0.9)) == hash(averages.ema(0.9))
    f = optax.contrib.schedule_free_eval_params
    rules = [averages.ema(0.9), averages.swa(start=1, every=2), averages.from_optimizer(f)]
    assert [*map(repr, rules)] == [
        "averages.ema(0.9)",
        "averages.swa(start=1, every=2)",
        "averages.from_optimizer(schedule_free_eval_params)",
    ]
