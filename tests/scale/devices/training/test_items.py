"""Items and states that lie anywhere: they are moved, and nothing is compiled again for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kaun
from kaun import Context, Data, layers, losses, metrics, rng, sharding


@pytest.fixture(scope="module")
def trained(kit):
    """A trainer with its state and data, and what its fit returns."""
    trainer, state, data = kit.trainer_of("fsdp")
    return trainer, state, data, trainer.fit(state, data)


def pairs(kit, place, n=4, rows=48):
    return [of_batch(place(kit.X[i : i + rows]), place(kit.Y[i : i + rows])) for i in range(0, n * rows, rows)]


def of_batch(x, y):
    return x, lambda output: losses.cross_entropy_sparse(output, y)


def test_items_may_lie_anywhere(kit, trained):
    """NumPy, one device or another, spread by the user, a mesh of explicit axes: the same program and bytes."""
    trainer, start, _, _ = trained
    mesh = kit.mesh_of(8)
    places = {
        "numpy": lambda a: a,
        "jax": jnp.asarray,
        "committed": lambda a: jax.device_put(a, jax.devices()[3]),
        "spread": lambda a: sharding.put(a, trainer.sharding.spread),
        "explicit": lambda a: jax.device_put(a, NamedSharding(mesh, P("data"))),
    }
    found = {}
    for name, place in places.items():
        items = pairs(kit, place)
        found[name] = kit.content(trainer.fit(start, items)), kit.content(kit.fold(trainer, start, items))
        if name == "jax":
            compiled = len(trainer.compilations)
    assert len({tuple(bytes_) for both in found.values() for bytes_ in both}) == 1
    assert len(trainer.compilations) == compiled


def test_spread_items_are_stacked(kit, trained):
    """Arrays on several devices ended a block each: a dispatch for each step."""
    trainer, start, _, _ = trained
    seen = []

    class Blocks(kaun.reports.Report):
        def wants(self, step):
            return False

        def __call__(self, step, loss, state):
            pass

        def block(self, first, values):
            seen.append(len(values["loss"]))

    items = pairs(kit, lambda a: sharding.put(a, trainer.sharding.spread)) * 4
    trainer.fit(start, items, report=Blocks())
    assert sum(seen) == 16 and max(seen) > 1


def test_states_may_come_from_anywhere(kit, trained):
    """A state of one device, of another sharding, of an explicit mesh, of NumPy: placed, and the given one untouched."""
    trainer, start, data, end = trained
    plain, plain_state, _ = kit.trainer_of("none")
    tensor, _, _ = kit.trainer_of("tensor")
    count = len(trainer.compilations)
    mesh = kit.mesh_of(8)
    everywhere = jax.device_put(plain_state, NamedSharding(mesh, P()))
    for state in (plain_state, tensor.make_state(plain_state.vars).replace(key=plain_state.key), everywhere):
        before = kit.content(state)
        found = trainer.fit(state, data)
        assert kit.content(found) == kit.content(end) and kit.content(state) == before
        assert kit.misplaced(trainer, found) == []
    x, loss = next(iter(data))
    assert kit.content(trainer.step(plain_state, x, loss=loss)) == kit.content(trainer.step(start, x, loss=loss))
    # And back: a trainer without a sharding takes a state that is spread, as it always did.
    assert int(plain.step(end, x, loss=loss)[1].step) == int(end.step) + 1
    assert len(trainer.compilations) <= count + 1  # the step


def test_what_is_as_long_as_the_batch_by_chance_has_the_right_value(kit):
    """Class weights and a batch of 5 rows each: they are spread as rows are, which costs a copy and no value."""
    model = layers.linear(kit.FEATURES, 5)
    weights, x, y = np.arange(1.0, 6.0, dtype=np.float32), kit.X[:5], kit.Y[:5]
    found = []
    for name in ("none", "data"):
        with rng.scope(0):
            trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1), sharding=kit.sharding_of(name))
            state = trainer.init()
        loss = lambda out: losses.cross_entropy_sparse(out, y, class_weights=weights)
        found.append(trainer.step(state, x, loss=loss)[0])
    kit.close(found[1], found[0])


def test_predict_evaluate_and_export_of_a_spread_state(kit, trained):
    trainer, _, _, end = trained
    plain, _, _ = kit.trainer_of("none")
    alone = plain.make_state(jax.tree.map(np.asarray, end.vars))
    for rows in (48, 52):
        outputs = trainer.predict(end, kit.X[:rows])
        np.testing.assert_allclose(outputs, plain.predict(alone, kit.X[:rows]), rtol=1e-5, atol=1e-6)
        assert outputs.sharding == (trainer.sharding.spread if rows == 48 else trainer.sharding.replicated)
    batches = Data.batches((kit.X, kit.Y), 52)
    named = {"accuracy": metrics.accuracy, "f1": metrics.f1}
    found, expected = (t.evaluate(s, batches, named) for t, s in ((trainer, end), (plain, alone)))
    assert found == expected
    outputs = trainer.predict(end, batches.map(lambda b: b[0]))
    np.testing.assert_allclose(outputs, plain.predict(alone, kit.X), rtol=1e-5, atol=1e-6)
    exported = trainer.export(end, kit.X[:4])
    assert exported.nr_devices == 1
    np.testing.assert_allclose(exported.call(kit.X[:8]), outputs[:8], rtol=1e-5, atol=1e-6)


def test_what_a_user_holds_stays_valid_and_a_report_reads_the_state(kit, trained):
    trainer, start, data, end = trained
    before, seen = kit.content(start), []

    def report(step, loss, state):
        seen.append((state, np.asarray(state.vars.params[0]["weight"]).sum()))

    found = trainer.fit(start, data, report=kaun.reports.every(3, report))
    assert kit.content(found) == kit.content(end) and kit.content(start) == before
    for state, total in seen:
        assert kit.misplaced(trainer, state) == []
        assert np.asarray(state.vars.params[0]["weight"]).sum() == total


def test_step_inside_a_jitted_function(kit, trained):
    trainer, start, data, _ = trained
    x, loss = next(iter(data))
    value, after = jax.jit(lambda state, x: trainer.step(state, x, loss=loss))(start, x)
    expected, _ = trainer.step(start, x, loss=loss)
    kit.close(value, expected)
    assert kit.misplaced(trainer, after) == []


def test_a_context_is_placed_with_its_rows(kit):
    model = layers.sequential([layers.embedding(9, 16), layers.multi_head_attention(16, 2), layers.linear(16, 9)])
    x = np.arange(8 * 6).reshape(8, 6).astype(np.int32) % 9
    mask = (np.arange(6) < 4)[None].repeat(8, 0)
    found = []
    for name in ("none", "fsdp"):
        with rng.scope(0):
            trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1), sharding=kit.sharding_of(name))
            state = trainer.init()
        loss = lambda output: losses.cross_entropy_sparse(output, x)
        found.append(trainer.step(state, x, loss=loss, ctx=Context(attention_mask=mask))[0])
    kit.close(found[1], found[0])


class Foreign:
    """A layer whose variables exist before ``init``, or whose init reads its own numbers through NumPy."""

    def __init__(self, size, numpy):
        kept = jnp.linspace(-1, 1, size * 4).reshape(size, 4)

        def init(*, dtype):
            weight = kept if not numpy else jnp.asarray(np.asarray(jax.random.normal(rng.next_key(), (size, 4))) * 2)
            return kaun.Vars(params={"weight": weight.astype(dtype)}, state={}, dtype=dtype)

        apply = lambda vars, x, *, training, ctx: (x @ vars.params["weight"], vars)
        self.layer = kaun.Layer(init=init, apply=apply, name="foreign")


@pytest.mark.parametrize("numpy", [False, True])
def test_an_init_that_cannot_be_traced_runs_as_today_and_is_placed(kit, numpy):
    model, found = Foreign(8192, numpy).layer, []
    for name in ("none", "fsdp"):
        with rng.scope(3):
            trainer = kaun.Trainer(model=model, optimizer=optax.adam(1e-3), sharding=kit.sharding_of(name))
            state = trainer.init()
            found.append((kit.content(state), kit.content(rng.next_key())))
    assert found[0] == found[1] and kit.misplaced(trainer, state) == []
    assert state.opt_state[0].nu["weight"].sharding.spec == P("data")


def test_a_misspelt_pattern_is_refused_by_init(kit):
    where = sharding.by_path({"9.weight": P("data")}, kit.mesh_of(8))
    trainer = kaun.Trainer(model=kit.MODEL, optimizer=optax.sgd(0.1), sharding=where)
    with pytest.raises(ValueError, match=r"the pattern '9.weight' matches no parameter of the model. The paths are"):
        trainer.init()


def test_init_errors_are_those_of_one_device(kit):
    trainer = kaun.Trainer(model=kit.MODEL, optimizer=optax.sgd(0.1), sharding=kit.sharding_of("data"))
    with pytest.raises(ValueError, match="The variables belong to another model than this trainer's"):
        trainer.make_state(layers.linear(2, 2).init())
