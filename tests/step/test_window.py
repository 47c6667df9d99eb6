"""``Trainer(accumulate=k)``: k items make the update of one batch of all their rows, whatever their sizes and weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kaun
from kaun import Layer, Vars, layers, losses, reports, rng
from kaun.errors import NonFiniteLoss

SCHEDULED = optax.chain(optax.clip_by_global_norm(0.3), optax.adam(optax.exponential_decay(0.1, 1, 0.5)))
SGD, ADAM = optax.sgd(0.5), optax.adam(0.1)
G = np.random.default_rng(0)


@functools.cache
def made(accumulate, optimizer=SCHEDULED, model="mlp", **options):
    """Trainers and states are values, so the tests share them, and what they have compiled."""
    parts = {
        "mlp": lambda: layers.sequential([layers.linear(3, 4), layers.tanh(), layers.linear(4, 2)]),
        "linear": lambda: layers.linear(3, 2),
        "norm": lambda: layers.linear(3, 2) >> layers.batch_norm(2),
        "large": lambda: layers.linear(3, 100_000) >> layers.fn(lambda x: x[:, :2]),
    }
    with rng.scope(0):
        trainer = kaun.Trainer(model=parts[model](), optimizer=optimizer, accumulate=accumulate, **options)
        return trainer, trainer.init()


def batch(n, weights=False):
    x, y = G.normal(size=(n, 3)).astype(np.float32), G.normal(size=(n, 2)).astype(np.float32)
    return x, y, (G.random((n, 2)) * (G.random((n, 2)) > 0.4)).astype(np.float32) if weights else None


def item(rows):
    x, y, w = rows
    if w is None:
        return x, lambda out: losses.mse(out, y)
    return x, lambda out: losses.mse.parts(out, y, weights=w)


def joined(batches):
    return tuple(None if a[0] is None else np.concatenate(a) for a in zip(*batches, strict=True))


def gradient_of(params, x, y, w):
    """The gradient of the weighted mean of squares, for one layer or two with a tanh between them, in float64."""
    layer = [p for p in params if p] if isinstance(params, list) else [params.get("left", params)]
    layer = [jax.tree.map(lambda a: np.asarray(a, np.float64), p) for p in layer]
    inputs = [x, *[np.tanh(x @ p["weight"] + p["bias"]) for p in layer[:-1]]]
    error = (inputs[-1] @ layer[-1]["weight"] + layer[-1]["bias"])[:, : y.shape[1]] - y
    w = np.ones(y.shape) if w is None else w
    back = np.zeros((len(x), layer[-1]["bias"].size))
    back[:, : y.shape[1]] = 2 * w * error / (w.sum() or 1)
    found = []
    for p, a in zip(layer[::-1], inputs[::-1], strict=True):
        found.insert(0, {"bias": back.sum(axis=0), "weight": a.T @ back})
        back = (back @ p["weight"].T) * (1 - a**2)
    flat = [np.asarray(a, np.float32) for a in jax.tree.leaves(found)]
    return jax.tree.unflatten(jax.tree.structure(params), flat)


@functools.partial(jax.jit, static_argnums=0)
def updated(optimizer, gradient, opt_state, params):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state


def by_hand(params, windows, optimizer=SCHEDULED):
    """One update of optax for each window, on the concatenated batch."""
    opt_state = optimizer.init(params)
    for window in windows:
        params, opt_state = updated(optimizer, gradient_of(params, *window), opt_state, params)
    return params


def close(a, b, **options):
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, **{"rtol": 1e-6, "atol": 1e-6, **options}), a, b)


def same(a, b):
    is_key = lambda v: jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
    plain = lambda tree: [jax.random.key_data(v) if is_key(v) else v for v in jax.tree.leaves(tree)]
    return all(np.asarray(p).tobytes() == np.asarray(q).tobytes() for p, q in zip(plain(a), plain(b), strict=True))


def fold(trainer, state, items):
    for x, loss in items:
        _, state = trainer.step(state, x, loss=loss)
    return state


class Blocks(reports.Report):
    def __init__(self):
        self.values = {}

    def wants(self, step):
        return False

    def block(self, first, values):
        for name in values:
            self.values.setdefault(name, []).extend(values[name].tolist())


# The update of the one big batch


@given(st.lists(st.integers(1, 2), min_size=1, max_size=8), st.booleans())
@settings(max_examples=20, deadline=None)
def test_k_items_are_one_batch_of_all_their_rows(sizes, weights):
    trainer, state = made(3)
    batches = [batch(n, weights) for n in sizes]
    end = trainer.fit(state, list(map(item, batches)))
    windows = [joined(batches[i : i + 3]) for i in range(0, len(batches), 3)]
    close(end.vars.params, by_hand(state.vars.params, windows))
    assert int(end.step) == len(sizes) and int(end.opt_state.updates) == len(windows)


def scalar_model():
    """out = w x with one parameter, for input of any shape."""
    init = lambda *, dtype: Vars(params={"w": jnp.ones((), dtype)}, state={}, dtype=dtype)
    return Layer(init=init, apply=lambda vars, x, *, training, ctx: (x * vars.params["w"], vars))


def test_a_scalar_counts_by_its_examples_and_a_mean_by_its_weight():
    trainer = kaun.Trainer(model=scalar_model(), optimizer=optax.sgd(1.0), accumulate=3)
    state = trainer.init()
    x, w = np.array([1, 2, 6], np.float32), np.array([0.5, 0, 3], np.float32)
    items = [
        (x, lambda out: out.mean()),
        (x, lambda out: losses.Mean((w * out).sum(), w.sum())),
        (np.float32(7), lambda out: out),  # x has no rows
    ]
    end = trainer.fit(state, items)
    expected = 1 - (3 * x.mean() + (w * x).sum() + 7) / (3 + w.sum() + 1)
    np.testing.assert_allclose(end.vars.params["w"], expected, rtol=1e-6)


def test_a_window_of_weight_0_is_an_update_with_a_gradient_of_0():
    """As a batch that is masked as a whole: the moments of adam move the parameters all the same."""
    trainer, state = made(2, ADAM, "linear")
    first = batch(2, weights=True)
    masked = (*first[:2], np.zeros((2, 2), np.float32))
    end = trainer.fit(state, [item(first), item(masked), item(masked), item(masked)])
    close(end.vars.params, by_hand(state.vars.params, [first, masked], ADAM))
    assert int(end.opt_state.updates) == 2


def test_it_is_the_big_batch_with_microbatches_and_frozen_parameters():
    batches = [batch(4, weights=True) for _ in range(4)]
    trainer, state = made(2, SGD, microbatches=2, trainable=lambda path: path.startswith("2"))
    end = trainer.fit(state, list(map(item, batches)))
    hidden = np.asarray(state.vars.params[0]["weight"])
    first = np.tanh(np.concatenate([x for x, _, _ in batches]) @ hidden)  # its bias is 0
    rows = [(first[i : i + 8], *joined(batches[i // 4 : i // 4 + 2])[1:]) for i in (0, 8)]
    close(end.vars.params[2], by_hand(state.vars.params[2], rows, SGD))
    jax.tree.map(np.testing.assert_array_equal, end.vars.params[0], state.vars.params[0])
    assert end.opt_state.gradient[0] == {"bias": None, "weight": None}


def test_gradients_of_half_precision_add_up_in_float32():
    """In bfloat16 their sum would stop growing: 256 + 1 = 256."""
    trainer = kaun.Trainer(model=scalar_model(), optimizer=optax.sgd(1.0), accumulate=600)
    state = trainer.init(dtype=jnp.bfloat16)
    assert state.opt_state.gradient["w"].dtype == jnp.float32
    one = jnp.ones((), jnp.bfloat16)
    end = trainer.fit(state, [*[(one, lambda out: out)] * 300, *[(one, lambda out: 0 * out)] * 300])
    assert float(end.vars.params["w"]) == 0.5


def test_an_optimizer_that_takes_the_loss_gets_that_of_the_window():
    def update(gradient, opt_state, params, *, value, grad):
        assert grad is gradient
        return jax.tree.map(lambda p: jnp.full_like(p, value), params), opt_state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    trainer = kaun.Trainer(model=scalar_model(), optimizer=optimizer, accumulate=2)
    end = trainer.fit(trainer.init(), [(np.ones(n, np.float32), lambda out, n=n: n * out.mean()) for n in (1, 3)])
    assert float(end.vars.params["w"]) == 1 + (1 * 1 + 3 * 3) / 4


def test_batch_norm_moves_at_each_item():
    trainer, state = made(2, SGD, "norm")
    plain, _ = made(1, optax.sgd(0.0), "norm")
    items = [item(batch(2)) for _ in range(2)]
    end, moved = trainer.fit(state, items), fold(plain, plain.make_state(state.vars), items)
    close(end.vars.state, moved.vars.state)
    assert not np.array_equal(end.vars.state["right"]["running_mean"], state.vars.state["right"]["running_mean"])


# Law 2, and what reports see


@pytest.mark.parametrize(
    ("mode", "model"),
    [
        ("raise", "linear"),
        ("skip", "large"),
        *(
            pytest.param(mode, model, marks=pytest.mark.slow)
            for mode, model in [("raise", "large"), ("skip", "linear"), ("ignore", "linear"), ("ignore", "large")]
        ),
    ],
)
def test_fit_is_the_fold_of_step_flushed(tmp_path, model, mode):
    with rng.scope(1):
        trainer, state = made(3, ADAM, model, on_nonfinite=mode)
        state = trainer.make_state(state.vars)
    items = [item(batch(2)) for _ in range(7)]
    if mode == "skip":
        items[4] = (items[4][0] * np.float32("nan"), items[4][1])
    before = jax.tree.map(np.array, (state.vars, state.opt_state))
    folded = trainer.flush(fold(trainer, state, items))
    assert int(folded.opt_state.updates) == 3 and int(folded.step) == 7
    runs = kaun.checkpoint.Directory(tmp_path / "run", every=2)
    states = []
    for options in ({}, {"report": lambda step, loss, now: states.append(now)}, {"checkpoints": runs}):
        assert same(trainer.fit(state, items, **options), folded)
    assert int(states[-1].opt_state.position) == 1, "the last report sees the open window"
    assert same(trainer.flush(states[-1]), folded)
    jax.tree.map(np.testing.assert_array_equal, (state.vars, state.opt_state), before)


def test_flush_is_the_identity_without_an_open_window():
    trainer, state = made(3, ADAM, "linear")
    assert trainer.flush(state) is state
    items = [item(batch(2)) for _ in range(3)]
    end = trainer.fit(state, items)
    assert trainer.flush(end) is end
    plain, other = made(1, ADAM, "linear")
    assert plain.flush(other) is other


def test_flush_is_a_program_of_its_own():
    with rng.scope(0):
        trainer = kaun.Trainer(model=layers.linear(3, 2), optimizer=SGD, accumulate=3)
        state = trainer.init()
    one = item(batch(2))
    for n in (3, 4, 5):
        trainer.fit(state, [one] * n)
    found = [c for c in trainer.compilations if c.where == "flush"]
    assert [(c.code, c.why) for c in found] == [("", "first")] and found[0].seconds > 0
    opened = fold(trainer, state, [one] * 2)
    inside = jax.jit(trainer.flush)
    close(inside(opened).vars, trainer.flush(opened).vars)
    assert same(inside(state), state)


def test_blocks_have_updates_and_the_rate_of_each():
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=lambda count: 0.5**count)
    trainer, state = made(2, optimizer, "linear", on_nonfinite="skip")
    rows = batch(2)
    good, bad = item(rows), item((np.full((2, 3), np.nan, np.float32), *batch(2)[1:]))
    trainer.fit(state, [good, good, bad, good, bad, bad, good], report=(blocks := Blocks()))
    assert blocks.values["updates"] == [0, 1, 1, 2, 2, 2, 2]
    np.testing.assert_array_equal(blocks.values["learning_rate"], [np.nan, 1, np.nan, 0.5, np.nan, np.nan, np.nan])
    assert blocks.values["skipped"] == [False, False, True, False, True, True, False]
    assert blocks.values["step"] == list(range(1, 8))
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient_of(state.vars.params, *rows))))
    np.testing.assert_allclose(blocks.values["grad_norm"][:2], [norm] * 2, rtol=1e-5)


def test_the_learning_rate_report_counts_updates():
    schedule = lambda count: 0.5**count
    trainer, state = made(3, optax.sgd(schedule), "linear")
    one, rates = item(batch(2)), []
    for n in (7, 4):
        blocks = Blocks()
        state = trainer.fit(state, [one] * n, report=reports.all_of(blocks, reports.learning_rate(schedule)))
        rates += blocks.values["learning_rate"]
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.125, 0.125, 0.125, 0.0625]


# Items and updates that are not finite


def bad(n=2):
    x, y, _ = batch(n)
    return x * np.float32("nan"), lambda out: losses.mse(out, y)


@pytest.mark.parametrize("model", ["linear", pytest.param("large", marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_skipped_item_leaves_its_window_and_its_place_counts(model, place):
    trainer, state = made(3, ADAM, model, on_nonfinite="skip")
    batches = [batch(2) for _ in range(5)]
    items = list(map(item, batches))
    items.insert(place, bad())
    end = trainer.fit(state, items)
    close(end.vars.params, by_hand(state.vars.params, [joined(batches[:2]), joined(batches[2:])], ADAM))
    assert int(end.opt_state.updates) == 2 and int(end.step) == 6


def test_a_window_of_skipped_items_makes_no_update():
    trainer, state = made(2, ADAM, "linear", on_nonfinite="skip")
    first, last = [item(batch(2)), item(batch(2))], [item(batch(2)), item(batch(2))]
    assert same(trainer.fit(state, [*first, bad(), bad(), *last]).vars, trainer.fit(state, first + last).vars)
    opened = trainer.fit(state, [*first, bad()])
    assert int(opened.opt_state.updates) == 1 and int(opened.opt_state.position) == 0
    assert same(opened.vars, trainer.fit(state, first).vars)


@pytest.mark.parametrize("model", [pytest.param("linear", marks=pytest.mark.slow), "large"])
def test_a_bad_item_raises_with_the_window_before_it(model):
    trainer, state = made(3, ADAM, model)
    items = [item(batch(2)) for _ in range(5)]
    with pytest.raises(NonFiniteLoss, match=r"The loss is nan at step 6; the gradient is not finite for ") as caught:
        trainer.fit(state, [*items, bad(), *items])
    assert same(caught.value.kaun_state, fold(trainer, state, items))
    _, after = trainer.step(caught.value.kaun_state, bad()[0], loss=bad()[1])
    assert same(after.replace(step=after.step - 1), caught.value.kaun_state), "a discarded step changes step alone"


DIES = optax.sgd(lambda count: jnp.where(count == 1, jnp.nan, 0.1))


@pytest.mark.parametrize("model", ["linear", pytest.param("large", marks=pytest.mark.slow)])
def test_an_update_that_is_not_finite_raises_with_the_window_before_it(model):
    trainer, state = made(2, DIES, model)
    items = [item(batch(2)) for _ in range(4)]
    with pytest.raises(NonFiniteLoss, match=r"The update of step 4 makes 'params\.") as caught:
        trainer.fit(state, items)
    assert same(caught.value.kaun_state, fold(trainer, state, items[:3]))
    assert int(caught.value.kaun_state.opt_state.position) == 1
    assert "learning rate" in str(caught.value) and caught.value.leaves[0].startswith("params.")
    assert kaun.explain(trainer, caught.value).part == "update"


def test_flush_of_an_update_that_is_not_finite_raises():
    trainer, state = made(2, DIES, "linear")
    items = [item(batch(2)) for _ in range(3)]
    for run in (lambda: trainer.fit(state, items), lambda: trainer.flush(fold(trainer, state, items))):
        with pytest.raises(
            NonFiniteLoss, match=r"The update that flush makes of the open window after step 3 makes 'params\.bias'"
        ) as caught:
            run()
        assert same(caught.value.kaun_state, fold(trainer, state, items)) and caught.value.step == 3
        assert 'on_nonfinite="skip"' in str(caught.value) and np.isfinite(caught.value.loss)
        with pytest.raises(ValueError, match="comes from flush, which runs no item"):
            kaun.explain(trainer, caught.value)


@pytest.mark.parametrize("model", [pytest.param("linear", marks=pytest.mark.slow), "large"])
def test_skip_ends_a_window_whose_update_is_not_finite(model):
    trainer, state = made(2, DIES, model, on_nonfinite="skip")
    items = [item(batch(2)) for _ in range(4)]
    end = trainer.fit(state, items, report=(blocks := Blocks()))
    assert same(end.vars, trainer.fit(state, items[:2]).vars)
    assert blocks.values["updates"] == [0, 1, 1, 1] and blocks.values["skipped"] == [False] * 3 + [True]
    assert (int(end.opt_state.position), int(end.opt_state.items)) == (0, 0)
    assert same(trainer.fit(state, items[:3]).vars, end.vars), "flush does the same"


def test_ignore_applies_what_is_not_finite():
    trainer, state = made(2, ADAM, "linear", on_nonfinite="ignore")
    end = trainer.fit(state, [item(batch(2)), bad(), item(batch(2))])
    assert int(end.opt_state.updates) == 2 and not np.isfinite(end.vars.params["weight"]).any()


@pytest.mark.parametrize("mode", ["raise", pytest.param("ignore", marks=pytest.mark.slow)])
def test_an_overflow_of_float16_halves_the_scale_and_leaves_its_window(mode):
    trainer, state = made(3, SGD, "linear", precision="mixed_float16", on_nonfinite=mode)
    x, y = np.ones((2, 3), np.float32), np.zeros((2, 2), np.float32)
    quiet, loud = (x, lambda out: 0.01 * losses.mse(out, y)), (x, lambda out: 1e4 * losses.mse(out - 1, y))
    end = trainer.fit(state, [quiet, loud, quiet])
    assert float(end.opt_state.scale) == 2.0**14 and int(end.opt_state.inner.updates) == 1
    close(end.vars.params, trainer.fit(state, [quiet, quiet]).vars.params, rtol=1e-3)
    assert not same(end.vars, state.vars)


# States of other trainers, and arguments


@pytest.mark.parametrize(("value", "error"), [(2.0, TypeError), (True, TypeError), (0, ValueError)])
def test_it_must_be_a_count(value, error):
    with pytest.raises(
        error, match=rf"accumulate=\.\.\.\) expected an int of at least 1, received {value!r}\. Write accumulate=4\."
    ):
        made(value)


def test_states_of_another_trainer_are_refused():
    (trainer, state), (plain, other) = made(3, ADAM, "linear"), made(1, ADAM, "linear")
    one = item(batch(2))
    fix = r"belongs to another trainer\. Write state = trainer\.make_state\(state\.vars\)"
    runs = lambda t, s: (lambda: t.step(s, one[0], loss=one[1]), lambda: t.fit(s, [one]), lambda: t.flush(s))
    for run in runs(trainer, other):
        with pytest.raises(ValueError, match=rf"has no window of accumulated .* trainer has accumulate=3: .*{fix}"):
            run()
    for run in runs(plain, state):
        with pytest.raises(ValueError, match=rf"has a window of accumulated .* trainer has accumulate=1: .*{fix}"):
            run()


def test_optimizers_that_call_the_loss_are_refused():
    def update(gradient, opt_state, params, *, value_fn):
        return jax.tree.map(lambda g: g * value_fn(params), gradient), opt_state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    trainer = kaun.Trainer(model=layers.linear(3, 2), optimizer=optimizer, accumulate=2)
    with pytest.raises(ValueError, match=r"an optimizer that calls value_fn.*Trainer\(microbatches=4\)"):
        trainer.init()
