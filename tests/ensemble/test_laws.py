"""Ensembles: members as the trainer makes them, fit is the fold of step, and every argument of a trainer."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kaun
from kaun import Data, averages, layers, losses, rng
from kaun._engine import options
from kaun._jax import primitives_in

G = np.random.default_rng(0)
X = G.normal(size=(10, 3)).astype(np.float32)
Y = G.normal(size=(10, 2)).astype(np.float32)
TRAIN = Data.batches((X, Y), 4).with_loss(losses.mse)  # of 4, 4 and 2 rows
EVEN = TRAIN.take(2)
MOMENTUM = optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9)
RATES = jnp.array([0.3, 0.03, 0.003])


def small():
    return layers.linear(3, 4) >> layers.tanh() >> layers.linear(4, 2)


@functools.cache
def made(model=small, optimizer=MOMENTUM, n=3, **options):
    trainer = kaun.Trainer(model=model(), optimizer=optimizer, **options)
    with rng.scope(0):
        return kaun.Ensemble(trainer, n), kaun.Ensemble(trainer, n).init()


def host(tree):
    data = lambda leaf: np.asarray(jax.random.key_data(leaf) if kaun.tree.is_key(leaf) else leaf).tobytes()
    return [data(leaf) for leaf in jax.tree.leaves(tree)]


def folded(many, states, data=TRAIN, **options):
    for x, loss, *ctx in data:
        _, states = many.step(states, x, loss=loss, ctx=ctx[0] if ctx else None, **options)
    return states


def averaging():
    """A layer that keeps a running mean of its input."""

    def apply(vars, x, *, training, ctx=None):
        return x, vars.replace(state={"mean": 0.9 * vars.state["mean"] + 0.1 * x.mean(0)}) if training else vars

    init = lambda *, dtype: layers.Vars({}, {"mean": jnp.zeros(2, dtype)}, dtype)
    middle = layers.Layer(init=init, apply=apply, name="averaging")
    return layers.sequential([layers.linear(3, 2), middle, layers.linear(2, 1)])


def test_members_that_may_be_skipped_keep_the_bits_of_a_running_statistic():
    many, states = made(averaging, optax.sgd(0.05), on_nonfinite="skip")
    arrays = [np.random.default_rng(1).normal(size=(160, n)).astype(np.float32) for n in (3, 1)]
    train = Data.batches(tuple(arrays), 8).with_loss(losses.mse)
    assert host(many.fit(states, train)) == host(folded(many, states, train))


def test_members_that_are_not_packed_update_the_statistics_of_batch_norm_with_the_bits_of_fit():
    # Their steps select the old state in the kernel of the update, and a fit does not.
    many, states = made(lambda: layers.linear(3, 32) >> layers.batch_norm(32) >> layers.linear(32, 2), optax.sgd(0.1))
    assert host(many.fit(states, EVEN)) == host(folded(many, states, EVEN))


def close(a, b, atol=2e-6):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(u, np.float64), np.asarray(v, np.float64), atol=atol, rtol=2e-5)


def test_a_member_is_the_trainers_init_byte_for_byte():
    initializers = jax.nn.initializers
    model = layers.linear(3, 5, weight_init=initializers.orthogonal(), bias_init=initializers.normal(0.1))
    trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1, momentum=0.9))
    with rng.scope(7):
        states, after = kaun.Ensemble(trainer, 3).init(), rng.next_key()
    with rng.scope(7):
        key, expected = rng.next_key(), rng.next_key()
    assert after == expected  # one key was drawn
    for i in range(3):
        with rng.scope(jax.random.fold_in(key, i)):
            assert host(states.member(i)) == host(trainer.init())
    with rng.scope(7):
        assert host(kaun.Ensemble(trainer, 2).init().member(1)) == host(states.member(1))
    assert jax.tree.structure(states.member(-1)) == jax.tree.structure(trainer.init())


def test_an_init_that_uses_numpy_makes_the_same_members():
    noise = lambda key, shape, dtype: jnp.asarray(np.sin(np.asarray(jax.random.normal(key, shape))), dtype)
    trainer = kaun.Trainer(model=layers.linear(2, 2, weight_init=noise), optimizer=optax.sgd(0.1))
    with rng.scope(3):
        states = kaun.Ensemble(trainer, 2).init()
    with rng.scope(3):
        key = rng.next_key()
    with rng.scope(jax.random.fold_in(key, 1)):
        assert host(states.member(1)) == host(trainer.init())


def test_make_state_takes_the_variables_of_one_model_or_of_all_members():
    many, states = made()
    one = states.member(1).vars
    with rng.scope(5):
        shared, each = many.make_state(one), many.make_state(states.vars)
    assert host(shared.member(2).vars) == host(one)
    assert host(each.vars) == host(states.vars)
    with rng.scope(5):
        key = rng.next_key()
    with rng.scope(jax.random.fold_in(key, 2)):
        assert host(shared.member(2)) == host(many.trainer.make_state(one))
    two = jax.tree.map(lambda a: a[:2], states.vars)
    with pytest.raises(ValueError, match=r"of one model, or of 3 members along axis 0, received float32\[2, "):
        many.make_state(two)
    with pytest.raises(TypeError, match=r"make_state expected kaun\.Vars, received dict"):
        many.make_state({})


def by_hand(vars, rate, steps):
    """SGD with momentum of one member, in NumPy float64."""
    left, right = vars.params["left"]["left"], vars.params["right"]
    p = [np.asarray(a, np.float64) for a in (left["weight"], left["bias"], right["weight"], right["bias"])]
    velocity = [np.zeros_like(a) for a in p]
    for x, y in steps:
        h = np.tanh(x @ p[0] + p[1])
        d = 2 * (h @ p[2] + p[3] - y) / y.size
        inner = (d @ p[2].T) * (1 - h**2)
        gradient = [x.T @ inner, inner.sum(0), h.T @ d, d.sum(0)]
        velocity = [0.9 * v + g for v, g in zip(velocity, gradient, strict=True)]
        p = [a - rate * v for a, v in zip(p, velocity, strict=True)]
    return p


def test_each_member_trains_with_its_own_rate_as_by_hand():
    many, _ = made()
    with rng.scope(0):
        start = many.init(learning_rate=RATES)
    end = many.fit(start, TRAIN.epochs(4))
    steps = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)] * 4
    for i, rate in enumerate(RATES.tolist()):
        vars = end.member(i).vars
        left, right = vars.params["left"]["left"], vars.params["right"]
        close(
            [left["weight"], left["bias"], right["weight"], right["bias"]], by_hand(start.member(i).vars, rate, steps)
        )
    assert end.member(1).step == 12 and end.member(1).key == start.member(1).key


def dropout_net():
    return layers.linear(3, 8) >> layers.batch_norm(8) >> layers.dropout(0.5) >> layers.linear(8, 2)


def wide():
    """With 200 members above 1 MiB, so that the loop overwrites their states in place."""
    return layers.linear(3, 128) >> layers.tanh() >> layers.linear(128, 2)


CASES = {
    "dropout and batch norm": {"model": dropout_net},
    "in place": {"model": wide, "n": 200},
    "skip": {"on_nonfinite": "skip"},
    "ignore": {"on_nonfinite": "ignore"},
    "trainable": {"trainable": lambda path: path.startswith("right")},
    "float16": {"precision": "mixed_float16"},
    "bfloat16": {"precision": "mixed_bfloat16"},
    "microbatches": {"microbatches": 2},
    "penalty": {"penalty": lambda params: 1e-3 * jnp.square(params["right"]["weight"]).sum()},
    "average": {"average": averages.ema(0.9)},
    "adamw": {"optimizer": optax.adamw(0.1)},
    "MultiSteps": {"optimizer": optax.MultiSteps(optax.sgd(0.1), 2)},
    "lbfgs": {"optimizer": optax.lbfgs(memory_size=2)},
    "conv": {
        "model": lambda: (
            layers.fn(lambda x: x[:, :, None]) >> layers.conv1d(1, 4, 3) >> layers.flatten() >> layers.linear(12, 2)
        )
    },
}
SHORT = ("dropout and batch norm",)


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_fit_is_the_fold_of_step_and_near_the_trainers(name):
    many, start = made(**CASES[name])
    before = host(start)
    train = EVEN if name in SHORT else TRAIN
    end = many.fit(start, train.epochs(2))
    assert host(end) == host(folded(many, start, train.epochs(2)))
    assert host(start) == before  # what was given stays valid
    alone = many.trainer.fit(start.member(1), train.epochs(2))
    assert jax.tree.structure(alone) == jax.tree.structure(end.member(1))
    tolerance = 0.02 if name.endswith("float16") else 1e-3 if name == "lbfgs" else 2e-5
    close(end.member(1).vars, alone.vars, tolerance)
    if name == "average":
        close(end.averaged.member(1).vars, alone.averaged.vars, tolerance)
        assert end.averaged.is_averaged and end.averaged.member(1).is_averaged


@pytest.mark.slow
def test_masks_of_dropout_and_statistics_differ_by_member():
    many, start = made(dropout_net)
    same = many.make_state(start.member(0).vars)
    _, after = many.step(same, X, loss=lambda out: losses.mse(out, Y))
    weights = np.asarray(after.vars.params["right"]["weight"])
    assert not np.array_equal(weights[0], weights[1])  # from equal weights, by other masks
    end = many.fit(start, TRAIN)
    (mean,) = [np.asarray(a) for path, a in kaun.tree.flatten(end.vars.state)[0].items() if path.endswith("mean")]
    assert mean.shape == (3, 8) and not np.array_equal(mean[0], mean[1])
    outputs = many.predict(end, X)
    close(outputs[1], many.trainer.predict(end.member(1), X))


def test_one_program_serves_every_batch_and_every_member():
    many, start = kaun.Ensemble(made()[0].trainer, 3), made()[1]
    below = lambda least: lambda loss: loss < least
    end = many.fit(start, TRAIN.epochs(3), stop=below(1e-3))
    many.fit(end, TRAIN, stop=below(1e-3))  # another function of the same code
    assert [c.where for c in many.compilations] == ["fit"] * 2  # of 4 rows, and of 2


@pytest.mark.slow
def test_a_step_may_be_part_of_a_compiled_function():
    many, start = made()
    loss = lambda out: losses.mse(out, Y)
    expected, after = many.step(start, X, loss=loss)
    found, same = jax.jit(lambda s: many.step(s, X, loss=loss))(start)
    close(found, expected)
    close(after.vars, same.vars)


def test_states_print_pickle_and_give_members():
    many, start = made()
    end = many.fit(start, TRAIN)
    assert repr(end) == "TrainState(3 members, step=3, 26 parameters each in float32)"
    assert host(pickle.loads(pickle.dumps(end)).member(1)) == host(end.member(1))
    assert "member" in dir(end) and "member" not in dir(end.member(0))
    assert many == kaun.Ensemble(many.trainer, 3) and many != kaun.Ensemble(many.trainer, 4)
    with pytest.raises(IndexError, match=r"state\.member\(i\) expected i from 0 to 2: there are 3 members, received 3"):
        end.member(3)
    for i in (1.0, True, None, slice(2), jnp.arange(2)):
        with pytest.raises(TypeError, match=r"member as an int, received .*\[states\.member\(i\) for i in range\(3\)"):
            end.member(i)
    assert host(end.member(jnp.argmax(jnp.arange(2)))) == host(end.member(1))
    with pytest.raises(TypeError, match=r"expected the state of an ensemble.* many = kaun\.Ensemble\(trainer, 8\)"):
        end.member(0).member(0)


def test_arguments_are_checked():
    many, start = made()
    trainer = many.trainer
    with pytest.raises(TypeError, match=r"Ensemble expected a Trainer first, received int"):
        kaun.Ensemble(3, trainer)
    with pytest.raises(TypeError, match=r"the number of members as an int, received 2\.0"):
        kaun.Ensemble(trainer, 2.0)
    with pytest.raises(ValueError, match=r"Ensemble expected at least 1 member, received 0"):
        kaun.Ensemble(trainer, 0)
    with pytest.raises(ValueError, match=r"cannot use Trainer\(accumulate=2\).*microbatches=4"):
        kaun.Ensemble(kaun.Trainer(model=small(), optimizer=optax.sgd(0.1), accumulate=2), 2)
    with pytest.raises(TypeError, match=r"Ensemble\.fit expected the states of 3 members, received the state of one"):
        many.fit(start.member(0), TRAIN)
    with pytest.raises(ValueError, match=r"Ensemble\.evaluate expected the states of 2 members, received those of 3"):
        kaun.Ensemble(trainer, 2).evaluate(start, [], {"mse": losses.mse})
    with pytest.raises(
        ValueError, match=r"another model[^$]*those of 3 members.*state\.member\(i\).*Ensemble\(trainer, 3"
    ):
        trainer.fit(start, TRAIN)
    with pytest.raises(
        TypeError, match=r"explain expected a Trainer first, received Ensemble\. Write explain\(trainer"
    ):
        kaun.explain(many, ValueError())
    with pytest.raises(TypeError, match=r"'mean' are the parts of a metric.*many\.evaluate"):
        parts = kaun.metrics.Counted.of(kaun.metrics.accuracy).parts
        many.step(start, X, loss=lambda out: (losses.mse(out, Y), {"mean": parts(out, jnp.zeros(10, jnp.int32))}))
    with pytest.raises(TypeError, match=r"The loss of an ensemble returned 'losses', a name that is kaun's own"):
        many.step(start, X, loss=lambda out: (losses.mse(out, Y), {"losses": jnp.float32(1)}))


def test_products_of_small_members_are_sums_and_those_of_large_ones_are_not():
    def operations(many, states):
        x, loss = next(iter(EVEN))
        return primitives_in(jax.make_jaxpr(lambda states: many.step(states, x, loss=loss))(states))

    assert "dot_general" not in operations(*made())
    large = lambda: layers.linear(3, 32) >> layers.tanh() >> layers.linear(32, 2)
    assert "dot_general" in operations(*made(large))


def test_only_few_small_members_are_kept_on_one_thread():
    passes = lambda n: options.step_options(None, options.MemberPacking([jnp.zeros((n, 51))]))["xla_disable_hlo_passes"]
    assert "cpu-parallel-task-assigner" in passes(256) and "cpu-parallel-task-assigner" not in passes(2048)


def test_programs_of_small_members_are_compiled_with_their_own_options(monkeypatch):
    assert options._accepts_member_options(), "XLA has no such option any more: see _engine/options.py"
    unknown = {**options.LOOP_OPTIONS, "xla_cpu_of_no_version": ""}
    monkeypatch.setattr(options, "_MEMBER_OPTIONS", unknown)
    assert not options._accepts_member_options.__wrapped__()
    many, states = made(functools.partial(layers.linear, 3, 2))
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_cpu_of_no_version'"):
        many.fit(states, EVEN)
    many.trainer.fit(many.trainer.init(), EVEN)
