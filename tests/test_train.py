"""What a user gets wrong, and what the message says; the laws are in tests/laws."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Context, Data, Layer, Vars, layers, losses, rng
from kaun.errors import MissingContext

X = np.ones((4, 2), np.float32)
Y = np.zeros((4, 1), np.float32)


def mse(out):
    return losses.mse(out, Y)


@pytest.fixture(scope="module")
def made():
    with rng.scope(0):
        model = layers.sequential([layers.linear(2, 3), layers.tanh(), layers.linear(3, 1)])
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
        return trainer, trainer.init()


def both(made, error, match, *, x=X, loss=mse, ctx=None, trainer=None, state=None):
    """Both roads to a step give the message, and fit loses nothing."""
    trainer, state = trainer or made[0], state or made[1]
    with pytest.raises(error, match=match):
        trainer.step(state, x, loss=loss, ctx=ctx)
    with pytest.raises(error, match=match) as caught:
        trainer.fit(state, [(X, mse), (x, loss)] if trainer is made[0] else [(x, loss)], ctx=ctx)
    assert int(caught.value.kaun_state.step) == (1 if trainer is made[0] else 0)


# Trainer


def test_the_model_must_be_a_layer():
    with pytest.raises(TypeError, match=r"Trainer\(model=...\) expected a kaun Layer, received 3"):
        kaun.Trainer(model=3, optimizer=optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"\. Did you forget to call it\? Write model=layers.sequential"):
        kaun.Trainer(model=layers.linear, optimizer=optax.sgd(0.1))


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_trainer_is_the_trainer(made, through):
    assert through(made[0]) is made[0]
    assert through({"trainers": [made[0]]})["trainers"][0] is made[0]


def test_a_trainer_is_not_pickled_and_the_message_says_what_to_pickle(made):
    text = r"^a Trainer cannot be pickled: its model and optimizer are closures\. .*pickle\.dumps\(\(build_trainer, state\)\)"
    for value in (made[0], {"trainer": made[0]}):
        with pytest.raises(TypeError, match=text):
            pickle.dumps(value)


def test_the_optimizer_must_have_init_and_update():
    model = layers.linear(2, 1)
    with pytest.raises(
        TypeError, match=r"has no init and no update\. Did you forget to call it\? Write optimizer=optax.adam"
    ):
        kaun.Trainer(model=model, optimizer=optax.sgd)
    with pytest.raises(TypeError, match=r"received 'adam', which has no init and no update"):
        kaun.Trainer(model=model, optimizer="adam")


def test_lookahead_is_refused_with_the_reason():
    optimizer = optax.lookahead(optax.sgd(0.1), 5, 0.5)
    trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optimizer)
    with pytest.raises(
        TypeError,
        match=r"(?s)does not work on the model's plain tree of parameters\. It raises AttributeError: 'dict' object has no attribute 'fast'.*LookaheadParams",
    ):
        trainer.init()


def test_an_optimizer_whose_updates_do_not_fit_is_refused():
    optimizer = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: ({"other": jnp.zeros(2)}, s))
    trainer = kaun.Trainer(model=layers.linear(2, 1), optimizer=optimizer)
    with pytest.raises(
        TypeError, match=r"(?s)Its updates differ from them.*bias: expected float32\[1\], found nothing"
    ):
        trainer.init()


def test_any_object_with_init_and_update_is_an_optimizer():
    class Descent:
        def init(self, params):
            return ()

        def update(self, gradient, state, params=None):
            return jax.tree.map(lambda g: -0.1 * g, gradient), state

    with rng.scope(0):
        mine = kaun.Trainer(model=layers.linear(2, 1), optimizer=Descent())
        state = mine.init()
    _, after = mine.step(state, X, loss=mse)
    reference = kaun.Trainer(model=mine.model, optimizer=optax.sgd(0.1))
    _, expected = reference.step(reference.make_state(state.vars), X, loss=mse)
    jax.tree.map(np.testing.assert_array_equal, after.vars, expected.vars)


def test_a_model_without_parameters_is_refused():
    trainer = kaun.Trainer(model=layers.tanh() >> layers.relu(), optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"has no parameters, so there is nothing to train.*model.apply"):
        trainer.init()


def test_an_integer_parameter_is_refused_by_path():
    init = lambda *, dtype: Vars(params={"a": [jnp.zeros(3, jnp.int32)]}, state={}, dtype=dtype)
    trainer = kaun.Trainer(model=Layer(init=init, apply=lambda v, x, **_: (x, v)), optimizer=optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"Parameter 'a.0' is int32\[3\].*Put it into the layer's state"):
        trainer.init()


def test_dtypes_of_init(made):
    trainer, _ = made
    with pytest.raises(ValueError, match=r"init\(dtype=float64\) needs JAX's x64 mode.*jax_enable_x64"):
        trainer.init(dtype=jnp.float64)
    with pytest.raises(TypeError, match=r"init\(dtype=\.\.\.\) expected a floating dtype, received int32"):
        trainer.init(dtype=jnp.int32)
    half = trainer.init(dtype=jnp.bfloat16)
    assert half.vars.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(half.vars)} == {jnp.dtype(jnp.bfloat16)}


# In float16 an eps of 1e-8 is 0, and in bfloat16 a b2 of 0.999 is 1: both end in nan.
def plain():
    return optax.adam(1e-2, eps=1e-3)


def injected():
    return optax.inject_hyperparams(optax.adamw)(1e-2, b2=0.9, eps=1e-3)


@pytest.mark.parametrize(
    ("dtype", "make"),
    [
        (jnp.bfloat16, injected),
        pytest.param(jnp.float16, plain, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, plain, marks=pytest.mark.slow),
        pytest.param(jnp.float16, injected, marks=pytest.mark.slow),
    ],
)
def test_models_in_half_precision_train_and_keep_their_dtypes(dtype, make):
    with rng.scope(0):
        model = layers.sequential([layers.linear(2, 4), layers.batch_norm(4), layers.linear(4, 1)])
        trainer = kaun.Trainer(model=model, optimizer=make())
        state = trainer.init(dtype=dtype)
    x, y = jnp.asarray(X, dtype) * jnp.arange(4, dtype=dtype)[:, None], jnp.asarray(Y, dtype)
    end = trainer.fit(state, Data.repeat(5, (x, lambda out: losses.mse(out, y))))
    assert [a.dtype for a in jax.tree.leaves(end)] == [a.dtype for a in jax.tree.leaves(state)]
    assert len(trainer.compilations) == 1


def test_make_state_wants_variables_of_this_model(made):
    trainer, state = made
    other = layers.sequential([layers.linear(2, 5), layers.tanh(), layers.linear(5, 1, bias=False)])
    with pytest.raises(
        ValueError,
        match=r"(?s)belong to another model.*params.0.weight: expected float32\[2, 3\], found float32\[2, 5\]",
    ):
        trainer.make_state(other.init())
    with pytest.raises(ValueError, match=r"(?s)params.2.bias: expected float32\[1\], found nothing"):
        trainer.make_state(other.init())
    with pytest.raises(
        TypeError, match=r"make_state expected kaun.Vars, received list. Write make_state\(state.vars\)"
    ):
        trainer.make_state(state.vars.params)
    loaded = jax.tree.map(lambda a: np.asarray(a, np.float64), state.vars)
    assert {a.dtype for a in jax.tree.leaves(trainer.make_state(loaded).vars)} == {jnp.dtype(jnp.float32)}


def test_a_state_of_another_model_is_refused_everywhere(made):
    trainer, _state = made
    other = kaun.Trainer(model=layers.linear(2, 1), optimizer=optax.sgd(0.1)).init()
    message = r"(?s)belong to another model.*params.0.weight: expected float32\[2, 3\], found nothing"
    for use in (
        lambda: trainer.step(other, X, loss=mse),
        lambda: trainer.fit(other, [(X, mse)]),
        lambda: trainer.predict(other, X),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_a_state_of_equal_tree_and_other_shapes_is_refused_after_a_good_one(made):
    """How a state is packed must not be remembered by its tree alone: other shapes would be cut to fit, silently."""
    trainer, state = made
    trainer.step(state, X, loss=mse)
    wider = layers.sequential([layers.linear(2, 5), layers.tanh(), layers.linear(5, 1)])
    other = kaun.Trainer(model=wider, optimizer=optax.sgd(0.1)).init()
    for use in (lambda: trainer.step(other, X, loss=mse), lambda: trainer.fit(other, [(X, mse)])):
        with pytest.raises(ValueError, match=r"params.0.weight: expected float32\[2, 3\], found float32\[2, 5\]"):
            use()


def test_a_state_must_be_a_train_state(made):
    trainer, state = made
    for use in (trainer.fit, trainer.predict):
        with pytest.raises(
            TypeError, match=r"expected a TrainState, received Vars. Make one with trainer.make_state\(vars\)"
        ):
            use(state.vars, X)
    with pytest.raises(
        TypeError, match=r"step expected a TrainState, received NoneType. Make one with trainer.init\(\)"
    ):
        trainer.step(None, X, loss=mse)


def test_an_init_that_needs_real_numbers_is_run(made):
    def init(*, dtype):
        w = np.asarray(jax.random.normal(rng.next_key(), (2, 1), dtype))
        return Vars(params={"w": jnp.asarray(w / np.linalg.norm(w))}, state={}, dtype=dtype)

    apply = lambda vars, x, *, training, ctx: (x @ vars.params["w"], vars)
    trainer = kaun.Trainer(model=Layer(init=init, apply=apply), optimizer=optax.sgd(0.1))
    value, _ = trainer.step(trainer.init(), X, loss=mse)
    assert value.shape == ()


# Inputs


def test_a_wrong_width_names_the_layer_by_its_path(made):
    both(
        made,
        ValueError,
        r"linear\(2, 3\) at '0' expected float32\[..., 2\], received float32\[4, 5\]",
        x=np.ones((4, 5), np.float32),
    )
    model = layers.linear(2, 4) >> layers.residual(layers.sequential([layers.linear(4, 4), layers.linear(3, 4)]))
    trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
    both(made, ValueError, r"linear\(3, 4\) at 'right.inner.1' expected", trainer=trainer, state=trainer.init())


def test_integers_into_a_float_layer_and_the_reverse(made):
    both(
        made,
        TypeError,
        r"linear\(2, 3\) at '0' expected float32\[..., 2\], received int32\[4, 2\].*astype",
        x=np.ones((4, 2), np.int32),
    )
    trainer = kaun.Trainer(model=layers.embedding(5, 2) >> layers.linear(2, 1), optimizer=optax.sgd(0.1))
    both(
        made,
        TypeError,
        r"embedding\(5, 2.*at 'left' expected int.*received float32\[4, 2\]",
        trainer=trainer,
        state=trainer.init(),
    )


def test_a_dtype_other_than_the_models(made):
    both(
        made,
        TypeError,
        r"received bfloat16\[4, 2\]: the parameters are float32.*x.astype\(jnp.float32\)",
        x=jnp.ones((4, 2), jnp.bfloat16),
    )
    trainer, state = made
    value, _ = trainer.step(state, X.astype(np.float64), loss=mse)
    expected, _ = trainer.step(state, X, loss=mse)
    assert float(value) == float(expected), "NumPy float64 is canonicalized as JAX does"


@pytest.mark.parametrize(
    ("x", "text"),
    [
        ("words", "x expected a NumPy or JAX array of numbers, received str"),
        ({"a": X, "b": [X, object()]}, "x at 'b.1' expected a NumPy or JAX array of numbers, received object"),
        (np.array(["a"]), "received an array of dtype <U1"),
        (np.array([object()]), "received an array of dtype object"),
        (np.array(["2020-01-01"], "datetime64[D]"), "received an array of dtype datetime64"),
    ],
)
def test_inputs_that_are_no_numbers(made, x, text):
    both(made, TypeError, text, x=x)


# Losses


@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        (lambda out: (out - Y)[:, 0], ValueError, r"float32\[4\].*\.mean\(\)"),
        (lambda out: jnp.argmax(out), TypeError, r"loss `<lambda>` \(test_train.py:\d+\) must return.*int32"),
        (lambda out: jnp.asarray(1j) * out.sum().astype(jnp.complex64), TypeError, "complex64"),
        (lambda out: 1.0, TypeError, "float.*the model's output"),
        (lambda out: None, TypeError, "None"),
        (lambda out: (out.mean(), 1), TypeError, "tuple"),
    ],
    ids=["vector", "int", "complex", "float", "none", "tuple"],
)
def test_losses_that_are_no_real_floating_scalars(made, loss, error, text):
    both(made, (TypeError, ValueError), text, loss=loss)


def test_a_loss_that_is_no_function(made):
    trainer, state = made
    with pytest.raises(
        TypeError, match=r"step\(loss=...\) expected a function of the model's output, received float32\[4, 1\]"
    ):
        trainer.step(state, X, loss=Y)


def test_mse_does_not_broadcast(made):
    both(made, ValueError, r"\[4, 1\].*\[4\]", loss=lambda out: losses.mse(out, Y[:, 0]))


# Data


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ((X, Y), r"item 2 is a tuple of \(float32\[4, 2\], float32\[4, 1\]\).*with_loss"),
        (X, r"item 2 is float32\[4, 2\]"),
        ((X,), r"item 2 is a tuple of \(float32\[4, 2\]\)"),
        ((X, mse, {"mask": 1}), r"item 2 is a tuple of \(float32\[4, 2\], function, dict\)"),
        (None, "item 2 is NoneType"),
    ],
)
def test_items_that_are_no_pairs(made, item, text):
    trainer, state = made
    with pytest.raises(TypeError, match=r"fit expected items \(x, loss\) or \(x, loss, Context\).*" + text) as caught:
        trainer.fit(state, [(X, mse), item])
    assert int(caught.value.kaun_state.step) == 1


def test_empty_data(made):
    trainer, state = made
    used = iter([(X, mse)])
    trainer.fit(state, used)
    for data in ([], used, Data.repeat(1, (X, mse)).take(0)):
        with pytest.raises(ValueError, match=r"fit received no items: the data is empty.*a new iterator\."):
            trainer.fit(state, data)


def test_data_that_is_no_data(made):
    trainer, state = made
    with pytest.raises(
        TypeError, match=r"fit expected data, a kaun.Data or an iterable of \(x, loss\), received int.*Data.repeat"
    ):
        trainer.fit(state, 3)


def test_a_report_that_cannot_be_called(made):
    trainer, state = made
    with pytest.raises(
        TypeError, match=r"fit expected a report, callable as \(step, loss, state\), received 100\. Write def report"
    ):
        trainer.fit(state, [(X, mse)], report=100)


def test_context(made):
    trainer, state = made
    with pytest.raises(TypeError, match=r"ctx expected a kaun.Context, received dict. Write Context\(name=array\)"):
        trainer.step(state, X, loss=mse, ctx={"mask": X})

    def apply(vars, x, *, training, ctx):
        return x @ vars.params["w"] * ctx["mask"], vars

    init = lambda *, dtype: Vars(params={"w": jnp.ones((2, 1), dtype)}, state={}, dtype=dtype)
    masked = kaun.Trainer(model=Layer(init=init, apply=apply), optimizer=optax.sgd(0.1))
    both(
        made,
        MissingContext,
        "Context has no 'mask'; it has 'other'",
        trainer=masked,
        state=masked.init(),
        ctx=Context(other=Y),
    )
    with pytest.raises(TypeError, match=r"ctx at 'mask' expected a NumPy or JAX array of numbers, received str"):
        masked.predict(masked.init(), X, ctx=Context(mask="a"))
    with pytest.raises(MissingContext, match=r"it has nothing"):
        masked.predict(masked.init(), X)


# The state


def test_a_state_is_an_immutable_pytree_that_says_what_it_is(made):
    _, state = made
    assert repr(state) == "TrainState(step=0, 13 parameters in float32)"
    with pytest.raises(AttributeError, match=r"TrainState is immutable: use state = state.replace\(step=...\)"):
        state.step = 3
    with pytest.raises(AttributeError, match=r"TrainState has no 'params'.*Write state.vars.params"):
        state.params  # noqa: B018
    assert int(state.replace(step=jnp.int32(7)).step) == 7 and int(state.step) == 0
    given = state.replace(step=7).step
    assert (given.dtype, given.weak_type, int(given)) == (jnp.int32, False, 7)
    with pytest.raises(
        TypeError, match=r"^TrainState has no field 'stepp'\. Its fields are vars, opt_state, step, key\.$"
    ):
        state.replace(stepp=1)
    doubled = jax.tree.map(lambda a: a, state)
    assert isinstance(doubled, kaun.TrainState)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert ".vars.params[0]['weight']" in paths and ".step" in paths


def test_a_trainer_is_a_frozen_value(made):
    trainer, _ = made
    with pytest.raises(AttributeError, match=r"^Trainer is immutable: write .*dataclasses\.replace\(trainer, model="):
        trainer.model = None
    assert trainer == kaun.Trainer(model=trainer.model, optimizer=trainer.optimizer)
    assert "sequential" in repr(trainer)
    with pytest.raises(TypeError):
        kaun.Trainer(trainer.model, trainer.optimizer)
