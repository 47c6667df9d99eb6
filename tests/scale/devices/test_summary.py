"""The summary of a trainer with a sharding: specs and bytes are those of its state, and the cost is that of a device."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import kaun
from kaun import layers, losses, rng, sharding


def test_specs_and_bytes_of_each_device():
    model = layers.sequential([layers.linear(16, 64), layers.batch_norm(64), layers.linear(64, 8)])
    trainer = kaun.Trainer(model=model, optimizer=optax.adam(0.1), sharding=sharding.fsdp(min_size=512))
    x = jax.ShapeDtypeStruct((32, 16), jnp.float32)
    found = kaun.summary(trainer, x, lambda out: losses.mse(out, jnp.zeros((32, 8))))
    with rng.scope(0):
        state = trainer.init()
    on_first = lambda value: sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(value))
    assert found.device_bytes == on_first((state.vars, state.opt_state)) and found.devices == 8
    assert sum(row.device_bytes for row in found.rows) == on_first(state.vars)
    assert [row.spec for row in found.rows] == [f"weight {P(None, 'data')}", "", f"weight {P('data')}"]
    assert str(found).splitlines()[:2] == [
        "path  layer           output           parameters  bytes  bytes each  spec",
        "0     linear(16, 64)  float32[32, 64]       1,088  4,352         768  " + found.rows[0].spec,
    ]
    whole = kaun.summary(
        kaun.Trainer(model=model, optimizer=optax.adam(0.1)), x, lambda out: losses.mse(out, jnp.zeros((32, 8)))
    )
    assert whole.device_bytes is None and whole.devices == 1 and "bytes each" not in str(whole)
    assert "\nEach of 8 devices has 5.22 KB of these 21.3 KB.\n" in str(found)
    assert "\nA compiled step, on each device: " in str(found)
    assert (
        found.cost.flops < 1.3 / 8 * whole.cost.flops + 8 * 64 * 24 and found.cost.arguments < whole.cost.arguments / 3
    )
