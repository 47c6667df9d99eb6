"""State and items on different devices, without a sharding: what is compiled again, refused, and warned about."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kaun
from kaun import Context, Data, Layer, layers, losses, rng, tree

X, Y = np.ones((8, 3), np.float32), np.zeros((8, 3), np.float32)
WORK = "each of 8 devices has the whole state, and x was not put on them, so every device does all the work"


@functools.cache
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def rows(a):
    return jax.device_put(a, NamedSharding(mesh(), PartitionSpec("data")))


def everywhere(a):
    return jax.device_put(a, NamedSharding(mesh(), PartitionSpec()))


def on_device(a, i=0):
    return jax.device_put(a, jax.devices()[i])


def made(*more):
    with rng.scope(0):
        model = layers.sequential([layers.linear(3, 3), *more])
        trainer = kaun.Trainer(model=model, optimizer=optax.sgd(0.1))
        return trainer, trainer.init()


def loss_of(y):
    return lambda out: losses.mse(out, y)


def count_compiled(function):
    """How many programs XLA compiles while a function runs."""
    names = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: names.append(name))
    try:
        function()
        return names.count("/jax/core/compile/backend_compile_duration")
    finally:
        jax.monitoring.clear_event_listeners()


def test_a_change_of_placement_is_named():
    """It was compiled again, and `compilations` did not say so."""
    trainer, plain = made()
    state = everywhere(plain)
    for x, y in ((rows(X), rows(Y)), (jnp.asarray(X), rows(Y)), (rows(X), rows(Y))):
        trainer.step(state, x, loss=loss_of(y))
        trainer.fit(state, Data.repeat(3, (x, loss_of(y))))
        trainer.predict(state, x if x.committed else everywhere(x))
    trainer.step(plain, jnp.asarray(X), loss=loss_of(jnp.asarray(Y)))
    whys = {where: [c.why for c in trainer.compilations if c.where == where] for where in ("step", "fit", "predict")}
    named = ["first", "x was spread over data, is on one device"]
    assert whys["fit"] == named
    assert whys["predict"] == ["first", "x was spread over data, is on all 8 devices"]
    assert whys["step"] == [
        *named,
        "the state was on all 8 devices, is on one device; captured y was spread over data, is on one device",
    ]
    assert all(c.seconds > 0 for c in trainer.compilations)


def test_the_first_dispatch_on_a_mesh_is_not_compiled_twice(no_compile_cache):
    """The status of a run lay on one device before its first dispatch, and on the mesh after it."""
    trainer, state = made()
    item = everywhere(X), loss_of(everywhere(Y))
    state = everywhere(state)
    trainer.fit(state, [item])
    other, _ = made(layers.tanh())
    assert (
        count_compiled(lambda: other.fit(state.replace(vars=everywhere(made(layers.tanh())[1].vars)), [item] * 5)) <= 2
    )


@pytest.mark.parametrize("entry", ["step", "fit", "predict", "evaluate", "ctx", "captured"])
def test_an_item_that_was_put_on_another_device_is_named(entry):
    """JAX: "Received incompatible devices for jitted computation. Got argument rest[2] of ..."."""
    masked = lambda vars, x, *, training, ctx: (x * ctx["mask"] if "mask" in ctx else x, vars)
    trainer, state = made(Layer(init=layers.relu().init, apply=masked, name="masked"))
    state, x, far = everywhere(state), rows(X), on_device(X)
    calls = {
        "step": ("step", "x", lambda: trainer.step(state, far, loss=loss_of(rows(Y)))),
        "fit": ("fit", "x", lambda: trainer.fit(state, [(x, loss_of(rows(Y))), (far, loss_of(rows(Y)))])),
        "predict": ("predict", "x", lambda: trainer.predict(state, far)),
        "evaluate": ("evaluate", "item.y", lambda: trainer.evaluate(state, [(x, far)], {"loss": losses.mse})),
        "ctx": ("step", "ctx['mask']", lambda: trainer.step(state, x, loss=jnp.mean, ctx=Context(mask=far))),
        "captured": ("step", "captured y", lambda: trainer.step(state, x, loss=loss_of(on_device(Y)))),
    }
    where, name, call = calls[entry]
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(
        f"{where} received arrays that were put on different devices: the state is on all 8 devices; "
    )
    assert f"; {name} is on one device (cpu:0). Without sharding= kaun moves nothing. Write Trainer(..., " in text
    variable = {"item.y": "x", "ctx['mask']": "x", "captured y": "y"}.get(name, name)
    fix = f'{variable} = jax.device_put({variable}, NamedSharding(mesh, PartitionSpec("data")))'
    assert text.endswith(
        f"sharding=sharding.data_parallel()), which moves what comes to its devices, or put the array there: {fix}."
    )


def test_the_fix_is_for_what_lies_where():
    trainer, state = made()
    with pytest.raises(
        ValueError,
        match=r"the state is on one device \(cpu:1\); x is spread over data\. .* state = jax\.device_put\(state, Named",
    ):
        trainer.predict(on_device(state, 1), rows(X))
    with pytest.raises(
        ValueError, match=r"x is on one device \(cpu:2\)\. .* x = jax\.device_put\(x, state\.step\.sharding\)\.$"
    ):
        trainer.predict(on_device(state, 1), on_device(X, 2))
    far = on_device(Y, 2)
    loss = lambda out: losses.mse(out, far) + losses.mse(out, far * 2)
    ctx = Context(mask=on_device(X, 1), a=far, b=far, c=far)
    with pytest.raises(
        ValueError, match=r"ctx\['b'\] is on one device \(cpu:2\); 1 more array is elsewhere too\. Without"
    ):
        trainer.step(on_device(state, 1), on_device(X, 1), loss=loss, ctx=ctx)


@pytest.mark.parametrize("entry", ["step", "fit", "predict"])
def test_that_every_device_does_all_the_work_is_said_once(entry):
    trainer, state = made()
    state = everywhere(state)
    run = {
        "step": lambda x: trainer.step(state, x, loss=loss_of(Y)),
        "fit": lambda x: trainer.fit(state, [(x, loss_of(Y))] * 3),
        "predict": lambda x: trainer.predict(state, x),
    }[entry]
    with pytest.warns(UserWarning) as caught:
        run(X)
    (warning,) = caught
    assert str(warning.message).startswith(f"{entry}: {WORK}. Write Trainer(..., sharding=sharding.data_parallel()), ")
    assert str(warning.message).endswith("put x on all: jax.device_put(x, state.step.sharding).")
    assert warning.filename == __file__
    run(jnp.asarray(X))


def test_who_asks_for_it_is_not_warned():
    """An item on all devices, a model that divides the work, a state that is divided itself, one device."""
    trainer, plain = made()
    state = everywhere(plain)
    trainer.predict(state, everywhere(X))
    trainer.predict(state, rows(X))
    trainer.predict(plain, X)
    trainer.predict(on_device(plain, 1), X)
    trainer, state = made(
        layers.fn(lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh(), PartitionSpec("data"))))
    )
    trainer.predict(everywhere(state), X)


def test_places_in_words():
    two = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    put = lambda *spec: jax.device_put(np.ones((8, 8)), NamedSharding(two, PartitionSpec(*spec)))
    assert [tree.placement(put(*spec)) for spec in ((), ("data",), (None, "model"), ("data", "model"), (("data", "model"),))] == [
        "on all 8 devices", "spread over data", "spread over model along axis 1", "spread over data, model along axis 1",
        "spread over data and model",
    ]  # fmt: skip
    assert tree.placement(X) == tree.placement(jnp.ones(1)) == "on one device"
    assert tree.placement(on_device(X, 3)) == "on one device (cpu:3)"
