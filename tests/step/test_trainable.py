"""Freezing by path: what is refused, what the gradient is taken of, and what a frozen layer does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Layer, Vars, layers, losses, rng
from kaun._step import trainable
from kaun.errors import NonFiniteLoss

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)


def mse(out):
    return losses.mse(out, Y)


def model():
    return layers.sequential(
        [layers.linear(3, 4), layers.batch_norm(4), layers.relu(), layers.dropout(0.5), layers.linear(4, 2)]
    )


def made(trainable, model=model, optimizer=None, **options):
    with rng.scope(0):
        trainer = kaun.Trainer(model=model(), optimizer=optimizer or optax.adam(0.1), trainable=trainable, **options)
        return trainer, trainer.init()


def test_it_must_be_a_function():
    with pytest.raises(
        TypeError, match=r"trainable=\.\.\.\) expected a function.*received 'head'\. Write trainable=lambda"
    ):
        made("head")


def test_one_that_is_true_for_nothing_is_refused_with_the_paths():
    with pytest.raises(
        ValueError,
        match=r"(?s)True for some of the model's parameters, received .*, which is False for all of them\. The paths are\n  '0\.bias'\n  '0\.weight'\n.*'4\.weight'\nWrite",
    ):
        made(lambda path: path.startswith("head"))


def test_many_paths_are_cut():
    params = {f"{i:02}": jnp.ones(1) for i in range(30)}
    with pytest.raises(ValueError, match=r"'19'\n  and 10 more\nWrite"):
        trainable.trainable_part(lambda path: False, params)


def test_the_gradient_is_jax_s_of_those_parameters_alone():
    plain = lambda: layers.sequential([layers.linear(3, 4), layers.tanh(), layers.linear(4, 2)])
    trainer, state = made(lambda path: path.startswith("2"), plain, optax.sgd(0.1, momentum=0.9))
    head, rest = state.vars.params[2], state.vars.params[:2]

    def objective(head):
        hidden = jnp.tanh(X @ rest[0]["weight"] + rest[0]["bias"][None])
        return ((hidden @ head["weight"] + head["bias"][None] - Y) ** 2).mean()

    opt = optax.sgd(0.1, momentum=0.9)
    opt_state, slope = opt.init(head), jax.jit(jax.value_and_grad(objective))
    for _ in range(20):
        value, gradient = slope(head)
        updates, opt_state = opt.update(gradient, opt_state, head)
        head = optax.apply_updates(head, updates)
        found, state = trainer.step(state, X, loss=mse)
        np.testing.assert_allclose(found, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.vars.params[2], head)
    assert [a.shape for a in jax.tree.leaves(state.opt_state)] == [(2,), (4, 2)]


def test_frozen_weights_are_not_differentiated():
    trainer, state = made(lambda path: path.startswith("4"), optimizer=optax.sgd(0.1))
    program = str(jax.make_jaxpr(lambda s: trainer.step(s, X, loss=mse))(state))
    everything, whole = made(None, optimizer=optax.sgd(0.1))
    full = str(jax.make_jaxpr(lambda s: everything.step(s, X, loss=mse))(whole))
    # Forward twice and the head's weight; with all of them the first weight and the way down to it too.
    assert (program.count("dot_general["), full.count("dot_general[")) == (3, 5)


def test_a_layer_frozen_as_a_whole_runs_as_in_predict_and_keeps_its_state():
    trainer, state = made(lambda path: path.startswith("4"))
    with rng.scope(3):
        moved = state.vars.replace(state=jax.tree.map(lambda a: a + 0.5, state.vars.state))
        state = trainer.make_state(moved)
    _, after = trainer.step(state, X, loss=mse)
    jax.tree.map(np.testing.assert_array_equal, after.vars.state, state.vars.state)
    # without the dropout, which has no parameters and stays active, the loss is that of predict
    quiet = lambda: layers.sequential([layers.linear(3, 4), layers.batch_norm(4), layers.linear(4, 2)])
    trainer, state = made(lambda path: path.startswith("2"), quiet)
    state = state.replace(vars=state.vars.replace(state=jax.tree.map(lambda a: a + 0.5, state.vars.state)))
    value, _ = trainer.step(state, X, loss=mse)
    np.testing.assert_allclose(value, mse(trainer.predict(state, X)), rtol=1e-6)


def test_a_layer_with_one_parameter_that_trains_runs_as_before():
    trainer, state = made(lambda path: path == "1.bias")
    _, after = trainer.step(state, X, loss=mse)
    assert not np.array_equal(after.vars.state[1]["running_mean"], state.vars.state[1]["running_mean"])


def test_dropout_inside_of_a_frozen_backbone_is_off_and_beside_it_on():
    backbone = lambda: layers.sequential([layers.linear(3, 4), layers.dropout(0.5)])
    head = lambda path: path.startswith("1")
    inside, state = made(head, lambda: layers.sequential([backbone(), layers.linear(4, 2)]))
    value, _ = inside.step(state, X, loss=mse)
    np.testing.assert_allclose(value, mse(inside.predict(state, X)), rtol=1e-6)
    beside, state = made(
        lambda path: path.startswith("2"),
        lambda: layers.sequential([layers.linear(3, 4), layers.dropout(0.5), layers.linear(4, 2)]),
    )
    value, _ = beside.step(state, X, loss=mse)
    assert abs(float(value) - float(mse(beside.predict(state, X)))) > 1e-3


def by_hand():
    """A container that knows nothing of paths."""
    norm, head = layers.batch_norm(3), layers.linear(3, 2)

    def init(*, dtype):
        a, b = norm.init(dtype=dtype), head.init(dtype=dtype)
        return Vars(params={"norm": a.params, "head": b.params}, state={"norm": a.state}, dtype=dtype)

    def apply(vars, x, *, training, ctx):
        part = Vars(params=vars.params["norm"], state=vars.state["norm"], dtype=vars.dtype)
        x, after = norm.apply(part, x, training=training, ctx=ctx)
        part = Vars(params=vars.params["head"], state={}, dtype=vars.dtype)
        return head.apply(part, x, training=training, ctx=ctx)[0], vars.replace(state={"norm": after.state})

    return Layer(init=init, apply=apply, name="by_hand")


def test_a_container_written_by_hand_needs_nothing():
    trainer, state = made(lambda path: path.startswith("head"), by_hand)
    state = state.replace(vars=state.vars.replace(state=jax.tree.map(lambda a: a + 0.5, state.vars.state)))
    value, after = trainer.step(state, X, loss=mse)
    np.testing.assert_allclose(value, mse(trainer.predict(state, X)), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after.vars.state, state.vars.state)


def test_state_of_a_layer_that_moves_it_anyway_is_kept():
    def init(*, dtype):
        return Vars(params={"w": jnp.ones(3, dtype)}, state={"seen": jnp.zeros((), dtype)}, dtype=dtype)

    counts = Layer(
        init=init,
        apply=lambda v, x, *, training, ctx: (x * v.params["w"][None], v.replace(state={"seen": v.state["seen"] + 1})),
    )
    trainer, state = made(lambda path: path.startswith("1"), lambda: layers.sequential([counts, layers.linear(3, 2)]))
    assert float(trainer.step(state, X, loss=mse)[1].vars.state[0]["seen"]) == 0
    trainer, state = made(lambda path: path.startswith("0"), lambda: layers.sequential([counts, layers.linear(3, 2)]))
    assert float(trainer.step(state, X, loss=mse)[1].vars.state[0]["seen"]) == 1


@pytest.mark.parametrize(
    ("path", "trains", "frozen"),
    [
        ("1.mean", "4", True),
        ("1.mean", "1", False),
        ("3.count", "4", False),
        ("0.inner.seen", "0", False),
        ("seen", "4", False),
    ],
)
def test_whose_state_is_kept(path, trains, frozen):
    params = ["0.inner.weight", "0.bias", "1.weight", "4.weight"]
    assert trainable._is_frozen(path, {p: not p.startswith(trains) for p in params}) == frozen


@pytest.mark.parametrize("swap", [False, True])
def test_the_state_of_another_trainable_is_refused(swap):
    some, small = made(lambda path: path.startswith("4"))
    every, large = made(None)
    trainer, state = (every, small) if swap else (some, large)
    with pytest.raises(
        ValueError, match=r"(?s)does not fit the trainable parameters.*another trainable.*0\.mu\.0\.bias.*make_state"
    ):
        trainer.step(state, X, loss=mse)
    again = trainer.make_state(state.vars)
    trainer.step(again, X, loss=mse)


def test_what_is_not_finite_is_named_by_its_own_path():
    trainer, state = made(
        lambda path: path.startswith("4"),
        lambda: layers.sequential(
            [layers.linear(3, 4), layers.tanh(), layers.tanh(), layers.tanh(), layers.linear(4, 2)]
        ),
    )
    with pytest.raises(
        NonFiniteLoss, match=r"the gradient is not finite for '4\.bias', '4\.weight' \(2 of 2 parameters\)"
    ) as caught:
        trainer.fit(state, [(X, lambda out: mse(out) * jnp.nan)])
    assert caught.value.parameters == ("4.bias", "4.weight")
    assert caught.value.kaun_state.step == 0


def test_checkpoints_of_frozen_trainers(tmp_path):
    trainer, state = made(lambda path: path.startswith("4"))
    data = [(X, mse)] * 6
    whole = trainer.fit(state, data)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(state, data, report=_killed, checkpoints=kaun.checkpoint.Directory(tmp_path, every=2))
    again = trainer.fit(state, data, checkpoints=kaun.checkpoint.Directory(tmp_path, every=2))
    jax.tree.map(np.testing.assert_array_equal, whole.vars, again.vars)


def _killed(step, loss, state):
    if step == 4 and loss != 0:
        raise KeyboardInterrupt
